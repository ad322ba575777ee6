"""Bounds against scipy, budgets to breach, and what must be monotone."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from release_guard.evidence import Cost, Ending, Outcome, Point
from release_guard.statistics import (
    Censored,
    best_score,
    beta_quantile,
    breached,
    budget_to_breach,
    clopper_pearson,
    confirm,
    flagged,
    geometric_mean,
    ratio_bounds,
    regularised_beta,
    retained_loss,
    t_bounds,
    t_cdf,
    t_quantile,
)

NAN = float("nan")


def outcome(*points: tuple[int, float], ending: Ending = "survived") -> Outcome:
    curve = tuple(
        Point(cost=Cost(steps=steps, samples=4 * steps, flops=0, seconds=0), score=score)
        for steps, score in points
    )
    return Outcome(ending=ending, curve=curve, examples=100)


class TestSpecialFunctions:
    @pytest.mark.parametrize("a", [0.5, 1, 3.7, 60, 2_500])
    @pytest.mark.parametrize("b", [0.5, 1, 12, 900.5])
    @pytest.mark.parametrize("x", [0.0, 1e-6, 0.03, 0.5, 0.97, 1.0])
    def test_regularised_beta(self, x: float, a: float, b: float) -> None:
        assert regularised_beta(x, a, b) == pytest.approx(special.betainc(a, b, x), abs=1e-10)

    @pytest.mark.parametrize("level", [0.01, 0.05, 0.5, 0.95])
    @pytest.mark.parametrize(("a", "b"), [(1, 59), (201, 700), (0.5, 0.5), (3_000, 2)])
    def test_beta_quantile(self, level: float, a: float, b: float) -> None:
        assert beta_quantile(level, a, b) == pytest.approx(stats.beta.ppf(level, a, b), rel=1e-8)

    @pytest.mark.parametrize("freedom", [1, 2, 4, 11, 999])
    @pytest.mark.parametrize("level", [0.6, 0.9, 0.95, 0.975])
    def test_t_quantile(self, level: float, freedom: int) -> None:
        assert t_quantile(level, freedom) == pytest.approx(stats.t.ppf(level, freedom), rel=1e-8)

    @pytest.mark.parametrize("value", [-3.0, -0.2, 0.0, 1.4, 8.0])
    def test_t_cdf(self, value: float) -> None:
        assert t_cdf(value, 5) == pytest.approx(stats.t.cdf(value, 5), abs=1e-12)


class TestClopperPearson:
    @pytest.mark.parametrize(("hits", "trials"), [(0, 1), (0, 59), (1, 59), (7, 7), (201, 900)])
    def test_is_that_of_scipy(self, hits: int, trials: int) -> None:
        lower, upper = clopper_pearson(hits, trials)
        exact = stats.binomtest(hits, trials)
        greater = {"alternative": "greater"}
        low = stats.binomtest(hits, trials, **greater).proportion_ci(0.95, "exact").low
        assert lower == pytest.approx(low, abs=1e-9)
        less = stats.binomtest(hits, trials, alternative="less").proportion_ci(0.95, "exact").high
        assert upper == pytest.approx(less, abs=1e-9)
        assert lower <= exact.statistic <= upper

    def test_no_breach_in_59_draws_bounds_five_percent(self) -> None:
        assert clopper_pearson(0, 59)[1] == pytest.approx(0.0495, abs=1e-4)

    def test_takes_means_of_fractional_scores(self) -> None:
        assert clopper_pearson(10, 100)[0] < clopper_pearson(10.5, 100)[0]


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
        assert confirm([0.10, 0.12, 0.09], 300, 0.2) == "refuted"

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
        scores=st.lists(st.floats(0, 0.3), min_size=3, max_size=6),
        raised=st.lists(st.floats(0, 0.7), min_size=6, max_size=6),
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
