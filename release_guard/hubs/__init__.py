"""Where releases go. A hub takes only a `Release`: nothing refused or unsigned can be pushed."""

import re
from abc import abstractmethod

from release_guard.errors import PolicyError
from release_guard.manifest import Tree
from release_guard.plugins import Plugin
from release_guard.release import Receipt, Release

NOTHING = "0" * 40  # the head of a repository that holds nothing yet, as git writes it
_PART = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)


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
        `release.previous` is set, that is the head the push must find.

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
        """A revision as a `Tree`: digests and small files, no weight is downloaded."""


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


def moved(repo: str, authors: list[str]) -> str:
    """What to say when others pushed since a head was seen.

    Args:
        repo: `owner/name`.
        authors: Who made the revisions since; one name a revision, empty if that is unknown.
    """
    names = " and ".join(sorted(set(authors)))
    plural = "" if len(authors) == 1 else "s"
    what = f" ({len(authors)} revision{plural} by {names})" if authors else ""
    return f"{repo} moved since this push began{what}; run publish again to see the difference"
