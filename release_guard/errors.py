"""Errors meant for the user: the class carries the exit code, the text what, where, what next."""

import textwrap


class ReleaseGuardError(Exception):
    """Something went wrong that the user can act on; printed as one line."""

    exit_code = 1


class PolicyError(ReleaseGuardError):
    """The policy file or the command line is wrong; one line for each problem."""

    exit_code = 2


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


def brief(error: BaseException) -> str:
    """A library's message cut to one line of a few words, to stand inside one of ours."""
    text = str(error).strip() or type(error).__name__
    return textwrap.shorten(text.splitlines()[0], width=200, placeholder=" ...")
