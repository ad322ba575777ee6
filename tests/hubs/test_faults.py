"""Whatever goes wrong, the hub holds the old release or the whole new one, and a rerun finishes."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from faults import KINDS, REPO, TAG, Kind, Place, Scene, holds, wrong
from hubserver import Act, Answer, HubServer, Request

from release_guard.journal import Journal

once = pytest.mark.parametrize("scene", ["lfs"], indirect=True)


def places(scene: Scene, kind: Kind) -> Iterator[Place]:
    """The commit, and others that change from kind to kind: docs/faults.py takes them all."""
    every = len(scene.firsts())
    here = 5 * KINDS.index(kind) % every
    for number, place in enumerate(scene.firsts()):
        if kind.only_at and place.route not in kind.only_at:
            continue
        if kind.only_at or place.route == "commit" or number == here:
            yield place


@once
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_fault_leaves_old_or_new_and_a_rerun_finishes(scene: Scene, kind: Kind) -> None:
    for place in places(scene, kind):
        row = scene.row(kind, place)
        assert not wrong(row), row


@pytest.mark.parametrize("scene", ["xet"], indirect=True)
@pytest.mark.parametrize("name", ["connection dropped before", "401, token expired", "500 once"])
def test_faults_while_uploading_over_xet(scene: Scene, name: str) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    for place in scene.firsts():
        if place.state == "upload":
            row = scene.row(kind, place)
            assert not wrong(row), row


def delivered(scene: Scene, server: HubServer, **more: object) -> tuple[int, str]:
    return scene.pusher.deliver(scene.job(scene.new, server, **more))


def test_no_room_for_signatures(fresh: Scene) -> None:
    with fresh.server() as server:
        status, said = delivered(fresh, server, largest=500)
        assert (status, "cannot be written (File too large)" in said) == (1, True)
        assert server.writes() == []
        assert delivered(fresh, server)[0] == 0


def test_no_room_for_the_journal(fresh: Scene) -> None:
    down = next(kind for kind in KINDS if kind.name == "503 for ever")
    with fresh.server() as server:
        server.intercept = lambda request, route, act: (
            down.strike(request, act) if route == "create" else act()
        )
        assert delivered(fresh, server)[0] == 1  # signed, and the journal written
        server.requests.clear()
        status, said = delivered(fresh, server, largest=200)
        assert (status, "release.state.json: cannot be written" in said) == (1, True)
        assert server.writes() == []
        server.intercept = lambda request, route, act: act()
        assert delivered(fresh, server)[0] == 0


def test_a_second_attempt_has_the_name_of_the_first(fresh: Scene) -> None:
    journal = Journal.beside(fresh.new)
    assert journal.last() is None
    with fresh.server() as server:
        server.mode = "deaf"
        status, said = delivered(fresh, server)
        assert (status, "did not say whether it took the commit" in said) == (1, True)
        first = journal.last()
        assert first is not None
        server.mode = "normal"
        assert delivered(fresh, server)[0] == 0
        second = journal.last()
        assert second is not None
        assert (second.run, second.root) == (first.run, first.root)
        assert f"release-guard-run: {first.run}" in server.repositories[REPO].head.message
    assert "hf_test" not in journal.path.read_text()
    assert {path.name for path in fresh.new.parent.iterdir()} == {"release", "release.state.json"}


@pytest.mark.parametrize("now", ["2001-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"])
def test_clocks_that_disagree(fresh: Scene, now: str) -> None:
    """Ours before the evidence, the hub's far in the future: neither decides anything."""
    with fresh.server() as server:
        server.intercept = lambda request, route, act: _dated(act())
        assert delivered(fresh, server, now=now) == (0, "published")
        assert holds(server, fresh.new, fresh.old) == "new"


def test_a_clock_after_the_evidence_expired(fresh: Scene) -> None:
    with fresh.server() as server:
        status, said = delivered(fresh, server, now="2040-01-01T00:00:00+00:00")
        assert (status, "2026" in said) == (4, True)
        assert server.writes() == []


def test_an_old_release_is_not_taken_for_the_new_one(update: Scene) -> None:
    with update.server() as server:
        update.prepared(server)
        head = server.repositories[REPO].head.oid
        server.repositories[REPO].tags[TAG] = head
        status, said = delivered(update, server)
        assert (status, f"the tag v1.0 is on {head} already" in said) == (5, True)
        assert server.writes() == []
        assert server.repositories[REPO].head.oid == head


def test_what_no_release_put_there_is_deleted_only_by_consent(update: Scene) -> None:
    with update.server() as server:
        update.prepared(server)
        server.add(REPO, "thesis.txt", b"do not lose")
        status, said = delivered(update, server)
        assert (status, "thesis.txt would be deleted" in said, "--yes" in said) == (5, True, True)
        assert "only-2.txt" not in said  # the earlier release vouched for that one
        assert server.writes() == []
        assert delivered(update, server, yes=True)[0] == 0
        assert holds(server, update.new, update.old) == "new"


def test_gated_before_there_is_anything_to_see(fresh: Scene) -> None:
    seen: list[tuple[str, object, int]] = []
    with fresh.server() as server:

        def watch(request: Request, route: str, act: Act) -> Answer | None:
            if route == "settings":
                seen.append(
                    (*next(iter(request.json.items())), len(server.repositories[REPO].commits))
                )
            return act()

        server.intercept = watch
        assert delivered(fresh, server)[0] == 0
    assert seen == [("gated", "manual", 1), ("visibility", "public", 2)]


def _dated(answer: Answer | None) -> Answer | None:
    if answer is None:
        return None
    return replace(answer, headers={**answer.headers, "Date": "Thu, 01 Jan 2099 00:00:00 GMT"})
