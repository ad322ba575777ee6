"""Pictures of curves against cost or number of trials, one an arm, each with its band."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from release_guard import svg
from release_guard.charts import LETTER, SHAPES, frame
from release_guard.evidence import Arm
from release_guard.figures import ARM_NAMES
from release_guard.svg import Axis
from release_guard.wording import amount

Curve = Sequence[tuple[float, float]]
"""Costs and heights, at growing cost."""
Band = Sequence[tuple[float, float, float]]
"""Costs, each with the least and the greatest height."""

_Path = Callable[[Sequence[tuple[float, float]]], list[tuple[float, float]]]

_LEFT, _RIGHT = 38, svg.WIDTH - 12
_ENTRIES, _ENTRY, _LINE = 3, 120, 17  # legend: entries in a line, width of one, height of a line
_PLOT = 196


@dataclass(frozen=True)
class Line:
    """One arm's curve.

    Attributes:
        arm: Fixes colour, dashes and marks.
        curve: Where it goes.
        band: The span around it; none: not drawn.
        marks: Where its marks stand; None: at every point of the curve.
    """

    arm: Arm
    curve: Curve
    band: Band = ()
    marks: Curve | None = None


@dataclass(frozen=True)
class Plane:
    """What both axes are.

    Attributes:
        title: Below the axis across.
        upward: Above the axis upward, which goes from 0 to 1.
        is_log: Whether the axis across is.
        is_staircase: Whether each height holds until the next point; else they are joined.
        ceiling: Where a dashed line lies, which the title upward names; None: nowhere.
        budget: From where the picture is shaded; None: nowhere.
    """

    title: str
    upward: str
    is_log: bool = True
    is_staircase: bool = True
    ceiling: float | None = None
    budget: float | None = None


def picture(lines: Sequence[Line], plane: Plane, *, alt: str) -> str:
    """Bands behind, then lines with their marks, the ceiling in front."""
    rows = -(-len(lines) // _ENTRIES)
    top = 33.0 + _LINE * rows
    bottom = top + _PLOT
    across, upward = _across(lines, plane), Axis(0, 1, bottom, top)
    parts = [*frame(across, top, bottom, plane.title), *_scale(upward, _upward(plane))]
    if plane.budget is not None:
        parts += _budget(across, plane.budget, top, bottom)
    path = svg.staircase if plane.is_staircase else list
    parts += [_band(line, across, upward, path) for line in lines if line.band]
    for line in lines:
        parts += _line(line, across, upward, path)
    if plane.ceiling is not None:
        y = upward.at(plane.ceiling)
        parts.append(svg.line(_LEFT, y, _RIGHT, y, css="ceiling"))
    return svg.drawing([*parts, *_legend(lines)], height=bottom + 40, alt=alt)


def envelope(curves: Sequence[Curve]) -> Curve:
    """Highest score that any of the curves had reached by each cost: the worst case."""
    reached: list[tuple[float, float]] = []
    highest = 0.0
    for cost, score in sorted(point for curve in curves for point in curve):
        highest = max(highest, score)
        if reached and reached[-1][0] == cost:
            reached.pop()
        reached.append((cost, highest))
    return reached


def height_at(curve: Curve, cost: float) -> float | None:
    """The height of a staircase at a cost; None before its first point."""
    return next((height for at, height in reversed(curve) if at <= cost), None)


def _across(lines: Sequence[Line], plane: Plane) -> Axis:
    values = [point[0] for line in lines for point in (*line.curve, *line.band)]
    if plane.budget is not None:
        values.append(plane.budget)
    if plane.is_log:
        return Axis.logarithmic(values, _LEFT, _RIGHT)
    return Axis(min(values) - 1, max(values) + 1, _LEFT, _RIGHT)


def _upward(plane: Plane) -> str:
    """The ceiling has its name there: beside its line it would hide what lies close to it."""
    if plane.ceiling is None:
        return plane.upward
    return f"{plane.upward} (dashed: ceiling {plane.ceiling:.3g})"


def _line(line: Line, across: Axis, upward: Axis, path: _Path) -> list[str]:
    placed = _placed(line.curve, across, upward)
    marked = placed if line.marks is None else _placed(line.marks, across, upward)
    shape = SHAPES[line.arm]
    marks = [svg.marker(shape, x, y, css=f"mark arm-{line.arm}") for x, y in marked]
    return [svg.polyline(path(placed), css=f"envelope arm-{line.arm}"), *marks]


def _band(line: Line, across: Axis, upward: Axis, path: _Path) -> str:
    low = _placed([(cost, least) for cost, least, _ in line.band], across, upward)
    high = _placed([(cost, most) for cost, _, most in line.band], across, upward)
    corners = [*path(high), *reversed(path(low))]
    return svg.area(corners, css=f"band arm-{line.arm}")


def _scale(upward: Axis, title: str) -> list[str]:
    parts = [svg.text(4, upward.end - 12, title, css="title")]
    for tick in upward.ticks:
        y = upward.at(tick)
        parts.append(svg.line(_LEFT, y, _RIGHT, y, css="grid"))
        parts.append(svg.text(_LEFT - 5, y + 4, f"{tick:.1f}", anchor="end", css="tick"))
    return parts


def _budget(across: Axis, budget: float, top: float, bottom: float) -> list[str]:
    x, label = across.at(budget), f"budget {amount(budget)}"
    fits = x + 4 + LETTER * len(label) < svg.WIDTH
    anchor, shift = ("start", 4) if fits else ("end", -4)
    return [
        svg.rectangle(x, top, across.end - x, bottom - top, css="beyond"),
        svg.line(x, top - 4, x, bottom, css="budget"),
        svg.text(x + shift, top - 6, label, anchor=anchor, css="halo"),
    ]


def _legend(lines: Sequence[Line]) -> list[str]:
    parts = []
    for index, line in enumerate(lines):
        x, y = 4 + _ENTRY * (index % _ENTRIES), 11 + _LINE * (index // _ENTRIES)
        parts.append(svg.line(x, y, x + 28, y, css=f"envelope arm-{line.arm}"))
        parts.append(svg.marker(SHAPES[line.arm], x + 14, y, css=f"mark arm-{line.arm}"))
        parts.append(svg.text(x + 34, y + 4, ARM_NAMES[line.arm]))
    return parts


def _placed(curve: Curve, across: Axis, upward: Axis) -> list[tuple[float, float]]:
    return [(across.at(cost), upward.at(height)) for cost, height in curve]
