"""What a release consists of: names, sizes and SHA-256 digests, wherever the files lie."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from release_guard.errors import IntegrityError

FileClass = Literal["evidence", "documentation", "weights", "configuration"]

SIGNATURE = "model.sig"
EVIDENCE_FOLDER = ".release-guard"
IGNORED = (".git", ".gitattributes", ".github", ".gitignore")  # top level, never part of a release
_DOCUMENTS = ("*.md", "LICENSE*", "NOTICE*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg")
_WEIGHTS = ("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "onnx", "h5", "msgpack", "npz")
_CHUNK = 1 << 20


@dataclass(frozen=True, order=True)
class FileEntry:
    """One file: relative name with `/`, SHA-256 in lowercase hex, size in bytes."""

    name: str
    digest: str
    size: int

    @property
    def kind(self) -> FileClass:
        """What a change of this file means to whoever uses the model."""
        return classify(self.name)


@dataclass(frozen=True)
class Manifest:
    """All files of a release, sorted by name (Unicode code points)."""

    entries: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if names != sorted(set(names)):
            raise IntegrityError("a manifest must be sorted by name, without doubles")
        for name in names:
            require_canonical(name)

    @classmethod
    def of(cls, entries: Iterable[FileEntry]) -> "Manifest":
        """Build from entries in any order."""
        return cls(tuple(sorted(entries)))

    @property
    def root(self) -> str:
        """OMS root: SHA-256 over the raw digests in name order. It does not cover names."""
        return hashlib.sha256(
            b"".join(bytes.fromhex(entry.digest) for entry in self.entries)
        ).hexdigest()

    @property
    def payload(self) -> "Manifest":
        """Only what a model does: weights and configuration. Attestations bind to its root."""
        return Manifest(
            tuple(entry for entry in self.entries if entry.kind in {"weights", "configuration"})
        )

    def get(self, name: str) -> FileEntry | None:
        """The entry of that name, if there is one."""
        return next((entry for entry in self.entries if entry.name == name), None)

    def without(self, *names: str) -> "Manifest":
        """The same, less the files named."""
        return Manifest(tuple(entry for entry in self.entries if entry.name not in names))


class Tree(Protocol):
    """A release seen from afar: a directory, a git commit and a hub revision look alike."""

    @property
    def manifest(self) -> Manifest:
        """Every file that is there, `model.sig` among them."""
        ...

    def read(self, name: str) -> bytes:
        """Bytes of a small file; MUST raise `IntegrityError` if it is not there."""
        ...


@dataclass(frozen=True)
class DirectoryTree:
    """A release that lies in a folder."""

    directory: Path

    @property
    def manifest(self) -> Manifest:
        return hash_directory(self.directory)

    def read(self, name: str) -> bytes:
        require_canonical(name)
        try:
            return (self.directory / name).read_bytes()
        except OSError as error:
            raise IntegrityError(f"{name}: cannot be read ({error.strerror})") from None


def classify(name: str) -> FileClass:
    """Class of a file by its name, first match; unknown files count as configuration: strict."""
    if name == SIGNATURE or name.startswith(f"{EVIDENCE_FOLDER}/"):
        return "evidence"
    base = PurePosixPath(name).name
    if any(fnmatch(base, pattern) for pattern in _DOCUMENTS):
        return "documentation"
    if base.rpartition(".")[2].lower() in _WEIGHTS:
        return "weights"
    return "configuration"


def require_canonical(name: str) -> None:
    """Refuse names that could mean another file elsewhere.

    Raises:
        IntegrityError: Absolute, empty, `.` or `..` components, backslashes or control characters.
    """
    parts = name.split("/")
    bad = any(part in {"", ".", ".."} for part in parts) or "\\" in name
    if bad or any(ord(character) < 32 for character in name):
        raise IntegrityError(f"{name!r} is not a file name that a release may have")


def hash_file(path: Path) -> tuple[str, int]:
    """SHA-256 in hex and size in bytes of what was really read, in one pass."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_CHUNK))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return digest.hexdigest(), size


def hash_directory(directory: Path) -> Manifest:
    """Manifest of all regular files below a folder; one thread per core, one pass over the bytes.

    Links are refused, except links that stay inside the same Hub cache folder (`models--*`), which
    is how the Hub's own cache lays out a snapshot.

    Raises:
        IntegrityError: No folder, a link that leads away, or a name that is not UTF-8.
    """
    if not directory.is_dir():
        raise IntegrityError(f"{directory}: no such folder")
    names = list(_walk(directory))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        hashed: Sequence[tuple[str, int]] = list(
            pool.map(lambda name: hash_file(directory / name), names)
        )
    return Manifest.of(
        FileEntry(name, digest, size) for name, (digest, size) in zip(names, hashed, strict=True)
    )


def _walk(directory: Path) -> Iterable[str]:
    for folder, folders, files in os.walk(directory):
        here = Path(folder)
        if here == directory:
            folders[:] = [name for name in folders if name not in IGNORED]
            files = [name for name in files if name not in IGNORED]
        for name in folders:
            if (here / name).is_symlink():
                raise IntegrityError(f"{here / name}: a release holds no links to folders")
        for name in files:
            path = here / name
            _require_plain(path, directory)
            relative = path.relative_to(directory).as_posix()
            try:
                relative.encode()
            except UnicodeEncodeError:
                raise IntegrityError(f"{relative!r}: the name is not UTF-8") from None
            yield relative


def _require_plain(path: Path, directory: Path) -> None:
    if path.is_symlink():
        cache = next(
            (p for p in directory.resolve().parents if p.name.startswith("models--")), None
        )
        if cache is None or not path.resolve().is_relative_to(cache):
            raise IntegrityError(f"{path}: a release holds no links; put the file itself there")
    if not path.is_file():
        raise IntegrityError(f"{path}: not a regular file")
