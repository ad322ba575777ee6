"""Candidates, a hub, and a process that delivers the one to the other."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Pusher, Scene


@pytest.fixture(scope="module")
def pusher() -> Iterator[Pusher]:
    with Pusher() as running:
        yield running


@pytest.fixture(scope="module", params=["lfs", "xet"])
def scene(
    request: pytest.FixtureRequest, pusher: Pusher, tmp_path_factory: pytest.TempPathFactory
) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"), pusher, xet=request.param == "xet")


@pytest.fixture(scope="module")
def update(pusher: Pusher, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("update"), pusher, update=True)


@pytest.fixture
def fresh(pusher: Pusher, tmp_path: Path) -> Scene:
    """One whose folder nobody has signed yet."""
    return Scene(tmp_path, pusher)
