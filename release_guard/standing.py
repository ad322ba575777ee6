"""The search's trials as lifetimes, arm by arm: how many stand, and for how long."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from release_guard.evidence import Arm, Origin, Record
from release_guard.figures import ARMS
from release_guard.release import Interval
from release_guard.survival import (
    Lifetime,
    Step,
    incidence,
    lifetime,
    restricted_mean,
    restricted_mean_difference,
)
from release_guard.sweep import Place

_ORIGINS: tuple[Origin, ...] = ("listed", "tuned", "drawn")  # adaptive search follows successes


@dataclass(frozen=True)
class Standing:
    """One arm's trials as lifetimes.

    Attributes:
        arm: Whose.
        groups: Lifetimes, one group a configuration.
        crashed: Trials that showed nothing.
        steps: What they come to, up to the budget.
    """

    arm: Arm
    groups: Sequence[Sequence[Lifetime]]
    crashed: int
    steps: Sequence[Step]

    @property
    def trials(self) -> int:
        """How many lifetimes there are."""
        return sum(map(len, self.groups))

    @property
    def breached(self) -> float:
        """Cumulative incidence of breaches by the budget."""
        return self.steps[-1].breached if self.steps else 0.0

    @property
    def collapsed(self) -> float:
        """Cumulative incidence of collapses by the budget."""
        return self.steps[-1].collapsed if self.steps else 0.0


def standing(place: Place) -> list[Standing]:
    """Every arm with lifetimes, from the search up to the budget."""
    found = (_standing(place, arm) for arm in ARMS)
    return [each for each in found if each.trials]


def mean_share(place: Place, each: Standing) -> float:
    """Mean share of the logarithmic budget for which its trials stood."""
    return restricted_mean(each.steps, start=start(place), limit=place.budget)


def lead(place: Place, first: Standing, second: Standing) -> Interval:
    """By what share of the logarithmic budget one arm stood longer than another, with bounds."""
    return restricted_mean_difference(
        first.groups, second.groups, start=start(place), limit=place.budget
    )


def start(place: Place) -> float:
    """Least cost that anything was scored at, before the budget."""
    unit = place.policy.red_team.budget.unit
    costs = (r.outcome.curve[0].cost.of(unit) for r in place.records if r.outcome.curve)
    return min((cost for cost in costs if 0 < cost < place.budget), default=place.budget / 2)


def _standing(place: Place, arm: Arm) -> Standing:
    unit = place.policy.red_team.budget.unit
    by_configuration: dict[str, list[Lifetime]] = {}
    crashed = 0
    for record in _searched(place, arm):
        life = lifetime(record.outcome, place.ceiling, unit)
        if life is None:
            crashed += 1
        else:
            by_configuration.setdefault(record.trial.attack.label, []).append(life)
    groups = list(by_configuration.values())
    steps = incidence([life for group in groups for life in group])
    within = tuple(step for step in steps if step.cost <= place.budget)
    return Standing(arm, groups, crashed, within)


def _searched(place: Place, arm: Arm) -> Iterable[Record]:
    return (
        record
        for record in place.records
        if (record.trial.arm, record.trial.split) == (arm, "search") and record.origin in _ORIGINS
    )
