"""A folder as hub, the embedded default: no server, no network, every revision kept.

    HUB/OWNER/NAME/              the head's files, plain: to look at, to copy, to break a byte of
    HUB/.revisions/OWNER/NAME/   head        revision of the head
                                 revisions/  REVISION.json: parent, root, who, when, files
                                 objects/    contents, named by their SHA-256
                                 incoming/   a push at work, or what a killed one left
                                 switching   which folder is about to become which revision
                                 lock        held while pushing

The head's files are copies of the objects, never links to them: whoever edits the head cannot reach
a stored revision. A push builds the new head's folder aside and exchanges it for the old one in one
system call; `switching` names the new folder by its inode, so that after a kill the folder itself
tells whether the exchange took place.
"""

import ctypes
import errno
import fcntl
import getpass
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from release_guard.errors import HubError, IntegrityError, PushRefusedError
from release_guard.hubs import NOTHING, Hub, moved, require_repo_id
from release_guard.manifest import (
    DirectoryTree,
    FileEntry,
    Manifest,
    Tree,
    hash_directory,
    hash_file,
)
from release_guard.release import Receipt, Release

_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from linux/fcntl.h and linux/fs.h
_Seen = TypeVar("_Seen")


class Directory(Hub):
    """Revisions of releases in a local folder."""

    path: Path = Field(Path("hub"), description="Folder of the hub; made by the first push.")

    def preflight(self, repo: str) -> str:
        repository = self._repository(repo)
        with _spoken(repository):
            folders = (repository.store, *repository.store.parents)
            nearest = next(folder for folder in folders if folder.exists())
            if not os.access(nearest, os.W_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return repository.head()

    def push(self, release: Release, repo: str) -> Receipt:
        repository = self._repository(repo)
        with _spoken(repository):
            seen = release.previous or repository.head()
            with repository.locked():
                if not repository.holds(release.manifest):
                    repository.require_unmoved(seen)
                    repository.replace(release)
                return Receipt(url=repository.files.as_uri(), revision=repository.head())

    def address(self, repo: str) -> str:
        return f"{self.path.name}/{repo}"

    def tree(self, repo: str, revision: str = "main") -> Tree:
        repository = self._repository(repo)
        with _spoken(repository):
            head = repository.head()
            wanted = head if revision == "main" else revision
            stored = _Stored(repository.store / "objects", repository.revision(wanted).files)
            return _Head(repository, wanted, stored) if wanted == head else stored

    def _repository(self, repo: str) -> "_Repository":
        require_repo_id(repo)
        path = self.path.absolute()
        return _Repository(repo, files=path / repo, store=path / ".revisions" / repo)


class _Revision(BaseModel):
    """What a revision file says; its own digest is the revision's name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parent: str
    root: str
    who: str
    when: datetime
    files: tuple[FileEntry, ...]


class _Switch(BaseModel):
    """The folder with this inode is the head's as soon as it lies in the head's place."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inode: int
    revision: str


@dataclass(frozen=True)
class _Repository:
    repo: str
    files: Path
    store: Path

    def head(self) -> str:
        """Revision of the head, also after a kill at any moment; `NOTHING` before the first."""
        try:
            switch = _Switch.model_validate_json((self.store / "switching").read_bytes())
            if self.files.stat().st_ino == switch.inode:
                return switch.revision
        except FileNotFoundError:
            pass  # nobody is switching, or to a first head that is not in place yet
        try:
            return (self.store / "head").read_text().strip()
        except FileNotFoundError:
            return NOTHING

    def switching(self) -> bool:
        """Whether the head's folder is being exchanged, or a push was killed while doing so."""
        return (self.store / "switching").exists()

    def revision(self, name: str) -> _Revision:
        if name == NOTHING:
            raise HubError(f"{self.repo}: nothing has been pushed to {self.files.parents[1]} yet")
        try:
            content = (self.store / "revisions" / f"{name}.json").read_bytes()
            found = _Revision.model_validate_json(content)
        except FileNotFoundError:
            raise HubError(f"{self.repo} has no revision {name!r}; its head is main") from None
        except ValidationError:
            raise IntegrityError(f"{self.repo}: revision {name} is damaged") from None
        if _name(content) != name:
            raise IntegrityError(f"{self.repo}: revision {name} was changed after it was made")
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait for other pushes, tidy up after one that was killed, and after this one."""
        self.store.mkdir(parents=True, exist_ok=True)
        with (self.store / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._settle()
            try:
                yield
            finally:
                self._settle()

    def holds(self, manifest: Manifest) -> bool:
        """Whether the head's real files are these already."""
        if self.head() == NOTHING or not self.files.is_dir():
            return False
        try:
            return hash_directory(self.files) == manifest
        except IntegrityError:  # somebody put a link among them
            return False

    def require_unmoved(self, seen: str) -> None:
        head = self.head()
        if head == NOTHING and self.files.exists() and any(self.files.iterdir()):
            raise PushRefusedError(
                f"{self.files} holds files that were not pushed there; move them away first"
            )
        if head != seen:
            authors = [revision.who for revision in self._since(head, seen)]
            raise PushRefusedError(moved(self.repo, authors))

    def replace(self, release: Release) -> None:
        """Make the release the head: stage it whole, check it, then exchange the folders."""
        staged = self.store / "incoming" / "files"
        for entry in release.manifest.entries:
            _copy(self._object(release.directory / entry.name, entry), staged / entry.name)
        if hash_directory(staged) != release.manifest:
            raise IntegrityError(f"{self.repo}: the copied files are not the release; push again")
        name = self._record(release)
        # Written before the exchange, moved after it: a full disk cannot come in between.
        pointer = _write(self.store / "incoming" / "head", f"{name}\n".encode())
        switch = _Switch(inode=staged.stat().st_ino, revision=name)
        _write(self.store / "incoming" / "switching", switch.model_dump_json().encode()).rename(
            self.store / "switching"
        )
        self.files.parent.mkdir(parents=True, exist_ok=True)
        _exchange(staged, self.files, aside=self.store / "incoming" / "outgoing")
        pointer.rename(self.store / "head")

    def _settle(self) -> None:
        """Finish or drop what a push left behind; the head stays what it is."""
        pointer = self.store / "incoming" / "head"
        if self.switching():
            if pointer.exists() and pointer.read_text().strip() == self.head():
                pointer.rename(self.store / "head")
            (self.store / "switching").unlink()
        shutil.rmtree(pointer.parent, ignore_errors=True)

    def _since(self, head: str, seen: str) -> Iterator[_Revision]:
        while head not in {seen, NOTHING}:
            revision = self.revision(head)
            yield revision
            head = revision.parent

    def _object(self, source: Path, entry: FileEntry) -> Path:
        """A file with the entry's content: stored intact before, or now copied from `source`."""
        stored = self.store / "objects" / entry.digest
        if stored.exists() and hash_file(stored) == (entry.digest, entry.size):
            return stored
        incoming = self.store / "incoming" / "objects" / entry.digest
        if incoming.exists():  # two files with the same content
            return incoming
        if not source.is_file():
            raise IntegrityError(f"{source}: gone since the release was signed; sign it again")
        _copy(source, incoming)
        if hash_file(incoming) != (entry.digest, entry.size):
            raise IntegrityError(f"{source}: changed since the release was signed; sign it again")
        incoming.chmod(0o444)
        return incoming

    def _record(self, release: Release) -> str:
        """Store the objects and the revision; they count for nothing until the head names them."""
        objects, revisions = self.store / "objects", self.store / "revisions"
        objects.mkdir(exist_ok=True)
        revisions.mkdir(exist_ok=True)
        for new in sorted((self.store / "incoming").glob("objects/*")):
            new.rename(objects / new.name)
        revision = _Revision(
            parent=self.head(),
            root=release.manifest.root,
            who=_who(),
            when=datetime.now(UTC),
            files=release.manifest.entries,
        )
        content = revision.model_dump_json(indent=1).encode()
        name = _name(content)
        _write(self.store / "incoming" / "revision", content).rename(revisions / f"{name}.json")
        return name


@dataclass(frozen=True)
class _Stored:
    """A revision read from the objects; what they really hold counts, not what they are called."""

    objects: Path
    files: tuple[FileEntry, ...]

    @property
    def manifest(self) -> Manifest:
        return Manifest.of(
            FileEntry(entry.name, *hash_file(self.objects / entry.digest)) for entry in self.files
        )

    def read(self, name: str) -> bytes:
        for entry in self.files:
            if entry.name == name:
                return DirectoryTree(self.objects).read(entry.digest)
        raise IntegrityError(f"{name}: not in this revision")


@dataclass(frozen=True)
class _Head:
    """A revision read from the head's real files, as long as it is the head."""

    repository: _Repository
    revision: str
    stored: _Stored

    @property
    def manifest(self) -> Manifest:
        return self._look(lambda tree: tree.manifest)

    def read(self, name: str) -> bytes:
        return self._look(lambda tree: tree.read(name))

    def _look(self, look: Callable[[Tree], _Seen]) -> _Seen:
        """Never a mixture of two heads: a look that another push cut across does not count."""
        try:
            seen = look(DirectoryTree(self.repository.files))
        except IntegrityError:
            if self._is_head():
                raise
        else:
            if self._is_head():
                return seen
        return look(self.stored)

    def _is_head(self) -> bool:
        absent = self.repository.switching() and not self.repository.files.exists()
        return self.repository.head() == self.revision and not absent


@contextmanager
def _spoken(repository: _Repository) -> Iterator[None]:
    """Say in one line what the file system said."""
    try:
        yield
    except OSError as error:
        where = error.filename or repository.files
        if error.errno in _REFUSED:
            raise PushRefusedError(
                f"{repository.repo}: no permission at {where} ({error.strerror}); "
                "make the hub's folder writable or choose another"
            ) from None
        raise HubError(
            f"{repository.repo}: {error.strerror} at {where}; nothing was half-pushed, "
            "push again when that is put right"
        ) from None


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[: len(NOTHING)]


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as given, target.open("xb") as written:
        shutil.copyfileobj(given, written, 1 << 20)
        written.flush()
        os.fsync(written.fileno())


def _write(path: Path, content: bytes) -> Path:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def _exchange(staged: Path, files: Path, *, aside: Path) -> None:
    """Put `staged` where `files` is: in one step, or in two where the system knows no exchange.

    Between the two steps the head's folder is missing; trees are then read from the objects.
    """
    if not files.exists():
        staged.rename(files)
        return
    try:
        _renameat2(staged, files)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        files.rename(aside)
        staged.rename(files)


def _renameat2(one: Path, other: Path) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    paths = os.fsencode(one), os.fsencode(other)
    if library.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))
