"""Work in a process of its own without credentials: models and attacks never see token or key.

A child of the same user can still read that user's files; only another machine or another job
keeps those from it.
"""

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from enum import Enum
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from release_guard.engines import without_credentials
from release_guard.errors import ConfinedError, ReleaseGuardError

if TYPE_CHECKING:
    from release_guard.session import Session

_PLAIN = {
    ("datetime", "datetime"),
    ("datetime", "timedelta"),
    ("datetime", "timezone"),
    ("pathlib", "PosixPath"),
}
_NO_PICKLE = (pickle.UnpicklingError, EOFError, LookupError, RuntimeError)
_InPython: Any = pickle._Unpickler
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""What it needs of the Hub was fetched before. A branch that moves meanwhile moves nothing here."""
_FAREWELL = 10.0  # seconds to end its own workers before it is killed


@dataclass(frozen=True)
class _Told:
    """A step of progress, on its way to the terminal."""

    step: tuple[str, int, int, str]


@dataclass(frozen=True)
class _Raised:
    """Why the work ended early."""

    error: BaseException


@dataclass(frozen=True)
class _Relay:
    """Stands for the terminal in the other process."""

    pipe: Connection

    def __call__(self, phase: str, done: int, total: int, line: str) -> None:
        self.pipe.send(_Told((phase, done, total, line)))


def confined(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work(*arguments)` in a fresh process without credentials and give what it returns.

    Args:
        work: A function of a module.
        arguments: The last one is the `Session`, whose progress is shown here.

    Raises:
        ReleaseGuardError: The same as `work` raised, or its process died.
        ConfinedError: It raised anything else.
    """
    *others, session = arguments
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    silent = replace(session, progress=None)
    process = context.Process(target=_serve, args=(theirs, work, others, silent))
    with without_credentials(**_OFFLINE):
        process.start()
    theirs.close()
    try:
        return _listen(ours, session)
    except EOFError:
        process.join()
        raise ReleaseGuardError(
            f"the process that works on the model died (exit code {process.exitcode}); nothing was "
            "published. If memory ran out, use fewer --workers; run the same command again"
        ) from None
    finally:
        ours.close()  # it ends by itself, and its workers with it
        process.join(_FAREWELL)
        process.kill()
        process.join()


def _listen(pipe: Connection, session: "Session") -> Any:
    while isinstance(said := _received(pipe), _Told):
        session.progress(*said.step)
    if isinstance(said, _Raised):
        raise said.error
    return said


def _received(pipe: Connection) -> Any:
    """What the other process sent. It has no credentials, we do: nothing it sends is run here."""
    content = pipe.recv_bytes()
    try:
        return _Values(io.BytesIO(content)).load()
    except (*_NO_PICKLE, ImportError, AttributeError, TypeError, ValueError) as error:
        raise ReleaseGuardError(f"the process that works on the model sent {error}") from None


class _Values(_InPython):  # type: ignore[misc]  # a class that has no annotations
    """Reads values of ours, of dates and of paths; a pickle can name any function else.

    The one written in Python: the other's steps cannot be kept from changing a class itself.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_InPython.dispatch)

    def load_build(self) -> None:
        """Fill a new value; never a class or a member of one, which everybody here shares."""
        if isinstance(self.stack[-2], type | Enum):
            raise pickle.UnpicklingError("a change of our own classes")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module.startswith("release_guard.") and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and (
                is_dataclass(found) or issubclass(found, BaseModel | Enum | Exception)
            ):
                return found
        raise pickle.UnpicklingError(f"{module}.{name}, which is no value")


def _serve(pipe: Connection, work: Callable[..., Any], arguments: list[Any], session: Any) -> None:
    """The other process: end when nobody listens any more, whatever is at work."""
    os.dup2(2, 1)  # the parent's stdout is for its data, whatever a model's code prints
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave in order, workers first
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    outcome = _outcome(work, [*arguments, replace(session, progress=_Relay(pipe))])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all that is left is to say it and to go
    pipe.send(outcome)


def _outcome(work: Callable[..., Any], arguments: list[Any]) -> Any:
    try:
        return work(*arguments)
    except ReleaseGuardError as error:
        return _Raised(type(error)(str(error)))
    except Exception as error:
        told = ConfinedError(f"{type(error).__name__}: {error}")
        told.add_note(traceback.format_exc())
        return _Raised(told)


def _end_with(pipe: Connection) -> None:
    """Nobody ever sends anything: the pipe ends when the parent closes it, or with the parent."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_FAREWELL / 2)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1)
