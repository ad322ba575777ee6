"""A workspace for a stage under test."""

from pathlib import Path

from release_guard.stages import Workspace


def quiet(directory: Path, *, workers: int = 1) -> Workspace:
    """One that tells nobody anything."""
    private = directory / "private"
    private.mkdir(parents=True, exist_ok=True)
    return Workspace(directory, private, lambda *_: None, lambda _: None, workers)
