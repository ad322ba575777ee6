import itertools
from statistics import median_low

import pytest
from evidence_builder import example_policy, passing_evidence
from hypothesis import given
from hypothesis import strategies as st
from rich_evidence import rich_evidence, rich_policy

from release_guard.tuning import best_in_random_order, section


@given(st.lists(st.integers(0, 8).map(lambda value: value / 8), min_size=1, max_size=6))
def test_the_median_is_that_of_all_orders(scores):
    found = best_in_random_order(scores)
    assert [each.count for each in found] == list(range(1, len(scores) + 1))
    for each in found:
        best = sorted(max(order[: each.count]) for order in itertools.permutations(scores))
        assert each.median == median_low(best)
        assert each.low == best[max(0, -(-len(best) * 5 // 100) - 1)]
        assert each.high == best[-(-len(best) * 95 // 100) - 1]


def test_the_band_closes_where_everything_was_tried():
    last = best_in_random_order([0.1, 0.4, 0.2])[-1]
    assert last.low == last.median == last.high == 0.4


def test_draws_bound_what_could_be_drawn_and_listed_attacks_do_not():
    policy = rich_policy()
    drawn = section(rich_evidence(policy), policy)
    assert "drawn at random" in drawn
    assert "of all such configurations do (95 % bound)" in drawn
    listed = section(passing_evidence(example_policy()), example_policy())
    assert "as listed" in listed
    assert "such configurations" not in listed


@pytest.mark.parametrize("kept", [0, 2])
def test_a_few_attacks_make_no_picture(kept):
    policy = example_policy()
    found = passing_evidence(policy)
    allowed = {attack.label for attack in policy.attacks[:kept]}
    records = tuple(item for item in found.records if item.trial.attack.label in allowed)
    assert section(found.model_copy(update={"records": records}), policy) == ""
