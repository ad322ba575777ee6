import pytest
from evidence_builder import Asked, evidence, example_policy, passing_evidence, record, weak

from release_guard import figures
from release_guard.statistics import Censored
from release_guard.sweep import places

POLICY = example_policy()


def test_the_weakest_attack_decides_the_defended_arm():
    found = evidence(POLICY, weak(POLICY))
    (place,) = places(found, POLICY)
    best = figures.cheapest(place, "defended")
    assert best.attack == POLICY.attacks[0]
    assert best.finding == "confirmed"
    assert all(cost.upper <= place.budget for cost in best.fresh)


def test_nothing_tried_costs_nothing_known():
    (place,) = places(passing_evidence(POLICY, records=()), POLICY)
    assert figures.cheapest(place, "defended") is None
    assert figures.efforts(place, "defended") == ()


@pytest.mark.parametrize(
    ("btb", "ending", "said"),
    [
        (100, None, "0.570, breached at 130 steps (1 of 1 trials)"),
        (10_000, None, "0.100 at most"),
        (10_000, "collapsed", "collapsed; 0.100 at most"),
        (10_000, "failed", "failed; 0.100 at most"),
    ],
)
def test_an_effort_says_how_it_ended(btb, ending, said):
    asked = Asked("defended", POLICY.attacks[0], "footwear", "fp32", 7, "search")
    one = record(POLICY, asked, btb, "listed", ending=ending)
    (place,) = places(passing_evidence(POLICY, records=(one,)), POLICY)
    (effort,) = figures.efforts(place, "defended")
    assert figures.found(effort, "steps") == said


def test_seeds_that_never_breached_count_with_what_they_were_tried_to():
    costs = [Censored(5, 10), Censored(1000, None)]
    assert figures.typical(costs) == pytest.approx(100)
    assert figures.typical([Censored(0, None)]) == 0


def test_a_date_that_cannot_be_read_is_unknown():
    assert figures.dates(passing_evidence(POLICY), POLICY) == ("2026-01-02", "2026-07-01")
    found = passing_evidence(POLICY, finished_at="yesterday")
    assert figures.dates(found, POLICY) == ("unknown", "unknown")


def test_a_trial_that_ran_on_above_the_ceiling_counts_as_breached():
    asked = Asked("defended", POLICY.attacks[0], "footwear", "fp32", 7, "confirm")
    ran_on = record(POLICY, asked, 100, "confirming", stops=False, ending="survived")
    assert figures.ending(ran_on, 0.5) == "breached"
    held = record(POLICY, asked, 10_000, "confirming", stops=False)
    assert figures.ending(held, 0.5) == "survived"
