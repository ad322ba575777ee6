"""Student's t, the beta distribution and exact bounds of shares, on the standard library alone."""

import math
from functools import lru_cache

LEVEL = 0.95
"""Of every one-sided bound."""

_TINY = 1e-300
_EPSILON = 1e-15
_FRACTION_TERMS = 10_000
_STEPS = 200
_EDGE = 1e-6


def clopper_pearson(successes: float, trials: int, *, level: float = LEVEL) -> tuple[float, float]:
    """One-sided lower and upper bounds of a share; means of fractional scores count as successes.

    Args:
        successes: Between 0 and `trials`.
        trials: How many, at least 1.
        level: Of each bound alone.
    """
    failures = max(0.0, trials - successes)
    lower = beta_quantile(1 - level, successes, failures + 1) if successes > 0 else 0.0
    upper = beta_quantile(level, successes + 1, failures) if failures > 0 else 1.0
    return lower, upper


@lru_cache(maxsize=1_000)
def t_quantile(level: float, freedom: float) -> float:
    """Quantile of Student's t at 0.5 < level < 1, through I_x(freedom / 2, 1 / 2)."""
    x = beta_quantile(2 * (1 - level), freedom / 2, 0.5)
    return math.sqrt(freedom * (1 - x) / x)


def t_cdf(value: float, freedom: float) -> float:
    """Distribution function of Student's t."""
    tail = regularised_beta(freedom / (freedom + value * value), freedom / 2, 0.5) / 2
    return 1 - tail if value > 0 else tail


def beta_quantile(level: float, a: float, b: float) -> float:
    """The x with I_x(a, b) = level: Newton's steps on the density, halving where they leave."""
    low, high, x = 0.0, 1.0, min(max(a / (a + b), _EDGE), 1 - _EDGE)
    for _ in range(_STEPS):
        excess = regularised_beta(x, a, b) - level
        low, high = (low, x) if excess > 0 else (x, high)
        density = math.exp(_log_beta_front(x, a, b)) / (x * (1 - x))
        following = x - excess / density if density > _TINY else low
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - x) <= _EPSILON * following:
            return following
        x = following
    return x


def regularised_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), a and b positive, x in [0, 1]."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - regularised_beta(1 - x, b, a)
    return math.exp(_log_beta_front(x, a, b)) * _beta_fraction(x, a, b) / a


def _log_beta_front(x: float, a: float, b: float) -> float:
    """Logarithm of x^a (1 - x)^b / B(a, b)."""
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return a * math.log(x) + b * math.log1p(-x) - log_beta


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Lentz' evaluation of the continued fraction of I_x(a, b) (DLMF 8.17.22)."""
    value, c = 1.0, 1.0
    d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _FRACTION_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d)
            c = _away_from_zero(1 + term / c)
            value *= c * d
        if abs(c * d - 1) < _EPSILON:
            break
    return value


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
