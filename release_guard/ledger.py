"""Append-only record of trials: done is not done twice, and a kill loses at most the last line."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from release_guard.errors import ReleaseGuardError
from release_guard.evidence import Outcome, Trial
from release_guard.strict_json import canonical_json, loads


class Ledger:
    """Outcomes by trial key, in one JSONL file that several runs may share.

    Undefended and never-knew trials are keyed by the base model's digest, so every run of one base
    finds them here. A `failed` outcome is kept for the record but tried again.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._entries: dict[str, tuple[Trial, Outcome]] = {}
        self._read(warn)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Trial]:
        """Every trial that has not to be tried again."""
        return (trial for trial, outcome in self._entries.values() if outcome.ending != "failed")

    def get(self, trial: Trial) -> Outcome | None:
        """What came of this trial, unless it has to be tried (again)."""
        _, outcome = self._entries.get(trial.key, (trial, None))
        return None if outcome is None or outcome.ending == "failed" else outcome

    def add(self, trial: Trial, outcome: Outcome) -> None:
        """Append one line, whole or not at all, on disk before this returns.

        Raises:
            ReleaseGuardError: The disk is full or the file cannot be written.
        """
        line = canonical_json(
            {
                "key": trial.key,
                "trial": trial.model_dump(mode="json"),
                "outcome": outcome.model_dump(mode="json"),
                "outcome_digest": _digest(outcome),
            }
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(_separator(file.fileno()) + line + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ReleaseGuardError(
                f"{self.path}: cannot record a trial ({error.strerror}); free some space and run "
                "the same command again, finished trials are kept"
            ) from None
        self._entries[trial.key] = trial, outcome

    def _read(self, warn: Callable[[str], None]) -> None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise ReleaseGuardError(f"{self.path}: cannot be read ({error.strerror})") from None
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                entry = loads(line)
                trial = Trial.model_validate(entry["trial"])
                outcome = Outcome.model_validate(entry["outcome"])
                found = trial.key, _digest(outcome)
            except (ValueError, KeyError, TypeError):
                warn(f"{self.path}:{number}: not a ledger line; skipped, that trial will run again")
                continue
            if found != (entry.get("key"), entry.get("outcome_digest")):
                warn(
                    f"{self.path}:{number}: changed since it was written; skipped, that trial will "
                    "run again"
                )
                continue
            self._entries[trial.key] = trial, outcome


def _digest(outcome: Outcome) -> str:
    """The key says what was tried; this, what came of it: one flipped digit would still parse."""
    return hashlib.sha256(canonical_json(outcome.model_dump(mode="json"))).hexdigest()


def _separator(descriptor: int) -> bytes:
    """A line feed if a killed writer left half a line at the end."""
    size = os.fstat(descriptor).st_size
    return b"\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else b""
