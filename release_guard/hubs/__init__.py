"""Where releases go. A hub takes only a `Release`: nothing refused or unsigned can be pushed."""

from abc import abstractmethod

from release_guard.manifest import Tree
from release_guard.plugins import Plugin
from release_guard.release import Receipt, Release


class Hub(Plugin):
    """A place that keeps revisions of releases under `owner/name`."""

    @abstractmethod
    def push(self, release: Release, repo: str) -> Receipt:
        """Make the head of `repo` exactly `release`, in one commit on the head it saw.

        MUST be all or nothing at every moment, delete files that are not in the release, leave a
        head that already equals the release as it is, and compare digests before and after.

        Raises:
            PushRefusedError: The head moved meanwhile, or the hub refuses.
            AuthenticationError: Nobody, or somebody unknown, is asking.
            IntegrityError: What would land, or what landed, is not the release.
            HubError: Anything else the hub said or did not say.
        """

    @abstractmethod
    def tree(self, repo: str, revision: str = "main") -> Tree:
        """A revision as a `Tree`: digests and small files, no weight is downloaded."""
