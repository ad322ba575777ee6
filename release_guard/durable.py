"""Files that are on the disk when we say so: flushed before anything is built on them."""

import ctypes
import errno
import os
import shutil
from pathlib import Path

_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from linux/fcntl.h and linux/fs.h


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to a place that is still free."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as given, target.open("xb") as written:
        shutil.copyfileobj(given, written, 1 << 20)
        written.flush()
        os.fsync(written.fileno())


def write_new(path: Path, content: bytes) -> Path:
    """Write a file that is not there yet; give its path back."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def replace_file(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write a file whole or not at all, over one that may be there.

    Args:
        path: Where; what an attempt that was killed left beside it is dropped.
        content: All of it.
        mode: Who may read it, less the umask.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    partial.replace(path)


def exchange(staged: Path, files: Path, *, aside: Path) -> None:
    """Put `staged` where `files` is: in one step, or in two where the system knows no exchange.

    Between the two steps the head's folder is missing; trees are then read from the objects.
    """
    if not files.exists():
        staged.rename(files)
        return
    try:
        _renameat2(staged, files)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        files.rename(aside)
        staged.rename(files)


def _renameat2(one: Path, other: Path) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    paths = os.fsencode(one), os.fsencode(other)
    if library.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))
