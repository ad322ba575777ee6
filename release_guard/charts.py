"""The report's pictures: curves of harm against cost, and rows of values with their bounds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from release_guard import svg
from release_guard.evidence import Arm
from release_guard.figures import ARM_NAMES, ARMS, amount
from release_guard.svg import Axis

SHAPES: Mapping[Arm, str] = {"undefended": "circle", "defended": "square", "never_knew": "triangle"}

Curve = Sequence[tuple[float, float]]
"""Costs and scores, at growing cost."""

_LEFT, _RIGHT = 38, svg.WIDTH - 12
_ROW, _LABEL = 42, 52  # height of a row; characters that fit in one line
_LETTER = 6.2  # average width of a character


@dataclass(frozen=True)
class Reference:
    """A line that values are compared with."""

    value: float
    label: str
    css: str = "reference"


@dataclass(frozen=True)
class Row:
    """One value with its bounds.

    Attributes:
        label: What it is.
        note: The value in words.
        value: Where its mark stands; None: nothing is drawn.
        low: Lower end of its whisker.
        high: Upper end; None: open.
        css: Style of its mark.
        shape: Form of its mark.
        censored: The value is only a lower end: drawn as an arrow.
        is_bar: Draw a bar from the axis's start to the value.
    """

    label: str
    note: str
    value: float | None
    low: float | None = None
    high: float | None = None
    css: str = "arm-defended"
    shape: str = "diamond"
    censored: bool = False
    is_bar: bool = False


@dataclass(frozen=True)
class Stack:
    """Counts side by side, each with its style."""

    label: str
    note: str
    parts: Sequence[tuple[str, int]]


def harm(
    curves: Mapping[Arm, Sequence[Curve]],
    *,
    ceiling: float,
    budget: float,
    unit: str,
    alt: str,
) -> str:
    """Score against cost: every trial faintly, the worst case of each arm in front."""
    top, bottom, height = 50.0, 246.0, 286
    costs = [cost for arm in curves.values() for curve in arm for cost, _ in curve]
    across = Axis.logarithmic([*costs, budget], _LEFT, _RIGHT)
    upward = Axis(0, 1, bottom, top)
    parts = [*_frame(across, top, bottom, f"{unit} spent (log scale)"), *_scale(upward)]
    parts += _budget_line(across, budget, top, bottom)
    drawn = [arm for arm in ARMS if curves.get(arm)]
    for arm in drawn:
        for curve in curves[arm]:
            parts.append(svg.steps(_placed(curve, across, upward), css=f"trial arm-{arm}"))
    for arm in drawn:
        worst = _placed(envelope(curves[arm]), across, upward)
        parts.append(svg.steps(worst, css=f"envelope arm-{arm}"))
        parts += [svg.marker(SHAPES[arm], x, y, css=f"mark arm-{arm}") for x, y in worst]
    y = upward.at(ceiling)
    parts.append(svg.line(_LEFT, y, _RIGHT, y, css="ceiling"))
    parts.append(svg.text(_LEFT + 4, y - 5, f"ceiling {ceiling:.3g}", css="halo"))
    return svg.drawing([*parts, *_legend(drawn)], height=height, alt=alt)


def rows(
    content: Sequence[Row],
    axis: Axis,
    *,
    title: str,
    alt: str,
    references: Sequence[Reference] = (),
    form: Callable[[float], str] = amount,
) -> str:
    """One line a value: its name and its figures above, its mark and whisker below."""
    top = 8.0 + 15 * len(references)
    bottom = top + _ROW * len(content)
    parts = _frame(axis, top, bottom, title, form)
    for level, reference in enumerate(references):
        parts += _reference(axis, reference, 8 + 15 * level)
        parts += [
            svg.line(x, top + _ROW * index + 17, x, top + _ROW * index + 36, css=reference.css)
            for index in range(len(content))
            for x in [axis.at(reference.value)]
        ]
    for index, row in enumerate(content):
        parts += _row(row, axis, top + _ROW * index)
    return svg.drawing(parts, height=bottom + 38, alt=alt)


def stacks(content: Sequence[Stack], *, title: str, alt: str) -> str:
    """One bar a line, made of counts."""
    most = max((sum(count for _, count in stack.parts) for stack in content), default=0)
    axis = Axis(0, max(1, most), 8, _RIGHT)
    bottom = 8.0 + _ROW * len(content)
    parts = _frame(axis, 8, bottom, title, lambda value: f"{value:.0f}")
    for index, stack in enumerate(content):
        y = 8 + _ROW * index
        parts += _names(stack.label, stack.note, y)
        left = 0
        for css, count in stack.parts:
            start, end = axis.at(left), axis.at(left + count)
            parts.append(svg.rectangle(start, y + 19, max(0, end - start - 1), 14, css=css))
            left += count
    return svg.drawing(parts, height=bottom + 38, alt=alt)


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


def _frame(
    across: Axis,
    top: float,
    bottom: float,
    title: str,
    form: Callable[[float], str] = amount,
) -> list[str]:
    parts = [svg.line(across.start, bottom, across.end, bottom, css="axis")]
    for tick in across.ticks:
        x = across.at(tick)
        parts.append(svg.line(x, top, x, bottom, css="grid"))
        parts.append(svg.text(x, bottom + 15, form(tick), anchor="middle", css="tick"))
    middle = (across.start + across.end) / 2
    return [*parts, svg.text(middle, bottom + 32, title, anchor="middle", css="title")]


def _scale(upward: Axis) -> list[str]:
    parts = [svg.text(4, upward.end - 12, "score", css="title")]
    for tick in upward.ticks:
        y = upward.at(tick)
        parts.append(svg.line(_LEFT, y, _RIGHT, y, css="grid"))
        parts.append(svg.text(_LEFT - 5, y + 4, f"{tick:.1f}", anchor="end", css="tick"))
    return parts


def _budget_line(across: Axis, budget: float, top: float, bottom: float) -> list[str]:
    x = across.at(budget)
    is_left = x < svg.WIDTH / 2
    anchor, shift = ("start", 4) if is_left else ("end", -4)
    return [
        svg.rectangle(x, top, across.end - x, bottom - top, css="beyond"),
        svg.line(x, top - 4, x, bottom, css="budget"),
        svg.text(x + shift, top - 6, f"budget {amount(budget)}", anchor=anchor, css="halo"),
    ]


def _legend(arms: Sequence[Arm]) -> list[str]:
    parts = []
    for index, arm in enumerate(arms):
        x = 4 + 120 * index
        parts.append(svg.line(x, 11, x + 28, 11, css=f"envelope arm-{arm}"))
        parts.append(svg.marker(SHAPES[arm], x + 14, 11, css=f"mark arm-{arm}"))
        parts.append(svg.text(x + 34, 15, ARM_NAMES[arm]))
    return parts


def _placed(curve: Curve, across: Axis, upward: Axis) -> list[tuple[float, float]]:
    return [(across.at(cost), upward.at(score)) for cost, score in curve]


def _reference(axis: Axis, reference: Reference, y: float) -> list[str]:
    x = axis.at(reference.value)
    fits = x + 4 + _LETTER * len(reference.label) < svg.WIDTH
    anchor, shift = ("start", 4) if fits else ("end", -4)
    return [
        svg.line(x, y, x, y + 11, css=reference.css),
        svg.text(x + shift, y + 9, reference.label, anchor=anchor, css="halo"),
    ]


def _names(label: str, note: str, y: float) -> list[str]:
    fits = max(8, _LABEL - len(note) - 2)
    return [
        svg.text(4, y + 14, svg.shorten(label, fits), css="halo strong"),
        svg.text(_RIGHT, y + 14, note, anchor="end", css="halo"),
    ]


def _row(row: Row, axis: Axis, y: float) -> list[str]:
    parts = _names(row.label, row.note, y)
    if row.value is None:
        return parts
    middle = y + 26
    x = axis.at(row.value)
    if row.is_bar:
        origin = axis.start if axis.log else axis.at(0)
        left, width = min(origin, x), abs(x - origin)
        parts.append(svg.rectangle(left, middle - 6, width, 12, css=f"bar {row.css}"))
    if row.low is not None:
        far = axis.end if row.high is None else axis.at(row.high)
        parts.append(svg.line(axis.at(row.low), middle, far, middle, css=f"whisker {row.css}"))
        ends = [axis.at(row.low)] + ([] if row.high is None else [far])
        parts += [
            svg.line(end, middle - 5, end, middle + 5, css=f"whisker {row.css}") for end in ends
        ]
    shape = "arrow" if row.censored else row.shape
    return [*parts, svg.marker(shape, x, middle, css=f"mark {row.css}")]
