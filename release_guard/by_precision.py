"""What rounding costs: the retained skill and the resistance, precision by precision."""

from collections.abc import Iterable, Sequence

from release_guard import charts, figures, page, wording
from release_guard.charts import Reference, Row
from release_guard.evidence import Evidence
from release_guard.page import Cell
from release_guard.policy import Policy, Precision
from release_guard.release import Result, Strength, Verdict
from release_guard.svg import WIDTH, Axis

_ACROSS = (8, WIDTH - 12)
_HEAD = (
    "precision",
    "came out",
    "retained, undefended",
    "retained, defended",
    "target",
    "score before any attack",
    "kappa",
    "kappa, first precision over this",
)
_HOW = (
    "Each precision has weights of its own, which were attacked and judged by themselves. Retained "
    "scores show what rounding costs by itself and what the defence adds to that; kappa, whether "
    "the defence survives it. Whoever has a precision can round it to a coarser one, never back."
)


def section(evidence: Evidence, verdict: Verdict, policy: Policy) -> str:
    """All precisions beside each other; nothing if there is only one."""
    if len(policy.precisions) == 1:
        return ""
    pictures = [*_utility_picture(evidence, policy), *_kappa_pictures(verdict, policy)]
    rows = [
        row
        for precision in policy.precisions
        for row in _rows(precision, evidence, verdict, policy)
    ]
    table = page.table("Precisions", _HEAD, rows)
    return page.section("What rounding costs", _HOW, page.gallery(pictures), table)


def _utility_picture(evidence: Evidence, policy: Policy) -> Iterable[str]:
    rows = [
        Row(
            label=f"{kept.precision}, {arm}",
            note=wording.score(score),
            value=score,
            css=f"arm-{arm}",
            is_bar=True,
            shape=charts.SHAPES["undefended" if arm == "undefended" else "defended"],
        )
        for kept in figures.utilities(evidence, policy)
        for arm, score in (("undefended", kept.base), ("defended", kept.immunized))
    ]
    if rows:
        picture = charts.rows(
            rows, Axis(0, 1, *_ACROSS), title="retained score", alt=_told(rows), form="{:g}".format
        )
        yield page.figure(picture, "Retained score by precision")


def _kappa_pictures(verdict: Verdict, policy: Policy) -> Iterable[str]:
    references = [
        Reference(1, "1: no change", "unity"),
        Reference(policy.gate.kappa, f"bar: {policy.gate.kappa:g}"),
    ]
    for target in dict.fromkeys(each.target for each in verdict.strengths):
        rows = [_kappa_row(each) for each in verdict.strengths if each.target == target]
        values = [value for row in rows for value in (row.low, row.value, row.high) if value]
        if values:
            picture = charts.rows(
                rows,
                Axis.logarithmic([*values, *(each.value for each in references)], *_ACROSS),
                title="kappa (log scale)",
                alt=_told(rows),
                references=references,
            )
            yield page.figure(picture, f"{target}: kappa by precision")


def _kappa_row(found: Strength) -> Row:
    kappa = found.kappa
    return Row(
        label=found.precision,
        note=wording.ratio(kappa),
        value=kappa.estimate or None,
        low=kappa.lower,
        high=None if kappa.censored else kappa.upper,
        censored=kappa.censored,
    )


def _told(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row.label}: {row.note}" for row in rows)


def _rows(
    precision: Precision, evidence: Evidence, verdict: Verdict, policy: Policy
) -> Iterable[Sequence[str | Cell]]:
    """One a target; what does not depend on it stands in the first."""
    kept = [each for each in figures.utilities(evidence, policy) if each.precision == precision]
    retained = (
        [wording.score(kept[0].base), wording.score(kept[0].immunized)] if kept else ["-"] * 2
    )
    said = _outcome(precision, evidence, verdict, policy)
    for number, target in enumerate(policy.targets):
        place = target.name, precision
        before = {
            (u.target, u.precision): u.score for u in evidence.unattacked if u.arm == "defended"
        }
        strength = {(each.target, each.precision): each for each in verdict.strengths}.get(place)
        yield [
            *([precision, said, *retained] if not number else [""] * 4),
            target.name,
            wording.score(before[place]) if place in before else "-",
            wording.ratio(strength.kappa) if strength else "-",
            wording.amount(strength.rounding) if strength and strength.rounding else "-",
        ]


def _outcome(precision: Precision, evidence: Evidence, verdict: Verdict, policy: Policy) -> Cell:
    own = {check.result for check in verdict.checks if check.precision == precision}
    if precision in verdict.published(policy.precisions):
        return Cell("passed", "good")
    if precision in evidence.unrunnable:
        return Cell("could not be run", "unsure")
    if own == {Result.PASS}:
        return Cell("passed, not published", "unsure")
    return Cell("did not pass", "bad" if Result.FAIL in own else "unsure")
