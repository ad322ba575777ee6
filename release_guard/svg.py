"""Inline SVG by hand: text stays text, colours come from the page's style, equal input equal bytes.

Drawings are narrow (`WIDTH` units) so that 12-unit text stays readable on a phone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
_MOST_TICKS = 7
_DECADE = 10
_MARKERS = {
    "circle": '<circle cx="{x}" cy="{y}" r="3.6" class="{css}"/>',
    "square": '<path d="M{x} {y}m-3.3 -3.3h6.6v6.6h-6.6z" class="{css}"/>',
    "triangle": '<path d="M{x} {y}m0 -4.4l4.2 7.6h-8.4z" class="{css}"/>',
    "inverted": '<path d="M{x} {y}m0 4.4l4.2 -7.6h-8.4z" class="{css}"/>',
    "cross": '<path d="M{x} {y}m-3 -3l6 6m0 -6l-6 6" class="{css}"/>',
    "arrow": '<path d="M{x} {y}m0 -4.5l7 4.5l-7 4.5z" class="{css}"/>',
    "diamond": '<path d="M{x} {y}m0 -4.6l4.6 4.6l-4.6 4.6l-4.6 -4.6z" class="{css}"/>',
}


@dataclass(frozen=True)
class Axis:
    """Maps values between `low` and `high` to positions between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def logarithmic(cls, values: Iterable[float], start: float, end: float) -> "Axis":
        """A log axis with room around the positive values among these."""
        positive = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
        low, high = min(positive) / 1.25, max(positive) * 1.25
        if high / low < _DECADE:
            middle = math.sqrt(low * high)
            low, high = middle / math.sqrt(_DECADE), middle * math.sqrt(_DECADE)
        return cls(low, high, start, end, log=True)

    def at(self, value: float) -> float:
        """Position of a value; what lies outside is drawn at the edge."""
        inside = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> Sequence[float]:
        """About five round values inside."""
        return self._log_ticks() if self.log else self._linear_ticks()

    def _log_ticks(self) -> Sequence[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        powers = range(first, last + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            ticks = [digit * 10.0**power for power in powers for digit in digits]
            inside = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(inside) <= _MOST_TICKS:
                return inside
        return inside[:: len(inside) // 5]

    def _linear_ticks(self) -> Sequence[float]:
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span))
        step = next(
            power * digit
            for digit in (0.1, 0.2, 0.5, 1, 2, 5)
            if span / (power * digit) < _MOST_TICKS
        )
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + index) * step for index in range(count)]


def drawing(elements: Iterable[str], *, height: float, alt: str) -> str:
    """A whole picture, with the text that stands for it where it cannot be seen."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {_round(height)}" role="img" aria-label="{escape(alt)}">'
        f"{''.join(elements)}</svg>"
    )


def text(x: float, y: float, content: str, *, anchor: str = "start", css: str = "") -> str:
    """One line of text; `anchor` is start, middle or end."""
    return (
        f'<text x="{_round(x)}" y="{_round(y)}" text-anchor="{anchor}" class="{css}">'
        f"{escape(content)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, *, css: str) -> str:
    """A straight line."""
    return polyline([(x1, y1), (x2, y2)], css=css)


def polyline(points: Iterable[tuple[float, float]], *, css: str) -> str:
    """A line through these points."""
    path = " ".join(f"{_round(x)},{_round(y)}" for x, y in points)
    return f'<polyline points="{path}" class="{css}"/>'


def area(corners: Iterable[tuple[float, float]], *, css: str) -> str:
    """A filled shape with these corners."""
    path = " ".join(f"{_round(x)},{_round(y)}" for x, y in corners)
    return f'<polygon points="{path}" class="{css}"/>'


def staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of a staircase through these points: each height holds until the next one."""
    return [
        corner
        for (_, before), (x, y) in zip([*points[:1], *points], points, strict=False)
        for corner in ((x, before), (x, y))
    ]


def rectangle(x: float, y: float, width: float, height: float, *, css: str) -> str:
    """A filled box."""
    return (
        f'<rect x="{_round(x)}" y="{_round(y)}" width="{_round(width)}" '
        f'height="{_round(height)}" class="{css}"/>'
    )


def arrow(x1: float, x2: float, y: float, *, css: str) -> str:
    """A level line from `x1` to `x2` with a head in its middle, where no mark hides it."""
    middle, back = (x1 + x2) / 2, math.copysign(min(5.0, abs(x2 - x1) / 2), x1 - x2)
    head = [(middle + back, y - 4), (middle, y), (middle + back, y + 4)]
    return line(x1, y, x2, y, css=css) + polyline(head, css=css)


def marker(shape: str, x: float, y: float, *, css: str) -> str:
    """A circle, square, triangle, inverted, cross, arrow or diamond around a point."""
    return _MARKERS[shape].format(x=_round(x), y=_round(y), css=css)


def shorten(content: str, length: int) -> str:
    """Cut the middle out of a long name: its ends tell names apart."""
    if len(content) <= length:
        return content
    head = (length - 1) // 3
    return f"{content[:head]}…{content[len(content) - (length - 1 - head) :]}"


def _round(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
