"""Whom the owner of a repository trusts, and where to look: from git's configuration alone."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from release_guard.errors import PolicyError
from release_guard.git import Repository
from release_guard.pushed import Remote

if TYPE_CHECKING:
    from release_guard.signers import Voucher

KEY, IDENTITY, ISSUER = "release-guard.key", "release-guard.identity", "release-guard.issuer"
REMOTES = "release-guard.remotes"
OWN_KEY = ".git/release-guard.pub"  # `.git/` is the git folder, also where that lies elsewhere
_SECTION = "release-guard."
_FOLDER = "040000"  # mode of a folder in a tree


@dataclass(frozen=True)
class Settings:
    """`release-guard.*` of a repository.

    Attributes:
        repository: Whose.
        root: Top of the working tree, or the git folder where there is none.
        values: All that git's configuration says.
    """

    repository: Repository
    root: Path
    values: Mapping[str, Sequence[str]]

    @property
    def remotes(self) -> Sequence[str]:
        """Names, URLs and globs of the remotes that are watched beside the Hub's."""
        return self.values.get(REMOTES, ())

    @property
    def watched(self) -> Mapping[str, bool]:
        """Of every remote by its name, whether any push to it is verified."""
        found: dict[str, bool] = {}
        for key, values in self.values.items():
            name, dot, last = key.removeprefix("remote.").rpartition(".")
            if key.startswith("remote.") and dot and last in {"url", "pushurl"}:
                seen = any(self.watches(Remote(name, url)) for url in values)
                found[name] = found.get(name, False) or seen
        return found

    def watches(self, remote: Remote) -> bool:
        """Whether a push there must be verified."""
        return remote.is_watched(self.remotes, os.environ.get("HF_ENDPOINT"))

    @property
    def unknown(self) -> Sequence[str]:
        """Settings of ours that mean nothing: most likely a slip of the pen."""
        known = {KEY, IDENTITY, ISSUER, REMOTES}
        return [key for key in self.values if key.startswith(_SECTION) and key not in known]

    @property
    def key(self) -> Path | None:
        """Where the public key lies; relative to the top of the working tree."""
        value = self._last(KEY)
        if not value:
            return None
        if value.startswith(".git/"):
            return self.repository.common / value.removeprefix(".git/")
        return self.root / Path(value).expanduser()

    def signer(self, commits: Sequence[str] = ()) -> "Voucher":
        """Whose signature counts.

        Args:
            commits: That are about to be pushed. None of them may bring the key along.

        Raises:
            PolicyError: Nobody is named, or more than one, or a key that the repository's own
                history could have put there.
            ReleaseGuardError: The key cannot be read.
        """
        key, identity, issuer = self.key, self._last(IDENTITY), self._last(ISSUER)
        if key is not None and not (identity or issuer):
            from release_guard.keys import PublicKey, load_public_key  # noqa: PLC0415

            self._require_own(key, commits)
            return PublicKey(load_public_key(key))
        if identity and issuer and key is None:
            from release_guard.plugins import Spec  # noqa: PLC0415  a key is read far sooner
            from release_guard.signers import Signer  # noqa: PLC0415

            named = Spec(name="sigstore", identity=identity, issuer=issuer)
            return Signer.build(named, where=IDENTITY)
        if key is None and not (identity or issuer):
            raise PolicyError(
                "nobody is trusted here, so nothing can be verified; run: "
                "release-guard hook install --key PUBLIC_KEY"
            )
        raise PolicyError(f"set either {KEY}, or {IDENTITY} and {ISSUER} both, with git config")

    def _require_own(self, key: Path, commits: Sequence[str]) -> None:
        """Refuse a key under version control: whoever may commit could vouch for anything."""
        spelt = Path(os.path.abspath(key))  # noqa: PTH100  a link itself may be what is tracked
        inside = {path for path in map(self._inside, (spelt, key.resolve())) if path}
        if not inside:
            return
        # A folder on the way may be a link or a submodule, and the commit says what of.
        above = {str(each) for path in inside for each in PurePosixPath(path).parents} - {"."}
        trees = [("ls-tree", "-z", "--full-tree", commit) for commit in commits]
        for command in (("ls-files", "-z", "--stage"), *trees):
            listed = self.repository.ask(
                *command, "--", *inside, *above, cwd=self.root, GIT_LITERAL_PATHSPECS="1"
            )
            entries = [entry.partition("\t") for entry in os.fsdecode(listed).split("\0")[:-1]]
            modes = {name: about[:6] for about, _, name in entries}
            if any(modes.get(name, _FOLDER) != _FOLDER for name in (*inside, *above)):
                raise PolicyError(
                    f"{KEY} names {self._last(KEY)}, which is under version control here: a commit "
                    "must not bring the key that vouches for it. Take a copy that you trust: "
                    f"release-guard hook install --key {self._last(KEY)}"
                )

    def _inside(self, path: Path) -> str:
        """Its name in the working tree; empty: it lies elsewhere, or in the git folder."""
        owned = (self.repository.common, self.repository.folder)
        if any(path.is_relative_to(folder.resolve()) for folder in owned):
            return ""
        root = self.root.resolve()
        return str(path.relative_to(root)) if path.is_relative_to(root) else ""

    def _last(self, key: str) -> str:
        return (self.values.get(key) or ("",))[-1]


def settings_of(repository: Repository, root: Path) -> Settings:
    """What is configured for a repository whose working tree has this top."""
    return Settings(repository, root, repository.settings())
