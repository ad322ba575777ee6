"""What the defence costs the skill that must stay, example by example."""

from collections.abc import Sequence

from release_guard import charts, figures, page, wording
from release_guard.charts import Reference, Row
from release_guard.evidence import Evidence
from release_guard.figures import Utility
from release_guard.policy import Policy
from release_guard.svg import WIDTH, Axis

_ACROSS = (8, WIDTH - 12)


def section(evidence: Evidence, policy: Policy) -> str:
    """The retained score before and after; nothing if it was not measured."""
    kept = figures.utilities(evidence, policy)
    title = "What the model is for"
    if not kept:
        return ""
    how = (
        "Mean change of the retained score, example by example, from undefended to defended: left "
        "is loss. It passes if the whisker's left end, the 95 % bound, stays right of the margin."
    )
    rows = [_utility_row(each) for each in kept]
    values = [
        value for row in rows for value in (row.low, row.value, row.high) if value is not None
    ]
    margin = -policy.retain.margin
    reach = 1.25 * max(map(abs, [*values, margin]))
    picture = charts.rows(
        rows,
        Axis(-reach, reach, *_ACROSS),
        title="change of score, percentage points",
        alt="; ".join(f"{row.label}: {row.note}" for row in rows),
        references=[
            Reference(0, "no change", "unity"),
            Reference(margin, f"margin {wording.points(margin)}"),
        ],
        form=lambda value: f"{100 * value:.3g}",
    )
    table = page.table(
        title,
        ("precision", "undefended", "defended", "loss", "95 % bound", "margin", "pairs"),
        [_utility_cells(each) for each in kept],
    )
    return page.section(title, how, page.gallery([page.figure(picture, "Retained data")]), table)


def _utility_row(kept: Utility) -> Row:
    loss = kept.loss
    if loss.estimate is None or loss.upper is None or loss.lower is None:
        return Row(kept.precision, "too few pairs", None)
    worst = wording.points(-loss.upper)
    return Row(
        label=kept.precision,
        note=f"{wording.points(-loss.estimate)}, at worst {worst}",
        value=-loss.estimate,
        low=-loss.upper,
        high=-loss.lower,
    )


def _utility_cells(kept: Utility) -> Sequence[str]:
    loss, bound = kept.loss.estimate, kept.loss.upper
    return (
        kept.precision,
        wording.score(kept.base),
        wording.score(kept.immunized),
        "not claimed" if loss is None else wording.points(loss),
        "none" if bound is None else wording.points(bound),
        wording.points(kept.margin),
        str(kept.pairs),
    )
