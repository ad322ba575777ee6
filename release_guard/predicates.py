"""Evidence and verdict as in-toto predicates. Pure: every field is derived, none is typed in."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from release_guard import particulars
from release_guard.evidence import Evidence
from release_guard.layout import Artefact
from release_guard.particulars import Json
from release_guard.policy import Budget, Policy
from release_guard.release import Result, Verdict

VERIFIER = "https://release-guard.dev/verifier/v"  # followed by the tool's version

Descriptor = Mapping[str, object]


def resistance(
    evidence: Evidence,
    verdict: Verdict,
    policy: Policy,
    *,
    files: Mapping[str, Descriptor],
    parts: Sequence[Artefact],
) -> Json:
    """Predicate resistance v0.1.

    Args:
        evidence: What was tried.
        verdict: What the gate said of it.
        policy: As written, so that sources are named as the publisher names them.
        files: Resource descriptors of the policy (`policy`) and the full evidence (`report`).
        parts: What the release consists of.
    """
    budget = policy.red_team.budget
    return {
        "tool": {"name": "release-guard", "version": evidence.tool},
        "suite": {"name": "release-guard", "version": evidence.suite},
        **files,
        "baseModel": {"name": "base", "digest": {"sha256": evidence.base}},
        "modality": policy.modality.name,
        "precisions": [each for each in policy.precisions if each not in verdict.left_out],
        "leftOut": list(verdict.left_out),
        "artefacts": [
            {
                "precision": each.precision,
                "folder": each.folder.removesuffix("/"),
                "digest": {"sha256": each.root},
            }
            for each in parts
        ],
        "stages": [stage.model_dump(mode="json") for stage in evidence.stages],
        "budget": {"unit": budget.unit, "limit": budget.limit},
        **particulars.data(evidence, policy),
        **particulars.attempts(evidence, policy),
        **particulars.results(evidence, policy),
        **particulars.comparisons(verdict),
        **particulars.methods(evidence, policy),
        "notTested": list(verdict.not_tested),
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
    """Predicate test-result v0.1. Never `WARNED`, which consumers read as passed.

    Of precisions that are left out it says nothing.
    """
    passed = [check.name for check in verdict.counted if check.result is Result.PASS]
    failed = [check.name for check in verdict.counted if check.result is not Result.PASS]
    return {
        "result": "PASSED" if verdict.passed else "FAILED",
        "configuration": [policy],
        "passedTests": sorted(passed),
        "warnedTests": [],
        "failedTests": sorted(failed),
    }


def svr(evidence: Evidence, verdict: Verdict, policy: Policy, descriptor: Descriptor) -> Json:
    """Predicate SVR v0.2: only what holds, each property with its bound.

    A family that is void at some place has no check there, so it does not hold everywhere.
    """
    names = {check.name for check in verdict.counted}
    published = verdict.published(policy.precisions)
    families: dict[str, list[bool]] = {}
    for check in verdict.counted:
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
            if all(held) and verdict.passed and _judged_at(family, policy, published) <= names
        ),
    }


def _judged_at(family: str, policy: Policy, published: Iterable[str]) -> set[str]:
    """The checks of a family at all targets it is listed for, at every precision published."""
    return {
        f"resists/{family}/{target.name}@{precision}"
        for target in policy.targets
        if any(attack.family == family for attack in policy.aimed_at(target))
        for precision in published
    }


def svr_property(attack: str, budget: Budget, suite: str) -> str:
    """Name of the property that no configuration of an attack breached within a budget."""
    words = ("no_breach", attack, f"{budget.limit:g}", budget.unit, "suite", suite)
    plain = "".join(letter if letter.isalnum() else "_" for letter in "_".join(words))
    return f"RELEASE_GUARD_{plain.upper()}"


def _utc(moment: str, *, days: int = 0) -> str:
    """RFC 3339 in UTC, whole seconds."""
    then = datetime.fromisoformat(moment).astimezone(UTC) + timedelta(days=days)
    return then.strftime("%Y-%m-%dT%H:%M:%SZ")
