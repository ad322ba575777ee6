import pytest
from evidence_builder import Asked, example_policy, passing_evidence, record
from rich_evidence import rich_evidence, rich_policy

from release_guard.standing import lead, mean_share, standing, start
from release_guard.sweep import Place, places

POLICY = example_policy()


def place_of(*records) -> Place:
    (place,) = places(passing_evidence(POLICY, records=records), POLICY)
    return place


def asked(arm: str, number: int = 0, split: str = "search", seed: int = 7) -> Asked:
    return Asked(arm, POLICY.attacks[number], "footwear", "fp32", seed, split)


def test_shares_of_the_search_add_up_and_crashes_are_only_counted():
    crash = record(POLICY, asked("defended", 3), 1e4, "listed", ending="failed")
    place = place_of(
        record(POLICY, asked("defended", 0), 100, "listed"),
        record(POLICY, asked("defended", 1), 1e4, "listed", ending="collapsed"),
        record(POLICY, asked("defended", 2), 1e4, "listed"),
        crash.model_copy(update={"outcome": crash.outcome.model_copy(update={"curve": ()})}),
    )
    (found,) = standing(place)
    assert (found.trials, found.crashed) == (3, 1)
    assert found.breached == pytest.approx(1 / 3)
    assert found.collapsed == pytest.approx(1 / 3)
    assert found.steps[-1].standing == pytest.approx(1 / 3)


def test_neither_fresh_seeds_nor_adaptive_search_count():
    place = place_of(
        record(POLICY, asked("defended"), 1e4, "listed"),
        record(POLICY, asked("defended", 1), 100, "searched"),
        record(POLICY, asked("defended", 0, "confirm", 1_007), 100, "confirming"),
    )
    (found,) = standing(place)
    assert (found.trials, found.breached) == (1, 0)


def test_what_falls_beyond_the_budget_stands_at_the_budget():
    place = place_of(record(POLICY, asked("undefended"), 900, "listed", long=True))
    (found,) = standing(place)
    assert found.breached == 0
    assert mean_share(place, found) == 1


def test_the_defended_model_stands_longer_and_the_bounds_say_so():
    policy = rich_policy()
    for place in places(rich_evidence(policy), policy):
        found = {each.arm: each for each in standing(place)}
        assert found.keys() == {"undefended", "defended", "never_knew", "sham", "ancestor"}
        shares = {arm: mean_share(place, each) for arm, each in found.items()}
        assert max(shares["undefended"], shares["sham"]) < 0.8 < shares["defended"] <= 1
        ahead = lead(place, found["defended"], found["undefended"])
        assert 0 < ahead.lower < ahead.estimate < ahead.upper < 1
        assert start(place) == 1
