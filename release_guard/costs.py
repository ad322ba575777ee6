"""What a breach costs on each arm, and the ratios of these costs with their bounds."""

from collections.abc import Iterable

from release_guard import charts, figures, page, wording
from release_guard.charts import Reference, Row
from release_guard.evidence import Arm, Evidence
from release_guard.figures import ARM_NAMES, ARMS
from release_guard.policy import Policy
from release_guard.release import Strength, Verdict
from release_guard.svg import WIDTH, Axis
from release_guard.sweep import Place, places

_ACROSS = (8, WIDTH - 12)
_HOW = (
    "Bars are the least cost at which any attack brought a model over the ceiling, whiskers the "
    "span of the fresh seeds, and an arrow says that some seed had not breached by then. Ratios "
    "of these costs come with one-sided 95 % bounds and the bar of the policy: kappa is defended "
    "over undefended, sigma defended over never knew, head start never knew over undefended, the "
    "way out the cheaper of never knew and ancestor."
)


def section(evidence: Evidence, verdict: Verdict, policy: Policy) -> str:
    """Costs and their ratios for each target and precision; nothing if no trial was run."""
    strengths = {(each.target, each.precision): each for each in verdict.strengths}
    pictures = []
    for place in (place for place in places(evidence, policy) if place.records):
        pictures.append(_cost_picture(place))
        strength = strengths.get((place.target, place.precision))
        if strength is not None and any(row.value for row in _ratio_rows(strength)):
            pictures.append(_ratio_picture(strength, policy))
    return page.section("What a breach costs", _HOW, page.gallery(pictures)) if pictures else ""


def _cost_picture(place: Place) -> str:
    unit = place.policy.red_team.budget.unit
    rows = [row for arm in ARMS for row in _cost_row(place, arm)]
    values = [value for row in rows for value in (row.low, row.value, row.high) if value]
    picture = charts.rows(
        rows,
        Axis.logarithmic([*values, place.budget], *_ACROSS),
        title=f"budget to breach, {unit} (log scale)",
        alt="; ".join(f"{row.label}: {row.note}" for row in rows),
        references=[Reference(place.budget, f"budget {wording.amount(place.budget)}", "budget")],
    )
    return page.figure(picture, f"{place.target} at {place.precision}: budget to breach")


def _cost_row(place: Place, arm: Arm) -> Iterable[Row]:
    best = figures.cheapest(place, arm)
    if best is None:
        return
    limit = place.budget if arm == "defended" else place.horizon
    costs = [cost.capped(limit) for cost in best.fresh or best.costs]
    breaches = [cost.upper for cost in costs if cost.upper is not None]
    css, censored = f"arm-{arm}", len(breaches) < len(costs)
    value = figures.typical(costs)
    note = f"{'>' if not breaches else '≥' if censored else ''} {wording.amount(value)}".strip()
    if len(costs) > 1:
        note += f" ({len(breaches)} of {len(costs)} seeds breached)"
    yield Row(
        label=ARM_NAMES[arm],
        note=note,
        value=value,
        low=min(cost.lower for cost in costs) if breaches else None,
        high=None if censored else max(breaches),
        css=css,
        shape=charts.SHAPES[arm],
        censored=censored,
        is_bar=True,
    )


def _ratio_picture(strength: Strength, policy: Policy) -> str:
    gate = policy.gate
    rows = [*_ratio_rows(strength)]
    values = [value for row in rows for value in (row.low, row.value, row.high) if value]
    references = [
        Reference(1, "1: no change", "unity"),
        Reference(gate.kappa_lower, f"bar, lower bound: {gate.kappa_lower:g}"),
        Reference(gate.kappa, f"bar, kappa: {gate.kappa:g}"),
    ]
    picture = charts.rows(
        rows,
        Axis.logarithmic([*values, *(each.value for each in references)], *_ACROSS),
        title="ratio of costs (log scale)",
        alt="; ".join(f"{row.label}: {row.note}" for row in rows),
        references=references,
    )
    return page.figure(picture, f"{strength.target} at {strength.precision}: ratios of costs")


def _ratio_rows(strength: Strength) -> Iterable[Row]:
    for label, value in wording.multipliers(strength).items():
        if value is None or value.estimate is None:
            yield Row(label, "not claimed", None, css="plain")
            continue
        yield Row(
            label=label,
            note=wording.ratio(value),
            value=value.estimate,
            low=value.lower,
            high=None if value.censored else value.upper,
            css="arm-defended" if label == "kappa" else "plain",
            shape="diamond" if label == "kappa" else "circle",
            censored=value.censored,
        )
