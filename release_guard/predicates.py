"""Evidence and verdict as in-toto predicates. Pure: every field is derived, none is typed in."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from release_guard import figures, sweep
from release_guard.evidence import Arm, Evidence
from release_guard.figures import Effort
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept, Policy, Target
from release_guard.release import Interval, Result, Strength, Verdict
from release_guard.statistics import Censored, geometric_mean
from release_guard.strength import control
from release_guard.sweep import Place, places

VERIFIER = "https://release-guard.dev/verifier/v"  # followed by the tool's version

Json = dict[str, Any]
Descriptor = Mapping[str, Any]


def resistance(
    evidence: Evidence, verdict: Verdict, policy: Policy, *, files: Mapping[str, Descriptor]
) -> Json:
    """Predicate resistance v0.1.

    Args:
        evidence: What was tried.
        verdict: What the gate said of it.
        policy: As written, so that sources are named as the publisher names them.
        files: Resource descriptors of the policy (`policy`) and the full evidence (`report`).
    """
    controls = list(_controls(evidence, policy))
    void = sorted({control["attack"] for control in controls if not control["breachedU"]})
    return {
        "tool": {"name": "release-guard", "version": evidence.tool},
        "suite": {"name": "release-guard", "version": evidence.suite},
        **files,
        "baseModel": {"name": "base", "digest": {"sha256": evidence.base}},
        "modality": policy.modality.name,
        "precisions": list(policy.precisions),
        "datasets": _datasets(evidence, policy),
        "stages": [stage.model_dump(mode="json") for stage in evidence.stages],
        "targets": [_target(target, evidence) for target in policy.targets],
        "budget": _budget(policy.red_team.budget),
        "attacks": list(_attacks(evidence, policy, void)),
        "measurements": list(_measurements(evidence, policy)),
        "controls": controls,
        "breach": list(_breaches(evidence, policy)),
        "kappa": [_ratio(each, each.kappa) for each in verdict.strengths],
        "sigma": [_ratio(each, each.sigma) for each in verdict.strengths if each.sigma],
        "iid": {"draws": 0, "drawsBreachingU": 0, "breaches": 0, "upper95": 1.0},
        "utility": _utility(evidence, policy),
        "notTested": list(verdict.not_tested),
        "voided": void,
        "breachedBeyondBudget": list(_beyond_budget(evidence, policy)),
        "checks": [
            {"name": check.name, "result": check.result.name, "detail": check.detail}
            for check in verdict.checks
        ],
        "verdict": verdict.result.name,
        "claim": verdict.claim,
        "startedAt": _utc(evidence.started_at),
        "finishedAt": _utc(evidence.finished_at),
        "validUntil": _utc(evidence.finished_at, days=policy.gate.valid_days),
        "environment": dict(evidence.environment),
    }


def test_result(verdict: Verdict, policy: Descriptor) -> Json:
    """Predicate test-result v0.1. Never `WARNED`, which consumers read as passed."""
    passed = [check.name for check in verdict.checks if check.result is Result.PASS]
    failed = [check.name for check in verdict.checks if check.result is not Result.PASS]
    return {
        "result": "PASSED" if verdict.passed else "FAILED",
        "configuration": [policy],
        "passedTests": sorted(passed),
        "warnedTests": [],
        "failedTests": sorted(failed),
    }


def svr(evidence: Evidence, verdict: Verdict, policy: Policy, descriptor: Descriptor) -> Json:
    """Predicate SVR v0.2: only what holds, each property with its bound."""
    families: dict[str, list[bool]] = {}
    for check in verdict.checks:
        kind, _, rest = check.name.partition("/")
        if kind == "resists":
            families.setdefault(rest.partition("/")[0], []).append(check.result is Result.PASS)
    budget = policy.red_team.budget
    return {
        "verifier": {"id": f"{VERIFIER}{evidence.tool}", "policies": [descriptor]},
        "timeCreated": _utc(evidence.finished_at),
        "properties": sorted(
            svr_property(family, budget, evidence.suite)
            for family, held in families.items()
            if all(held) and verdict.passed
        ),
    }


def svr_property(attack: str, budget: Budget, suite: str) -> str:
    """Name of the property that no configuration of an attack breached within a budget."""
    words = ("no_breach", attack, f"{budget.limit:g}", budget.unit, "suite", suite)
    plain = "".join(letter if letter.isalnum() else "_" for letter in "_".join(words))
    return f"RELEASE_GUARD_{plain.upper()}"


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
    return {
        "name": target.name,
        "kind": "concept" if isinstance(target, Concept) else "merge",
        "dataset": target.dataset,
        "ceiling": evidence.ceilings.get(target.name),
    }


def _budget(budget: Budget) -> Json:
    return {"unit": budget.unit, "limit": budget.limit}


def _attacks(evidence: Evidence, policy: Policy, void: Sequence[str]) -> Iterable[Json]:
    tried: dict[str, list[int]] = {}
    options: dict[str, Json] = {}
    for attack in (*policy.attacks, *(record.trial.attack for record in evidence.records)):
        options.setdefault(attack.label, attack.model_dump(mode="json"))
    for record in evidence.records:
        tried.setdefault(record.trial.attack.label, []).append(record.trial.seed)
    for label, spec in options.items():
        name = spec.pop("name")
        ran = "void" if name in void else "run"
        yield {
            "name": label,
            "family": name,
            "options": spec,
            "seeds": sorted(set(tried.get(label, ()))),
            "status": ran if label in tried else "notRun",
        }


def _measurements(evidence: Evidence, policy: Policy) -> Iterable[Json]:
    for place, arm, effort in _efforts(evidence, policy):
        outcomes = [record.outcome for record in effort.records]
        yield {
            "attack": effort.attack.label,
            "target": place.target,
            "precision": place.precision,
            "arm": arm,
            "trials": len(outcomes),
            "n": max(outcome.examples for outcome in outcomes),
            "score": effort.best,
            "breaches": len(effort.breaches),
            "endings": sorted(outcome.ending for outcome in outcomes),
        }


def _controls(evidence: Evidence, policy: Policy) -> Iterable[Json]:
    """An attack family that cannot breach the undefended model proves nothing about the other."""
    for place in sweep.places(evidence, policy):
        for family in place.families:
            found = control(place, family)
            yield {
                "attack": family,
                "target": place.target,
                "precision": place.precision,
                "seeds": len(found.costs) if found else 0,
                "breachedU": found is not None and found.valid,
            }


def _breaches(evidence: Evidence, policy: Policy) -> Iterable[Json]:
    """Budget to breach of each arm under its best attack, or how far it was looked for."""
    unit = policy.red_team.budget.unit
    for place in places(evidence, policy):
        for arm in figures.ARMS:
            tried = figures.efforts(place, arm)
            best = figures.cheapest(place, arm)
            if best is None:
                continue
            costs = best.fresh or best.costs
            found: Json = {"censoredAt": max(c.lower for each in tried for c in each.costs)}
            if any(cost.upper is not None for cost in costs):
                found = _reached(best.attack, costs)
            where = {"target": place.target, "precision": place.precision, "arm": arm}
            yield {**where, "unit": unit, **found}


def _reached(attack: Spec, costs: Sequence[Censored]) -> Json:
    uppers = [cost.upper for cost in costs if cost.upper is not None]
    return {
        "attack": attack.label,
        "estimate": _rounded(geometric_mean(costs)),
        "lower": min(cost.lower for cost in costs),
        "upper": max(uppers) if len(uppers) == len(costs) else None,
    }


def _efforts(evidence: Evidence, policy: Policy) -> Iterable[tuple[Place, Arm, Effort]]:
    for place in places(evidence, policy):
        for arm in figures.ARMS:
            for effort in figures.efforts(place, arm):
                yield place, arm, effort


def _ratio(strength: Strength, interval: Interval) -> Json:
    return {
        "target": strength.target,
        "precision": strength.precision,
        "estimate": _rounded(interval.estimate),
        "lower95": _rounded(interval.lower),
        "upper95": _rounded(interval.upper),
        "censored": interval.censored,
    }


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
            "target": place.target,
            "precision": place.precision,
            "cost": min(effort.breaches),
            "unit": policy.red_team.budget.unit,
        }


def _utc(moment: str, *, days: int = 0) -> str:
    """RFC 3339 in UTC, whole seconds."""
    then = datetime.fromisoformat(moment).astimezone(UTC) + timedelta(days=days)
    return then.strftime("%Y-%m-%dT%H:%M:%SZ")


def _rounded(value: float | None) -> float | None:
    """Six digits: logarithms differ in the last ones between systems, signed bytes must not."""
    return None if value is None else float(f"{value:.6g}")
