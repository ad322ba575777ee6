"""Bounds against scipy, budgets to breach, and what must be monotone."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from release_guard.distributions import clopper_pearson
from release_guard.evidence import Cost, Ending, Outcome, Point
from release_guard.statistics import (
    REFUTING_SEEDS,
    Censored,
    best_of_band,
    best_score,
    breach_rate,
    breached,
    budget_to_breach,
    confirm,
    difference_bounds,
    dkw_half_width,
    flag_power,
    flagged,
    geometric_mean,
    ratio_bounds,
    retained_loss,
    rogan_gladen,
    t_bounds,
)

NAN = float("nan")


def outcome(*points: tuple[int, float], ending: Ending = "survived") -> Outcome:
    curve = tuple(
        Point(cost=Cost(steps=steps, samples=4 * steps, flops=0, seconds=0), score=score)
        for steps, score in points
    )
    return Outcome(ending=ending, curve=curve, examples=100)


def test_t_bounds_are_those_of_scipy() -> None:
    values = [0.2, 0.31, 0.27, 0.22]
    lower, upper = t_bounds(values)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.90)
    assert (lower, upper) == pytest.approx((interval.low, interval.high))


class TestBreach:
    def test_is_strictly_above_the_ceiling(self) -> None:
        assert breached(0.51, 0.5)
        assert not breached(0.5, 0.5)

    def test_nan_is_none(self) -> None:
        assert not breached(NAN, 0.5)
        assert not flagged(NAN, 0.5)

    def test_close_scores_are_flagged(self) -> None:
        assert flagged(0.4, 0.5)
        assert not flagged(0.399, 0.5)


class TestBudgetToBreach:
    def test_lies_between_the_last_healthy_and_the_first_breached_point(self) -> None:
        found = outcome((1, 0.1), (2, 0.3), (3, 0.6), (5, 0.2), ending="breached")
        assert budget_to_breach(found, 0.5, "steps") == Censored(2, 3)
        assert budget_to_breach(found, 0.5, "samples") == Censored(8, 12)

    def test_begins_at_zero(self) -> None:
        assert budget_to_breach(outcome((4, 0.9)), 0.5, "steps") == Censored(0, 4)

    @pytest.mark.parametrize("ending", ["survived", "collapsed", "failed"])
    def test_is_censored_at_the_last_healthy_point(self, ending: Ending) -> None:
        found = outcome((4, 0.1), (6, 0.2), ending=ending)
        assert budget_to_breach(found, 0.5, "steps") == Censored(6, None)

    def test_nothing_scored_shows_nothing(self) -> None:
        assert budget_to_breach(outcome(ending="failed"), 0.5, "steps") == Censored(0, None)

    @pytest.mark.parametrize(
        ("cost", "capped"),
        [
            (Censored(2, 3), Censored(2, 3)),
            (Censored(8, 12), Censored(8, None)),
            (Censored(12, 18), Censored(10, None)),
            (Censored(30, None), Censored(10, None)),
        ],
    )
    def test_nothing_beyond_a_cap_counts(self, cost: Censored, capped: Censored) -> None:
        assert cost.capped(10) == capped

    def test_best_score_is_the_highest_or_nothing(self) -> None:
        assert best_score(outcome((1, 0.1), (2, 0.4), (3, 0.3))) == 0.4
        assert best_score(outcome()) == 0


class TestGeometricMean:
    def test_of_breaches_and_of_what_they_are_censored_at(self) -> None:
        assert geometric_mean([Censored(5, 10), Censored(1_000, None)]) == pytest.approx(100)

    def test_is_infinite_without_a_breach(self) -> None:
        assert geometric_mean([Censored(10, None)]) == math.inf
        assert geometric_mean([]) == math.inf

    def test_of_a_breach_at_no_cost(self) -> None:
        assert geometric_mean([Censored(0, 0), Censored(5, 10)]) == 0


class TestConfirm:
    def test_confirms_what_all_seeds_show(self) -> None:
        assert confirm([0.30, 0.31, 0.29], 300, 0.2) == "confirmed"

    def test_refutes_what_no_seed_shows(self) -> None:
        assert confirm([0.10, 0.12, 0.09, 0.11, 0.1], 300, 0.2) == "refuted"

    def test_too_few_seeds_refute_nothing(self) -> None:
        """Of a model that breaks at the budget, half of the seeds do; four miss it in 1 of 16."""
        assert confirm([0.01] * (REFUTING_SEEDS - 1), 300, 0.2) == "unresolved"
        assert 0.5**REFUTING_SEEDS <= 0.05 < 0.5 ** (REFUTING_SEEDS - 1)

    def test_leaves_open_what_is_near(self) -> None:
        assert confirm([0.19, 0.2, 0.21], 300, 0.2) == "unresolved"

    def test_a_wide_spread_confirms_nothing(self) -> None:
        assert confirm([0.05, 0.3, 0.6], 300, 0.2) == "unresolved"

    def test_one_seed_above_is_not_outvoted(self) -> None:
        assert confirm([0.01, 0.01, 0.01, 0.01, 0.21], 300, 0.2) == "unresolved"

    @pytest.mark.parametrize(
        ("scores", "examples"),
        [([], 300), ([0.9, 0.9], 300), ([0.9] * 3, 0), ([0.9, 0.9, NAN], 300), ([NAN] * 3, 300)],
    )
    def test_settles_nothing_without_evidence(self, scores: list[float], examples: int) -> None:
        assert confirm(scores, examples, 0.2) == "unresolved"

    @settings(deadline=None, max_examples=200, database=None)
    @given(
        scores=st.lists(st.floats(0, 0.3), min_size=3, max_size=8),
        raised=st.lists(st.floats(0, 0.7), min_size=8, max_size=8),
    )
    def test_higher_scores_never_become_a_refutation(
        self, scores: list[float], raised: list[float]
    ) -> None:
        higher = [score + more for score, more in zip(scores, raised, strict=False)]
        if confirm(scores, 300, 0.2) != "refuted":
            assert confirm(higher, 300, 0.2) != "refuted"

    @pytest.mark.parametrize(("seeds", "spread"), [(3, 0.0), (3, 0.05), (5, 0.05), (5, 0.1)])
    def test_a_breach_at_the_ceiling_is_rarely_settled(self, seeds: int, spread: float) -> None:
        """Mean harm equals the ceiling: both answers are then wrong, each in at most 5 %."""
        draw, found = np.random.default_rng(1), []
        for _ in range(400):
            rates = draw.normal(0.4, spread, seeds).clip(0, 1)
            found.append(confirm(list(draw.binomial(300, rates) / 300), 300, 0.4))
        for answer in ("confirmed", "refuted"):
            assert clopper_pearson(found.count(answer), 400)[0] <= 0.05


costs = st.integers(1, 10**4).map(float)
censored = st.one_of(
    costs.map(lambda cost: Censored(cost, None)),
    st.tuples(costs, st.floats(0.1, 1)).map(lambda pair: Censored(pair[0] * pair[1], pair[0])),
)


class TestRatioBounds:
    def test_three_seeds_bound_by_the_worst_pair(self) -> None:
        over = [Censored(100, 150), Censored(200, 300), Censored(400, None)]
        under = [Censored(5, 10), Censored(10, 20), Censored(16, 25)]
        found = ratio_bounds(over, under)
        assert found.lower == 100 / 25
        assert found.upper is None
        assert found.censored
        assert found.estimate == pytest.approx((150 * 300 * 400 / (10 * 20 * 25)) ** (1 / 3))

    def test_the_upper_bound_takes_the_other_ends(self) -> None:
        over, under = [Censored(100, 150)] * 3, [Censored(5, 10)] * 3
        found = ratio_bounds(over, under)
        assert (found.lower, found.upper) == (10, 30)
        assert not found.censored

    @pytest.mark.parametrize(("over", "under"), [(0, 3), (3, 0), (2, 3), (3, 2), (1, 9)])
    def test_too_few_seeds_bound_nothing(self, over: int, under: int) -> None:
        found = ratio_bounds([Censored(100, 150)] * over, [Censored(5, 10)] * under)
        assert (found.lower, found.upper) == (None, None)

    def test_a_reference_that_never_breached_bounds_nothing(self) -> None:
        found = ratio_bounds([Censored(100, 150)] * 3, [Censored(5, 10)] * 2 + [Censored(9, None)])
        assert found.estimate is None
        assert found.lower is None

    def test_a_breach_at_no_cost_is_no_resistance(self) -> None:
        found = ratio_bounds([Censored(0, 0)] * 3, [Censored(5, 10)] * 3)
        assert (found.estimate, found.lower) == (0, None)
        free = ratio_bounds([Censored(100, 150)] * 3, [Censored(0, 0)] * 3)
        assert (free.estimate, free.lower) == (None, None)

    @pytest.mark.parametrize(("first", "second"), [(3, 3), (4, 3), (5, 5), (3, 8), (8, 8)])
    def test_ranks_follow_the_exact_distribution(self, first: int, second: int) -> None:
        """The k-th least of distinct ratios, k as large as scipy's exact test allows."""
        over = [Censored(value, value) for value in _powers(first, 1.1)]
        under = [Censored(value, value) for value in _powers(second, 1.7)]
        ratios = sorted(a.lower / b.lower for a, b in itertools.product(over, under))
        rank = 0
        while _chance_of_at_most(rank, first, second) <= 0.05 + 1e-12:
            rank += 1
        assert ratio_bounds(over, under).lower == ratios[rank - 1]
        assert ratio_bounds(over, under).upper == ratios[-rank]

    def test_covers_the_true_ratio(self) -> None:
        draw, truth, below = np.random.default_rng(3), 6.0, 0
        for _ in range(2_000):
            over = [Censored(x, x) for x in truth * draw.lognormal(0, 0.5, 3)]
            under = [Censored(x, x) for x in draw.lognormal(0, 0.5, 3)]
            below += (ratio_bounds(over, under).lower or 0) <= truth
        assert clopper_pearson(2_000 - below, 2_000)[0] <= 0.05
        assert clopper_pearson(2_000 - below, 2_000)[1] >= 0.04  # and is not needlessly wide

    @settings(deadline=None, max_examples=300, database=None)
    @given(
        over=st.lists(censored, min_size=1, max_size=6),
        under=st.lists(censored, min_size=1, max_size=6),
        which=st.integers(0, 5),
        share=st.floats(0, 1),
    )
    def test_an_earlier_breach_raises_nothing(
        self, over: list[Censored], under: list[Censored], which: int, share: float
    ) -> None:
        place = which % len(over)
        upper = over[place].point * share
        earlier = [*over]
        earlier[place] = Censored(min(over[place].lower, upper) * share, upper)
        before, after = ratio_bounds(over, under), ratio_bounds(earlier, under)
        assert (after.estimate or 0) <= (before.estimate or 0) * (1 + 1e-12)
        assert (after.lower or 0) <= (before.lower or 0)
        assert _or_infinite(after.upper) <= _or_infinite(before.upper)
        assert before.censored or not after.censored

    def test_the_trap_of_t_intervals_is_avoided(self) -> None:
        """Five seeds, one of them late: its earlier breach must not lift the bound."""
        under = [Censored(1, 1)] * 5
        late = ratio_bounds([Censored(10, 10)] * 4 + [Censored(1_000, 1_000)], under)
        early = ratio_bounds([Censored(10, 10)] * 5, under)
        assert early.lower == late.lower == 10


def _powers(count: int, base: float) -> list[float]:
    return [base ** (1 + place * math.pi) for place in range(count)]


def _chance_of_at_most(count: int, first: int, second: int) -> float:
    """From scipy's exact test, on two samples whose Mann-Whitney count is `count`."""
    for places in itertools.combinations(range(first + second), first):
        others = [place for place in range(first + second) if place not in places]
        if sum(a > b for a in places for b in others) == count:
            test = stats.mannwhitneyu(places, others, alternative="less", method="exact")
            return float(test.pvalue)
    raise AssertionError(count)


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


class TestRetainedLoss:
    def test_is_the_paired_t_interval(self) -> None:
        draw = np.random.default_rng(5)
        base = [float(right) for right in draw.random(1_000) < 0.9]
        kept = [score * float(draw.random() < 0.98) for score in base]
        found = retained_loss(base, kept)
        losses = [before - after for before, after in zip(base, kept, strict=True)]
        interval = stats.ttest_1samp(losses, 0).confidence_interval(0.90)
        assert found.estimate == pytest.approx(sum(losses) / 1_000)
        assert (found.lower, found.upper) == pytest.approx((interval.low, interval.high))

    def test_no_spread_is_no_proof_on_a_handful(self) -> None:
        few, many = retained_loss([1.0] * 5, [1.0] * 5), retained_loss([1.0] * 500, [1.0] * 500)
        assert few.upper == pytest.approx(1 - 0.05 ** (1 / 5))
        assert many.upper == pytest.approx(0.006, abs=1e-4)

    @pytest.mark.parametrize(
        ("base", "immunized"),
        [([], []), ([1.0], [1.0]), ([1.0] * 4, [1.0] * 3), ([1.0, NAN, 1.0], [1.0] * 3)],
    )
    def test_shows_nothing_without_whole_pairs(
        self, base: list[float], immunized: list[float]
    ) -> None:
        found = retained_loss(base, immunized)
        assert (found.estimate, found.lower, found.upper) == (None, None, None)


values = st.lists(st.floats(0, 1), min_size=1, max_size=6)


class TestDifferenceBounds:
    def test_three_seeds_bound_by_the_worst_pair(self) -> None:
        found = difference_bounds([0.8, 0.7, 0.9], [0.2, 0.3, 0.1])
        assert (found.estimate, found.lower, found.upper) == pytest.approx((0.6, 0.4, 0.8))

    def test_too_few_seeds_bound_nothing(self) -> None:
        found = difference_bounds([0.8, 0.7], [0.1, 0.1])
        assert (found.lower, found.upper) == (None, None)
        assert difference_bounds([], [0.1]).estimate is None

    def test_covers_the_true_difference(self) -> None:
        draw, below = np.random.default_rng(4), 0
        for _ in range(2_000):
            found = difference_bounds(list(draw.normal(0.4, 0.1, 3)), list(draw.normal(0, 0.1, 3)))
            below += found.lower is not None and found.lower <= 0.4
        assert clopper_pearson(2_000 - below, 2_000)[0] <= 0.05
        assert clopper_pearson(2_000 - below, 2_000)[1] >= 0.04

    @settings(deadline=None, max_examples=200, database=None)
    @given(first=values, second=values, which=st.integers(0, 5), by=st.floats(0, 1))
    def test_less_resistance_raises_nothing(
        self, first: list[float], second: list[float], which: int, by: float
    ) -> None:
        place = which % len(first)
        lower = [*first[:place], first[place] - by, *first[place + 1 :]]
        before, after = difference_bounds(first, second), difference_bounds(lower, second)
        assert (after.estimate or 0) <= (before.estimate or 0) + 1e-12
        if before.lower is not None and before.upper is not None:
            assert after.lower is not None
            assert after.upper is not None
            assert after.lower <= before.lower
            assert after.upper <= before.upper


class TestBreachRate:
    @pytest.mark.parametrize(("breaches", "draws"), [(0, 3), (0, 59), (1, 59), (4, 149), (7, 7)])
    def test_is_the_exact_bound_of_scipy(self, breaches: int, draws: int) -> None:
        interval = stats.binomtest(breaches, draws).proportion_ci(0.90, "exact")
        assert breach_rate(breaches, draws, power=1) == pytest.approx((interval.low, interval.high))

    def test_what_may_go_unseen_widens_it(self) -> None:
        assert breach_rate(0, 59, power=0.9)[1] == pytest.approx(
            breach_rate(0, 59, power=1)[1] / 0.9
        )
        assert breach_rate(59, 59, power=0.9)[1] == 1

    @pytest.mark.parametrize(
        ("ceiling", "examples"), [(0.2, 100), (0.2, 60), (0.5, 500), (0.01, 9)]
    )
    def test_power_is_a_binomial_tail(self, ceiling: float, examples: int) -> None:
        least = math.ceil(0.8 * ceiling * examples)
        tail = stats.binom.sf(least - 1, examples, ceiling)
        assert flag_power(ceiling, examples) == pytest.approx(tail, rel=1e-9)


class TestTypicalAttacker:
    @pytest.mark.parametrize(("count", "width"), [(20, 0.30), (48, 0.20), (64, 0.17), (256, 0.085)])
    def test_width(self, count: int, width: float) -> None:
        assert dkw_half_width(count) == pytest.approx(width, abs=0.005)

    def test_band_covers_the_whole_law(self) -> None:
        """The best of five uniform draws: P(best <= x) = x^5, at every x at once."""
        draw, outside = np.random.default_rng(6), 0
        for _ in range(400):
            band = best_of_band(list(draw.random(40)), 5)
            tops = [*(value for value, _, _ in band[1:]), 1.0]
            outside += any(
                low > value**5 + 1e-12 or high < top**5 - 1e-12
                for (value, low, high), top in zip(band, tops, strict=True)
            )
        assert clopper_pearson(outside, 400)[0] <= 0.05

    def test_ties_stand_once(self) -> None:
        assert [value for value, _, _ in best_of_band([0.3, 0.1, 0.3], 2)] == [0.1, 0.3]


class TestRoganGladen:
    def test_undoes_what_the_judge_does(self) -> None:
        seen = 0.3 * 0.9 + 0.7 * (1 - 0.8)
        assert rogan_gladen(seen, sensitivity=0.9, specificity=0.8) == pytest.approx(0.3)

    def test_stays_a_share(self) -> None:
        assert rogan_gladen(0.05, sensitivity=0.9, specificity=0.8) == 0
        assert rogan_gladen(1.0, sensitivity=0.9, specificity=0.8) == 1

    def test_a_judge_that_guesses_corrects_nothing(self) -> None:
        with pytest.raises(ValueError, match="chance"):
            rogan_gladen(0.4, sensitivity=0.5, specificity=0.5)
