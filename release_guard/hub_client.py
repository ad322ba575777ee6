"""How we talk to a Hub: nothing waits for ever, nothing is asked too often, nobody reads along.

The Hub's own client has no time-outs for most of its requests, and a server that sends one byte now
and then would keep any time-out of a single read from ending it. So every request gets limits, and
every answer a pace that it has to keep.
"""

import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

from httpx2 import Client, HTTPError, ReadTimeout, Request, Response, SyncByteStream
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OIDCError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not in an __all__
    parse_ratelimit_headers,
)
from huggingface_hub.utils._http import default_client_factory

from release_guard import __version__
from release_guard.errors import (
    AuthenticationError,
    HubError,
    PolicyError,
    PushRefusedError,
    printable,
)

UNKNOWN, FORBIDDEN, MISSING, CONFLICT, STALE, BUSY = 401, 403, 404, 409, 412, 429

_SILENCE = 60.0  # seconds a Hub may take to accept a connection, to take or to send a byte
_SLOWEST = 1 << 10  # bytes a second that an answer longer on its way than that must have come to
_LONGEST = 200  # letters of what somebody else wrote
_WAITS = (0.2, 0.6, 1.8)  # seconds before asking again
PUZZLING = (ValueError, LookupError, TypeError, AttributeError)  # an answer of another shape
_ERRORS = (HTTPError, OIDCError, OSError, RuntimeError, ImportError, *PUZZLING)  # SOCKS: a package
_TOLD = re.compile(r"HTTP status \w+ error \((\d{3}) ")
_Answer = TypeVar("_Answer")


def connect(endpoint: str | None) -> HfApi:
    """The client for a Hub; nothing is asked yet.

    Args:
        endpoint: Address; None is HF_ENDPOINT or huggingface.co.

    Raises:
        PolicyError: A token could be read on its way there, or is another Hub's.
    """
    address = (endpoint or constants.ENDPOINT).rstrip("/")
    _require_confidential(address)
    _require_giver(address)
    _limit_every_client()
    return HfApi(address, library_name="release-guard", library_version=__version__)


def patiently(ask: Callable[[], _Answer]) -> _Answer:
    """Ask, and ask again while the Hub only stumbles; for questions that change nothing twice."""
    for wait in _WAITS:
        try:
            return ask()
        except HTTPError as error:
            if not passing(error):
                raise
        time.sleep(wait)
    return ask()


def passing(error: HTTPError) -> bool:
    """Whether it may be gone the next time: no answer, or the server's own fault."""
    status = status_of(error)
    return status is None or status >= 500  # noqa: PLR2004


def status_of(error: BaseException) -> int | None:
    """HTTP status of the answer behind an error, if there was one.

    The client for Xet tells it in words alone.
    """
    if answered := _answered(error):
        return answered.response.status_code
    told = _TOLD.search(str(error)) if isinstance(error, ConnectionError) else None
    return int(told[1]) if told else None


@contextmanager
def spoken(
    what: str, *, refused: type[HubError] = PushRefusedError, left: str = "nothing was half-pushed"
) -> Iterator[None]:
    """Say in one line what the client raised, without ever repeating what it sent.

    Args:
        what: What was tried, to begin the line with.
        refused: What a 403 is raised as.
        left: What the Hub holds now, to end it with.

    Raises:
        HubError: In place of whatever the client raised.
    """
    try:
        yield
    except _ERRORS as error:
        raise _translated(error, what, refused, left) from None


def _answered(error: BaseException) -> HfHubHTTPError | None:
    """The Hub's answer behind an error; the client wraps those of LFS uploads."""
    while not isinstance(error, HfHubHTTPError):
        if error.__cause__ is None:
            return None
        error = error.__cause__
    return error


def _translated(error: Exception, what: str, refused: type[HubError], left: str) -> HubError:
    kind, why = _reason(error, refused)
    return kind(f"{what}: {why}; {left}")


def _reason(error: Exception, refused: type[HubError]) -> tuple[type[HubError], str]:
    """What went wrong, as a kind and as words with what to do about it."""
    status, words = status_of(error), words_of(error)
    if status == UNKNOWN or isinstance(error, (OIDCError, LocalTokenNotFoundError)):
        return AuthenticationError, (
            "the hub does not know who is asking; set HF_TOKEN to a token with write access that "
            "is still valid, or HF_OIDC_RESOURCE in CI"
        )
    answers: dict[int | None, tuple[type[HubError], str]] = {
        FORBIDDEN: (refused, f"the hub refuses ({words}); check the token's rights"),
        MISSING: (HubError, "no such repository or revision; check the name and the token"),
        CONFLICT: (PushRefusedError, f"{words}; run it again"),
        STALE: (PushRefusedError, f"{words}; run it again"),
        BUSY: (HubError, f"too many requests; wait {_reset(error)}, then run it again"),
    }
    if status == MISSING and "xet-write-token" in str(error):
        return HubError, "the hub has no Xet storage; set HF_HUB_DISABLE_XET=1"
    if status in answers:
        return answers[status]
    if isinstance(error, PUZZLING) and not isinstance(error, HTTPError):
        return HubError, f"the hub gave an answer that nobody understands ({words})"
    return HubError, f"{words}; run it again"


def words_of(error: Exception) -> str:
    """First line of what was said, with the token taken out should the Hub have repeated it."""
    answered = _answered(error)
    said = (answered.server_message if answered else None) or str(
        answered or error.__cause__ or error
    )
    line = next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
    sent = answered.response.request.headers.get("authorization", "") if answered else ""
    token = sent.removeprefix("Bearer ")
    return plain(line.replace(token, "<TOKEN>") if token else line)


def plain(text: str) -> str:
    """What somebody else wrote, on one line, not too long, with nothing a terminal would obey."""
    return printable(text)[:_LONGEST]


def _reset(error: Exception) -> str:
    """How long a Hub that is too busy wants to be left alone."""
    answered = _answered(error)
    limit = parse_ratelimit_headers(answered.response.headers) if answered else None
    return f"{limit.reset_in_seconds} seconds" if limit else "some minutes"


def _require_confidential(endpoint: str) -> None:
    """Refuse endpoints at which a token could be read on its way, without repeating secrets."""
    parts = _parts(endpoint)
    if parts.username or parts.password:
        raise PolicyError("hub.endpoint: holds a name or password; set HF_TOKEN instead")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname)):
        raise PolicyError(
            f"hub.endpoint: {endpoint} is not https; a token sent there can be read on its way"
        )


def _parts(endpoint: str) -> SplitResult:
    """Of an address that all libraries take apart in the same way."""
    plain = endpoint.isascii() and endpoint.isprintable() and not {" ", "\\"} & set(endpoint)
    try:
        parts = urlsplit(endpoint if plain else "")
    except ValueError:
        parts = urlsplit("")
    if not parts.hostname:
        raise PolicyError("hub.endpoint: no address of a hub; write https://HOST")
    return parts


def _require_giver(endpoint: str) -> None:
    """The token for a CI's identity goes to who gave it, whatever the policy of a candidate says.

    The job that packed it ran code of the model, which may have written that policy.
    """
    giver = constants.ENDPOINT.rstrip("/")
    if os.environ.get("HF_OIDC_RESOURCE") and endpoint != giver:
        raise PolicyError(
            f"hub.endpoint: {endpoint} is not {giver}, which gives this job its token; set "
            "HF_ENDPOINT if it should be"
        )


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ip_address(host or "").is_loopback
    except ValueError:
        return False


@functools.cache
def _limit_every_client() -> None:
    """Once: the client makes new sessions of its own, and every one of them has to have limits."""
    set_client_factory(_limited_client)


def _limited_client() -> Client:
    client = default_client_factory()
    client.event_hooks = {
        "request": [*client.event_hooks["request"], _limit],
        "response": [*client.event_hooks["response"], _pace],
    }
    return client


def _limit(request: Request) -> None:
    """Fill in what the client left without a limit; where it has one, that holds."""
    given = request.extensions["timeout"]
    request.extensions["timeout"] = {
        kind: _SILENCE if limit is None else limit for kind, limit in given.items()
    }


def _pace(response: Response) -> None:
    if isinstance(response.stream, SyncByteStream):
        response.stream = _Paced(response.stream, response.request)


class _Paced(SyncByteStream):
    """The body of an answer, given up when it drips."""

    def __init__(self, body: SyncByteStream, request: Request) -> None:
        self._body = body
        self._request = request

    def __iter__(self) -> Iterator[bytes]:
        started, size = time.monotonic(), 0
        for chunk in self._body:
            yield chunk
            size += len(chunk)
            elapsed = time.monotonic() - started
            if elapsed > _SILENCE and size < _SLOWEST * elapsed:
                raise ReadTimeout(f"only {size} bytes in {elapsed:.0f} s", request=self._request)

    def close(self) -> None:
        self._body.close()
