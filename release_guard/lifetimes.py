"""Who still stands after a cost: Kaplan-Meier curves of every arm, and what the others fell of."""

from collections.abc import Sequence

from release_guard import page, wording
from release_guard.curves import Curve, Line, Plane, picture
from release_guard.evidence import Evidence
from release_guard.figures import ARM_NAMES
from release_guard.policy import Policy
from release_guard.standing import Standing, lead, mean_share, standing, start
from release_guard.survival import standing_after
from release_guard.sweep import Place, places

_SHARES = (1 / 16, 1 / 4, 1)  # of the budget, in the table
_HOW = (
    "Of all trials of the search on a model, the share that had neither breached nor collapsed by "
    "that cost: a line that stays at the top resists, one that falls early does not. A collapse "
    "is counted apart and is neither; crashed trials are left out and counted in the table."
)


def section(evidence: Evidence, policy: Policy) -> str:
    """A picture for each place, another where something collapsed; nothing without any trial."""
    pictures = [
        drawn
        for place in places(evidence, policy)
        if (found := standing(place))
        for drawn in _figures(place, found)
    ]
    return page.section("Who still stands", _HOW, page.gallery(pictures)) if pictures else ""


def _figures(place: Place, found: Sequence[Standing]) -> list[str]:
    where = f"{place.target} at {place.precision}"
    upright = [Line(each.arm, _curve(place, each, "standing")) for each in found]
    pictures = [
        page.figure(
            _picture(place, upright, "still standing"),
            f"{where}: neither breached nor collapsed",
            _table(place, found),
        )
    ]
    if any(each.collapsed for each in found):
        collapsing = [each for each in found if each.collapsed]
        fallen = [Line(each.arm, _curve(place, each, "collapsed")) for each in collapsing]
        drawn = _picture(place, fallen, "collapsed")
        caption = f"{where}: collapsed (cumulative incidence)"
        pictures.append(page.figure(drawn, caption, _collapses(place, collapsing)))
    return pictures


def _picture(place: Place, lines: Sequence[Line], what: str) -> str:
    unit = place.policy.red_team.budget.unit
    ends = "; ".join(f"{ARM_NAMES[line.arm]} {line.curve[-1][1]:.3f}" for line in lines)
    alt = f"Share of trials {what} against {unit} for {place.name}; at the budget: {ends}."
    plane = Plane(f"{unit} spent, up to the budget (log scale)", f"share {what}")
    return picture(lines, plane, alt=alt)


def _curve(place: Place, each: Standing, share: str) -> Curve:
    """From just before the first cost to the budget; each share holds until the next step."""
    before = (start(place) / 1.2, 1.0 if share == "standing" else 0.0)
    points = [before, *((step.cost, getattr(step, share)) for step in each.steps)]
    return [*points, (place.budget, points[-1][1])]


def _table(place: Place, found: Sequence[Standing]) -> str:
    unit, costs = place.policy.red_team.budget.unit, [share * place.budget for share in _SHARES]
    defended = {each.arm: each for each in found}.get("defended")
    rows = [
        (
            ARM_NAMES[each.arm],
            f"{each.trials} of {len(each.groups)} attacks, {each.crashed} crashed",
            *(wording.percent(standing_after(each.steps, cost)) for cost in costs),
            wording.percent(each.breached),
            wording.percent(each.collapsed),
            wording.percent(mean_share(place, each)),
            _lead(place, defended, each),
        )
        for each in found
    ]
    standing_by = (f"standing by {wording.cost(cost, unit)}" for cost in costs)
    head = (
        "model",
        "trials",
        *standing_by,
        "breached",
        "collapsed",
        "stood for",
        "defended stood longer by",
    )
    note = (
        "Stood for: the mean share of the logarithmic budget (restricted mean). In brackets: "
        "one-sided 95 % bounds, drawing whole attacks again."
    )
    table = page.table(f"Who still stands at the budget, {place.name}", head, rows)
    return table + page.paragraph(note, "how")


def _collapses(place: Place, found: Sequence[Standing]) -> str:
    unit = place.policy.red_team.budget.unit
    rows = [
        (ARM_NAMES[each.arm], wording.cost(step.cost, unit), wording.percent(step.collapsed))
        for each in found
        for step in each.steps
    ]
    return page.table(f"Collapses, {place.name}", ("model", "by", "collapsed"), rows)


def _lead(place: Place, defended: Standing | None, other: Standing) -> str:
    if defended is None or other.arm == "defended":
        return "-"
    return wording.difference(lead(place, defended, other))
