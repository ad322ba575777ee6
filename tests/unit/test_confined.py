"""Work in another process: what it is told, what comes back, how it ends."""

import io
import os
import pickle
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from release_guard.cli import main
from release_guard.confined import _Values, confined
from release_guard.errors import ConfinedError, PolicyError, ReleaseGuardError
from release_guard.release import Result, Verdict
from release_guard.session import Session

CANARY = "5f1e-canary"
SECRETS = ("HF_TOKEN", "HF_OIDC_ID_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
           "RELEASE_GUARD_SIGNING_KEY", "RELEASE_GUARD_KEY_PASSWORD")  # fmt: skip


def clock() -> datetime:
    return datetime(2026, 1, 2, tzinfo=UTC)


def session(heard: list[Any] | None = None) -> Session:
    def note(*step: object) -> None:
        if heard is not None:
            heard.append(step)

    return Session(1, note, clock)


def surroundings(session: Session) -> tuple[str, dict[str, str], datetime]:
    seen = Path("/proc/self/environ").read_bytes().decode(errors="replace")
    return seen, dict(os.environ), session.now()


def told(word: str, session: Session) -> str:
    session.progress("work", 1, 2, word)
    session.progress("work", 2, 2, "done")
    return word.upper()


def refuse(session: Session) -> None:
    raise PolicyError("one\ntwo")


def stumble(session: Session) -> None:
    raise ZeroDivisionError("nobody expected this")


def die(session: Session) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def chatter(session: Session) -> None:
    print("printed")  # noqa: T201
    os.write(1, b"written\n")
    subprocess.run(["echo", "echoed"], check=True)  # noqa: S607


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


def spring(session: Session) -> Any:
    return Trap()


def linger(path: str, session: Session) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def test_no_credential_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)
    seen, inside, now = confined(surroundings, session())
    assert CANARY not in seen
    assert not inside.keys() & set(SECRETS)
    assert inside.get("HF_HUB_DISABLE_IMPLICIT_TOKEN") == "1"
    assert now == clock()
    assert all(os.environ[name] == CANARY for name in SECRETS)


def test_progress_and_the_result_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[Any] = []
    assert confined(told, "word", session(heard)) == "WORD"
    assert heard == [("work", 1, 2, "word"), ("work", 2, 2, "done")]
    assert capfd.readouterr().err == ""  # it leaves in peace


def test_what_it_prints_is_no_data_of_ours(capfd: pytest.CaptureFixture[str]) -> None:
    confined(chatter, session())
    out, err = capfd.readouterr()
    assert out == ""
    assert {"printed", "written", "echoed"} <= {*err.split()}


def test_our_own_errors_come_back_as_they_are() -> None:
    with pytest.raises(PolicyError, match="one\ntwo"):
        confined(refuse, session())


def test_anything_else_is_told_with_its_traceback() -> None:
    with pytest.raises(ConfinedError, match="ZeroDivisionError: nobody expected this") as raised:
        confined(stumble, session())
    assert "in stumble" in raised.value.__notes__[0]


def test_what_comes_back_is_a_value_and_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle can name any function, and the process that reads it here holds the credentials."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReleaseGuardError, match=r"sent posix\.mkdir, which is no value"):
        confined(spring, session())
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    "sent",
    [
        b"crelease_guard.release\nVerdict\n(N}S'passed'\nI01\nstb.",
        b"crelease_guard.release\nResult\n(S'fail'\ntR}S'_name_'\nS'PASS'\nsb.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"crelease_guard.cli\nos.system\n(S'true'\ntR.",
        b"crelease_guard.cli\nmain\n(S'--help'\ntR.",
    ],
)
def test_nothing_of_ours_is_changed_or_called(sent: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"classes|no value"):
        _Values(io.BytesIO(sent)).load()
    assert isinstance(Verdict.passed, property)
    assert Result.FAIL.name == "FAIL"


def test_a_death_is_one_line_that_says_what_to_do() -> None:
    with pytest.raises(ReleaseGuardError, match=r"died \(exit code -9\); nothing was published"):
        confined(die, session())


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
def test_it_does_not_outlive_us(tmp_path: Path, way: signal.Signals) -> None:
    mark = tmp_path / "pid"
    code = (
        "import signal, sys, test_confined as t; from release_guard.confined import confined\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "confined(t.linger, sys.argv[1], t.session())"
    )
    path = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    parent = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", code, mark],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
    )
    while not (mark.exists() and mark.read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    child = psutil.Process(int(mark.read_text()))
    parent.send_signal(way)
    parent.wait(30)
    child.wait(30)
    assert not child.is_running()


def test_an_unexpected_error_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    from release_guard.commands.group import cli  # noqa: PLC0415

    @cli.command("stumble")
    def command() -> None:
        confined(stumble, session())

    try:
        assert main(["stumble"]) == 1
    finally:
        del cli.commands["stumble"]
    said = capsys.readouterr().err
    assert "error: unexpected ZeroDivisionError: nobody expected this; -vv shows" in said
