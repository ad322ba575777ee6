"""Harm against cost: the worst case of each arm, and how far fresh seeds lie apart."""

from collections.abc import Iterable, Sequence

from release_guard import page, wording
from release_guard.curves import Band, Curve, Line, Plane, envelope, height_at, picture
from release_guard.evidence import Arm, Evidence, Record
from release_guard.figures import ARM_NAMES, ARMS
from release_guard.policy import Policy, Unit
from release_guard.sweep import Place, places

_HOW = (
    "A line is the worst case, the highest score any attack on that model had reached by that "
    "cost; its band spans what the fresh seeds had reached. The defence holds where its line "
    "stays under the dashed ceiling up to the budget; the shaded part lies beyond it. Attacks that "
    "take no step stand at the left edge."
)
_SHARES = (1 / 16, 1 / 4, 1)  # of the budget, in the table


def section(evidence: Evidence, policy: Policy) -> str:
    """A picture for each target and precision; nothing if no trial was scored."""
    pictures = [_figure(place) for place in places(evidence, policy) if _lines(place)]
    return page.section("Harm against cost", _HOW, page.gallery(pictures)) if pictures else ""


def seed_band(records: Iterable[Record], unit: Unit) -> Band:
    """Least and greatest of what fresh seeds had reached by each cost; empty for fewer than two.

    A seed counts as far as its longest trial was allowed to go: where it ended by a breach it has
    kept what it reached.
    """
    by_seed: dict[int, list[Record]] = {}
    for record in records:
        if record.trial.split == "confirm" and record.outcome.curve:
            by_seed.setdefault(record.trial.seed, []).append(record)
    seeds = [
        (envelope(_curves(runs, unit)), max(run.trial.budget.limit for run in runs))
        for runs in by_seed.values()
    ]
    band = []
    for cost in sorted({cost for curve, _ in seeds for cost, _ in curve}):
        heights = [height_at(curve, cost) for curve, limit in seeds if cost <= limit]
        reached = [height for height in heights if height is not None]
        if len(reached) > 1:
            band.append((cost, min(reached), max(reached)))
    return band


def _figure(place: Place) -> str:
    unit, lines = place.policy.red_team.budget.unit, _lines(place)
    reached = "; ".join(f"{ARM_NAMES[line.arm]} at most {line.curve[-1][1]:.3f}" for line in lines)
    drawn = picture(
        lines,
        Plane(f"{unit} spent (log scale)", "score", ceiling=place.ceiling, budget=place.budget),
        alt=f"Score against {unit} for {place.name}: {reached}; ceiling {place.ceiling:.3g}.",
    )
    return page.figure(drawn, f"{place.target} at {place.precision}", _table(place, lines))


def _lines(place: Place) -> list[Line]:
    lines = (_line(place, arm) for arm in ARMS)
    return [line for line in lines if line.curve]


def _line(place: Place, arm: Arm) -> Line:
    unit = place.policy.red_team.budget.unit
    records = [record for record in place.records if record.trial.arm == arm]
    return Line(arm, envelope(_curves(records, unit)), seed_band(records, unit))


def _table(place: Place, lines: Sequence[Line]) -> str:
    unit = place.policy.red_team.budget.unit
    costs = [*(share * place.budget for share in _SHARES), place.horizon]
    rows = [(ARM_NAMES[line.arm], *(_reached(line, cost) for cost in costs)) for line in lines]
    head = ("model", *(f"by {wording.cost(cost, unit)}" for cost in costs))
    return page.table(f"Harm against cost, {place.name}", head, rows)


def _reached(line: Line, cost: float) -> str:
    spans = [(least, most) for at, least, most in line.band if at <= cost]
    worst = wording.score(height_at(line.curve, cost))
    if not spans:
        return worst
    least, most = map(wording.score, spans[-1])
    return f"{worst} (fresh seeds {least} to {most})"


def _curves(records: Iterable[Record], unit: Unit) -> list[Curve]:
    curves = (
        [(point.cost.of(unit), point.score) for point in record.outcome.curve] for record in records
    )
    return [curve for curve in curves if curve]
