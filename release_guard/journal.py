"""What a push is about to try, written down before anything is asked of the hub.

`DIR.state.json` lies beside the release folder DIR, never in it: a file that is not signed would
break the release. It is a hint, the hub is the truth. It gives a second attempt at the same files
the name of the first, by which the hub's commits are known again, and holds no secret.
"""

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from release_guard.durable import replace_file
from release_guard.errors import ReleaseGuardError
from release_guard.manifest import Manifest
from release_guard.release import Release


class Attempt(BaseModel):
    """One push, before its first request that writes.

    Attributes:
        run: Names it in the commit's description.
        repo: `owner/name`.
        parent: Head that it was planned on; None: whatever is found.
        files: Digest of names and contents, signatures apart.
        root: Release root of `model.sig`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    run: str
    repo: str
    parent: str | None
    files: str
    root: str


@dataclass(frozen=True)
class Journal:
    """The last attempt to push a folder."""

    path: Path

    @classmethod
    def beside(cls, folder: Path) -> "Journal":
        """The journal of a release folder."""
        return cls(folder.with_name(f"{folder.name}.state.json"))

    def last(self) -> Attempt | None:
        """What was tried; None if nothing was, or nobody can tell any more."""
        try:
            return Attempt.model_validate_json(self.path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        except OSError as error:
            raise ReleaseGuardError(f"{self.path}: cannot be read ({error.strerror})") from None

    def begin(self, release: Release, repo: str) -> Release:
        """Write down that a release is about to be pushed.

        Returns:
            The release, under the name of the last attempt if that was about the same files.

        Raises:
            ReleaseGuardError: It cannot be written; nothing was sent.
        """
        last, files = self.last(), _digest(release.manifest.unsigned)
        if last is not None and (last.repo, last.files) == (repo, files):
            release = replace(release, run=last.run)
        root, parent = release.manifest.root, release.previous
        attempt = Attempt(run=release.run, repo=repo, parent=parent, files=files, root=root)
        self._write(attempt.model_dump_json(indent=1).encode())
        return release

    def _write(self, content: bytes) -> None:
        try:
            replace_file(self.path, content)
        except OSError as error:
            raise ReleaseGuardError(
                f"{self.path}: cannot be written ({error.strerror}); nothing was sent. Make room "
                "there and run the same command again"
            ) from None


def _digest(manifest: Manifest) -> str:
    lines = (f"{entry.digest}  {entry.name}\n" for entry in manifest.entries)
    return sha256("".join(lines).encode()).hexdigest()
