"""Whether stages compose: what each of them is for must still be there after the last one."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from release_guard.evidence import Evidence, StageReport
from release_guard.policy import Policy
from release_guard.release import Check, Result
from release_guard.wording import percent

_FIRST = 2  # schema of evidence that holds effects
_ROUNDED = 1 - 1e-9  # a share that equals its bar reaches it


def composition(evidence: Evidence, policy: Policy) -> Iterator[Check]:
    """One check for each stage: it has an effect, and the later ones left enough of it.

    A model that was judged as it is has none, and evidence from before there were effects is
    judged as it was then.
    """
    if evidence.schema_version >= _FIRST and not (evidence.as_is and not evidence.stages):
        yield from kept(evidence.stages, policy)


def kept(reports: Sequence[StageReport], policy: Policy) -> Iterator[Check]:
    """The same of what stages reported."""
    names = [spec.name for spec in policy.stages]
    for place, name in enumerate(names):
        report = reports[place] if place < len(reports) else None
        result, detail = _left(report, names[place:], policy.gate.stage_effect_kept)
        yield Check(f"stages/{place}-{name}", result, f"{name}: {detail}")
    for place, report in enumerate(reports[len(names) :], start=len(names)):
        detail = f"{report.name}: the policy does not name it"
        yield Check(f"stages/{place}-{report.name}", Result.INCONCLUSIVE, detail)


def told(report: StageReport) -> str:
    """What was seen of a stage's effect: `0.91 after itself, 0.85 after merge_guard`."""
    looks = [
        f"{_figure(effect.value)} after {effect.after if number else 'itself'}"
        for number, effect in enumerate(report.effects)
    ]
    return ", ".join(looks) or "not looked at"


def _left(report: StageReport | None, names: Sequence[str], least: float) -> tuple[Result, str]:
    """Judge a stage by its looks, which must be those after it and after each later stage."""
    if report is None or report.name != names[0]:
        return Result.INCONCLUSIVE, "nothing says that it was applied"
    if [effect.after for effect in report.effects] != list(names):
        return Result.INCONCLUSIVE, "nobody looked at its effect after itself and each later stage"
    seen = f"effect {told(report)}"
    values = [effect.value for effect in report.effects if effect.value is not None]
    if len(values) < len(names) or not all(map(math.isfinite, values)):
        return Result.INCONCLUSIVE, seen
    if values[0] <= 0:
        return Result.FAIL, f"{seen}: it did nothing that it is for"
    return _undone(values, names, seen, least) if len(names) > 1 else (Result.PASS, seen)


def _undone(
    values: Sequence[float], names: Sequence[str], seen: str, least: float
) -> tuple[Result, str]:
    share = values[-1] / values[0]
    left = "all" if share >= 1 else percent(share)
    bar = f"{left} of it is left, at least {percent(least)} is asked"
    if share >= least * _ROUNDED:
        return Result.PASS, f"{seen}; {bar}"
    falls = [before - after for before, after in pairwise(values)]
    worst = names[1 + falls.index(max(falls))]
    return Result.FAIL, f"{seen}: {worst} undid most of it; {bar}"


def _figure(value: float | None) -> str:
    return "no finite number" if value is None else f"{value:.3g}"
