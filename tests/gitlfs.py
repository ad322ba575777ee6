"""The real Git LFS client: the system's own, or the one that `make test` put beside Python."""

import importlib.util
import os
import shutil
from pathlib import Path


def folder() -> Path:
    """Where the client is."""
    if there := shutil.which("git-lfs"):
        return Path(there).parent
    if found := importlib.util.find_spec("git_lfs"):
        return Path(str(found.origin)).with_name("bin")
    raise RuntimeError("git-lfs is not installed; see tests/git-lfs.txt, or ask your system for it")


def put_on_path() -> None:
    """Let git find it, whoever calls git."""
    os.environ["PATH"] += f"{os.pathsep}{folder()}"
