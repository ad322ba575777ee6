"""A git commit as a release, seen without reading weights: an LFS pointer counts as its file."""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from release_guard.errors import IntegrityError, ReleaseGuardError
from release_guard.git import Repository
from release_guard.manifest import (
    IGNORED,
    FileEntry,
    Manifest,
    classify,
    require_canonical,
)

MAX_PLAIN = 10 << 20  # bytes of a file outside LFS; the Hub takes no larger ones either
_KEPT = 1 << 20  # bytes of a proof that is kept, so that reading it starts no process
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\n"
    rb"oid sha256:([0-9a-f]{64})\n"
    rb"size (0|[1-9][0-9]{0,18})\n"
)
_REGULAR = "100"  # a mode begins with it: a file, executable or not
_ODD = {"120": "a symbolic link; commit the file itself", "160": "a submodule; commit its files"}


@dataclass(frozen=True)
class Blob:
    """One file of a commit: its name, mode, object id and size in bytes as git stores it."""

    name: str
    mode: str
    oid: str
    size: int


@dataclass(frozen=True)
class Pointer:
    """What an LFS pointer stands for: SHA-256 in hex and bytes of the file itself."""

    digest: str
    size: int


@dataclass(frozen=True)
class CommitTree:
    """A release that is a git commit; a `Tree`.

    Attributes:
        repository: Where it lies.
        commit: Its object id, in full.
        manifest: Every file of it that may belong to a release.
    """

    repository: Repository
    commit: str
    manifest: Manifest
    _plain: Mapping[str, str]  # object ids of the files outside LFS
    _kept: Mapping[str, bytes]

    def read(self, name: str) -> bytes:
        """Bytes of a small file; one kept in LFS must have been fetched.

        Raises:
            IntegrityError: Not part of the commit, or not here.
        """
        entry = self.manifest.get(name)
        if entry is None:
            raise IntegrityError(f"{name!a}: not part of the commit {self.commit[:12]}")
        if name in self._kept:
            return self._kept[name]
        if name not in self._plain:
            return self._fetched(entry)
        with self.repository.reader() as objects:
            return objects.blob(self._plain[name], MAX_PLAIN)

    def _fetched(self, entry: FileEntry) -> bytes:
        digest = entry.digest
        path = self.repository.common / "lfs/objects" / digest[:2] / digest[2:4] / digest
        try:
            content = path.read_bytes()
        except OSError:
            raise IntegrityError(f"{entry.name}: not fetched yet; run git lfs fetch") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise IntegrityError(f"{entry.name}: damaged in LFS; run git lfs fsck")
        return content


def commit_tree(repository: Repository | Path, revision: str) -> CommitTree:
    """Look at a commit: names and digests of all its files, no weights read.

    A file counts as what its LFS pointer names if it is a pointer to the letter *and* the commit's
    own attributes give it to LFS; else it counts as the text it is.

    Args:
        repository: Or any folder in it.
        revision: Whatever git takes for a commit; a tag counts as what it points to.

    Raises:
        ReleaseGuardError: No repository, no such commit, or no git.
        IntegrityError: The commit holds links, submodules, names no release may have, or large
            files outside LFS.
    """
    if isinstance(repository, Path):
        repository = Repository.at(repository)
    return tree_of(repository, resolve(repository, revision))


def tree_of(repository: Repository, commit: str) -> CommitTree:
    """The same for a commit that was resolved before."""
    blobs = list_files(repository, commit)
    files = [blob for blob in blobs if blob.name.partition("/")[0] not in IGNORED]
    for blob in files:
        _require_fit(blob)
    digests, pointers, kept = {}, {}, {}
    with repository.reader() as objects:
        for blob in files:
            content = objects.blob(blob.oid, MAX_PLAIN)
            digests[blob.name] = FileEntry(
                blob.name, hashlib.sha256(content).hexdigest(), len(content)
            )
            if (pointer := read_pointer(content)) is not None:
                pointers[blob.name] = FileEntry(blob.name, pointer.digest, pointer.size)
            if classify(blob.name) == "evidence" and len(content) <= _KEPT:
                kept[blob.name] = content
    tracked = in_lfs(repository, blobs, pointers)
    manifest = Manifest.of({**digests, **{name: pointers[name] for name in tracked}}.values())
    plain = {blob.name: blob.oid for blob in files if blob.name not in tracked}
    return CommitTree(
        repository, commit, manifest, plain, {name: kept[name] for name in kept.keys() - tracked}
    )


def resolve(repository: Repository, revision: str) -> str:
    """Object id of the commit that a revision names.

    Raises:
        ReleaseGuardError: No such commit here.
    """
    wanted = f"{revision}^{{commit}}"
    try:
        found = repository.ask("rev-parse", "--verify", "--quiet", "--end-of-options", wanted)
    except ReleaseGuardError:
        raise ReleaseGuardError(f"{revision!a}: no commit of this repository") from None
    return found.decode().strip()


def list_files(repository: Repository, commit: str) -> list[Blob]:
    """Every file of a commit, whatever its kind.

    Raises:
        IntegrityError: A name that is not UTF-8, or one that two files have: readers of such a
            commit differ in which they take.
    """
    listed = repository.ask("ls-tree", "-r", "-z", "-l", "--full-tree", commit)
    blobs = [_blob(line) for line in listed.split(b"\0")[:-1]]
    for name, count in Counter(blob.name for blob in blobs).items():
        if count > 1:
            raise IntegrityError(f"{name!a}: stands in the commit {commit[:12]} {count} times")
    return blobs


def read_pointer(content: bytes) -> Pointer | None:
    """What an LFS pointer stands for; None if it is not one to the letter."""
    found = _POINTER.fullmatch(content)
    return None if found is None else Pointer(found[1].decode(), int(found[2]))


def in_lfs(repository: Repository, blobs: Iterable[Blob], names: Collection[str]) -> frozenset[str]:
    """Which of the names the commit's own attributes give to LFS.

    git 2.39 cannot read attributes from a commit, and `.git/info/attributes` counts wherever it
    looks for them. So it looks at an index with nothing but the commit's attributes, in an empty
    git folder beside the same objects.
    """
    if not names:
        return frozenset()
    attributes = [
        f"{blob.mode} {blob.oid}\t{blob.name}\0"
        for blob in blobs
        if blob.name.rpartition("/")[2] == ".gitattributes" and blob.mode.startswith(_REGULAR)
    ]
    with tempfile.TemporaryDirectory() as name:
        empty = _empty_beside(repository, Path(name))
        objects = str(repository.objects)
        index = "".join(attributes).encode()
        empty.ask("update-index", "-z", "--index-info", given=index, GIT_OBJECT_DIRECTORY=objects)
        asked = "".join(f"{name}\0" for name in names).encode()
        check = ("check-attr", "-z", "--cached", "--stdin", "filter")
        found = (
            empty.ask(*check, given=asked, GIT_OBJECT_DIRECTORY=objects).decode().split("\0")[:-1]
        )
    return frozenset(
        name for name, value in zip(found[::3], found[2::3], strict=True) if value == "lfs"
    )


def _empty_beside(repository: Repository, folder: Path) -> Repository:
    version = 1 if repository.object_format != "sha1" else 0
    settings = f"[core]\nrepositoryformatversion = {version}\nbare = true\n"
    if version:
        settings += f"[extensions]\nobjectFormat = {repository.object_format}\n"
    for name in ("refs", "objects"):
        (folder / name).mkdir()
    (folder / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / "config").write_text(settings)
    return Repository(folder, folder, repository.objects, repository.object_format)


def _blob(line: bytes) -> Blob:
    about, _, raw = line.partition(b"\t")
    mode, _, oid, size = about.decode().split()
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise IntegrityError(f"{raw!r}: a release holds no names that are not UTF-8") from None
    return Blob(name, mode, oid, int(size) if size.isdigit() else 0)


def _require_fit(blob: Blob) -> None:
    require_canonical(blob.name)
    if not blob.mode.startswith(_REGULAR):
        raise IntegrityError(f"{blob.name}: {_ODD.get(blob.mode[:3], 'not a file')}")
    if blob.size > MAX_PLAIN:
        raise IntegrityError(
            f"{blob.name}: {blob.size:,} bytes outside LFS, where {MAX_PLAIN >> 20} MiB is the "
            f"most; not read. Run git lfs migrate import --include {blob.name!r}"
        )
