"""The same where other hooks are: they hear of what comes through, and of nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pushing import CONTENTS, GOOD, Bench
from ways import PUSHES, UNSENT, pushed_as_it_must_be

SETUPS = ("none", "foreign", "hooks-path", "pre-commit", "worktree")


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("setup", SETUPS)
def test_every_content_where_other_hooks_are(
    prepared: Callable[[str], Bench], tmp_path: Path, setup: str, content: str
) -> None:
    bench = prepared(setup).copied(tmp_path / "copy")
    pushed_as_it_must_be(bench, content, "update", worktree=setup == "worktree")
    heard(bench, setup, content in GOOD)


@pytest.mark.parametrize("push", [push for push in PUSHES if push != "update"])
@pytest.mark.parametrize("setup", ["none", "foreign", "hooks-path", "worktree"])
def test_every_way_where_other_hooks_are(
    prepared: Callable[[str], Bench], tmp_path: Path, setup: str, push: str
) -> None:
    bench = prepared(setup).copied(tmp_path / "copy")
    pushed_as_it_must_be(bench, "tampered", push, worktree=setup == "worktree")
    heard(bench, setup, push in UNSENT)


def heard(bench: Bench, setup: str, came_through: bool) -> None:
    """Whoever comes after our hook heard the same, or nothing at all."""
    if setup == "foreign":
        places = [bench.work / "foreign.log", bench.folder / "beside/foreign.log"]
        said = "".join(path.read_text() for path in places if path.exists())
        assert bool(said) == came_through
        assert said.startswith(f"called with origin {bench.url}\n") or not came_through
    if setup == "pre-commit":
        assert (bench.folder / "pre-commit.log").exists() == came_through
