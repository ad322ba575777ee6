"""Put the pre-push hook where git runs it, before whatever was there; and take it away again."""

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from release_guard.errors import ReleaseGuardError
from release_guard.git import Repository
from release_guard.hook_settings import IDENTITY, ISSUER, KEY, OWN_KEY, Settings

NEXT = "pre-push.release-guard-next"  # beside the hook: whatever was there before
_MARKER = re.compile(rb"\A#![^\n]*\n# release-guard pre-push hook, version ([0-9]+)\n")
_CALLS_LFS = re.compile(rb"^[^#\n]*\bgit[ -]lfs[ \t]+pre-push\b", re.MULTILINE)
_TEMPLATES = (Path(__file__).with_name("_hooks"), Path(__file__).parents[1] / "hooks")


class State(StrEnum):
    """What lies where git looks for the hook."""

    ABSENT = "absent"
    FOREIGN = "foreign"
    OUTDATED = "outdated"
    INSTALLED = "installed"


@dataclass(frozen=True)
class Place:
    """Where a repository's pre-push hook is.

    Attributes:
        repository: Whose.
        root: Top of its working tree.
        folder: The hooks' folder.
        shared: Value of `core.hooksPath`: other repositories may use the folder too; or empty.
    """

    repository: Repository
    root: Path
    folder: Path
    shared: str

    @classmethod
    def of(cls, settings: Settings) -> "Place":
        """Where git looks, for this repository and all its worktrees."""
        repository, root = settings.repository, settings.root
        shared = (settings.values.get("core.hookspath") or ("",))[-1]
        return cls(repository, root, repository.hooks(root), shared)

    @property
    def hook(self) -> Path:
        """What git runs."""
        return self.folder / "pre-push"

    @property
    def next(self) -> Path:
        """What our hook runs after itself."""
        return self.folder / NEXT

    @property
    def legacy(self) -> Path:
        """Where pre-commit puts what it was installed over."""
        return self.folder / "pre-push.legacy"

    @property
    def state(self) -> State:
        """What is there now."""
        if not self.hook.exists() and not self.hook.is_symlink():
            return State.ABSENT
        found = _content(self.hook)
        if _MARKER.match(found) is None:
            return State.FOREIGN
        runs = self.hook.stat().st_mode & 0o111
        good = found == self.rendered() and runs and not self.runs_twice
        return State.INSTALLED if good else State.OUTDATED

    @property
    def runs_twice(self) -> bool:
        """Whether pre-commit, once installed over our hook, keeps another copy to run first."""
        return _MARKER.match(_content(self.legacy)) is not None

    @property
    def uses_lfs(self) -> bool:
        """Whether files of this repository are kept in LFS."""
        if (self.repository.common / "lfs").is_dir():
            return True
        attributes = [self.root / ".gitattributes", self.repository.common / "info/attributes"]
        return any(b"filter=lfs" in _content(path) for path in attributes)

    @property
    def next_calls_lfs(self) -> bool:
        """Whether what runs after our hook uploads to LFS; pre-commit runs an older hook first."""
        after = _content(self.next)
        if b"pre-commit" in after:
            after += _content(self.legacy)
        return _CALLS_LFS.search(after) is not None

    def rendered(self) -> bytes:
        """The hook as it has to be here and now."""
        text = _template()
        lfs = "yes" if self.uses_lfs and not self.next_calls_lfs else ""
        for name, value in (("python", shlex.quote(sys.executable)), ("lfs", lfs)):
            text = text.replace(f"\n{name}=\n", f"\n{name}={value}\n", 1)
        return text.encode()


def install(place: Place) -> bool:
    """Write the hook; a foreign one is moved aside and runs after it.

    Returns:
        Whether anything had to be written.

    Raises:
        ReleaseGuardError: Nothing can be written there, or two foreign hooks are in the way.
    """
    with _writing(place.folder):
        before = place.state
        if before is State.INSTALLED:
            return False
        place.folder.mkdir(parents=True, exist_ok=True)
        if before is State.FOREIGN:
            _step_aside(place)
        if place.runs_twice:
            place.legacy.unlink()
        new = place.folder / "pre-push.release-guard-new"
        new.write_bytes(place.rendered())
        new.chmod(0o755)
        new.replace(place.hook)
    return True


def uninstall(place: Place) -> bool:
    """Take the hook away; what was there before is put back as it was.

    Returns:
        Whether there was one.

    Raises:
        ReleaseGuardError: The hook there is not ours, or nothing can be written.
    """
    with _writing(place.folder):
        if place.state is State.FOREIGN:
            raise ReleaseGuardError(
                f"{place.hook}: not written by release-guard, so it is left alone"
                + (f"; an older one lies in {place.next}" if _is_there(place.next) else "")
            )
        there = place.state is not State.ABSENT
        if _is_there(place.next):
            place.next.replace(place.hook)
        elif there:
            place.hook.unlink()
    return there


def pin_key(settings: Settings, key: Path) -> str:
    """Trust a public key from now on: a copy in the git folder, where no commit can change it.

    Returns:
        Its fingerprint.

    Raises:
        ReleaseGuardError: Not a public key, or nothing can be written.
    """
    from release_guard.keys import fingerprint, load_public_key  # noqa: PLC0415

    found = fingerprint(load_public_key(key))
    copy = settings.repository.common / OWN_KEY.removeprefix(".git/")
    with _writing(copy.parent):
        if not copy.exists() or not copy.samefile(key):
            copy.write_bytes(key.read_bytes())
    _configure(settings, {KEY: OWN_KEY, IDENTITY: "", ISSUER: ""})
    return found


def pin_identity(settings: Settings, identity: str, issuer: str) -> None:
    """Trust whoever a certificate authority calls so from now on.

    Raises:
        PolicyError: No such identity or issuer can be; what was trusted stays so.
    """
    from release_guard.plugins import Spec  # noqa: PLC0415
    from release_guard.signers import Signer  # noqa: PLC0415

    Signer.build(Spec(name="sigstore", identity=identity, issuer=issuer), where="signer")
    _configure(settings, {KEY: "", IDENTITY: identity, ISSUER: issuer})


def _configure(settings: Settings, values: dict[str, str]) -> None:
    for name, value in values.items():
        if value or name in settings.values:  # an empty one outdoes what is set for all others
            settings.repository.ask("config", "--local", "--replace-all", name, value)


def _step_aside(place: Place) -> None:
    if _is_there(place.next) and _content(place.next) != _content(place.hook):
        raise ReleaseGuardError(
            f"{place.hook} was replaced by another hook since release-guard was installed, and "
            f"{place.next} is there already; make one of the two, remove the other, and try again"
        )
    place.hook.replace(place.next)


def _template() -> str:
    for folder in _TEMPLATES:
        with contextlib.suppress(OSError):
            return (folder / "pre-push").read_text(encoding="utf-8")
    raise ReleaseGuardError("hooks/pre-push is missing; install model-release-guard again")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReleaseGuardError(
            f"{error.filename or folder}: cannot be written ({error.strerror})"
        ) from None
