"""Killed at any moment, a delivery leaves the old release or the whole new one, and can go on."""

from collections.abc import Sequence

import pytest
from faults import REPO, Place, Scene, holds, wrong

MANY = 100  # events, more than there are
once = pytest.mark.parametrize("scene", ["lfs"], indirect=True)


def telling(scene: Scene) -> Sequence[Place]:
    """Every request, but of the many downloads in a row, which change nothing, only some.

    docs/faults.py takes them all.
    """
    places = scene.places()
    return [place for place in places if place.route != "resolve" or place.number % 8 == 0]


@once
def test_killed_at_any_request_of_a_first_push(scene: Scene) -> None:
    rows = [scene.killed(place) for place in telling(scene)]
    assert not [row for row in rows if wrong(row)]
    lefts = [row.left for row in rows]
    assert lefts == sorted(lefts, key=["nothing", "empty", "new"].index)
    assert {*lefts} == {"nothing", "empty", "new"}
    assert {row.place.state for row in rows if row.public} <= {"show"}


def test_killed_at_any_kind_of_request_of_an_update(update: Scene) -> None:
    rows = [update.killed(place) for place in update.firsts()]
    assert not [row for row in rows if wrong(row)]
    lefts = [row.left for row in rows]
    assert lefts == sorted(lefts, key=["old", "new"].index)
    assert {*lefts} == {"old", "new"}


def test_killed_at_every_file_it_writes(fresh: Scene) -> None:
    with fresh.server() as server:
        for event in range(1, MANY):
            job = fresh.job(fresh.new, server, kill_at=event)
            status, said = fresh.pusher.deliver(job)
            if status == 0:
                break
            assert status == -9, said
            assert holds(server, fresh.new, fresh.old) == "nothing"
        assert event > 8  # three attestations, a signature and the journal, each opened and named
        assert holds(server, fresh.new, fresh.old) == "new"
        assert len(server.repositories[REPO].commits) == 2
