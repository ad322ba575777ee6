"""Everything a command says: data on stdout, all else on stderr, progress as the place allows."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from release_guard.credentials import masked
from release_guard.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PROGRAM = "release-guard"
SCHEMA_VERSION = 1  # of the documents that --json prints
_PATIENCE = 5  # seconds
_QUIET_SECONDS = 30  # between two log lines of a phase


@dataclass
class Terminal:
    """The streams of one command.

    Attributes:
        command: Its name, such as `policy check`.
        as_json: Print one JSON document instead of text.
        quiet: Nothing on stderr but warnings and errors.
        verbosity: 1: every trial; 2: tracebacks too.
        warnings: What was warned of, for the document.
        pushing: A push may have reached the hub by now.
        follows: Another process of the same command speaks for this one, too.
    """

    command: str = ""
    as_json: bool = False
    quiet: bool = False
    verbosity: int = 0
    warnings: list[str] = field(default_factory=list)
    pushing: bool = False
    follows: bool = False
    _phase: "_Phase | None" = None
    _bars: "Progress | None" = None
    _bar: "TaskID | None" = None

    def data(self, text: str, document: Mapping[str, Any]) -> None:
        """The outcome: `text` for people and pipes, or the whole `document`."""
        self.close()
        if self.follows:
            return
        if self.as_json:
            self._print_document(document)
        elif text:
            _echo(_lines(text))

    def say(self, text: str) -> None:
        """Something for people; never data."""
        if not (self.quiet or self.follows):
            self._to_stderr(_lines(text))

    def warn(self, line: str) -> None:
        """Something that does not stop the command but must not be missed."""
        self.warnings.append(line)
        if self.follows:
            return
        self._to_stderr(f"{_in_colour('warning:', 'yellow')} {_shown(line)}")

    def confirms(self, question: str) -> bool:
        """Ask, where somebody is there to answer; nobody's silence is a yes."""
        self.close()
        there = sys.stdin.isatty() and sys.stderr.isatty()
        if not there or self.as_json or self.quiet or self.follows:
            return False
        import click  # noqa: PLC0415

        return click.confirm(question, default=False, err=True)

    def fail(
        self, lines: Sequence[str], exit_code: int, document: Mapping[str, Any] | None = None
    ) -> int:
        """Say why it ends here, one line each, and give the exit code back.

        Where another process speaks, it has time to say the same and to end them all. What is
        known beside the lines goes into the document.
        """
        self.close()
        if self.follows:
            time.sleep(_PATIENCE)
        for line in lines:
            self._to_stderr(f"{_in_colour('error:', 'red')} {_shown(line)}")
        if self.as_json:
            known = document or {}
            self._print_document({"exit_code": exit_code, "errors": list(lines), **known})
        return exit_code

    def stop(self, line: str, exit_code: int) -> int:
        """Say that somebody ended it, which is no error, and give the exit code back."""
        self.close()
        if self.follows:
            return exit_code
        self._to_stderr(_shown(line))
        if self.as_json:
            self._print_document({"exit_code": exit_code, "errors": [line]})
        return exit_code

    def progress(self, phase: str, done: int, total: int, line: str) -> None:
        """Told about every step of a run; a `Progress` of the red team."""
        if total == 0:
            self.warn(line)
            return
        self.pushing = self.pushing or (phase == "publish" and done > 0)
        now = time.monotonic()
        if self._phase is None or not self._phase.goes_on(phase, done, total):
            self._phase = _Phase(phase, total, now, done)
            self._bar = None
        self._phase.done = done
        if self.quiet or self.follows:
            return
        if sys.stderr.isatty():
            self._draw(self._phase, _shown(line))
        if self.verbosity or not (sys.stderr.isatty() or self._phase.is_silent(now)):
            self._phase.shown = now
            self._to_stderr(_shown(self._phase.told(line, now)))

    def close(self) -> None:
        """Leave the bars as they are and write below them."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _print_document(self, document: Mapping[str, Any]) -> None:
        whole = {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            **document,
            "warnings": self.warnings,
        }
        _echo(_lines(json.dumps(whole, indent=2, ensure_ascii=False, default=str)))

    def _to_stderr(self, text: str) -> None:
        if self._bars is not None:
            import click  # noqa: PLC0415

            self._bars.console.print(click.unstyle(text), markup=False, highlight=False)
        else:
            _echo(text, err=True)

    def _draw(self, phase: "_Phase", line: str) -> None:
        if self._bars is None:
            self._bars = _make_bars()
            self._bars.start()
        if self._bar is None:
            self._bar = self._bars.add_task(phase.name, total=phase.total, line="")
        self._bars.update(self._bar, completed=phase.done, line=line)


@dataclass
class _Phase:
    """Part of a run on its way; the same phase begins anew for another arm or concept."""

    name: str
    total: int
    started: float
    first: int
    done: int = 0
    shown: float | None = None

    def goes_on(self, name: str, done: int, total: int) -> bool:
        return (name, total) == (self.name, self.total) and done >= self.done

    def is_silent(self, now: float) -> bool:
        """Whether it has spoken just now; beginning and end are always told."""
        if self.shown is None or self.done == self.total:
            return False
        return now - self.shown < _QUIET_SECONDS

    def told(self, line: str, now: float) -> str:
        from release_guard.wording import duration  # noqa: PLC0415  --help needs no pydantic

        left = self.seconds_left(now)
        about = "" if left is None else f", about {duration(left)} left"
        return f"{self.name}: {self.done} of {self.total}{about}; {line}"

    def seconds_left(self, now: float) -> float | None:
        """By the pace so far; None while there is none, and at the end."""
        if self.done <= self.first or self.done == self.total:
            return None
        return (now - self.started) / (self.done - self.first) * (self.total - self.done)


def _echo(text: str, *, err: bool = False) -> None:
    import click  # noqa: PLC0415  whoever has nothing to say does without

    click.echo(text, err=err, color=_colours(sys.stderr if err else sys.stdout))


def _in_colour(word: str, colour: str) -> str:
    import click  # noqa: PLC0415

    return click.style(word, fg=colour)


def _shown(line: str) -> str:
    """Without what a terminal would obey, and without secrets; in JSON an escape stays one."""
    return printable(masked(line, os.environ))


def _lines(text: str) -> str:
    return "\n".join(map(_shown, text.split("\n")))


def _colours(stream: Any) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def _make_bars() -> "Progress":
    from rich.console import Console  # noqa: PLC0415  a tenth of a second, for a terminal only
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column  # noqa: PLC0415

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
        console=Console(stderr=True),
        speed_estimate_period=1_800,  # a trial takes seconds to minutes
        expand=True,
    )
