"""A repository on a Hub: the few questions that a push and a reader ask it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import takewhile
from typing import Literal

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_url
from huggingface_hub.errors import OIDCError, RepositoryNotFoundError
from huggingface_hub.hf_api import GitCommitInfo, ModelInfo, RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not in an __all__
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)

from release_guard.errors import AuthenticationError, HubError, IntegrityError
from release_guard.hub_client import MISSING, passing, patiently, words_of
from release_guard.manifest import IGNORED, FileEntry, Manifest, classify
from release_guard.release import Release

Gate = Literal["auto", "manual", False]
Operation = CommitOperationAdd | CommitOperationDelete

_TITLE = "Publish with release-guard"
_RUN, _ROOT = "release-guard-run", "release-root"


@dataclass(frozen=True)
class Remote:
    """One repository; asked again when the Hub only stumbles, by us or by its own client."""

    api: HfApi
    repo: str

    def may_write(self) -> bool:
        """False where the repository is missing and somebody known is asking."""
        self.identify()
        try:
            patiently(lambda: self.api.auth_check(self.repo, write=True))
        except RepositoryNotFoundError as error:
            if error.response.status_code != MISSING:
                raise
            patiently(self.api.whoami)
            return False
        return True

    def identify(self) -> None:
        """Have the CI's identity exchanged for a token now: its refusal has many codes, one sense.

        Raises:
            AuthenticationError: The hub trusts no such publisher, or the CI gives no identity.
        """
        try:
            patiently(get_token)
        except (HTTPError, OIDCError) as error:
            if isinstance(error, HTTPError) and passing(error):
                raise
            raise AuthenticationError(
                f"{self.repo}: no token for the identity of this job ({words_of(error)}); check "
                "the repository's trusted publisher, and that the job has `id-token: write`"
            ) from None

    def create(self) -> None:
        """Make it, for nobody else to see yet."""
        patiently(lambda: self.api.create_repo(self.repo, private=True, exist_ok=True))

    def info(self, revision: str = "main") -> ModelInfo:
        """Head, visibility and gate."""
        return patiently(lambda: self.api.model_info(self.repo, revision=revision))

    def head(self, revision: str = "main") -> str:
        """The commit that a revision names."""
        found = self.info(revision).sha
        if found is None:
            raise HubError(f"{self.repo}: the hub names no commit for {revision!r}")
        return found

    def tree(self, revision: str) -> "RemoteTree":
        """What a commit holds; its listing is read at once, its files when they are asked for."""
        listed = self.api.list_repo_tree(self.repo, recursive=True, revision=revision)
        files = tuple(
            item
            for item in listed
            if isinstance(item, RepoFile) and item.path.split("/")[0] not in IGNORED
        )
        return RemoteTree(self, revision, files)

    def download(self, name: str, revision: str) -> bytes:
        """A file's content."""
        url = hf_hub_url(self.repo, name, revision=revision, endpoint=self.api.endpoint)
        headers = build_hf_headers(
            library_name=self.api.library_name, library_version=self.api.library_version
        )
        response = http_backoff("GET", url, headers=headers)
        hf_raise_for_status(response)
        return response.content

    def upload(self, additions: Sequence[CommitOperationAdd]) -> None:
        """Send what large files hold, for a later commit to name."""
        # A .gitignore on the Hub would drop files from upload and commit without a word.
        self.api.preupload_lfs_files(self.repo, additions, free_memory=False, gitignore_content="")

    def commit(self, operations: Sequence[Operation], parent: str, release: Release) -> str:
        """Commit on `parent` or not at all; the new head."""
        return self.api.create_commit(
            self.repo,
            operations,
            commit_message=_TITLE,
            commit_description=f"{_RUN}: {release.run}\n{_ROOT}: sha256:{release.manifest.root}",
            parent_commit=parent,
        ).oid

    def made_in(self, run: str, revision: str) -> bool:
        """Whether the head, if it is this commit, says that this run made it."""
        lines = {
            line
            for commit in self.commits()[:1]
            if commit.commit_id == revision
            for line in commit.message.splitlines()
        }
        return f"{_RUN}: {run}" in lines

    def commits(self) -> Sequence[GitCommitInfo]:
        """All of them, newest first."""
        return patiently(lambda: list(self.api.list_repo_commits(self.repo)))

    def since(self, revision: str) -> Iterator[GitCommitInfo]:
        """The commits after this one, newest first."""
        return takewhile(lambda commit: commit.commit_id != revision, self.commits())

    def tags(self) -> Mapping[str, str]:
        """Commits by the tags that name them."""
        found = patiently(lambda: self.api.list_repo_refs(self.repo))
        return {tag.name: tag.target_commit for tag in found.tags}

    def tag(self, name: str, revision: str) -> None:
        """Name a commit; only if no other has that name."""
        patiently(lambda: self.api.create_tag(self.repo, tag=name, revision=revision))

    def gate(self, gated: Gate) -> None:
        """Let people see files only after they were asked who they are, or at once again."""
        patiently(lambda: self.api.update_repo_settings(self.repo, gated=gated))

    def show(self) -> None:
        """Let everybody see it."""
        patiently(lambda: self.api.update_repo_settings(self.repo, visibility="public"))


@dataclass(frozen=True)
class RemoteTree:
    """A commit: digests as the Hub lists them for large files, as downloaded for the others.

    What is asked raises as the client does.
    """

    remote: Remote
    revision: str
    files: Sequence[RepoFile]
    _small: dict[str, bytes] = field(default_factory=dict, repr=False)

    @cached_property
    def manifest(self) -> Manifest:
        return self._entries(self.files)

    @property
    def weights(self) -> Manifest:
        """Only the weights; as a rule nothing has to be downloaded to know them."""
        return self._entries([file for file in self.files if classify(file.path) == "weights"])

    def read(self, name: str) -> bytes:
        file = next((file for file in self.files if file.path == name), None)
        if file is None:
            raise IntegrityError(f"{name}: not in {self.remote.repo} at {self.revision}")
        content = self._content(file)
        if file.lfs is not None and sha256(content).hexdigest() != file.lfs.sha256:
            raise IntegrityError(f"{name}: the hub lists another digest than it serves")
        return content

    def _entries(self, files: Sequence[RepoFile]) -> Manifest:
        return Manifest.of(map(self._entry, files))

    def _entry(self, file: RepoFile) -> FileEntry:
        if file.lfs is not None:
            return FileEntry(file.path, file.lfs.sha256, file.lfs.size)
        content = self._content(file)
        return FileEntry(file.path, sha256(content).hexdigest(), len(content))

    def _content(self, file: RepoFile) -> bytes:
        """Downloaded, and a small file only once."""
        if file.path in self._small:
            return self._small[file.path]
        content = self.remote.download(file.path, self.revision)
        if file.lfs is None:
            self._small[file.path] = content
        return content
