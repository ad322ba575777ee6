"""The Hugging Face Hub, through its own client.

A push is a chain of states, from any of which a rerun may begin anew:

    look      may we write, what is the head, what is in it
    gate      made, private; who may see files later is settled before there are any
    upload    content-addressed, digests compared
    commit    one, on the head that was seen; if its answer is lost, the head tells
    compare   what landed is the release
    show      opened last, once the caller has verified what is there

`upload_folder` is never used: it makes several commits and checks the parent of the first alone.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import GitCommitInfo, ModelInfo
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not in an __all__
    disable_progress_bars,
)
from pydantic import Field

from release_guard.errors import AuthenticationError, HubError, IntegrityError, PushRefusedError
from release_guard.hub_client import (
    CONFLICT,
    PUZZLING,
    STALE,
    connect,
    passing,
    plain,
    spoken,
    status_of,
    words_of,
)
from release_guard.hub_remote import Gate, Operation, Remote, RemoteTree
from release_guard.hubs import NOTHING, Hub, Revision, moved, require_repo_id, taken
from release_guard.manifest import FileEntry, Manifest
from release_guard.release import Receipt, Release

_SMALL = 10 << 20  # bytes; the Hub keeps larger files outside git, whatever they are
_COMMIT_WAITS = (0.25, 2.0, 8.0)  # seconds before looking what became of a commit


class HuggingFace(Hub):
    """huggingface.co, or a Hub that speaks like it. The token is the client's own business."""

    endpoint: str | None = Field(
        None, description="Address of the Hub; HF_ENDPOINT or huggingface.co if it is not given."
    )
    private: bool = Field(
        True,
        description="Make new repositories private and leave others as they are; "
        "false: public once the pushed files were verified.",
    )
    gated: Gate | None = Field(
        None,
        description="Who asks for access gets it at once ('auto') or by the owner's hand "
        "('manual'), false: nobody has to ask; not given: as it is. Set before any file is there.",
    )

    def preflight(self, repo: str) -> str:
        remote = self._remote(repo)
        with spoken(f"{repo}: may not be written", left="nothing was written"):
            return remote.head() if remote.may_write() else NOTHING

    def push(self, release: Release, repo: str) -> Receipt:
        if not sys.stderr.isatty():
            disable_progress_bars()
        remote = self._remote(repo)
        with spoken(f"{repo}: push failed", left="nothing was committed"):
            if not remote.may_write():
                remote.create()
            parent = remote.head()
            there = remote.tree(parent)
            self._close(remote)
            if there.manifest == release.manifest:
                return _receipt(remote, parent)
            _require_planned(release, there)
            operations = _uploaded(release, remote, there.manifest)
            revision = _commit(release, there, operations)
        with spoken(f"{repo}: {revision} was committed but not compared", left="it stays there"):
            _require_landed(release, remote.tree(revision), parent)
            return _receipt(remote, revision)

    def address(self, repo: str) -> str:
        return f"hf://{repo}"

    def tree(self, repo: str, revision: str = "main") -> "_Readable":
        with _reading(repo):
            remote = self._remote(repo)
            return _Readable(remote.tree(remote.head(revision)))

    def history(self, repo: str) -> Sequence[Revision]:
        with _reading(repo):
            return [_revision(commit) for commit in self._remote(repo).commits()]

    def weights(self, repo: str, revision: str) -> Manifest:
        with _reading(repo):
            return self._remote(repo).tree(revision).weights

    def tags(self, repo: str) -> Mapping[str, str]:
        with _reading(repo):
            return self._remote(repo).tags()

    def tag(self, repo: str, name: str, revision: str) -> None:
        remote = self._remote(repo)
        with spoken(f"{repo}: {revision} is there but not tagged {name}", left="it stays there"):
            if name not in remote.tags():
                _tag(remote, name, revision)
            if (other := remote.tags()[name]) != revision:
                raise PushRefusedError(taken(repo, name, other))

    def remarks(self, repo: str) -> Sequence[str]:
        remote = self._remote(repo)
        with spoken(f"{repo}: may not be written", left="nothing was written"):
            if not remote.may_write():
                later = "" if self.private else " until what was pushed is verified"
                return (f"{repo} does not exist yet; it will be made, private{later}",)
            info = remote.info()
        if not info.private:
            return (f"{repo} is public: the commit can be seen at once, before it is verified",)
        return () if self.private else (f"{repo} is private; public once the push is verified",)

    def show(self, repo: str) -> None:
        remote = self._remote(repo)
        with spoken(f"{repo}: pushed, but not opened as asked for", left="it stays as it was"):
            info = remote.info()
            if self.gated is False and info.gated:
                remote.gate(False)
            if not self.private and info.private:
                remote.show()
            if self._is_closed(info) and self._is_closed(remote.info()):
                raise PushRefusedError(
                    f"{repo}: pushed, but the hub did not open it as it was told; do it by hand in "
                    "the repository's settings"
                )

    def _remote(self, repo: str) -> Remote:
        require_repo_id(repo)
        return Remote(connect(self.endpoint), repo)

    def _close(self, remote: Remote) -> None:
        """Let nobody in without asking, before there is anything to see."""
        if not self.gated or remote.info().gated == self.gated:
            return
        with spoken(f"{remote.repo}: cannot be gated", left="nothing was committed"):
            remote.gate(self.gated)
            if remote.info().gated != self.gated:
                raise PushRefusedError(
                    f"{remote.repo}: the hub did not gate it as it was told; nothing was committed"
                )

    def _is_closed(self, info: ModelInfo) -> bool:
        """Whether people see less of it than the options ask for."""
        return bool((self.gated is False and info.gated) or (not self.private and info.private))


@dataclass(frozen=True)
class _Readable:
    """A tree that speaks as we do when it cannot be read."""

    tree: RemoteTree

    @property
    def revision(self) -> str:
        """The commit, whatever it was asked for as."""
        return self.tree.revision

    @property
    def manifest(self) -> Manifest:
        with _reading(self.tree.remote.repo):
            return self.tree.manifest

    def read(self, name: str) -> bytes:
        with _reading(self.tree.remote.repo):
            return self.tree.read(name)


def _landed(release: Release, there: RemoteTree) -> bool:
    """Whether a commit that got no answer is there: ours, or that of an earlier attempt.

    An earlier attempt signed the same files, but signatures that carry their moment differ.
    """
    if there.manifest == release.manifest:
        return True
    same = there.manifest.unsigned == release.manifest.unsigned
    return same and there.remote.made_in(release.run, there.revision)


def _require_planned(release: Release, there: RemoteTree) -> None:
    planned = release.previous
    if planned in {None, there.revision} or (planned == NOTHING and not there.manifest.entries):
        return
    raise _moved(there.remote, str(planned), there)


def _moved(remote: Remote, seen: str, now: RemoteTree) -> PushRefusedError:
    before = remote.tree(seen).manifest if seen != NOTHING else Manifest(())
    since = [_revision(commit) for commit in remote.since(seen)]
    return PushRefusedError(moved(remote.repo, since, before, now.manifest))


def _uploaded(release: Release, remote: Remote, there: Manifest) -> Sequence[Operation]:
    """Upload what differs; the operations that make the release of what is there."""
    new = [entry for entry in release.manifest.entries if there.get(entry.name) != entry]
    strays = [entry.name for entry in there.entries if release.manifest.get(entry.name) is None]
    with _unchanged([release.directory / entry.name for entry in new]):
        additions = [_addition(release.directory / entry.name, entry) for entry in new]
        remote.upload(additions)
    _require_digests(additions, new)
    return [*additions, *(CommitOperationDelete(name, is_folder=False) for name in strays)]


def _addition(path: Path, entry: FileEntry) -> CommitOperationAdd:
    """Small files as the bytes that were hashed, large ones by path, hashed on their way."""
    if entry.size > _SMALL:
        return CommitOperationAdd(entry.name, path)
    content = path.read_bytes()
    if sha256(content).hexdigest() != entry.digest:
        raise IntegrityError(f"{path}: changed since the release was signed; sign it again")
    return CommitOperationAdd(entry.name, content)


@contextmanager
def _unchanged(paths: Sequence[Path]) -> Iterator[None]:
    """The client hashes a file and then reads it again: nobody may write to it in between."""
    before = [_fingerprint(path) for path in paths]
    try:
        yield
    finally:
        for path, fingerprint in zip(paths, before, strict=True):
            if _fingerprint(path) != fingerprint:
                raise IntegrityError(
                    f"{path}: changed while it was uploaded; nothing was committed"
                )


def _fingerprint(path: Path) -> tuple[int, ...]:
    if path.is_symlink() or not path.is_file():
        raise IntegrityError(f"{path}: gone since the release was signed; sign it again")
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _require_digests(additions: Sequence[CommitOperationAdd], entries: Sequence[FileEntry]) -> None:
    for addition, entry in zip(additions, entries, strict=True):
        info = addition.upload_info  # asking an unhashed one would hash the disk: no proof
        if not info.is_hashed or info.sha256.hex() != entry.digest:
            raise IntegrityError(
                f"{entry.name}: what was uploaded is not what was signed; nothing was committed"
            )


def _commit(release: Release, parent: RemoteTree, operations: Sequence[Operation]) -> str:
    """Commit, and if the answer is lost or late find out from the head what became of it.

    Asking again is safe: it names the same parent, so that of two such commits one is refused.
    """
    remote, said = parent.remote, ""
    for wait in _COMMIT_WAITS:
        try:
            return remote.commit(operations, parent.revision, release)
        except (HTTPError, *PUZZLING) as error:
            if isinstance(error, HTTPError) and not (passing(error) or status_of(error) == STALE):
                raise
            said = words_of(error)
        time.sleep(wait)
        with spoken(f"{remote.repo}: the commit got no answer", left="it may have been taken"):
            head = remote.head()
            if head != parent.revision:
                there = remote.tree(head)
                if _landed(release, there):
                    return head
                raise _moved(remote, parent.revision, there)
    raise HubError(
        f"{remote.repo}: the hub did not say whether it took the commit ({said}); run publish "
        "again, it looks first and does nothing twice"
    )


def _require_landed(release: Release, there: RemoteTree, parent: str) -> None:
    if _landed(release, there):
        return
    if there.revision == parent:
        raise IntegrityError(
            f"{there.remote.repo}: the hub answered without a commit, its head is still {parent}; "
            "nothing was changed, publish again"
        )
    raise IntegrityError(
        f"{there.remote.repo}: revision {there.revision} is not what was pushed; keep the "
        "repository private, compare the files, then publish again"
    )


def _tag(remote: Remote, name: str, revision: str) -> None:
    try:
        remote.tag(name, revision)
    except HTTPError as error:
        # Somebody was faster, or it was we and the answer was lost.
        if status_of(error) != CONFLICT or name not in remote.tags():
            raise


def _receipt(remote: Remote, revision: str) -> Receipt:
    return Receipt(url=f"{remote.api.endpoint}/{remote.repo}/tree/{revision}", revision=revision)


def _revision(commit: GitCommitInfo) -> Revision:
    authors = " and ".join(commit.authors) or "somebody"
    return Revision(commit.commit_id, plain(authors), plain(commit.title))


def _reading(repo: str) -> AbstractContextManager[None]:
    return spoken(
        f"{repo}: cannot be read", refused=AuthenticationError, left="nothing was changed"
    )
