from evidence_builder import Asked, example_policy, passing_evidence, record

from release_guard.evidence import Record
from release_guard.harm import section, seed_band

POLICY = example_policy()


def fresh(seed: int, btb: float, *, long: bool = False, stops: bool = False) -> Record:
    asked = Asked("defended", POLICY.attacks[0], "footwear", "fp32", seed, "confirm")
    return record(POLICY, asked, btb, "confirming", long=long, stops=stops)


def test_the_band_spans_fresh_seeds_only():
    asked = Asked("defended", POLICY.attacks[0], "footwear", "fp32", 7, "search")
    lucky = record(POLICY, asked, 1, "listed")
    band = seed_band([lucky, fresh(1, 100), fresh(2, 400)], "steps")
    cost, least, most = band[-1]
    assert cost == 400
    assert (round(least, 3), most) == (0.5, 0.99)  # .5 * (cost / btb) ** .5, at most .99
    assert all(low < high for _, low, high in band)


def test_one_seed_has_no_band():
    assert seed_band([fresh(1, 100)], "steps") == []


def test_a_seed_counts_as_far_as_it_was_run():
    band = seed_band([fresh(1, 100), fresh(2, 200), fresh(3, 1e4, long=True)], "steps")
    assert band[-1][0] == 400
    assert max(cost for cost, _, _ in seed_band([fresh(1, 100), fresh(2, 200)], "steps")) == 400


def test_a_seed_that_ended_by_a_breach_keeps_what_it_reached():
    stopped, other = fresh(1, 20, long=True, stops=True), fresh(2, 1e5, long=True)
    band = seed_band([stopped, other], "steps")
    assert band[-1][0] == 1_600
    assert band[-1][2] == max(point.score for point in stopped.outcome.curve)


def test_nothing_scored_gives_no_section():
    assert section(passing_evidence(POLICY, records=()), POLICY) == ""
