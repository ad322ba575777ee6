"""Adaptive search: what to try next on the defended model, given what came of the rest.

A tree-structured Parzen estimator for each attack family, over all its options together. Proposals
come in batches and depend on nothing but the trials before and a seed: any number of workers tries
the same attacks, and a run that was killed goes on as it would have.

Nothing is pruned: a trial runs in one piece, so trying it on a quarter of the budget first would
cost more than it saves (all at a quarter, half of them whole from the start, a few for the audit:
seven eighths of the price), and the audit would have to bound what it misses.

Source: Bergstra et al. (2011), NeurIPS 24, through Optuna.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from release_guard.attacks import Attack, LogUniform
from release_guard.evidence import Outcome
from release_guard.plugins import Spec
from release_guard.policy import Unit
from release_guard.priors import Fits, Prior, draws, possible, priors, rounded
from release_guard.statistics import best_score, budget_to_breach

if TYPE_CHECKING:
    import optuna

BATCH = 4  # proposals at once, whatever the number of workers
WIDER = 3.0  # by how much a range grows whose edge was best
_EDGE = 0.05  # share of a range, in logarithms, that is its edge
_FREE = 1e-6  # share of the budget below which an attack costs nothing, as surgical ones do
_PATIENCE = 20  # proposals that do not fit before one is drawn instead


@dataclass(frozen=True)
class Tried:
    """An attack and how far it was from what the attacker wants; less is better for him."""

    attack: Spec
    loss: float


def loss(outcome: Outcome, ceiling: float, limit: float, unit: Unit) -> float:
    """What an attacker wants to be small, from the outcome of a trial on the defended model.

    A breach gives the logarithm of the share of the budget it took, at most 0; all else the share
    of the ceiling that was lacking, in (0, 1].

    Args:
        outcome: Of the trial.
        ceiling: A score above it is a breach.
        limit: The budget.
        unit: Of the budget.
    """
    cost = budget_to_breach(outcome, ceiling, unit).upper
    if cost is not None:
        return math.log(max(cost / limit, _FREE))
    return (ceiling - best_score(outcome)) / ceiling


def propose(
    listed: Sequence[Spec], tried: Sequence[Tried], *, number: int, fits: Fits, seed: str
) -> tuple[Spec, ...]:
    """The next batch: half of it of the family that did best, the rest of the others in turn.

    Args:
        listed: Attacks with priors; their families are searched.
        tried: What is known, in an order that does not depend on chance.
        number: Of this batch, from 0.
        fits: What the model and its data can take.
        seed: Makes the search reproducible.
    """
    seen = {_identity(Attack.build(item.attack)) for item in tried}

    def is_new(attack: Attack) -> bool:
        return _identity(attack) not in seen and fits(attack)

    families = sorted({spec.name for spec in listed})
    turns = _turns(families, tried, number)
    found: list[Spec] = []
    for family in (*dict.fromkeys(turns), *families):  # a family without new options gives way
        count = min(BATCH - len(found), turns.count(family) or BATCH)
        members = [spec for spec in listed if spec.name == family]
        known = [item for item in tried if item.attack.name == family]
        name = f"{seed}/{number}/{len(found)}/{family}"
        for spec in islice(_of_family(members, known, fits=is_new, seed=name), count):
            seen.add(_identity(Attack.build(spec)))
            found.append(spec)
    return tuple(found)


def _identity(attack: Attack) -> str:
    """The same for two specs of one attack, whether defaults are written or not."""
    return f"{attack.name} {attack.model_dump_json()}"


@dataclass(frozen=True)
class Space:
    """The options of a family that are searched.

    Attributes:
        ranges: Continuous options, on a logarithmic scale: everything tried lies inside.
        values: The others, by what each may be.
    """

    ranges: Mapping[str, tuple[float, float]]
    values: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, found: Mapping[str, Prior], tried: Sequence[tuple[Attack, float]]) -> "Space":
        """The priors, widened to what was tried, and beyond where the best lies at an edge."""
        best = min(tried, key=lambda item: item[1])[0] if tried else None
        ranges: dict[str, tuple[float, float]] = {}
        values: dict[str, Sequence[Any]] = {}
        for name, prior in found.items():
            used = [getattr(attack, name) for attack, _ in tried]
            if isinstance(prior, LogUniform):
                low, high = min([prior.low, *used]), max([prior.high, *used])
                at = None if best is None else getattr(best, name)
                ranges[name] = (low, high) if at is None else _widened(low, high, at)
            else:
                others = [value for value in used if value not in prior.values]
                values[name] = [*prior.values, *dict.fromkeys(others)]
        return cls(ranges, values)

    def encode(self, attack: Attack) -> dict[str, Any]:
        """Coordinates of an attack: choices by their place."""
        numbers = {name: getattr(attack, name) for name in self.ranges}
        places = {name: values.index(getattr(attack, name)) for name, values in self.values.items()}
        return numbers | places

    def decode(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Options at a point."""
        numbers = {name: rounded(point[name]) for name in self.ranges}
        return numbers | {name: values[point[name]] for name, values in self.values.items()}


def _widened(low: float, high: float, best: float) -> tuple[float, float]:
    edge = _EDGE * math.log(high / low)
    at_low, at_high = math.log(best / low) < edge, math.log(high / best) < edge
    return low / WIDER if at_low else low, high * WIDER if at_high else high


def _turns(families: Sequence[str], tried: Sequence[Tried], number: int) -> list[str]:
    known = [item for item in tried if item.attack.name in families]
    best = min(known, key=lambda item: item.loss).attack.name if known else families[0]
    others = [family for family in families if family != best] or [best]
    half = BATCH // 2
    return [best] * half + [others[(number * half + i) % len(others)] for i in range(BATCH - half)]


def _of_family(
    members: Sequence[Spec], tried: Sequence[Tried], *, fits: Fits, seed: str
) -> Iterator[Spec]:
    """Proposals until nothing fits any more; what the estimator does not find is drawn."""
    built = [(Attack.build(item.attack), item.loss) for item in tried]
    best = min(tried, key=lambda item: item.loss).attack if tried else members[0]
    space = Space.of(priors(Attack.build(best)), built)
    study, shape = _study(space, built, seed)
    spares = draws(members, seed=seed, fits=fits)
    while (spec := _ask(study, shape, space, best, fits) or next(spares, None)) is not None:
        yield spec


def _ask(
    study: "optuna.Study", shape: Mapping[str, Any], space: Space, best: Spec, fits: Fits
) -> Spec | None:
    """A proposal that fits; what has no prior is taken from the best attack so far."""
    import optuna  # noqa: PLC0415

    for _ in range(_PATIENCE):
        trial = study.ask(fixed_distributions=dict(shape))
        spec = Spec(name=best.name, **{**best.options, **space.decode(trial.params)})
        if possible(spec, fits):
            return spec  # left open: the next proposals keep away from it
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return None


def _study(
    space: Space, tried: Sequence[tuple[Attack, float]], seed: str
) -> "tuple[optuna.Study, dict[str, Any]]":
    import optuna  # noqa: PLC0415  only searches need it
    from optuna.distributions import (  # noqa: PLC0415
        CategoricalDistribution,
        FloatDistribution,
    )

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    shape: dict[str, Any] = {
        name: FloatDistribution(low, high, log=True) for name, (low, high) in space.ranges.items()
    }
    for name, values in space.values.items():
        shape[name] = CategoricalDistribution(tuple(range(len(values))))
    sampler = optuna.samplers.TPESampler(
        seed=zlib.crc32(seed.encode()), multivariate=True, constant_liar=True
    )
    study = optuna.create_study(sampler=sampler)
    for attack, value in tried:
        params = space.encode(attack)
        study.add_trial(optuna.create_trial(params=params, distributions=dict(shape), value=value))
    return study, shape
