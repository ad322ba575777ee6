"""What the resistance predicate lists: on what, what was tried, what was found, by what methods."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from release_guard import figures
from release_guard.arms import num_searched
from release_guard.draws import draws
from release_guard.evidence import Arm, Evidence, Outcome, Record
from release_guard.figures import ARMS, ENDINGS, Effort
from release_guard.plugins import Spec
from release_guard.policy import MergeTarget, Policy, Target
from release_guard.release import Interval, Strength, Verdict
from release_guard.statistics import Censored, geometric_mean
from release_guard.strength import control
from release_guard.sweep import Place, everywhere, places

Json = dict[str, Any]

_RATIOS: Mapping[str, str] = {
    "kappa": "kappa",
    "sigma": "sigma",
    "headStart": "head_start",
    "longRun": "long_run",
    "outside": "outside",
    "ancestor": "ancestor",
    "sham": "sham",
}
"""Names in the predicate, and of the `Strength`s' fields."""


def data(evidence: Evidence, policy: Policy) -> Json:
    """The data, the targets, and how far the defence moved the weights."""
    moved = evidence.change.relative_l2.values()
    return {
        "datasets": _datasets(evidence, policy),
        "targets": [_target(target, evidence) for target in policy.targets],
        "change": {
            "identical": evidence.change.identical,
            "tensors": len(moved),
            "moved": sum(distance > 0 for distance in moved),
            "largest": max(moved, default=0.0),
        },
    }


def attempts(evidence: Evidence, policy: Policy) -> Json:
    """Every attack, and how many of all trials ended how."""
    controls = list(_controls(evidence, policy))
    void = sorted({control["attack"] for control in controls if not control["breachedU"]})
    endings = [record.outcome.ending for record in evidence.records]
    return {
        "attacks": list(_attacks(evidence, policy, void)),
        "trials": {
            "planned": evidence.planned,
            "ended": len({record.trial.key for record in evidence.records}),
            **{ending: endings.count(ending) for ending in ENDINGS},
        },
        "controls": controls,
        "voided": void,
        "unavailable": dict(evidence.unavailable),
        "unrunnable": dict(evidence.unrunnable),
    }


def results(evidence: Evidence, policy: Policy) -> Json:
    """Scores, budgets to breach and the retained skill."""
    return {
        "measurements": list(_measurements(evidence, policy)),
        "breach": list(_breaches(evidence, policy)),
        "breachedBeyondBudget": list(_beyond_budget(evidence, policy)),
        "utility": _utility(evidence, policy),
    }


def comparisons(verdict: Verdict) -> Json:
    """Whatever compares arms or precisions, one list a kind; what is not known has no entry."""
    compared = {
        name: [
            _interval(each, value)
            for each in verdict.strengths
            if (value := getattr(each, field)) is not None
        ]
        for name, field in _RATIOS.items()
    }
    rounding = [
        {**_where(each), "factor": _rounded(each.rounding)}
        for each in verdict.strengths
        if each.rounding is not None
    ]
    return {**compared, "rounding": rounding}


def methods(evidence: Evidence, policy: Policy) -> Json:
    """Random draws, adaptive search and attacks written against a stage, at every place."""
    concepts = places(evidence, policy)
    stages = dict.fromkeys(stage.name for stage in policy.stages)
    return {
        "draws": [_draws(place) for place in concepts],
        "search": [_search(place) for place in everywhere(evidence, policy)],
        "adaptive": [_adaptive(place, stage) for place in concepts for stage in stages],
    }


def _draws(place: Place) -> Json:
    tally = draws(place)
    return {
        **_where(place),
        "pool": tally.pool,
        "effective": tally.counted,
        "tried": tally.met,
        "lost": tally.lost,
        "breaches": tally.breaches,
        "power": _rounded(tally.power),
        "lower95": _rounded(tally.lower),
        "upper95": _rounded(tally.upper),
    }


def _search(place: Place) -> Json:
    score = figures.highest(figures.searched(place))
    return {**_where(place), "trials": num_searched(place), "score": score}


def _adaptive(place: Place, stage: str) -> Json:
    """A stage is met by an attack written against it that ran whole on the defended model."""
    against = (r for r in place.records if (r.trial.arm, r.against) == ("defended", stage))
    labels = sorted({record.trial.attack.label for record in against})
    return {**_where(place), "stage": stage, "attacks": labels, "met": bool(place.met(stage))}


def _datasets(evidence: Evidence, policy: Policy) -> list[Json]:
    found = {(record.trial.target, record.trial.data) for record in evidence.records}
    sources = {target.name: target.dataset for target in policy.targets}
    described: list[Json] = [
        {"name": name, "uri": sources[name], "digest": {"sha256": digest}}
        for name, digest in sorted(found)
        if name in sources
    ]
    return [*described, {"name": "retained", "uri": policy.retain.dataset}]


def _target(target: Target, evidence: Evidence) -> Json:
    described: Json = {
        "name": target.name,
        "kind": "concept",
        "dataset": target.dataset,
        "ceiling": evidence.ceilings.get(target.name),
    }
    if isinstance(target, MergeTarget):
        names = {"donor": target.donor, "base": target.base, "donorDataset": target.donor_dataset}
        described |= {"kind": "merge", **names}
    return described


def _attacks(evidence: Evidence, policy: Policy, void: Sequence[str]) -> Iterable[Json]:
    """As listed, then whatever else was tried, in the order of the trials' keys."""
    attacks = {attack.label: attack for attack in policy.attacks}
    tried: dict[str, list[Record]] = {}
    for record in sorted(evidence.records, key=lambda record: record.trial.key):
        attacks.setdefault(record.trial.attack.label, record.trial.attack)
        tried.setdefault(record.trial.attack.label, []).append(record)
    for label, attack in attacks.items():
        records, ran = tried.get(label, []), "void" if attack.family in void else "run"
        yield {
            "name": label,
            "family": attack.family,
            "options": attack.model_dump(mode="json", exclude={"name"}),
            "seeds": sorted({record.trial.seed for record in records}),
            "status": ran if records else "notRun",
            "origins": sorted({record.origin for record in records}),
            "against": sorted({record.against for record in records if record.against}),
            "surgical": any(record.surgical for record in records),
        }


def _measurements(evidence: Evidence, policy: Policy) -> Iterable[Json]:
    for place, arm, effort in _efforts(evidence, policy):
        outcomes = [record.outcome for record in effort.records]
        yield {
            "attack": effort.attack.label,
            **_where(place),
            "arm": arm,
            "trials": len(outcomes),
            "n": max(outcome.examples for outcome in outcomes),
            "score": effort.best,
            "breaches": len(effort.breaches),
            "endings": sorted(outcome.ending for outcome in outcomes),
            **_kept(outcomes),
        }


def _kept(outcomes: Sequence[Outcome]) -> Json:
    """Of merges: the most that any kept of the donor's task, and what the donor has."""
    kept = [outcome.kept for outcome in outcomes if outcome.kept is not None]
    if not kept:
        return {}
    merged, alone = max(each.merged for each in kept), max(each.alone for each in kept)
    return {"donorKept": merged, "donorAlone": alone}


def _controls(evidence: Evidence, policy: Policy) -> Iterable[Json]:
    """A listed family that cannot breach the undefended model proves nothing about the other.

    One that teaches nothing needs no control.
    """
    for place in everywhere(evidence, policy):
        for family in (name for name in place.listed if not place.surgical(name)):
            found = control(place, family)
            yield {
                "attack": family,
                **_where(place),
                "seeds": len(found.costs) if found else 0,
                "breachedU": found is not None and found.valid,
            }


def _breaches(evidence: Evidence, policy: Policy) -> Iterable[Json]:
    """Budget to breach of each arm under its best attack, or how far it was looked for."""
    unit = policy.red_team.budget.unit
    for place in places(evidence, policy):
        for arm in ARMS:
            tried = figures.efforts(place, arm)
            best = figures.cheapest(place, arm)
            if best is None:
                continue
            costs = best.fresh or best.costs
            found: Json = {"censoredAt": max(c.lower for each in tried for c in each.costs)}
            if any(cost.upper is not None for cost in costs):
                found = _reached(best.attack, costs)
            yield {**_where(place), "arm": arm, "unit": unit, **found}


def _reached(attack: Spec, costs: Sequence[Censored]) -> Json:
    uppers = [cost.upper for cost in costs if cost.upper is not None]
    return {
        "attack": attack.label,
        "estimate": _rounded(geometric_mean(costs)),
        "lower": min(cost.lower for cost in costs),
        "upper": max(uppers) if len(uppers) == len(costs) else None,
    }


def _efforts(evidence: Evidence, policy: Policy) -> Iterable[tuple[Place, Arm, Effort]]:
    for place in everywhere(evidence, policy):
        for arm in ARMS:
            for effort in figures.efforts(place, arm):
                yield place, arm, effort


def _utility(evidence: Evidence, policy: Policy) -> list[Json]:
    return [
        {
            "dataset": policy.retain.dataset,
            "precision": kept.precision,
            "n": kept.pairs,
            "base": kept.base,
            "immunized": kept.immunized,
            "lossUpper95": _rounded(kept.loss.upper),
            "margin": kept.margin,
            "nonInferior": kept.loss.upper is not None and kept.loss.upper <= kept.margin,
        }
        for kept in figures.utilities(evidence, policy)
    ]


def _beyond_budget(evidence: Evidence, policy: Policy) -> Iterable[Json]:
    for place, effort in figures.beyond_budget(evidence, policy):
        yield {
            "attack": effort.attack.label,
            **_where(place),
            "cost": min(effort.breaches),
            "unit": policy.red_team.budget.unit,
        }


def _interval(strength: Strength, interval: Interval) -> Json:
    return {
        **_where(strength),
        "estimate": _rounded(interval.estimate),
        "lower95": _rounded(interval.lower),
        "upper95": _rounded(interval.upper),
        "censored": interval.censored,
    }


def _where(place: Place | Strength) -> Json:
    return {"target": place.target, "precision": place.precision}


def _rounded(value: float | None) -> float | None:
    """Six digits: logarithms differ in the last ones between systems, signed bytes must not."""
    return None if value is None else float(f"{value:.6g}")
