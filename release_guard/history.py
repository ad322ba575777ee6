"""What a push would publish beside the newest state: every older file that rides along."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from release_guard.git import Objects, Repository
from release_guard.gittree import MAX_PLAIN, read_pointer
from release_guard.manifest import classify, could_be_weights

_MAX_POINTER = 1024  # bytes; git-lfs looks at no larger ones
_SIZE = re.compile(rb"^size ([0-9]{1,18})$", re.MULTILINE)
_OID = re.compile(rb"^oid sha256:([0-9a-fA-F]{64})", re.MULTILINE)


@dataclass(frozen=True)
class Arrival:
    """A file that the remote does not have yet and that could be weights.

    Attributes:
        commit: Brings it.
        name: Its path there.
        digest: SHA-256 in hex of what the remote would get; None: too large to be looked at.
    """

    commit: str
    name: str
    digest: str | None


def arrivals(repository: Repository, commit: str, known: Sequence[str]) -> list[Arrival]:
    """Every file in the commits that a push sends which is weights by its name or kept in LFS.

    git-lfs uploads what a pointer names whatever the attributes say, and whatever the file is
    called; so a pointer counts here even where a checkout would not follow it. Small documents in
    LFS (pictures) are let through.

    Args:
        repository: Where the commits lie.
        commit: That is pushed.
        known: Object ids that the remote has; those not here are of no use.
    """
    brought = list(_introduced(repository, _new_commits(repository, commit, known)))
    if not brought:
        return []
    sizes = _sizes(repository, {oid for _, _, oid in brought})
    found = []
    with repository.reader() as objects:
        for where, name, oid in brought:
            found += [
                Arrival(where, name, digest) for digest in _digests(objects, name, oid, sizes[oid])
            ]
    return found


def _new_commits(repository: Repository, commit: str, known: Sequence[str]) -> bytes:
    """Object ids, one a line, of what the remote lacks."""
    given = "".join(f"{line}\n" for line in (commit, *(f"^{oid}" for oid in known)))
    return repository.ask("rev-list", "--ignore-missing", "--stdin", given=given.encode())


def _introduced(repository: Repository, commits: bytes) -> Iterator[tuple[str, str, str]]:
    """Commit, path and object id of every file that a commit has and none of its parents had."""
    asked = ("diff-tree", "--stdin", "-r", "-c", "--root", "-z", "--no-renames", "--raw")
    words = iter(repository.ask(*asked, "--no-abbrev", given=commits).split(b"\0")[:-1])
    commit = ""
    for word in words:
        if not word.startswith(b":"):
            commit = word.decode()
            continue
        name = next(words).decode("utf-8", "surrogateescape")
        parents = len(word) - len(word.lstrip(b":"))
        fields = word.lstrip(b":").decode().split()
        mode, oid = fields[parents], fields[2 * parents + 1]
        if mode.startswith("100"):
            yield commit, name, oid


def _sizes(repository: Repository, oids: Iterable[str]) -> Mapping[str, int]:
    given = "".join(f"{oid}\n" for oid in oids).encode()
    lines = repository.ask("cat-file", "--batch-check", given=given).decode().splitlines()
    return {oid: int(size) for oid, _, size in map(str.split, lines)}


def _digests(objects: Objects, name: str, oid: str, size: int) -> Iterator[str | None]:
    kind = classify(name)
    if size > MAX_PLAIN:
        yield None
    elif size < _MAX_POINTER or could_be_weights(name):
        content = objects.blob(oid, MAX_PLAIN)
        pointed = list(_pointed(content)) if size < _MAX_POINTER else []
        yield from (digest for digest, length in pointed if not _is_picture(kind, length))
        if could_be_weights(name) and not pointed:
            yield hashlib.sha256(content).hexdigest()


def _pointed(content: bytes) -> Iterator[tuple[str, int | None]]:
    """What LFS would upload for a text, read as loosely as anything might read it."""
    if (pointer := read_pointer(content)) is not None:
        yield pointer.digest, pointer.size
    elif content.lstrip().startswith(b"version "):
        sizes = [int(size) for size in _SIZE.findall(content)]
        for oid in _OID.findall(content):
            yield oid.decode().lower(), max(sizes, default=None)


def _is_picture(kind: str, length: int | None) -> bool:
    return kind == "documentation" and length is not None and length <= MAX_PLAIN
