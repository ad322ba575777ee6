"""The figures that card and report print, drawn from the evidence; nothing is judged here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import get_args

from release_guard import wording
from release_guard.draws import draws
from release_guard.evidence import Arm, Ending, Evidence, Origin, Record
from release_guard.plugins import Spec
from release_guard.policy import Policy, Precision, Unit
from release_guard.release import Interval
from release_guard.statistics import (
    Censored,
    Finding,
    budget_to_breach,
    geometric_mean,
    retained_loss,
)
from release_guard.sweep import Configuration, Place, finished, places, within

ARMS: tuple[Arm, ...] = get_args(Arm)
ENDINGS: tuple[Ending, ...] = get_args(Ending)
ORIGINS: tuple[Origin, ...] = get_args(Origin)
ARM_NAMES: Mapping[Arm, str] = {
    "undefended": "undefended",
    "defended": "defended",
    "never_knew": "never knew",
    "sham": "sham",
    "ancestor": "ancestor",
}
_UNLISTED: Mapping[Origin, str] = {"drawn": "drawn at random", "searched": "adaptive search"}


@dataclass(frozen=True)
class Effort:
    """One attack on one arm at one place, over all its seeds.

    Attributes:
        attack: Name and options.
        records: Its trials, in order of seeds.
        costs: Budget to breach of each.
        fresh: Budget to breach of each seed that no search had seen, on examples none had seen.
        best: Highest score within the budget; None if no trial was scored there.
        budget: What the policy lets an attacker spend.
        finding: What fresh seeds say of a breach within the budget; None: nothing came close.
    """

    attack: Spec
    records: tuple[Record, ...]
    costs: tuple[Censored, ...]
    fresh: tuple[Censored, ...]
    best: float | None
    budget: float
    finding: Finding | None

    @property
    def breaches(self) -> tuple[float, ...]:
        """Costs of the seeds that breached, at whatever cost."""
        return tuple(cost.upper for cost in self.costs if cost.upper is not None)

    @property
    def is_surgical(self) -> bool:
        """Whether it only brings back what is hidden, so that it needs no control."""
        return any(record.surgical for record in self.records)

    @property
    def within(self) -> bool:
        """Whether some seed breached within the budget."""
        return any(cost <= self.budget for cost in self.breaches)


@dataclass(frozen=True)
class Utility:
    """Retained score before and after at one precision."""

    precision: Precision
    base: float
    immunized: float
    loss: Interval
    margin: float
    pairs: int


def typical(costs: Sequence[Censored]) -> float:
    """Geometric mean over seeds; those that never breached count with what they were tried to."""
    positive = [cost.point for cost in costs if cost.point > 0]
    return math.exp(math.fsum(map(math.log, positive)) / len(positive)) if positive else 0.0


def arms(evidence: Evidence) -> tuple[Arm, ...]:
    """The arms that anything was tried on."""
    tried = {record.trial.arm for record in evidence.records}
    return tuple(arm for arm in ARMS if arm in tried)


def efforts(place: Place, arm: Arm) -> tuple[Effort, ...]:
    """Every attack tried there, in the policy's order, then what was tuned."""
    listed = [attack.label for attack in place.attacks]
    found = place.configurations(arm)
    known = {item.attack.label: item for item in found}
    ordered = [known.pop(label) for label in listed if label in known]
    return tuple(_effort(item) for item in (*ordered, *known.values()))


def worst_unlisted(place: Place, arm: Arm) -> Mapping[str, Effort]:
    """Of what the policy does not list: the effort that went furthest, by kind and family.

    A confirmed breach goes before one that is open, that before the highest score.
    """
    listed = {attack.label for attack in place.attacks}
    gravity = {"confirmed": 2, "unresolved": 1}
    groups: dict[str, list[Effort]] = {}
    for effort in efforts(place, arm):
        if effort.attack.label not in listed:
            origins = {record.origin for record in effort.records}
            kind = next((_UNLISTED[each] for each in _UNLISTED if each in origins), "not listed")
            groups.setdefault(f"{effort.attack.family}, {kind}", []).append(effort)
    return {
        name: max(group, key=lambda each: (gravity.get(each.finding or "", 0), each.best or 0.0))
        for name, group in groups.items()
    }


def of_draws(place: Place) -> str:
    """What independent random draws say of all configurations; nothing if none was made."""
    found = draws(place)
    if not found.pool:
        return ""
    lost = f" ({found.lost} with those that were lost)" if found.lost != found.breaches else ""
    return (
        f"Of {found.counted} random configurations that breach the undefended model, or may, "
        f"{found.breaches} breach the defended one{lost}: at most {wording.percent(found.upper)} "
        "of all such configurations do (95 % bound)."
    )


def searched(place: Place) -> tuple[Effort, ...]:
    """What an adaptive search tried on the defended model."""
    return tuple(
        effort
        for effort in efforts(place, "defended")
        if any(record.origin == "searched" for record in effort.records)
    )


def highest(tried: Iterable[Effort]) -> float | None:
    """Highest score within the budget; None if nothing was scored."""
    return max((effort.best for effort in tried if effort.best is not None), default=None)


def of_search(place: Place) -> str:
    """What an adaptive search on the defended model found; nothing if there was none."""
    found = searched(place)
    if not found:
        return ""
    return (
        f"An adaptive search on the defended model tried {wording.count(len(found), 'attack')}: "
        f"{wording.score(highest(found))} at most within the budget, ceiling "
        f"{wording.score(place.ceiling)}."
    )


def cheapest(place: Place, arm: Arm) -> Effort | None:
    """The attack that says what a breach of an arm costs; None if nothing was tried.

    The defended arm is as weak as its weakest attack within the budget; of the others, the attack
    that did best in the search counts. Only attacks with fresh seeds count where there are any.
    """
    tried = place.configurations(arm)
    fresh = [item for item in tried if item.fresh]

    def rank(item: Configuration) -> tuple[float, float, str]:
        within_budget = geometric_mean(item.costs(place.budget)) if item.fresh else math.inf
        first = within_budget if arm == "defended" else 0.0
        return first, item.search_cost, item.attack.label

    best = min(fresh or tried, key=rank, default=None)
    return None if best is None else _effort(best)


def ending(record: Record, ceiling: float) -> Ending:
    """How a trial ended; one that ran on to its budget above the ceiling did breach."""
    if _cost(record, ceiling).upper is not None:
        return "breached"
    return record.outcome.ending


def beyond_budget(evidence: Evidence, policy: Policy) -> tuple[tuple[Place, Effort], ...]:
    """Attacks that breached the defended model, but only after spending more than the budget."""
    return tuple(
        (place, effort)
        for place in places(evidence, policy)
        for effort in efforts(place, "defended")
        if effort.breaches and not effort.within
    )


def utilities(evidence: Evidence, policy: Policy) -> tuple[Utility, ...]:
    """Retained score before and after, at every precision that was measured."""
    return tuple(
        Utility(
            precision=kept.precision,
            base=sum(kept.base) / len(kept.base),
            immunized=sum(kept.immunized) / len(kept.immunized),
            loss=retained_loss(kept.base, kept.immunized),
            margin=policy.retain.margin,
            pairs=len(kept.base),
        )
        for kept in evidence.retention
        if kept.base and len(kept.base) == len(kept.immunized)
    )


def bar(policy: Policy) -> tuple[tuple[str, str], ...]:
    """What was fixed before anything was measured: name and value."""
    gate, red = policy.gate, policy.red_team
    sigma = (
        "reported only"
        if gate.sigma_lower is None
        else f"at least {wording.amount(gate.sigma_lower)}"
    )
    left = wording.percent(gate.stage_effect_kept)
    return (
        ("budget of each attack", wording.cost(red.budget.limit, red.budget.unit)),
        ("kappa", f"at least {wording.amount(gate.kappa)}"),
        ("kappa, lower bound", f"at least {wording.amount(gate.kappa_lower)}"),
        ("sigma, lower bound", sigma),
        *([("stage's effect left at the end", f"at least {left}")] if policy.stages else []),
        ("retained loss, upper bound", f"at most {wording.points(policy.retain.margin)}"),
        ("undefended seeds breached", f"at least {wording.percent(gate.control_share)}"),
        ("attacks that must be valid", ", ".join(gate.mandatory) or "none"),
        ("trials that may crash", f"at most {wording.percent(gate.max_failed)}"),
        ("confirming seeds", str(red.confirm_seeds)),
    )


def dates(evidence: Evidence, policy: Policy) -> tuple[str, str]:
    """The day the evidence was complete, and the day a PASS on it no longer counts."""
    day = finished(evidence)
    if day is None:
        return "unknown", "unknown"
    return day.isoformat(), (day + timedelta(days=policy.gate.valid_days)).isoformat()


def found(effort: Effort, unit: Unit) -> str:
    """What came of an effort: `0.412 at most`, `0.61, breached at 12 steps (3 of 4 trials)`."""
    if effort.breaches:
        trials = f"{len(effort.breaches)} of {len(effort.records)} trials"
        least = min(effort.breaches)
        at = f"breached at {wording.cost(least, unit)}" if least else "breached without a step"
        if effort.within:
            return f"{wording.score(effort.best)}, {at} ({trials})"
        return f"{wording.score(effort.best)} at most; {at}, beyond the budget ({trials})"
    endings = sorted({record.outcome.ending for record in effort.records})
    if effort.best is None or endings != ["survived"]:
        return f"{' and '.join(endings)}; {wording.score(effort.best)} at most"
    return f"{wording.score(effort.best)} at most"


def _effort(configuration: Configuration) -> Effort:
    place = configuration.place
    fresh = (record for records in configuration.fresh.values() for record in records)
    records = sorted(
        (*configuration.search, *fresh), key=lambda item: (item.trial.seed, item.trial.key)
    )
    scored = any(within(record, place.budget).outcome.curve for record in records)
    return Effort(
        attack=configuration.attack,
        records=tuple(records),
        costs=tuple(_cost(record, place.ceiling) for record in records),
        fresh=configuration.costs(place.horizon),
        best=configuration.height(records) if scored else None,
        budget=place.budget,
        finding=configuration.finding if configuration.flagged else None,
    )


def _cost(record: Record, ceiling: float) -> Censored:
    budget = record.trial.budget
    found = budget_to_breach(record.outcome, ceiling, budget.unit)
    if found.upper is None and record.outcome.ending == "survived":
        return Censored(max(found.lower, budget.limit), None)
    return found
