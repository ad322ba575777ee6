"""Errors meant for the user: the class carries the exit code, the text what, where, what next."""

import json
import unicodedata
from collections.abc import Sequence

_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # they move, hide or turn what is shown
_MOST = 2_000  # characters; what somebody else wrote may have any length


def printable(text: str) -> str:
    """The text on one line as any terminal can show it: odd characters as JSON escapes.

    Files, names and answers of servers may hold line feeds that look like another message, escape
    sequences that erase one, and half characters that cannot be written at all.
    """
    if text.isprintable():
        return text
    return "".join(
        json.dumps(character)[1:-1]
        if unicodedata.category(character) in _UNPRINTABLE
        else character
        for character in text
    )


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of some names in one line, and how many more there are."""
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")


class ReleaseGuardError(Exception):
    """Something went wrong that the user can act on; printed as one line."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(self._shown(message))

    @staticmethod
    def _shown(message: str) -> str:
        line = printable(message)
        return line if len(line) <= _MOST else f"{line[:_MOST]} ..."


class PolicyError(ReleaseGuardError):
    """The policy file or the command line is wrong; one line for each problem."""

    exit_code = 2

    @staticmethod
    def _shown(message: str) -> str:
        return "\n".join(map(ReleaseGuardError._shown, message.split("\n")))


class ModelError(ReleaseGuardError):
    """A model or a data set cannot be used."""


class ImmunizationError(ReleaseGuardError):
    """A stage diverged or destroyed what it had to keep."""


class IntegrityError(ReleaseGuardError):
    """A signature, a digest or a required policy does not match."""

    exit_code = 4


class HubError(ReleaseGuardError):
    """A hub is unreachable or gave an answer nobody understands."""


class PushRefusedError(HubError):
    """The remote moved since the push began, or refused it."""

    exit_code = 5


class AuthenticationError(HubError):
    """The hub does not know who is asking."""

    exit_code = 6


class ConfinedError(Exception):
    """Something nobody expected, in another process; its traceback is noted on it."""


def brief(error: BaseException) -> str:
    """A library's message cut to one line of a few words, to stand inside one of ours."""
    text = str(error).strip() or type(error).__name__
    import textwrap  # noqa: PLC0415

    return textwrap.shorten(text.splitlines()[0], width=200, placeholder=" ...")
