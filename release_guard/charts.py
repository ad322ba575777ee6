"""Rows of values with their bounds, and stacked counts: one line of words above each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from release_guard import svg
from release_guard.evidence import Arm
from release_guard.svg import Axis
from release_guard.wording import amount

SHAPES: Mapping[Arm, str] = {
    "undefended": "circle",
    "defended": "square",
    "never_knew": "triangle",
    "sham": "diamond",
    "ancestor": "inverted",
}
LETTER = 6.2
"""Average width of a character."""

_RIGHT = svg.WIDTH - 12
_ROW, _STACK, _LABEL = 42, 57, 52  # heights of a row; characters that fit in one line


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


def frame(
    across: Axis,
    top: float,
    bottom: float,
    title: str,
    form: Callable[[float], str] = amount,
) -> list[str]:
    """The axis across with its ticks and title."""
    parts = [svg.line(across.start, bottom, across.end, bottom, css="axis")]
    for tick in across.ticks:
        x = across.at(tick)
        parts.append(svg.line(x, top, x, bottom, css="grid"))
        parts.append(svg.text(x, bottom + 15, form(tick), anchor="middle", css="tick"))
    middle = (across.start + across.end) / 2
    return [*parts, svg.text(middle, bottom + 32, title, anchor="middle", css="title")]


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
    parts = frame(axis, top, bottom, title, form)
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
    """One bar a line, made of counts, below what they are."""
    most = max((sum(count for _, count in stack.parts) for stack in content), default=0)
    axis = Axis(0, max(1, most), 8, _RIGHT)
    bottom = 8.0 + _STACK * len(content)
    parts = frame(axis, 8, bottom, title, lambda value: f"{value:.0f}")
    for index, stack in enumerate(content):
        y = 8 + _STACK * index
        parts.append(svg.text(4, y + 14, stack.label, css="halo strong"))
        parts.append(svg.text(4, y + 29, stack.note, css="halo"))
        left = 0
        for css, count in stack.parts:
            start, end = axis.at(left), axis.at(left + count)
            parts.append(svg.rectangle(start, y + 34, max(0, end - start - 1), 14, css=css))
            left += count
    return svg.drawing(parts, height=bottom + 38, alt=alt)


def _reference(axis: Axis, reference: Reference, y: float) -> list[str]:
    x = axis.at(reference.value)
    fits = x + 4 + LETTER * len(reference.label) < svg.WIDTH
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
