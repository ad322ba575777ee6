"""Where releases go. A hub takes only a `Release`: nothing refused or unsigned can be pushed."""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from release_guard.errors import PolicyError, listed
from release_guard.manifest import Manifest, Tree
from release_guard.plugins import Plugin
from release_guard.release import Receipt, Release

NOTHING = "0" * 40  # the head of a repository that holds nothing yet, as git writes it
_PART = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)


@dataclass(frozen=True)
class Revision:
    """What is known of one without looking into it.

    Attributes:
        name: What `tree` takes.
        authors: Who made it, in words.
        title: What they called it.
    """

    name: str
    authors: str
    title: str


class Hub(Plugin):
    """A place that keeps revisions of releases under `owner/name`."""

    @abstractmethod
    def preflight(self, repo: str) -> str:
        """Head of `repo` to plan a release against (`NOTHING` where nothing is), before any cost.

        MUST write nothing, and fail already here if a push would be turned away at the door.

        Raises:
            PushRefusedError: The hub may be read but not written.
            AuthenticationError: Nobody, or somebody unknown, is asking.
            HubError: Anything else the hub said or did not say.
        """

    @abstractmethod
    def push(self, release: Release, repo: str) -> Receipt:
        """Make the head of `repo` exactly `release`, in one commit on the head it saw.

        MUST be all or nothing at every moment, delete files that are not in the release, leave a
        head that already equals the release as it is, and compare digests before and after. If
        `release.previous` is set, that is the head the push must find. A new repository MUST be
        nobody else's to see until `show`. A head that an earlier attempt of `release.run` made
        counts as pushed if its payload is the release's: the caller verifies what is there.

        Raises:
            PushRefusedError: The head moved meanwhile, or the hub refuses.
            AuthenticationError: Nobody, or somebody unknown, is asking.
            IntegrityError: What would land, or what landed, is not the release.
            HubError: Anything else the hub said or did not say.
        """

    @abstractmethod
    def address(self, repo: str) -> str:
        """What `release-guard verify` is called with for the head of `repo`, for the card."""

    @abstractmethod
    def tree(self, repo: str, revision: str = "main") -> Tree:
        """A revision or tag as a `Tree`: digests and small files, no weight is downloaded."""

    @abstractmethod
    def history(self, repo: str) -> Sequence[Revision]:
        """Every revision up to the head, newest first."""

    @abstractmethod
    def tags(self, repo: str) -> Mapping[str, str]:
        """Revisions by their tags."""

    @abstractmethod
    def tag(self, repo: str, name: str, revision: str) -> None:
        """Name a revision. A name that it has already is fine.

        Raises:
            PushRefusedError: Another revision has that name, or the hub refuses.
        """

    def weights(self, repo: str, revision: str) -> Manifest:
        """Only the weights of a revision."""
        entries = self.tree(repo, revision).manifest.entries
        return Manifest.of(entry for entry in entries if entry.kind == "weights")

    def remarks(self, repo: str) -> Sequence[str]:
        """What somebody has to know before a push to `repo`, one line each; nothing is written."""
        del repo
        return ()

    def show(self, repo: str) -> None:
        """Open the repository as far as the options ask for; the last step of all.

        Raises:
            PushRefusedError: The hub refuses; everything stays as hidden as it was.
        """
        del repo


def require_repo_id(repo: str) -> None:
    """Refuse whatever is not `owner/name`, by the rules that hold on every hub.

    Raises:
        PolicyError: Not two parts, or a part that a hub or a file system could take amiss.
    """
    parts = repo.split("/")
    odd = ".." in repo or "--" in repo or repo.endswith(".git")
    if len(parts) != 2 or odd or not all(_PART.fullmatch(part) for part in parts):  # noqa: PLR2004
        raise PolicyError(
            f"{repo!r} is not a repository id; write owner/name, each of letters, digits, '-', '_' "
            "and '.', such as acme/classifier"
        )


def moved(repo: str, since: Sequence[Revision], before: Manifest, after: Manifest) -> str:
    """What to say when others pushed since a head was seen: who, and what they changed.

    Args:
        repo: `owner/name`.
        since: The revisions made since, newest first.
        before: What the head held when it was seen.
        after: What it holds now.
    """
    names = " and ".join(sorted({revision.authors for revision in since}))
    titles = listed([f'"{revision.title}"' for revision in since])
    who = f"{len(since)} revision{'s'[: len(since) != 1]} by {names}: {titles}" if since else ""
    what = f"changed: {listed(sorted(_differing(before, after)))}" if before != after else ""
    said = "; ".join(part for part in (who, what) if part)
    return (
        f"{repo} moved since this push began{f' ({said})' if said else ''}; run publish again to "
        "see the difference, nothing was overwritten"
    )


def taken(repo: str, tag: str, revision: str) -> str:
    """What to say of a tag that another revision has."""
    return f"{repo}: the tag {tag} is on {revision} already, and stays there; choose another name"


def require_tag(name: str) -> None:
    """Refuse names that git, a hub or a file system could take amiss.

    Raises:
        PolicyError: Not letters, digits, '-', '_' and '.', or a name that means something else.
    """
    revision = len(name) == len(NOTHING) and not name.strip("0123456789abcdef")
    odd = ".." in name or name.endswith(".lock") or name == "main"
    if revision or odd or not _PART.fullmatch(name):
        raise PolicyError(f"{name!r} is not a tag; write letters, digits, '-', '_', '.': v1.0")


def _differing(before: Manifest, after: Manifest) -> set[str]:
    return {entry.name for entry in {*before.entries} ^ {*after.entries}}
