"""The resistance index: an area, computed by hand, and what it must not reward."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from release_guard.resistance import resistance

heights = st.lists(st.tuples(st.integers(0, 120), st.floats(0, 1)), max_size=8)


def index(*found: tuple[float, float]) -> float:
    return resistance([found], plateau=0.8, start=1, limit=100)


def test_of_nothing_and_of_everything() -> None:
    assert index() == 1
    assert index((1, 0.0), (100, 0.0)) == pytest.approx(1)
    assert index((0, 0.8)) == pytest.approx(0)
    assert index((1, 0.9), (100, 0.1)) == pytest.approx(0)


def test_is_the_area_over_the_logarithmic_budget() -> None:
    """A quarter of the plateau up to 10, all of it from there on: both halves weigh the same."""
    assert index((1, 0.2), (10, 0.2), (11, 0.8)) == pytest.approx(1 - 0.125 - 0.5)


def test_a_score_holds_from_the_cost_before() -> None:
    assert index((10, 0.0), (100, 0.4)) == pytest.approx(1 - 0.5 * 0.5)


def test_nothing_beyond_the_budget_counts() -> None:
    assert index((50, 0.1), (200, 0.8)) == index((50, 0.1))


def test_a_grid_of_one_cost_is_its_score() -> None:
    assert resistance([[(4, 0.2)]], plateau=0.8, start=4, limit=4) == pytest.approx(0.75)


@settings(deadline=None, max_examples=200, database=None)
@given(heights, st.integers(0, 7), st.floats(0, 1))
def test_more_harm_is_never_more_resistance(
    found: list[tuple[int, float]], which: int, by: float
) -> None:
    before = index(*found)
    assert -1e-12 <= before <= 1
    place = which % (len(found) + 1)
    if place < len(found):
        cost, score = found[place]
        found[place] = (cost, min(1.0, score + by))
    assert index(*found) <= before + 1e-12
    worse = resistance([found, [(3, by)]], plateau=0.8, start=1, limit=100)
    assert worse <= before + 1e-12


def test_the_worst_of_several_attacks_counts_everywhere() -> None:
    early, late = [(1, 0.2), (10, 0.2), (100, 0.2)], [(10, 0.0), (100, 0.8)]
    found = resistance([early, late], plateau=0.8, start=1, limit=100)
    assert found == pytest.approx(1 - 0.5 * 0.25 - 0.5)


def test_log_base_is_irrelevant() -> None:
    coarse = resistance([[(7, 0.3), (49, 0.5)]], plateau=1, start=1, limit=49)
    by_hand = (math.log(7) * 0.3 + math.log(7) * 0.5) / math.log(49)
    assert coarse == pytest.approx(1 - by_hand)
