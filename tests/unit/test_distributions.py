"""Distributions and exact bounds against scipy."""

import pytest
from scipy import special, stats

from release_guard.distributions import (
    beta_quantile,
    clopper_pearson,
    regularised_beta,
    t_cdf,
    t_quantile,
)


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
