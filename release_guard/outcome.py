"""What came of a command: a document for programs, lines for people. Nothing is decided here."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from release_guard import wording
from release_guard.policy import Policy
from release_guard.release import Check, Receipt, Result, Strength, Verdict

if TYPE_CHECKING:
    from release_guard.changes import Changes
    from release_guard.deliver import Packed
    from release_guard.evidence import Evidence
    from release_guard.judging import Immunized
    from release_guard.manifest import FileEntry
    from release_guard.plan import Plan, Row
    from release_guard.replay import Replay

_GIGA, _MEGA = 1e9, 1e6
_MOST_CHECKS = 12


def verdict_document(verdict: Verdict, evidence: "Evidence") -> dict[str, Any]:
    """Everything the gate said, and about what."""
    return {
        "verdict": verdict.result.name,
        "claim": verdict.claim,
        "checks": [_check(check) for check in verdict.checks],
        "strengths": [asdict(strength) for strength in verdict.strengths],
        "not_tested": list(verdict.not_tested),
        "left_out": list(verdict.left_out),
        "policy_digest": evidence.policy,
        "payload_root": evidence.immunized,
        "artefacts": dict(evidence.artefacts),
        "base_root": evidence.base,
        "trials": len(evidence.records),
    }


def immunized_document(done: "Immunized") -> dict[str, Any]:
    """Where the weights are, what the stages said, and whether they compose."""
    return {
        "model": str(done.folder),
        "stages": [report.model_dump(mode="json") for report in done.stages],
        "checks": [_check(check) for check in done.checks],
    }


def immunized_lines(checks: Sequence[Check]) -> Iterator[str]:
    """Each stage's effect, and what that means for publishing."""
    yield from (f"{check.result.name}: {check.detail}" for check in checks)
    if all(check.result is Result.PASS for check in checks):
        yield "next: publish with the same policy and the same --output goes on from here"
    else:
        yield (
            "next: `publish` would be refused; give a stage without an effect more steps, and put "
            "one that undid another before it"
        )


def replay_document(
    replayed: "Replay", evidence: "Evidence", environment: Mapping[str, str]
) -> dict[str, Any]:
    """Both outcomes, how they compare, and on what machines they came about."""
    trial = replayed.record.trial
    return {
        "key": trial.key,
        "trial": trial.model_dump(mode="json"),
        "agreement": str(replayed.agreement),
        "distance": replayed.distance,
        "tolerance": replayed.tolerance,
        "recorded": replayed.record.outcome.model_dump(mode="json"),
        "replayed": replayed.outcome.model_dump(mode="json"),
        "recorded_on": dict(evidence.environment),
        "replayed_on": dict(environment),
    }


def plan_document(plan: "Plan") -> dict[str, Any]:
    """The plan with its sums."""
    sums = {"trials": plan.trials, "held": plan.held, "steps": plan.steps, "seconds": plan.seconds}
    return {**asdict(plan), **sums}


def verdict_lines(verdict: Verdict, policy: Policy) -> Iterator[str]:
    """Why it was refused, first of all; else what was shown; then the figures."""
    if verdict.passed:
        yield f"PASS: {verdict.claim}"
        if verdict.left_out:
            yield f"  left out, as the report says why: {', '.join(verdict.left_out)}"
    else:
        yield f"REFUSED ({verdict.result.name}), because:"
        yield from _reasons(verdict)
    for strength in verdict.strengths:
        yield f"  {_strength_line(strength)}"
    gate = policy.gate
    wanted = f"kappa {wording.amount(gate.kappa)}, lower bound {wording.amount(gate.kappa_lower)}"
    sigma = "" if gate.sigma_lower is None else f", sigma {wording.amount(gate.sigma_lower)}"
    yield f"  the policy's bar: {wanted}{sigma}"
    if verdict.not_tested:
        yield f"  not tested: {len(verdict.not_tested)} things, all listed in the report"


def advice_lines(verdict: Verdict) -> Iterator[str]:
    """What to do after a refusal."""
    if verdict.result is Result.INCONCLUSIVE:
        yield (
            "next: the evidence is too thin for a yes or a no; see the report for the checks that "
            "are open, then give more seeds or examples (a stronger red_team.profile), or attacks "
            "that do breach the undefended model"
        )
    else:
        yield (
            "next: look at the report for the attack that got through, then strengthen the stages "
            "(`stages` in the policy) and publish again; a lower bar is another policy, with "
            "another digest"
        )


def published_lines(
    packed: "Packed", repo: str, receipt: Receipt | None, *, dry_run: bool
) -> Iterator[str]:
    """Where it went and how to verify it; or why it went nowhere, and what to do."""
    candidate, policy = packed.candidate, packed.policy
    if receipt is not None:
        yield f"published: {receipt.url} at {receipt.revision}"
        yield f"verify: {verify_command(policy, repo, receipt)}"
    elif not candidate.verdict.passed:
        yield "nothing was published"
        yield from advice_lines(candidate.verdict)
    elif dry_run:
        yield f"dry run: nothing was signed or sent; what would be lies in {candidate.directory}"
    else:
        yield (
            f"packed, nothing was signed or sent; next: release-guard publish --repo {repo} "
            f"--candidate {shlex.quote(str(candidate.directory))} "
            f"--expect-root {candidate.payload.root}"
        )


def changes_document(changes: "Changes | None") -> dict[str, Any]:
    """What was, or would be, changed on the hub."""
    return {"changes": None if changes is None else asdict(changes)}


def changes_lines(changes: "Changes") -> Iterator[str]:
    """What a push would change, before it does; then what else has to be known."""
    kinds = {
        "new": changes.new,
        "changed": changes.changed,
        "deleted": changes.deleted,
        "unchanged": changes.unchanged,
    }
    sums = (f"{len(files)} {kind} ({_size(_bytes(files))})" for kind, files in kinds.items())
    yield f"{changes.repo}: {', '.join(sums)}"
    del kinds["unchanged"]
    for kind, files in kinds.items():
        for entry in files:
            note = ", put there by no signed release" if entry in changes.foreign else ""
            yield f"  {kind:<8} {entry.name} ({_size(entry.size)}{note})"
    yield from (f"  note: {remark}" for remark in changes.remarks)


def _bytes(files: "Sequence[FileEntry]") -> int:
    return sum(entry.size for entry in files)


def replay_lines(replayed: "Replay") -> Iterator[str]:
    """How the outcomes compare, then both."""
    trial, distance = replayed.record.trial, replayed.distance
    gap = "at other costs" if distance is None else f"largest difference {distance:.3g}"
    yield f"{replayed.agreement} ({gap}, tolerance {replayed.tolerance:g})"
    yield f"  {trial.arm} {trial.attack.label} {trial.target}@{trial.precision} seed {trial.seed}"
    for name, outcome in (("recorded", replayed.record.outcome), ("replayed", replayed.outcome)):
        scores = " ".join(f"{point.score:.4f}" for point in outcome.curve)
        yield f"  {name}: {outcome.ending} {outcome.note} {scores}".rstrip()


def plan_lines(plan: "Plan") -> Iterator[str]:
    """One line a part of the red team's work, then the sums; all of it at most."""
    if plan.stages:
        yield f"stages, in this order: {', '.join(plan.stages)} (their time is not in this plan)"
    yield f"{'trials':>7} {'in ledger':>9} {'steps':>10} {'time':>9}  phase"
    yield from map(_row_line, plan.rows)
    yield (
        f"{plan.trials:>7} {plan.held:>9} {plan.steps:>10,} "
        f"{wording.duration(plan.seconds):>9}  in all, with {plan.workers} at once"
    )
    yield "at most: a run ends at the first confirmed breach, a trial at its own"
    yield f"disk: up to {_size(plan.disk_bytes)}; free there: {_size(plan.free_bytes)}"


def verify_command(policy: Policy, repo: str, receipt: Receipt) -> str:
    """What to paste, here, to verify what was just pushed."""
    url = urlsplit(receipt.url)
    target = unquote(url.path) if url.scheme == "file" else f"hf://{repo}@{receipt.revision}"
    key = policy.signer.options.get("public", "PUBLIC_KEY")  # none where the key is a variable
    return wording.verify_command(target, policy.signer, key)


def pushed_document(receipt: Receipt | None) -> Mapping[str, Any]:
    """Where it went, if it went anywhere."""
    if receipt is None:
        return {"pushed": False, "url": None, "revision": None}
    return {"pushed": True, "url": receipt.url, "revision": receipt.revision}


def _check(check: Check) -> dict[str, Any]:
    return {**asdict(check), "result": check.result.name}


def _reasons(verdict: Verdict) -> Iterator[str]:
    """What failed; only if nothing did, what is open: a red team stops at the first breach."""
    bad = [check for check in verdict.checks if check.result is not Result.PASS]
    failed = [check for check in bad if check.result is Result.FAIL]
    shown = (failed or bad)[:_MOST_CHECKS]
    yield from (f"  {check.name}: {check.detail}" for check in shown)
    if len(bad) > len(shown):
        yield f"  ({len(bad) - len(shown)} more checks did not pass, see the report)"
    if not verdict.checks:
        yield "  there is no evidence at all"


def _strength_line(strength: Strength) -> str:
    sigma = "" if strength.sigma is None else f", sigma {wording.ratio(strength.sigma)}"
    where = f"{strength.target}@{strength.precision}"
    return f"{where}: kappa {wording.ratio(strength.kappa)}{sigma}"


def _row_line(row: "Row") -> str:
    return (
        f"{row.trials:>7} {row.held:>9} {row.steps:>10,} {wording.duration(row.seconds):>9}  "
        f"{row.phase}: {row.arm.replace('_', '-')}, {row.target}"
    )


def _size(num_bytes: float) -> str:
    if num_bytes >= _GIGA:
        return f"{num_bytes / _GIGA:.1f} GB"
    return f"{num_bytes / _MEGA:.1f} MB"
