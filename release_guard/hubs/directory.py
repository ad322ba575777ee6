"""A folder as hub, the embedded default: no server, no network, every revision kept.

    HUB/OWNER/NAME/              the head's files, plain: to look at, to copy, to break a byte of
    HUB/.revisions/OWNER/NAME/   head        revision of the head
                                 revisions/  REVISION.json: parent, root, who, when, files
                                 tags/       revisions by the names given to them
                                 objects/    contents, named by their SHA-256
                                 incoming/   a push at work, or what a killed one left
                                 switching   which folder is about to become which revision
                                 lock        held while pushing

The head's files are copies of the objects, never links to them: whoever edits the head cannot reach
a stored revision. A push builds the new head's folder aside and exchanges it for the old one in one
system call; `switching` names the new folder by its inode, so that after a kill the folder itself
tells whether the exchange took place.
"""

import errno
import fcntl
import getpass
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from release_guard.dsse import as_digest
from release_guard.durable import copy_file, exchange, write_new
from release_guard.errors import HubError, IntegrityError, PushRefusedError
from release_guard.hubs import NOTHING, Hub, Revision, moved, require_repo_id, taken
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
_POINTER = re.compile(rb"[0-9a-f]{40}")
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
            wanted = head if revision == "main" else repository.tags().get(revision, revision)
            stored = _Stored(repository.store / "objects", repository.revision(wanted).files)
            return _Head(repository, wanted, stored) if wanted == head else stored

    def history(self, repo: str) -> Sequence[Revision]:
        repository = self._repository(repo)
        with _spoken(repository):
            return list(repository.since(NOTHING))

    def tags(self, repo: str) -> Mapping[str, str]:
        repository = self._repository(repo)
        with _spoken(repository):
            return repository.tags()

    def tag(self, repo: str, name: str, revision: str) -> None:
        repository = self._repository(repo)
        with _spoken(repository), repository.locked():
            if (other := repository.tags().get(name, revision)) != revision:
                raise PushRefusedError(taken(repo, name, other))
            repository.tag(name, revision)

    def _repository(self, repo: str) -> "_Repository":
        require_repo_id(repo)
        path = self.path.absolute()
        return _Repository(repo, files=path / repo, store=path / ".revisions" / repo)


def _named_by_digest(entry: FileEntry) -> FileEntry:
    """An object's name is part of a path."""
    return replace(entry, digest=as_digest(entry.digest, entry.name))


_Name = Annotated[str, Field(pattern=r"\A[0-9a-f]{40}\z")]
"""Of a revision; part of a path too."""


class _Revision(BaseModel):
    """What a revision file says; its own digest is the revision's name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parent: _Name
    root: str
    who: str
    when: datetime
    files: tuple[Annotated[FileEntry, AfterValidator(_named_by_digest)], ...]


class _Switch(BaseModel):
    """The folder with this inode is the head's as soon as it lies in the head's place."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inode: int
    revision: _Name


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
        except ValidationError:
            raise IntegrityError(f"{self.store / 'switching'}: damaged") from None
        try:
            return self._pointer(self.store / "head")
        except FileNotFoundError:
            return NOTHING

    def switching(self) -> bool:
        """Whether the head's folder is being exchanged, or a push was killed while doing so."""
        return (self.store / "switching").exists()

    def revision(self, name: str) -> _Revision:
        if name == NOTHING:
            raise HubError(f"{self.repo}: nothing has been pushed to {self.files.parents[1]} yet")
        path = self.store / "revisions" / f"{name}.json"
        if not _POINTER.fullmatch(name.encode(errors="replace")) or not path.exists():
            raise HubError(f"{self.repo} has no revision {name!r}; its head is main")
        try:
            content = path.read_bytes()
            found = _Revision.model_validate_json(content)
        except (ValidationError, IntegrityError):
            raise IntegrityError(f"{self.repo}: revision {name} is damaged") from None
        if _name(content) != name:
            raise IntegrityError(f"{self.repo}: revision {name} was changed after it was made")
        return found

    def _pointer(self, path: Path) -> str:
        """The revision that a file names."""
        name = path.read_bytes().strip()
        if not _POINTER.fullmatch(name):
            raise IntegrityError(f"{path}: damaged, it names no revision")
        return name.decode()

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
            before, after = (self._listed(revision) for revision in (seen, head))
            raise PushRefusedError(moved(self.repo, list(self.since(seen)), before, after))

    def replace(self, release: Release) -> None:
        """Make the release the head: stage it whole, check it, then exchange the folders."""
        staged = self.store / "incoming" / "files"
        for entry in release.manifest.entries:
            copy_file(self._object(release.directory / entry.name, entry), staged / entry.name)
        if hash_directory(staged) != release.manifest:
            raise IntegrityError(f"{self.repo}: the copied files are not the release; push again")
        name = self._record(release)
        # Written before the exchange, moved after it: a full disk cannot come in between.
        pointer = write_new(self.store / "incoming" / "head", f"{name}\n".encode())
        switch = _Switch(inode=staged.stat().st_ino, revision=name)
        write_new(self.store / "incoming" / "switching", switch.model_dump_json().encode()).rename(
            self.store / "switching"
        )
        self.files.parent.mkdir(parents=True, exist_ok=True)
        exchange(staged, self.files, aside=self.store / "incoming" / "outgoing")
        pointer.rename(self.store / "head")

    def _settle(self) -> None:
        """Finish or drop what a push left behind; the head stays what it is."""
        pointer = self.store / "incoming" / "head"
        if self.switching():
            if pointer.exists() and self._pointer(pointer) == self.head():
                pointer.rename(self.store / "head")
            (self.store / "switching").unlink()
        shutil.rmtree(pointer.parent, ignore_errors=True)

    def since(self, seen: str) -> Iterator[Revision]:
        """The revisions made after this one, newest first."""
        head = self.head()
        while head not in {seen, NOTHING}:
            revision = self.revision(head)
            yield Revision(head, revision.who, f"release {revision.root[:12]}")
            head = revision.parent

    def tags(self) -> Mapping[str, str]:
        """Revisions by their tags."""
        return {path.name: path.read_text().strip() for path in self._tags.glob("*")}

    def tag(self, name: str, revision: str) -> None:
        """Name a revision; the caller holds the lock and has seen that the name is free."""
        incoming = self.store / "incoming" / "tag"
        incoming.parent.mkdir()
        self._tags.mkdir(exist_ok=True)
        write_new(incoming, f"{revision}\n".encode()).rename(self._tags / name)

    @property
    def _tags(self) -> Path:
        return self.store / "tags"

    def _listed(self, revision: str) -> Manifest:
        return Manifest(() if revision == NOTHING else self.revision(revision).files)

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
        copy_file(source, incoming)
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
        write_new(self.store / "incoming" / "revision", content).rename(revisions / f"{name}.json")
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
