"""git as it stands: one repository's objects, read by git itself and by nobody's settings.

Whatever the caller's environment or the repository's own switches say, the same commit reads the
same: replaced objects and grafts are not followed, no attribute comes from outside the commit, no
hook runs and nothing is fetched.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from release_guard.errors import IntegrityError, ReleaseGuardError

_PLAIN = {
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_GRAFT_FILE": os.devnull,
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_NO_LAZY_FETCH": "1",  # git 2.45; the next line does it for older ones
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C",
}
_SETTINGS = ("core.hooksPath", "core.attributesFile")  # what could run, or speak for the commit


@dataclass(frozen=True)
class Repository:
    """Where a repository keeps what it has; all paths absolute.

    Attributes:
        folder: Its git folder; of a worktree, the worktree's own.
        common: The git folder that all its worktrees share.
        objects: Its object store.
        object_format: `sha1` or `sha256`.
    """

    folder: Path
    common: Path
    objects: Path
    object_format: str

    @classmethod
    def at(cls, place: Path) -> Self:
        """The repository that a folder belongs to, whatever GIT_DIR and its like say.

        Raises:
            ReleaseGuardError: There is none, or git is not installed.
        """
        return cls._located(place, _environment())

    @classmethod
    def of_hook(cls) -> Self:
        """The repository that git runs a hook for: here its environment is the answer."""
        return cls._located(Path.cwd(), os.environ)

    def top(self, place: Path) -> Path:
        """Top of the working tree that a folder belongs to; the git folder where there is none."""
        command = ["git", "rev-parse", "--path-format=absolute", "--show-toplevel"]
        try:
            return Path(os.fsdecode(_run(command, _environment(), b"", place)).removesuffix("\n"))
        except ReleaseGuardError:
            return self.folder

    @classmethod
    def _located(cls, place: Path, environment: Mapping[str, str]) -> Self:
        wanted = ["--git-dir", "--git-common-dir", "--git-path", "objects", "--show-object-format"]
        command = ["git", "rev-parse", "--path-format=absolute", *wanted]
        found = _run(command, environment, b"", cwd=place)
        lines = os.fsdecode(found).splitlines()
        if len(lines) != len(wanted) - 1:  # a line break in a path would shift what follows
            raise ReleaseGuardError(f"{place}: git gave no answer that can be read")
        folder, common, objects = map(Path, lines[:-1])
        return cls(folder, common, objects, lines[-1])

    def ask(
        self, *arguments: str, given: bytes = b"", cwd: Path | None = None, **variables: str
    ) -> bytes:
        """What git answers on stdout.

        Args:
            arguments: Of git.
            given: Its standard input.
            cwd: Where to run it, if that matters.
            variables: To add to its environment.

        Raises:
            ReleaseGuardError: git failed; its own words, one line.
        """
        return _run(self._command(arguments), _environment(**variables), given, cwd)

    def settings(self) -> Mapping[str, Sequence[str]]:
        """Git's configuration as it counts here: every value of every key, the last one decides.

        The one answer that the caller's environment may change, as in `git -c KEY=VALUE push`.
        """
        command = ["git", f"--git-dir={self.folder}", "config", "--null", "--list"]
        found: dict[str, list[str]] = {}
        for entry in os.fsdecode(_run(command, os.environ, b"")).split("\0")[:-1]:
            key, _, value = entry.partition("\n")
            found.setdefault(key, []).append(value)
        return found

    def hooks(self, root: Path) -> Path:
        """Folder of the hooks that git runs for this repository, wherever it was told to look."""
        command = ["git", f"--git-dir={self.folder}", "rev-parse", "--path-format=absolute"]
        found = _run([*command, "--git-path", "hooks"], os.environ, b"", root)
        return Path(os.fsdecode(found).removesuffix("\n"))

    def advertised(self, url: str) -> Sequence[str]:
        """Object ids that a remote says it has refs to; asked as git itself would ask.

        Raises:
            ReleaseGuardError: It does not answer.
        """
        command = ["git", f"--git-dir={self.folder}", "ls-remote", "--", url]
        environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
        return [
            line.split("\t")[0] for line in _run(command, environment, b"").decode().splitlines()
        ]

    def reader(self) -> "Objects":
        """Start reading objects; a context that ends with the process that reads them."""
        return Objects(self._command(["cat-file", "--batch"]))

    def _command(self, arguments: Sequence[str]) -> list[str]:
        settings = [word for name in _SETTINGS for word in ("-c", f"{name}={os.devnull}")]
        return ["git", f"--git-dir={self.folder}", *settings, *arguments]


class Objects:
    """One `git cat-file` that is asked for one object after another."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command

    def __enter__(self) -> Self:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(self._command, env=_environment(), **pipes)  # noqa: S603
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is not None:  # it may be in the middle of an answer nobody will read
            self._process.kill()
        self._process.communicate()

    def blob(self, oid: str, limit: int) -> bytes:
        """Content of a blob.

        Args:
            oid: Object id, in full.
            limit: Most bytes; what is larger is not read.

        Raises:
            IntegrityError: Missing, no blob, or larger.
        """
        assert self._process.stdin is not None  # noqa: S101  both are pipes
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(oid.encode() + b"\n")
        self._process.stdin.flush()
        header: list[bytes] = self._process.stdout.readline().split()
        if len(header) != 3 or header[1] != b"blob":  # noqa: PLR2004  id, type, size
            raise IntegrityError(f"object {oid}: not in this repository; run git fetch")
        size = int(header[2])
        if size > limit:
            raise IntegrityError(f"object {oid}: larger than {limit} bytes; not read")
        content: bytes = self._process.stdout.read(size + 1)  # a line break ends every answer
        if len(content) != size + 1:
            raise IntegrityError(f"object {oid}: git could not read it; run git fsck")
        return content[:-1]


def _environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {**kept, **_PLAIN, **variables}


def _run(
    command: Sequence[str], environment: Mapping[str, str], given: bytes, cwd: Path | None = None
) -> bytes:
    try:
        done = subprocess.run(  # noqa: S603
            command, env=environment, input=given, capture_output=True, cwd=cwd, check=False
        )
    except OSError as error:
        what = cwd if isinstance(error, NotADirectoryError) or (cwd and not cwd.is_dir()) else "git"
        raise ReleaseGuardError(f"{what}: cannot be used ({error.strerror})") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it did not say why"]
        raise ReleaseGuardError(f"git: {said[0].removeprefix('fatal: ')}")
    return done.stdout
