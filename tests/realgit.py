"""The real git and its LFS client: the system's own, or the one `make test` put beside Python."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path


def git(place: Path, *arguments: str) -> str:
    """What git says in a folder, less the blanks around it."""
    command = ["git", "-C", place, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return done.stdout.strip()


def folder() -> Path:
    """Where the LFS client is."""
    if there := shutil.which("git-lfs"):
        return Path(there).parent
    if found := importlib.util.find_spec("git_lfs"):
        return Path(str(found.origin)).with_name("bin")
    raise RuntimeError("git-lfs is not installed; see tests/git-lfs.txt, or ask your system for it")


def put_on_path() -> None:
    """Let git find it, whoever calls git."""
    os.environ["PATH"] += f"{os.pathsep}{folder()}"
