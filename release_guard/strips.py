"""The attacks that did best in the search on the defended model, and what fresh seeds say."""

from collections.abc import Sequence
from dataclasses import dataclass

from release_guard import page, svg, wording
from release_guard.charts import frame
from release_guard.evidence import Evidence
from release_guard.page import Cell
from release_guard.policy import Policy
from release_guard.svg import Axis
from release_guard.sweep import Configuration, Place, places

_BEST = 5
_ROW, _TOP = 58, 26
_ACROSS = (8, svg.WIDTH - 12)
_LINE = 46  # bold characters that fit in one line
_HOW = (
    "One row for each of the five attacks that scored highest in the search on the defended "
    "model. The arrow leads from what the search saw (hollow) to the mean of fresh seeds (filled; "
    "ticks are the seeds): the luck of the search falls away on it."
)


@dataclass(frozen=True)
class Strip:
    """One attack on the defended model, within the budget.

    Attributes:
        label: Name and options.
        search: Highest score of the search.
        seeds: Highest score of each fresh seed, growing; empty: not run again.
        finding: What they say.
    """

    label: str
    search: float
    seeds: Sequence[float]
    finding: str

    @property
    def mean(self) -> float | None:
        """Mean over the fresh seeds."""
        return sum(self.seeds) / len(self.seeds) if self.seeds else None

    @property
    def note(self) -> str:
        """In words."""
        if self.mean is None:
            return f"search {self.search:.3f}; not run on fresh seeds"
        found = f"{self.mean:.3f} on {len(self.seeds)} fresh seeds"
        return f"search {self.search:.3f}, {found}{self.finding and f': {self.finding}'}"


def section(evidence: Evidence, policy: Policy) -> str:
    """A picture for each place; nothing if no attack on the defended model was scored."""
    found = [(place, strips) for place in places(evidence, policy) if (strips := best(place))]
    if not found:
        return ""
    pictures = [_figure(place, strips) for place, strips in found]
    return page.section("From the search to fresh seeds", _HOW, page.gallery(pictures))


def best(place: Place) -> list[Strip]:
    """The five highest of the search, highest first."""
    scored = [
        item
        for item in place.configurations("defended")
        if any(record.outcome.curve for record in item.search)
    ]
    ranked = sorted(scored, key=lambda item: (-item.height(item.search), item.attack.label))
    return [_strip(item) for item in ranked[:_BEST]]


def _strip(item: Configuration) -> Strip:
    runs = [records for records in item.fresh.values() if any(r.outcome.curve for r in records)]
    return Strip(
        label=item.attack.label,
        search=item.height(item.search),
        seeds=sorted(map(item.height, runs)),
        finding=item.finding if item.flagged and runs else "",
    )


def _figure(place: Place, strips: Sequence[Strip]) -> str:
    axis = Axis(0, 1, *_ACROSS)
    bottom = _TOP + _ROW * len(strips)
    parts = frame(axis, _TOP, bottom, "score", lambda value: f"{value:.1f}")
    x = axis.at(place.ceiling)
    parts += [
        svg.line(x, 16, x, bottom, css="ceiling"),
        svg.text(x, 12, f"ceiling {place.ceiling:.3g}", anchor="middle", css="halo"),
    ]
    for index, strip in enumerate(strips):
        parts += _drawn(strip, axis, _TOP + _ROW * index)
    alt = "; ".join(f"{strip.label}: {strip.note}" for strip in strips)
    picture = svg.drawing(parts, height=bottom + 38, alt=f"{place.name}: {alt}.")
    return page.figure(picture, f"{place.target} at {place.precision}", _table(place, strips))


def _drawn(strip: Strip, axis: Axis, y: float) -> list[str]:
    start, middle = axis.at(strip.search), y + 44
    parts = [
        svg.text(4, y + 14, svg.shorten(strip.label, _LINE), css="halo strong"),
        svg.text(4, y + 29, strip.note, css="halo"),
    ]
    if strip.mean is not None:
        end = axis.at(strip.mean)
        parts += [
            svg.line(
                axis.at(each), middle - 7, axis.at(each), middle + 7, css="whisker arm-defended"
            )
            for each in strip.seeds
        ]
        parts.append(svg.arrow(start, end, middle, css="whisker arm-defended"))
        parts.append(svg.marker("square", end, middle, css="mark arm-defended"))
    return [*parts, svg.marker("circle", start, middle, css="hollow arm-defended")]


def _table(place: Place, strips: Sequence[Strip]) -> str:
    rows = [
        (
            Cell(strip.label, "wide"),
            wording.score(strip.search),
            wording.score(strip.mean),
            ", ".join(map(wording.score, strip.seeds)) or "not run",
            strip.finding or "not close to the ceiling",
        )
        for strip in strips
    ]
    head = ("attack", "search", "mean of fresh seeds", "each", "finding")
    return page.table(f"From the search to fresh seeds, {place.name}", head, rows)
