"""The Hugging Face Hub, through its own client.

A push is a chain of states, from any of which a rerun may begin anew:

    look      may we write, what is the head, what is in it
    upload    content-addressed, digests compared
    commit    one, on the head that was seen; if its answer is lost, the head tells
    compare   what landed is the release
    show      made public last, if that is asked for

`upload_folder` is never used: it makes several commits and checks the parent of the first alone.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import ip_address
from itertools import takewhile
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

from httpx2 import HTTPError
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_url,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OIDCError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not in an __all__
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
    http_backoff,
)
from pydantic import Field

from release_guard import __version__
from release_guard.errors import (
    AuthenticationError,
    HubError,
    IntegrityError,
    PolicyError,
    PushRefusedError,
)
from release_guard.hubs import NOTHING, Hub, moved, require_repo_id
from release_guard.manifest import IGNORED, FileEntry, Manifest
from release_guard.release import Receipt, Release

_SMALL = 10 << 20  # bytes; the Hub keeps larger files outside git, whatever they are
_WAITS = (0.2, 0.6, 1.8)  # seconds before asking again
_COMMIT_WAITS = (0.25, 2.0, 8.0)  # seconds before looking what became of a commit
_HUB_ERRORS = (HTTPError, OIDCError, OSError, RuntimeError, ValueError, LookupError)
_Answer = TypeVar("_Answer")


class HuggingFace(Hub):
    """huggingface.co, or a Hub that speaks like it. The token is the client's own business."""

    endpoint: str | None = Field(
        None, description="Address of the Hub; HF_ENDPOINT or huggingface.co if it is not given."
    )
    private: bool = Field(
        True,
        description="Make new repositories private and leave others as they are; "
        "false: public once the pushed files were compared.",
    )

    def preflight(self, repo: str) -> str:
        remote = self._remote(repo)
        with _spoken(f"{repo}: may not be written"):
            return remote.head() if remote.may_write() else NOTHING

    def push(self, release: Release, repo: str) -> Receipt:
        if not sys.stderr.isatty():
            disable_progress_bars()
        remote = self._remote(repo)
        with _spoken(f"{repo}: push failed"):
            if not remote.may_write():
                remote.create()
            parent = remote.head()
            there = remote.tree(parent).manifest
            revision = parent
            if there != release.manifest:
                _require_planned(release, remote, parent, there)
                revision = _replace(release, remote, parent, there)
        if not self.private:
            with _spoken(f"{repo}: pushed as {revision} but not made public"):
                remote.show()
        return Receipt(url=f"{remote.api.endpoint}/{repo}/tree/{revision}", revision=revision)

    def address(self, repo: str) -> str:
        return f"hf://{repo}"

    def tree(self, repo: str, revision: str = "main") -> "_RemoteTree":
        with _spoken(f"{repo}: cannot be read", refused=AuthenticationError):
            remote = self._remote(repo)
            return remote.tree(remote.head(revision))

    def _remote(self, repo: str) -> "_Remote":
        require_repo_id(repo)
        endpoint = (self.endpoint or constants.ENDPOINT).rstrip("/")
        _require_confidential(endpoint)
        api = HfApi(endpoint, library_name="release-guard", library_version=__version__)
        return _Remote(api, repo)


def _require_planned(release: Release, remote: "_Remote", parent: str, there: Manifest) -> None:
    planned = release.previous
    if planned in {None, parent} or (planned == NOTHING and not there.entries):
        return
    raise PushRefusedError(moved(remote.repo, remote.authors_since(str(planned))))


def _replace(release: Release, remote: "_Remote", parent: str, there: Manifest) -> str:
    """Upload what differs, commit it in one commit on `parent`, compare what landed."""
    new = [entry for entry in release.manifest.entries if there.get(entry.name) != entry]
    strays = [entry.name for entry in there.entries if release.manifest.get(entry.name) is None]
    additions = [_addition(release.directory / entry.name, entry) for entry in new]
    with _unchanged([release.directory / entry.name for entry in new]):
        remote.upload(additions)
    _require_digests(additions, new)
    deletions = [CommitOperationDelete(name, is_folder=False) for name in strays]
    revision = _commit(release, remote, parent, [*additions, *deletions])
    if remote.tree(revision).manifest != release.manifest:
        raise IntegrityError(
            f"{remote.repo}: revision {revision} is not what was pushed; keep the repository "
            "private, compare the files, then publish again"
        )
    return revision


def _addition(path: Path, entry: FileEntry) -> CommitOperationAdd:
    """Small files as the bytes that were hashed, large ones by path, hashed on their way."""
    if not path.is_file():
        raise IntegrityError(f"{path}: gone since the release was signed; sign it again")
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
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _require_digests(additions: Sequence[CommitOperationAdd], entries: Sequence[FileEntry]) -> None:
    for addition, entry in zip(additions, entries, strict=True):
        info = addition.upload_info  # asking an unhashed one would hash the disk: no proof
        if not info.is_hashed or info.sha256.hex() != entry.digest:
            raise IntegrityError(
                f"{entry.name}: what was uploaded is not what was signed; nothing was committed"
            )


def _commit(
    release: Release,
    remote: "_Remote",
    parent: str,
    operations: Sequence[CommitOperationAdd | CommitOperationDelete],
) -> str:
    """Commit, and if the answer is lost or late find out from the head what became of it.

    Asking again is safe: it names the same parent, so that of two such commits one is refused.
    """
    description = f"release-guard-run: {uuid4().hex}\nrelease-root: sha256:{release.manifest.root}"
    for wait in _COMMIT_WAITS:
        try:
            return remote.commit(operations, parent, description)
        except HTTPError as error:
            if not (_passing(error) or _status(error) == _STALE):
                raise
        time.sleep(wait)
        head = remote.head()
        if head != parent:
            if remote.tree(head).manifest == release.manifest:
                return head
            raise PushRefusedError(moved(remote.repo, remote.authors_since(parent)))
    raise HubError(
        f"{remote.repo}: the hub did not say whether it took the commit; run publish again, "
        "it looks first and does nothing twice"
    )


@dataclass(frozen=True)
class _Remote:
    """The few questions a push asks the Hub, asked again when the Hub only stumbles."""

    api: HfApi
    repo: str

    def may_write(self) -> bool:
        """False where the repository is missing and somebody known is asking."""
        try:
            _patiently(lambda: self.api.auth_check(self.repo, write=True))
        except RepositoryNotFoundError as error:
            if error.response.status_code != _MISSING:
                raise
            _patiently(self.api.whoami)
            return False
        return True

    def create(self) -> None:
        _patiently(lambda: self.api.create_repo(self.repo, private=True, exist_ok=True))

    def show(self) -> None:
        if _patiently(lambda: self.api.model_info(self.repo)).private:
            _patiently(lambda: self.api.update_repo_settings(self.repo, visibility="public"))

    def head(self, revision: str = "main") -> str:
        found = _patiently(lambda: self.api.model_info(self.repo, revision=revision)).sha
        if found is None:
            raise HubError(f"{self.repo}: the hub names no commit for {revision!r}")
        return found

    def tree(self, revision: str) -> "_RemoteTree":
        listed = _patiently(
            lambda: list(self.api.list_repo_tree(self.repo, recursive=True, revision=revision))
        )
        files = [
            item
            for item in listed
            if isinstance(item, RepoFile) and item.path.split("/")[0] not in IGNORED
        ]
        small = {
            file.path: self.download(file.path, revision) for file in files if file.lfs is None
        }
        manifest = Manifest.of(_entry(file, small) for file in files)
        return _RemoteTree(self, revision, manifest, small)

    def download(self, name: str, revision: str) -> bytes:
        url = hf_hub_url(self.repo, name, revision=revision, endpoint=self.api.endpoint)
        headers = build_hf_headers(library_name="release-guard", library_version=__version__)
        response = http_backoff("GET", url, headers=headers)
        hf_raise_for_status(response)
        return response.content

    def upload(self, additions: Sequence[CommitOperationAdd]) -> None:
        # A .gitignore on the Hub would drop files from upload and commit without a word.
        self.api.preupload_lfs_files(self.repo, additions, free_memory=False, gitignore_content="")

    def commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        parent: str,
        description: str,
    ) -> str:
        return self.api.create_commit(
            self.repo,
            operations,
            commit_message="Publish with release-guard",
            commit_description=description,
            parent_commit=parent,
        ).oid

    def authors_since(self, revision: str) -> list[str]:
        commits = _patiently(lambda: self.api.list_repo_commits(self.repo))
        newer = list(takewhile(lambda commit: commit.commit_id != revision, commits))
        return [" and ".join(commit.authors) or "somebody" for commit in newer]


@dataclass(frozen=True)
class _RemoteTree:
    """A commit: digests as the Hub lists them for large files, as downloaded for the others."""

    remote: _Remote
    revision: str
    manifest: Manifest
    small: Mapping[str, bytes]

    def read(self, name: str) -> bytes:
        entry = self.manifest.get(name)
        if entry is None:
            raise IntegrityError(f"{name}: not in {self.remote.repo} at {self.revision}")
        if name in self.small:
            return self.small[name]
        with _spoken(f"{self.remote.repo}: cannot be read", refused=AuthenticationError):
            content = self.remote.download(name, self.revision)
        if sha256(content).hexdigest() != entry.digest:
            raise IntegrityError(f"{name}: the hub lists another digest than it serves")
        return content


def _entry(file: RepoFile, small: Mapping[str, bytes]) -> FileEntry:
    if file.lfs is not None:
        return FileEntry(file.path, file.lfs.sha256, file.lfs.size)
    content = small[file.path]
    return FileEntry(file.path, sha256(content).hexdigest(), len(content))


def _require_confidential(endpoint: str) -> None:
    """Refuse endpoints at which a token could be read on its way, without repeating secrets."""
    parts = urlsplit(endpoint)
    if parts.username or parts.password:
        raise PolicyError("hub.endpoint: holds a name or password; set HF_TOKEN instead")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname)):
        raise PolicyError(
            f"hub.endpoint: {endpoint} is not https; a token sent there can be read on its way"
        )


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ip_address(host or "").is_loopback
    except ValueError:
        return False


def _patiently(ask: Callable[[], _Answer]) -> _Answer:
    """Ask, and ask again while the Hub only stumbles; for questions that change nothing twice."""
    for wait in _WAITS:
        try:
            return ask()
        except HTTPError as error:
            if not _passing(error):
                raise
        time.sleep(wait)
    return ask()


_UNKNOWN, _FORBIDDEN, _MISSING, _STALE, _BUSY = 401, 403, 404, 412, 429


def _passing(error: HTTPError) -> bool:
    status = _status(error)
    return status is None or status >= 500  # noqa: PLR2004  no answer, or the server's own fault


def _status(error: BaseException) -> int | None:
    answered = _answered(error)
    return answered.response.status_code if answered else None


def _answered(error: BaseException) -> HfHubHTTPError | None:
    """The Hub's answer behind an error; the client wraps those of LFS uploads."""
    while not isinstance(error, HfHubHTTPError):
        if error.__cause__ is None:
            return None
        error = error.__cause__
    return error


@contextmanager
def _spoken(what: str, *, refused: type[HubError] = PushRefusedError) -> Iterator[None]:
    """Say in one line what the client raised, without ever repeating what it sent."""
    try:
        yield
    except _HUB_ERRORS as error:
        raise _translated(error, what, refused) from None


def _translated(error: Exception, what: str, refused: type[HubError]) -> HubError:
    status = _status(error)
    if status == _UNKNOWN or isinstance(error, (OIDCError, LocalTokenNotFoundError)):
        return AuthenticationError(
            f"{what}: the hub does not know who is asking; set HF_TOKEN to a token with write "
            "access, or HF_OIDC_RESOURCE in CI"
        )
    if status == _FORBIDDEN:
        return refused(f"{what}: the hub refuses ({_words(error)}); check the token's rights")
    if status == _MISSING:
        return HubError(f"{what}: no such repository or revision; check the name and the token")
    if status == _BUSY:
        return HubError(f"{what}: too many requests; wait some minutes, then run it again")
    if "xet-write-token" in str(error):
        return HubError(f"{what}: the hub has no Xet storage; set HF_HUB_DISABLE_XET=1")
    return HubError(f"{what}: {_words(error)}; nothing was half-pushed, run it again")


def _words(error: Exception) -> str:
    """First line of what was said, with the token taken out should the Hub have repeated it."""
    answered = _answered(error)
    said = (answered.server_message if answered else None) or str(
        answered or error.__cause__ or error
    )
    line = next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
    sent = answered.response.request.headers.get("authorization", "") if answered else ""
    token = sent.removeprefix("Bearer ")
    return (line.replace(token, "<TOKEN>") if token else line)[:200]
