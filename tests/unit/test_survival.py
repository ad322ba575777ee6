"""Lifetimes against lifelines, and what competing causes must add up to."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import AalenJohansenFitter, KaplanMeierFitter
from lifelines.utils import restricted_mean_survival_time

from release_guard.evidence import Cost, Ending, Outcome, Point
from release_guard.survival import (
    Cause,
    Lifetime,
    incidence,
    lifetime,
    restricted_mean,
    restricted_mean_difference,
    standing_after,
)

CAUSES: tuple[Cause | None, ...] = ("breach", "collapse", None)
NUMBER = {"breach": 1, "collapse": 2, None: 0}


def outcome(*points: tuple[int, float], ending: Ending = "survived") -> Outcome:
    curve = tuple(
        Point(cost=Cost(steps=steps, samples=4 * steps, flops=0, seconds=0), score=score)
        for steps, score in points
    )
    return Outcome(ending=ending, curve=curve, examples=100)


def drawn(seed: int, count: int = 60) -> list[Lifetime]:
    """Distinct costs: lifelines shakes those that are tied."""
    draw = np.random.default_rng(seed)
    costs = draw.permutation(np.arange(1, count + 1)) * 1.5
    return [Lifetime(float(cost), CAUSES[draw.integers(3)]) for cost in costs]


class TestLifetime:
    def test_ends_at_the_first_score_above_the_ceiling(self) -> None:
        found = lifetime(outcome((1, 0.1), (3, 0.6), (5, 0.2), ending="breached"), 0.5, "steps")
        assert found == Lifetime(3, "breach")

    def test_counts_a_collapse_as_such(self) -> None:
        assert lifetime(outcome((4, 0.1), ending="collapsed"), 0.5, "samples") == Lifetime(
            16, "collapse"
        )
        assert lifetime(outcome(ending="collapsed"), 0.5, "steps") == Lifetime(0, "collapse")

    def test_a_breach_before_a_collapse_is_a_breach(self) -> None:
        found = lifetime(outcome((2, 0.7), (4, 0.1), ending="collapsed"), 0.5, "steps")
        assert found == Lifetime(2, "breach")

    def test_stands_at_the_last_score(self) -> None:
        assert lifetime(outcome((1, 0.1), (8, 0.5)), 0.5, "steps") == Lifetime(8, None)

    @pytest.mark.parametrize("found", [outcome((4, 0.1), ending="failed"), outcome()])
    def test_a_crash_is_no_lifetime(self, found: Outcome) -> None:
        assert lifetime(found, 0.5, "steps") is None

    def test_who_recovers_pays_for_both(self) -> None:
        collapse = Lifetime(10, "collapse")
        assert collapse.followed_by(Lifetime(6, "breach")) == Lifetime(16, "breach")
        assert collapse.followed_by(Lifetime(40, None)) == Lifetime(50, None)


class TestIncidence:
    @pytest.mark.parametrize("seed", range(4))
    def test_standing_is_the_kaplan_meier_curve_of_lifelines(self, seed: int) -> None:
        found = drawn(seed)
        costs, ended = [life.cost for life in found], [life.cause is not None for life in found]
        fitted = KaplanMeierFitter().fit(costs, ended)
        for step in incidence(found):
            assert step.standing == pytest.approx(fitted.predict(step.cost), abs=1e-9)

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("cause", ["breach", "collapse"])
    def test_incidences_are_those_of_lifelines(self, seed: int, cause: Cause) -> None:
        found = drawn(seed)
        fitter = AalenJohansenFitter(calculate_variance=False)
        numbers = [NUMBER[life.cause] for life in found]
        fitted = fitter.fit([life.cost for life in found], numbers, event_of_interest=NUMBER[cause])
        for step in incidence(found):
            ours = step.breached if cause == "breach" else step.collapsed
            theirs = fitted.cumulative_density_.loc[step.cost].item()
            assert ours == pytest.approx(theirs, abs=1e-9)

    @settings(deadline=None, max_examples=200, database=None)
    @given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(CAUSES)), min_size=1, max_size=30))
    def test_shares_add_up_and_never_turn_back(self, found: list[tuple[int, Cause | None]]) -> None:
        steps = incidence([Lifetime(cost, cause) for cost, cause in found])
        for step in steps:
            assert step.standing + step.breached + step.collapsed == pytest.approx(1)
        for before, after in itertools.pairwise(steps):
            assert after.standing <= before.standing
            assert after.breached >= before.breached
            assert after.collapsed >= before.collapsed

    def test_a_collapse_is_neither_a_breach_nor_resistance(self) -> None:
        """Two of four collapse before the others breach: a censored view would show 100 %."""
        found = [Lifetime(1, "collapse")] * 2 + [Lifetime(5, "breach")] * 2
        last = incidence(found)[-1]
        assert (last.standing, last.breached, last.collapsed) == (0, 0.5, 0.5)

    def test_nothing_fell(self) -> None:
        steps = incidence([Lifetime(9, None)] * 3)
        assert steps == ()
        assert standing_after(steps, 1e9) == 1


class TestRestrictedMean:
    @pytest.mark.parametrize("seed", range(4))
    def test_is_that_of_lifelines_on_log_costs(self, seed: int) -> None:
        found = drawn(seed)
        logs = [math.log(life.cost / 1.5) for life in found]
        fitted = KaplanMeierFitter().fit(logs, [life.cause is not None for life in found])
        theirs = restricted_mean_survival_time(fitted, t=math.log(40.0))
        ours = restricted_mean(incidence(found), start=1.5, limit=60.0)
        assert ours * math.log(40.0) == pytest.approx(theirs, rel=1e-9)

    def test_of_all_and_of_nothing(self) -> None:
        assert restricted_mean((), start=1, limit=100) == 1
        at_once = incidence([Lifetime(0, "breach")] * 3)
        assert restricted_mean(at_once, start=1, limit=100) == 0
        half = incidence([Lifetime(10, "breach")] * 3)
        assert restricted_mean(half, start=1, limit=100) == pytest.approx(0.5)

    def test_difference_is_resampled_by_configuration(self) -> None:
        strong = [[Lifetime(100, None)] * 3] * 6
        weak = [[Lifetime(10, "breach")] * 3] * 6
        found = restricted_mean_difference(strong, weak, start=1, limit=100)
        assert (found.estimate, found.lower, found.upper) == pytest.approx((0.5, 0.5, 0.5))

    def test_configurations_that_differ_widen_it(self) -> None:
        mixed = [[Lifetime(100, None)] * 9, [Lifetime(2, "breach")] * 9] * 4
        steady = [[Lifetime(10, "breach")]] * 8
        found = restricted_mean_difference(mixed, steady, start=1, limit=100)
        assert found.lower is not None
        assert found.upper is not None
        assert found.lower < 0 < found.upper
        assert found == restricted_mean_difference(mixed, steady, start=1, limit=100)

    @pytest.mark.parametrize("seed", range(3))
    def test_bounds_are_those_of_resampled_curves(self, seed: int) -> None:
        """Costs before the start, beyond the limit and tied; every draw through `incidence`."""
        draw, lot = np.random.default_rng(seed), random.Random(seed)  # noqa: S311  no secret
        arms = [
            [
                [
                    Lifetime(float(cost), CAUSES[draw.integers(3)])
                    for cost in draw.integers(0, 14, 3)
                ]
                for _ in range(7)
            ]
            for _ in range(2)
        ]

        def mean(groups: list[list[Lifetime]]) -> float:
            steps = incidence([life for group in groups for life in group])
            return restricted_mean(steps, start=2, limit=10)

        again = sorted(
            mean(lot.choices(arms[0], k=7)) - mean(lot.choices(arms[1], k=7)) for _ in range(1_000)
        )
        found = restricted_mean_difference(*arms, start=2, limit=10, seed=seed)
        wanted = (mean(arms[0]) - mean(arms[1]), again[49], again[-50])
        assert (found.estimate, found.lower, found.upper) == pytest.approx(wanted, abs=1e-12)

    def test_an_empty_arm_shows_nothing(self) -> None:
        found = restricted_mean_difference([], [[Lifetime(1, None)]], start=1, limit=100)
        assert found.estimate is None
