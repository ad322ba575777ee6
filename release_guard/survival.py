"""Budgets to breach as lifetimes: who still stands after a cost, and of what the others fell.

A trial ends by a breach, by a collapse, or standing. Taking a collapse for standing flatters a
model that destroys itself; taking it for a breach blames it for attacks that came to nothing. So
both are causes of their own that compete. Standard library only; reported, never judged.
"""

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from release_guard.evidence import Outcome
from release_guard.release import Interval

Cause = Literal["breach", "collapse"]

_RESAMPLES = 1_000
_TAIL = 0.05


@dataclass(frozen=True)
class Lifetime:
    """How long one trial stood.

    Attributes:
        cost: Of the first score that was a breach, else of the last healthy score.
        cause: What ended it; None: it stood when the trial did.
    """

    cost: float
    cause: Cause | None

    def followed_by(self, recovery: "Lifetime") -> "Lifetime":
        """A collapse and the attempt to recover from it, as one attacker who pays for both."""
        return Lifetime(self.cost + recovery.cost, recovery.cause)


@dataclass(frozen=True)
class Step:
    """Shares of trials from one cost up to the next.

    Attributes:
        cost: Where something ended.
        standing: Neither breached nor collapsed (Kaplan-Meier).
        breached: Cumulative incidence of breaches.
        collapsed: The same of collapses; the three add up to 1.
    """

    cost: float
    standing: float
    breached: float
    collapsed: float


def lifetime(outcome: Outcome, ceiling: float, unit: str) -> Lifetime | None:
    """The lifetime a trial shows; None if it crashed or scored nothing: it is counted elsewhere."""
    costs = [float(getattr(point.cost, unit)) for point in outcome.curve]
    for cost, point in zip(costs, outcome.curve, strict=True):
        if point.score > ceiling:
            return Lifetime(cost, "breach")
    if outcome.ending == "collapsed":
        return Lifetime(costs[-1] if costs else 0.0, "collapse")
    return Lifetime(costs[-1], None) if costs and outcome.ending != "failed" else None


def incidence(lifetimes: Sequence[Lifetime]) -> tuple[Step, ...]:
    """Kaplan-Meier curve and cumulative incidences of both causes, one step a cost with an event.

    Trials that end standing leave after the events of the same cost. At cost c, with n at risk, d
    events and d_k of cause k: standing *= 1 - d / n, incidence_k += standing before * d_k / n.

    Source: Aalen and Johansen (1978), Scandinavian Journal of Statistics 5(3), 141-150.
    """
    standing, fallen = 1.0, {"breach": 0.0, "collapse": 0.0}
    steps = []
    for cost in sorted({life.cost for life in lifetimes if life.cause is not None}):
        at_risk = sum(life.cost >= cost for life in lifetimes)
        before = standing
        for cause in fallen:
            share = sum((life.cost, life.cause) == (cost, cause) for life in lifetimes) / at_risk
            fallen[cause] += before * share
            standing -= before * share
        steps.append(Step(cost, max(0.0, standing), fallen["breach"], fallen["collapse"]))
    return tuple(steps)


def standing_after(steps: Sequence[Step], cost: float) -> float:
    """Share of trials that stand after a cost."""
    place = bisect_right([step.cost for step in steps], cost)
    return steps[place - 1].standing if place else 1.0


def restricted_mean(steps: Sequence[Step], *, start: float, limit: float) -> float:
    """Mean share of the logarithmic budget for which trials stand; in [0, 1].

    The restricted mean survival time of log cost, area under `standing` from log `start` to log
    `limit`, as a share of that range: 1 if nothing fell, 0 if everything fell at the start.

    Args:
        steps: From `incidence`.
        start: Least cost of the grid, positive.
        limit: The budget, more than `start`.
    """
    corners = [start, *(step.cost for step in steps if start < step.cost < limit), limit]
    area = math.fsum(
        standing_after(steps, left) * math.log(right / left)
        for left, right in itertools.pairwise(corners)
    )
    return area / math.log(limit / start)


def restricted_mean_difference(
    first: Sequence[Sequence[Lifetime]],
    second: Sequence[Sequence[Lifetime]],
    *,
    start: float,
    limit: float,
    seed: int = 0,
) -> Interval:
    """Difference of restricted means of two arms, with a bootstrap over configurations.

    Seeds of one configuration say little about others, so whole configurations are drawn again.

    Args:
        first: Lifetimes of an arm, one group a configuration.
        second: The same of the other arm.
        start: Least cost of the grid.
        limit: The budget.
        seed: Fixes the draws: the same evidence gives the same bounds.

    Returns:
        Difference, 5 % and 95 % quantile of its resamples; nothing if an arm is empty.
    """
    if not first or not second:
        return Interval(estimate=None, lower=None, upper=None)
    lot, span = random.Random(seed), (start, limit)  # noqa: S311  no secret
    mine, theirs = _Counts.of(first, span), _Counts.of(second, span)

    def again(counts: _Counts) -> float:
        return counts.mean(lot.choices(counts.groups, k=len(counts.groups)))

    found = sorted(again(mine) - again(theirs) for _ in range(_RESAMPLES))
    cut = round(_TAIL * _RESAMPLES)
    estimate = mine.mean(mine.groups) - theirs.mean(theirs.groups)
    return Interval(estimate=estimate, lower=found[cut - 1], upper=found[-cut])


@dataclass(frozen=True)
class _Counts:
    """What `restricted_mean` of any choice of groups needs, counted once.

    Attributes:
        groups: Of each, the lifetimes at risk at each cost where any ends, then those that end.
        widths: Shares of the logarithmic budget from its start to the first cost, to the next one,
            and so on to the limit.
    """

    groups: Sequence[Sequence[int]]
    widths: Sequence[float]

    @classmethod
    def of(cls, groups: Sequence[Sequence[Lifetime]], span: tuple[float, float]) -> Self:
        start, limit = span
        ends = {life.cost for group in groups for life in group if life.cause is not None}
        costs = sorted(cost for cost in ends if cost < limit)
        corners = [start, *(max(start, cost) for cost in costs), limit]
        whole = math.log(limit / start)
        return cls(
            [_at_risk_and_ended(group, costs) for group in groups],
            [math.log(right / left) / whole for left, right in itertools.pairwise(corners)],
        )

    def mean(self, chosen: Sequence[Sequence[int]]) -> float:
        """Share of the logarithmic budget for which the chosen groups' trials stand."""
        together = list(map(sum, zip(*chosen, strict=True)))
        first, *widths = self.widths
        standing, area = 1.0, first
        for at_risk, ended, width in zip(
            together[: len(widths)], together[len(widths) :], widths, strict=True
        ):
            if ended:
                standing *= 1 - ended / at_risk
            area += standing * width
        return area


def _at_risk_and_ended(group: Sequence[Lifetime], costs: Sequence[float]) -> list[int]:
    ends = [life.cost for life in group if life.cause is not None]
    return [sum(life.cost >= cost for life in group) for cost in costs] + [*map(ends.count, costs)]
