"""What is said where: data on stdout, all else on stderr, in turn."""

import json

import pytest

from release_guard.terminal import Terminal, _Phase


def test_log_lines_are_rare_but_ends_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    for done in range(1, 101):
        terminal.progress("search", done, 100, f"trial {done}")

    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(";")[2] for line in err.splitlines()] == [" trial 1", " trial 100"]


def test_verbose_tells_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(verbosity=1)
    for done in range(1, 6):
        terminal.progress("search", done, 5, "")

    assert len(capsys.readouterr().err.splitlines()) == 5


def test_quiet_keeps_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(quiet=True)
    terminal.say("chat")
    terminal.progress("search", 1, 1, "done")
    terminal.progress("ledger", 0, 0, "trials.jsonl:3: not a ledger line")

    assert capsys.readouterr().err == "warning: trials.jsonl:3: not a ledger line\n"


def test_the_same_phase_begins_anew_for_another_arm(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    for _ in range(2):
        for done in (1, 2, 3):
            terminal.progress("control", done, 3, str(done))

    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["1", "3", "1", "3"]


def test_time_left_is_by_the_pace_so_far() -> None:
    phase = _Phase("search", total=10, started=100.0, first=1, done=3)

    assert phase.seconds_left(120.0) == pytest.approx(70.0)
    assert "about 1.2 min left" in phase.told("", 120.0)
    assert _Phase("search", total=10, started=100.0, first=1, done=1).seconds_left(120.0) is None


def test_document_holds_the_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(command="plan", as_json=True)
    terminal.warn("odd")
    terminal.data("not this", {"trials": 3})

    document = json.loads(capsys.readouterr().out)
    assert document == {"schema_version": 1, "command": "plan", "trials": 3, "warnings": ["odd"]}


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_whether_a_push_may_have_landed(sent: int) -> None:
    terminal = Terminal(quiet=True)
    terminal.progress("publish", sent, 3, "")

    assert terminal.pushing == (sent > 0)


@pytest.mark.parametrize(
    ("set_to", "coloured"), [({}, False), ({"FORCE_COLOR": "1"}, True), ({"NO_COLOR": "1"}, False),
    ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False)],
)  # fmt: skip
def test_colours(
    set_to: dict[str, str],
    coloured: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_to.items():
        monkeypatch.setenv(name, value)
    Terminal().warn("odd")

    assert ("\x1b[" in capsys.readouterr().err) == coloured


def test_where_another_process_speaks_this_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(follows=True, as_json=True, verbosity=2)
    terminal.say("chat")
    terminal.warn("something")
    terminal.progress("immunize", 1, 2, "loss 1")
    terminal.data("path", {"model": "path"})
    assert terminal.stop("stopped", 130) == 130
    assert capsys.readouterr() == ("", "")
    assert terminal.warnings == ["something"]
