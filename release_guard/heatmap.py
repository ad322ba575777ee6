"""Learning rate against cost, the defended model beside the undefended one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from release_guard import page, svg, wording
from release_guard.evidence import Arm, Evidence, Record
from release_guard.figures import ARM_NAMES
from release_guard.page import Cell
from release_guard.policy import Policy
from release_guard.statistics import FLAG, breached
from release_guard.sweep import Place, places

_ARMS: tuple[Arm, ...] = ("undefended", "defended")
_FEWEST_RATES = 2
_MOST_COLUMNS = 9
_HALF = 0.5  # decades a row spans
_SHADES = (0.25, 0.5, FLAG, 1.0)  # shares of the ceiling between one shade and the next
_LEFT, _PANEL, _GAP, _TOP, _CELL = 44, 148, 10, 62, 20
_HOW = (
    "The darker (on a dark screen the brighter), the closer to the ceiling was the highest score "
    "any attack with that learning rate had reached by that cost; a cross is a breach, an empty "
    "box was not tried. Thick lines are the edges of the range tried on that model: a best cell "
    "at an edge says that the search should have gone further."
)


@dataclass(frozen=True)
class Grid:
    """One attack family on one arm.

    Attributes:
        rates: Middle of each row, a power of ten to the half, growing.
        costs: Upper end of each column, growing.
        scores: Highest score by row and column; None: not tried.
    """

    rates: Sequence[float]
    costs: Sequence[float]
    scores: Sequence[Sequence[float | None]]

    @property
    def tried(self) -> Sequence[int]:
        """Rows with anything in them."""
        return [row for row, scores in enumerate(self.scores) if any(s is not None for s in scores)]

    @property
    def best(self) -> int | None:
        """The row that breached or rose first; None if nothing was tried."""
        return max(
            self.tried, key=lambda row: sum(s or 0.0 for s in self.scores[row]), default=None
        )

    @property
    def is_best_at_edge(self) -> bool:
        """Whether the best learning rate is the least or the greatest one tried."""
        return self.best is not None and self.best in {self.tried[0], self.tried[-1]}


def section(evidence: Evidence, policy: Policy) -> str:
    """A picture for each attack family with several learning rates; nothing if there is none."""
    pictures = [
        _figure(place, family, found)
        for place in places(evidence, policy)
        for family in place.families
        if (found := grids(place, family))
    ]
    return (
        page.section("Learning rate against cost", _HOW, page.gallery(pictures)) if pictures else ""
    )


def grids(place: Place, family: str) -> Mapping[Arm, Grid]:
    """One grid an arm, with the same rows and columns; empty for fewer than two rows."""
    records = {arm: _rated(place, family, arm) for arm in _ARMS}
    rows = sorted({_row(record) for found in records.values() for record in found})
    if len(rows) < _FEWEST_RATES or not records["defended"]:
        return {}
    halvings = min(_MOST_COLUMNS - 1, max(0, math.floor(math.log2(place.budget))))
    costs = [place.budget / 2**power for power in range(halvings, -1, -1)]
    span = range(rows[0], rows[-1] + 1)
    return {
        arm: Grid(
            [10 ** (row * _HALF) for row in span],
            costs,
            [_scores([r for r in found if _row(r) == row], costs) for row in span],
        )
        for arm, found in records.items()
    }


def _rated(place: Place, family: str, arm: Arm) -> list[Record]:
    return [
        record
        for item in place.family(arm, family)
        for record in (*item.search, *(run for runs in item.fresh.values() for run in runs))
        if isinstance(item.attack.options.get("lr"), float)
        and item.attack.options["lr"] > 0
        and record.outcome.curve
    ]


def _row(record: Record) -> int:
    return round(math.log10(record.trial.attack.options["lr"]) / _HALF)


def _scores(records: Sequence[Record], costs: Sequence[float]) -> list[float | None]:
    points = [
        (point.cost.of(record.trial.budget.unit), point.score)
        for record in records
        for point in record.outcome.curve
    ]
    return [max((score for at, score in points if at <= cost), default=None) for cost in costs]


def _figure(place: Place, family: str, found: Mapping[Arm, Grid]) -> str:
    notes = [
        f"{ARM_NAMES[arm]}: best learning rate about {_rate(grid.rates[grid.best])}"
        + (", at the edge of the range tried" if grid.is_best_at_edge else "")
        for arm, grid in found.items()
        if grid.best is not None
    ]
    height = _TOP + _CELL * len(found["defended"].rates)
    parts = _legend()
    for index, (arm, grid) in enumerate(found.items()):
        parts += _panel(grid, _LEFT + index * (_PANEL + _GAP), ARM_NAMES[arm], place.ceiling)
    parts += [
        svg.text(
            _LEFT - 5,
            _TOP + _CELL * (len(grid.rates) - 1 - row) + 14,
            _rate(rate),
            anchor="end",
            css="tick",
        )
        for row, rate in enumerate(grid.rates)
    ]
    unit = place.policy.red_team.budget.unit
    parts.append(
        svg.text(
            svg.WIDTH / 2 + 16,
            height + 32,
            f"{unit} spent (doubling)",
            anchor="middle",
            css="title",
        )
    )
    drawn = svg.drawing(parts, height=height + 38, alt=". ".join([*notes, place.name]))
    twin = page.bullets(notes) + _table(place, family, found)
    return page.figure(drawn, f"{family}, {place.target} at {place.precision}", twin)


def _legend() -> list[str]:
    """Shades by share of the ceiling."""
    names = [f"{100 * share:.0f} %" for share in _SHADES]
    parts = [svg.text(4, 13, "of ceiling", css="title")]
    for shade in range(len(_SHADES) + 1):
        x = 66 + 46 * shade
        parts.append(svg.rectangle(x, 2, 45, 14, css=f"heat{shade}"))
        if shade < len(names):
            parts.append(svg.text(x + 45.5, 29, names[shade], anchor="middle", css="tick"))
    return [
        *parts,
        svg.marker("cross", 66 + 46 * 4 + 22, 9, css="cross"),
        svg.text(66 + 46 * 5 + 4, 13, "breach", css="title"),
    ]


def _panel(grid: Grid, left: float, name: str, ceiling: float) -> list[str]:
    width, rows = _PANEL / len(grid.costs), len(grid.rates)
    parts = [svg.text(left, _TOP - 8, name, css="strong")]
    for row, scores in enumerate(grid.scores):
        for column, score in enumerate(scores):
            x, y = left + column * width, _TOP + _CELL * (rows - 1 - row)
            parts += _box(x, y, width, score, ceiling)
    for row in {grid.tried[0], grid.tried[-1] + 1} if grid.tried else ():
        y = _TOP + _CELL * (rows - row)
        parts.append(svg.line(left, y, left + _PANEL, y, css="edge"))
    bottom = _TOP + _CELL * rows + 14
    return [
        *parts,
        svg.text(left, bottom, wording.amount(grid.costs[0]), css="tick"),
        svg.text(left + _PANEL, bottom, wording.amount(grid.costs[-1]), anchor="end", css="tick"),
    ]


def _box(x: float, y: float, width: float, score: float | None, ceiling: float) -> list[str]:
    if score is None:
        return [svg.rectangle(x + 1, y + 1, width - 2, _CELL - 2, css="untried")]
    shade = sum(score >= share * ceiling for share in _SHADES[:-1]) + breached(score, ceiling)
    box = svg.rectangle(x + 0.5, y + 0.5, width - 1, _CELL - 1, css=f"heat{shade}")
    if not breached(score, ceiling):
        return [box]
    return [box, svg.marker("cross", x + width / 2, y + _CELL / 2, css="cross")]


def _table(place: Place, family: str, found: Mapping[Arm, Grid]) -> str:
    costs = [wording.amount(cost) for cost in found["defended"].costs]
    rows: list[Sequence[str | Cell]] = [
        (ARM_NAMES[arm], _rate(rate), *(_cell(score, place.ceiling) for score in grid.scores[row]))
        for arm, grid in found.items()
        for row, rate in enumerate(grid.rates)
    ]
    head = ("model", "lr, about", *costs)
    return page.table(f"Learning rate against cost, {family}, {place.name}", head, rows)


def _cell(score: float | None, ceiling: float) -> Cell:
    if score is None:
        return Cell("not tried")
    return Cell(f"{score:.2f}", "bad" if breached(score, ceiling) else "")


def _rate(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-").replace("e+0", "e")
