"""The folder of a run: what it is about, what is done, so that the same command goes on.

DIR/run.json       what this run is: source, policy, mode; never a secret
DIR/policy.toml    the policy's exact bytes
DIR/checkpoints/   progress of the stages
DIR/private/       what stages give to the owner alone, such as the way back from a gauge
DIR/immunized/     the immunized model in fp32, once complete: it is attacked, and pushed as fp32
DIR/artefacts/     each published precision that is not fp32, written from it before the attacks
DIR/artefacts.json what they were written from
DIR/sham/          a model moved as far to no purpose, where the policy asks for one
DIR/stages.json, DIR/evidence.jsonl, DIR/report.html
DIR/release/       the upload set, nothing else
DIR/release.state.json  the journal of pushes
DIR/../trials.jsonl  the ledger, shared by all runs in that folder
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from release_guard.errors import PolicyError, ReleaseGuardError
from release_guard.strict_json import loads

_JOURNAL = "run.json"


@dataclass(frozen=True)
class Run:
    """One run's folder. `claim` opens it."""

    directory: Path

    @classmethod
    def claim(cls, directory: Path, about: dict[str, Any]) -> "Run":
        """Open the folder for a run about exactly this, new or begun earlier.

        Raises:
            PolicyError: It holds something else.
            ReleaseGuardError: It cannot be written.
        """
        run = cls(directory)
        try:
            known = read_made(run.journal)
        except FileNotFoundError:
            if directory.exists() and any(directory.iterdir()):
                raise PolicyError(
                    f"{directory}: not empty, and not a run of release-guard; "
                    "choose another --output"
                ) from None
            run.write(_JOURNAL, json.dumps(about, indent=2, sort_keys=True).encode())
            return run
        if different := sorted(key for key in about if known.get(key) != about[key]):
            raise PolicyError(
                f"{directory}: belongs to another run ({', '.join(different)} differ); "
                "choose another --output"
            )
        return run

    @property
    def journal(self) -> Path:
        return self.directory / _JOURNAL

    @property
    def immunized(self) -> Path:
        return self.directory / "immunized"

    @property
    def artefacts(self) -> Path:
        """The precisions in folders of their names."""
        return self.directory / "artefacts"

    @property
    def made(self) -> Path:
        """What was written from what."""
        return self.directory / "artefacts.json"

    @property
    def sham(self) -> Path:
        return self.directory / "sham"

    @property
    def release(self) -> Path:
        return self.directory / "release"

    @property
    def evidence(self) -> Path:
        return self.directory / "evidence.jsonl"

    @property
    def stages(self) -> Path:
        return self.directory / "stages.json"

    @property
    def policy(self) -> Path:
        return self.directory / "policy.toml"

    @property
    def report(self) -> Path:
        return self.directory / "report.html"

    @property
    def ledger(self) -> Path:
        return self.directory.parent / "trials.jsonl"

    @property
    def private(self) -> Path:
        """A folder that only its owner may read."""
        folder = self.directory / "private"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)  # also one that somebody made before
        return folder

    def checkpoints(self, place: int, name: str) -> Path:
        """A folder for one stage's own progress."""
        folder = self.directory / "checkpoints" / f"{place}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the run whole or not at all."""
        with saving(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = self.directory / f"{name}.partial"
            partial.write_bytes(content)
            partial.replace(self.directory / name)


def read_made(path: Path) -> dict[str, Any]:
    """A JSON object that a run wrote.

    Raises:
        FileNotFoundError: It was not written yet.
        PolicyError: It is damaged, or cannot be read.
    """
    try:
        found = loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise PolicyError(f"{path}: damaged; choose another --output")
    return found


@contextmanager
def folder_made_whole(target: Path) -> Iterator[Path]:
    """A folder to fill that takes its name only once it is complete.

    Raises:
        ReleaseGuardError: The disk is full or read-only; what was there before is kept.
    """
    partial = target.with_name(f"{target.name}.partial")
    with saving(target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)


@contextmanager
def saving(where: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that says what is kept."""
    try:
        yield
    except OSError as error:
        raise ReleaseGuardError(
            f"{where}: cannot be written ({error.strerror}); nothing was published. Make room "
            "there and run the same command again, it goes on where it stopped"
        ) from error


def share_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Put files into another folder, as links to the same bytes where the file system can.

    Raises:
        ReleaseGuardError: One is there already: what it is a link to would be overwritten too.
    """
    for name in names:
        goal = target / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        origin = (source / name).resolve()
        if goal.exists():
            raise ReleaseGuardError(f"{name}: two files of this name; rename one of them")
        try:
            os.link(origin, goal)
        except OSError:
            shutil.copyfile(origin, goal)
