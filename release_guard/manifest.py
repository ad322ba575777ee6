"""What a release consists of: names, sizes and SHA-256 digests, wherever the files lie."""

import contextlib
import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from release_guard.errors import IntegrityError, ReleaseGuardError

FileClass = Literal["evidence", "documentation", "weights", "configuration"]

PAYLOAD = frozenset({"weights", "configuration"})  # classes of the files that decide what it does
SIGNATURE = "model.sig"
EVIDENCE_FOLDER = ".release-guard"
IGNORED = (".git", ".gitattributes", ".github", ".gitignore")  # top level, never part of a release
_DOCUMENTS = ("*.md", "LICENSE*", "NOTICE*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg")
_WEIGHTS = ("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "onnx", "h5", "msgpack", "npz")
_PACKED = ("pkl", "pickle", "npy", "joblib", "tflite", "keras", "pb", "mlmodel", "nemo", "pte",
           "engine", "tar", "tgz", "gz", "zip", "xz", "bz2", "zst", "7z", "rar")  # fmt: skip
_TEXTS = frozenset({"json", "jsonl", "md", "txt", "toml", "yaml", "yml", "html", "py"})
_DOWNLOAD_CACHE = ".cache/huggingface"  # what `hf download --local-dir` leaves beside the files
_CHUNK = 1 << 18  # bytes read at once: they are hashed while the processor's cache holds them


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
        return root_digest(entry.digest for entry in self.entries)

    @property
    def payload(self) -> "Manifest":
        """Only what a model does: weights and configuration. Attestations bind to its root."""
        return Manifest(tuple(entry for entry in self.entries if entry.kind in PAYLOAD))

    @property
    def unsigned(self) -> "Manifest":
        """All but signatures: what two signings of the same files have in common."""
        return Manifest(tuple(entry for entry in self.entries if not _is_signature(entry.name)))

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
        with _open(_File(self.directory, name)) as file:
            return file.read()


def root_digest(digests: Iterable[str]) -> str:
    """SHA-256 over raw digests, given in hex in the order of their files' names."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def classify(name: str) -> FileClass:
    """Class of a file by its name, first match; unknown files count as configuration: strict."""
    if name == SIGNATURE or name.startswith(f"{EVIDENCE_FOLDER}/"):
        return "evidence"
    base = PurePosixPath(name).name
    if base.rpartition(".")[2].lower() in _WEIGHTS:
        return "weights"
    if any(fnmatchcase(base, pattern) for pattern in _DOCUMENTS):
        return "documentation"
    return "configuration"


def could_be_weights(name: str) -> bool:
    """Whether a file of this name may hold weights, wherever it lies and whatever `classify` says.

    Archives and pickles too, and what somebody put aside as `model.safetensors.bak`.
    """
    _, *endings = PurePosixPath(name).name.lower().split(".")
    text = bool(endings) and endings[-1] in _TEXTS
    return not text and any(each in _WEIGHTS or each in _PACKED for each in endings)


def _is_signature(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    return name == SIGNATURE or (folder == EVIDENCE_FOLDER and base.endswith(".sigstore.json"))


def require_canonical(name: str) -> None:
    """Refuse names that could mean another file elsewhere, or that not every system can hold.

    Raises:
        IntegrityError: Absolute, empty, `.` or `..` components, backslashes, control characters,
            or characters that UTF-8 cannot write.
    """
    bad = any(part in {"", ".", ".."} for part in name.split("/")) or "\\" in name
    odd = any(unicodedata.category(character) in {"Cc", "Cs"} for character in name)
    if bad or odd:
        raise IntegrityError(f"{name!a} is not a file name that a release may have")


def hash_file(path: Path) -> tuple[str, int]:
    """SHA-256 in hex and size in bytes of what was really read, in one pass; links are refused."""
    with _open(_File(path.parent, path.name)) as file:
        return _hash(file)


def hash_directory(directory: Path) -> Manifest:
    """Manifest of all regular files below a folder; one pass over the bytes, one thread a core.

    Links are refused, except links that stay inside the same Hub cache folder (`models--*`), which
    is how the Hub's own cache lays out a snapshot.

    Raises:
        IntegrityError: No folder, a link that leads away, a name that no release may have, or
            anything that cannot be read.
    """
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  a git commit needs none

    if not directory.is_dir():
        raise IntegrityError(f"{directory}: no such folder")
    files = sorted(
        _walk(directory, ""), key=lambda file: file.size, reverse=True
    )  # long ones first
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return Manifest.of(pool.map(_entry, files))


def write_file(path: Path, content: bytes) -> None:
    """Write a file of a release whole or not at all.

    Raises:
        ReleaseGuardError: The disk is full or the folder cannot be written.
    """
    try:
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise ReleaseGuardError(
            f"{path}: cannot be written ({error.strerror}); make room there and run the same "
            "command again"
        ) from None


@dataclass(frozen=True)
class _File:
    directory: Path
    name: str
    size: int = 0

    @property
    def path(self) -> Path:
        return self.directory / self.name


def _walk(directory: Path, prefix: str) -> Iterable[_File]:
    try:
        entries = list(os.scandir(directory / prefix))
    except OSError as error:  # a folder nobody can look into must not pass for an empty one
        raise IntegrityError(f"{directory / prefix}: cannot be read ({error.strerror})") from None
    for entry in entries:
        name = f"{prefix}{entry.name}"
        if name in IGNORED or name == _DOWNLOAD_CACHE:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(directory, f"{name}/")
            continue
        require_canonical(name)
        yield _File(directory, name, _size(entry))


def _size(entry: os.DirEntry[str]) -> int:
    """Only to sort by: a link to nothing has none, and fails when it is opened."""
    with contextlib.suppress(OSError):
        return entry.stat().st_size
    return 0


def _entry(file: _File) -> FileEntry:
    with _open(file) as opened:
        digest, size = _hash(opened)
    return FileEntry(file.name, digest, size)


def _open(file: _File) -> FileIO:
    """Open a regular file; never through a link, never waiting for a pipe's other end."""
    path = _inside_cache(file) if file.path.is_symlink() else file.path
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise IntegrityError(f"{file.path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IntegrityError(f"{file.path}: not a regular file; a release holds nothing else")
    return os.fdopen(descriptor, "rb", buffering=0)


def _inside_cache(file: _File) -> Path:
    parents = file.directory.resolve().parents
    cache = next((parent for parent in parents if parent.name.startswith("models--")), None)
    found = file.path.resolve()
    if cache is None or not found.is_relative_to(cache):
        raise IntegrityError(f"{file.path}: a release holds no links; put the file itself there")
    return found


def _hash(file: FileIO) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
        size += count
    return digest.hexdigest(), size
