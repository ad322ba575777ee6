"""How far the defence moved the weights: block by block, and the tensors that moved most."""

import re
from collections.abc import Mapping, Sequence
from statistics import median

from release_guard import charts, page, svg, wording
from release_guard.charts import Row
from release_guard.evidence import Evidence
from release_guard.svg import WIDTH, Axis

_MOST_TENSORS = 12
_FEWEST_BLOCKS = 3
_ACROSS = (8, WIDTH - 12)
_LEFT, _TOP, _BOTTOM = 38, 22.0, 190.0
_BLOCK = re.compile(r"\.(\d+)\.")
_TITLE = "Distance moved"
_HOW = (
    "How far the defence moved each tensor, relative to its length: of every block the median, "
    "with whiskers to its least and its most moved tensor; then the {shown} of {all} tensors that "
    "moved most. All at zero would be no defence at all."
)


def section(evidence: Evidence) -> str:
    """The distance between the undefended and the defended weights."""
    moved = evidence.change.relative_l2
    ordered = sorted(moved.items(), key=lambda item: (-item[1], item[0]))
    if not ordered or not ordered[0][1]:
        said = "Nothing moved: the defended weights equal the undefended ones."
        return page.section(_TITLE, said)
    shown = ordered[:_MOST_TENSORS]
    by_block = blocks(moved)
    pictures = [_blocks(by_block)] if len(by_block) >= _FEWEST_BLOCKS else []
    pictures.append(_tensors(shown, ordered))
    how = _HOW.format(shown=len(shown), all=len(moved))
    return page.section(_TITLE, how, page.gallery(pictures))


def blocks(moved: Mapping[str, float]) -> Mapping[int, Sequence[float]]:
    """Distances of each numbered block's tensors; tensors outside any block are left out."""
    found: dict[int, list[float]] = {}
    for name, distance in moved.items():
        if number := _BLOCK.search(name):
            found.setdefault(int(number[1]), []).append(distance)
    return dict(sorted(found.items()))


def _blocks(by_block: Mapping[int, Sequence[float]]) -> str:
    """Narrow whiskers side by side: models have up to a hundred blocks."""
    greatest = max(map(max, by_block.values()))
    across = Axis(min(by_block) - 1, max(by_block) + 1, _LEFT, _ACROSS[1])
    upward = Axis(0, 1.1 * greatest, _BOTTOM, _TOP)
    parts = [*charts.frame(across, _TOP, _BOTTOM, "block", _whole)]
    parts.append(svg.text(4, 12, "relative L2 distance, per cent", css="title"))
    for tick in upward.ticks:
        y = upward.at(tick)
        parts.append(svg.line(_LEFT, y, _ACROSS[1], y, css="grid"))
        parts.append(svg.text(_LEFT - 5, y + 4, _percent(tick), anchor="end", css="tick"))
    for number, distances in by_block.items():
        x, low, high = across.at(number), *map(upward.at, (min(distances), max(distances)))
        parts.append(svg.line(x, low, x, high, css="whisker plain"))
        parts.append(svg.marker("circle", x, upward.at(median(distances)), css="mark plain"))
    most = max(by_block, key=lambda number: median(by_block[number]))
    alt = (
        f"Distance of {len(by_block)} blocks; block {most} moved most, median "
        f"{wording.percent(median(by_block[most]))}."
    )
    picture = svg.drawing(parts, height=_BOTTOM + 38, alt=alt)
    return page.figure(picture, "Blocks", _block_table(by_block))


def _block_table(by_block: Mapping[int, Sequence[float]]) -> str:
    rows = [
        (
            str(number),
            *(wording.percent(of(distances)) for of in (min, median, max)),
            str(len(distances)),
        )
        for number, distances in by_block.items()
    ]
    head = ("block", "least", "median", "most", "tensors")
    return page.table("Distance by block", head, rows)


def _tensors(shown: Sequence[tuple[str, float]], ordered: Sequence[tuple[str, float]]) -> str:
    rows = [
        Row(name, wording.percent(value), value, css="plain", shape="circle", is_bar=True)
        for name, value in shown
    ]
    cells = [(page.Cell(name, "wide"), wording.percent(value)) for name, value in ordered]
    twin = page.table("Distance by tensor", ("tensor", "relative L2"), cells)
    picture = charts.rows(
        rows,
        Axis(0, 1.1 * shown[0][1], *_ACROSS),
        title="relative L2 distance, per cent",
        alt="; ".join(f"{row.label}: {row.note}" for row in rows),
        form=_percent,
    )
    return page.figure(picture, "Tensors that moved most", twin)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else ""
