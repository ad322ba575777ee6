"""Every state of a repository, pushed in every way, by git itself; what comes through is right."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pushing import CONTENTS, Bench
from ways import PUSHES, pushed_as_it_must_be


@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("content", CONTENTS)
def test_every_content_pushed_in_every_way(
    prepared: Callable[[str], Bench], tmp_path: Path, content: str, push: str
) -> None:
    bench = prepared("git-lfs").copied(tmp_path / "copy")
    pushed_as_it_must_be(bench, content, push)
