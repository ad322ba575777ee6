"""The release that a command line names: a folder, a git commit, a revision on a hub."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from release_guard.errors import PolicyError, ReleaseGuardError
from release_guard.gittree import commit_tree
from release_guard.hubs import Hub, require_repo_id
from release_guard.manifest import DirectoryTree, Manifest, Tree
from release_guard.plugins import Spec

HUB, GIT = "hf://", "git:"
_CACHED, _SNAPSHOTS = "models--", "snapshots"  # folders of the Hub's cache
_OWNER_AND_NAME = 2


@dataclass(frozen=True)
class Target:
    """A `Tree` that is hashed once, and what it is called.

    Attributes:
        tree: The release.
        place: What a signer is pinned for, whatever the revision: `hf://OWNER/NAME`, also for a
            snapshot in the Hub's cache, or the path of a folder.
        shown: What exactly was looked at: `main` and the like as the commit they stand for.
        folder: What came with the release, if that is a folder here.
    """

    tree: Tree
    place: str
    shown: str
    folder: Path | None = None

    @cached_property
    def manifest(self) -> Manifest:
        return self.tree.manifest

    def read(self, name: str) -> bytes:
        return self.tree.read(name)

    def require_foreign(self, key: Path) -> None:
        """Refuse a key that came with the release: whoever made the one made the other.

        Raises:
            PolicyError: It lies in the release's folder; in that of git it is its owner's.
        """
        if self.folder is None:
            return
        top, ways = self.folder.resolve(), (Path(os.path.abspath(key)), key.resolve())  # noqa: PTH100
        inside = [path for path in ways if path.is_relative_to(top)]
        if any(not path.is_relative_to(top / ".git") for path in inside):
            raise PolicyError(
                f"{key}: came with the release, so it says nothing about who signed; give a key "
                "that you have from its publisher, or --trust-on-first-use"
            )


def find(target: str) -> Target:
    """What `target` names: `hf://OWNER/NAME[@REVISION]`, `git:FOLDER[@REVISION]`, a folder, or
    `HUB/OWNER/NAME@REVISION` of a directory hub.

    Raises:
        PolicyError: It names nothing that could be a release.
        ReleaseGuardError: What it names is not there or cannot be read.
    """  # noqa: D205
    if target.startswith(HUB):
        return _on_the_hub(target)
    if target.startswith(GIT):
        return _commit(target.removeprefix(GIT))
    folder, separator, revision = target.rpartition("@")
    if separator and not Path(target).is_dir():
        return _in_a_directory_hub(Path(folder), revision)
    _require_named(target)
    return _folder(Path(target))


def _on_the_hub(target: str) -> Target:
    from release_guard.hubs.huggingface import HuggingFace  # noqa: PLC0415  half a second

    repo, _, revision = target.removeprefix(HUB).partition("@")
    require_repo_id(repo)
    tree = HuggingFace().tree(repo, revision or "main")
    return Target(tree, f"{HUB}{repo}", f"{HUB}{repo}@{tree.revision}")


def _commit(target: str) -> Target:
    folder, separator, revision = target.rpartition("@")
    if not separator or Path(target).is_dir():
        folder, revision = target, "HEAD"
    _require_named(folder)
    found = commit_tree(Path(folder), revision)
    common = found.repository.common.resolve()  # of all worktrees; of a usual one, TOP/.git
    top = common.parent if common.name == ".git" else common
    return Target(found, str(top), f"{GIT}{folder}@{found.commit}", top)


def _in_a_directory_hub(head: Path, revision: str) -> Target:
    if len(head.parts) == _OWNER_AND_NAME and not head.parent.exists():  # a form of the Hub's
        require_repo_id(str(head))
        raise ReleaseGuardError(
            f"{head}@{revision}: no folder here has it; for the Hub write hf://{head}@{revision}"
        )
    hub = Hub.build(Spec(name="directory", path=str(head.parent.parent)))
    tree = hub.tree(f"{head.parent.name}/{head.name}", revision)
    return Target(tree, str(head.resolve()), f"{head}@{revision}", head)


def _folder(folder: Path) -> Target:
    if not folder.exists():
        raise ReleaseGuardError(
            f"{folder}: no such folder; for a model of the Hub write hf://OWNER/NAME@REVISION"
        )
    if not folder.is_dir():
        raise ReleaseGuardError(f"{folder}: a file; name the folder it lies in")
    _require_no_cache(folder)
    return Target(DirectoryTree(folder), _model_of(folder.resolve()), str(folder), folder)


def _require_named(folder: str) -> None:
    """An empty variable in somebody's script must not mean the folder at work."""
    if not folder:
        raise PolicyError("the target names no folder; write . for the one you are in")


def _model_of(folder: Path) -> str:
    """Name of the model whose snapshot lies there, in the Hub's cache; else the folder's path."""
    kind, *repo = folder.parents[1].name.split("--") if len(folder.parents) > 1 else [""]
    if folder.parent.name == _SNAPSHOTS and kind == "models" and len(repo) == _OWNER_AND_NAME:
        return f"{HUB}{'/'.join(repo)}"
    return str(folder)


def _require_no_cache(folder: Path) -> None:
    """A cache holds blobs and every revision that was ever fetched: say which folder was meant."""
    models = [folder] if folder.name.startswith(_CACHED) else sorted(folder.glob(f"{_CACHED}*"))
    snapshots = [path for model in models for path in sorted((model / _SNAPSHOTS).glob("*"))]
    if snapshots:
        raise PolicyError(
            f"{folder}: a folder of the Hub's cache; give one of its snapshots, such as "
            f"{snapshots[-1]}"
        )
