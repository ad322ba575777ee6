"""What more trials would find: the best score among so many configurations.

The order in which an attacker happens to try them is luck, so it is averaged over: of the first n
of N configurations in a random order, C(k, n) of C(N, n) lie wholly among the k lowest. That is
exact, and says nothing of configurations nobody tried. Independent draws do: what they say of the
share that breaches is printed below the picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from release_guard import figures, page, wording
from release_guard.curves import Line, Plane, picture
from release_guard.evidence import Arm, Evidence
from release_guard.figures import ARM_NAMES
from release_guard.policy import Policy
from release_guard.statistics import breached
from release_guard.sweep import Configuration, Place, places

_ARMS: tuple[Arm, ...] = ("undefended", "defended")
_FEWEST = 3
_HOW = (
    "A line is the best score among so many configurations, the median over all orders of trying "
    "them; its band holds nine orders in ten. A line that still rises at its end says that more "
    "trials would find more."
)


@dataclass(frozen=True)
class Best:
    """Score of the best of so many configurations: its median, and a band around it."""

    count: int
    low: float
    median: float
    high: float


def best_in_random_order(scores: Sequence[float]) -> list[Best]:
    """Best of the first n of these scores in a random order: 5 %, 50 % and 95 % of the orders."""
    ordered = sorted(scores)
    found = []
    for count in range(1, len(ordered) + 1):
        low, median, high = (
            next(
                ordered[among - 1]
                for among in range(count, len(ordered) + 1)
                if math.comb(among, count) >= share * math.comb(len(ordered), count)
            )
            for share in (0.05, 0.5, 0.95)
        )
        found.append(Best(count, low, median, high))
    return found


def section(evidence: Evidence, policy: Policy) -> str:
    """A picture for each place with enough configurations; nothing if there is none."""
    found = [
        place for place in places(evidence, policy) if len(_scores(place, "defended")) >= _FEWEST
    ]
    if not found:
        return ""
    return page.section("What more trials would find", _HOW, page.gallery(map(_figure, found)))


def _figure(place: Place) -> str:
    found = {arm: best_in_random_order(scores) for arm in _ARMS if (scores := _scores(place, arm))}
    lines = [_line(arm, best) for arm, best in found.items()]
    kind = "drawn at random" if _is_drawn(place) else "as listed"
    said = "; ".join(f"{ARM_NAMES[arm]}: {_said(place, arm)}" for arm in found)
    drawn = picture(
        lines,
        Plane("configurations tried", "best score", is_log=False, ceiling=place.ceiling),
        alt=f"Best score against number of configurations for {place.name}, {kind}. {said}.",
    )
    caption = f"{place.target} at {place.precision}, {kind}"
    return page.figure(drawn, caption, _table(place, found), note=figures.of_draws(place))


def _line(arm: Arm, best: Sequence[Best]) -> Line:
    return Line(
        arm,
        [(each.count, each.median) for each in best],
        [(each.count, each.low, each.high) for each in best],
        marks=[(each.count, each.median) for each in best[:: max(1, len(best) // 8)]],
    )


def _said(place: Place, arm: Arm) -> str:
    scores = _scores(place, arm)
    count = sum(breached(score, place.ceiling) for score in scores)
    return f"{count} of {len(scores)} went above the ceiling"


def _table(place: Place, found: dict[Arm, list[Best]]) -> str:
    rows = [
        (
            ARM_NAMES[arm],
            str(each.count),
            wording.score(each.median),
            f"{wording.score(each.low)} to {wording.score(each.high)}",
        )
        for arm, best in found.items()
        for each in _few(best)
    ]
    table = page.table(
        f"Best of so many configurations, {place.name}",
        ("model", "configurations", "best score, median", "band"),
        rows,
    )
    return table + page.bullets(f"{ARM_NAMES[arm]}: {_said(place, arm)}" for arm in found)


def _few(best: Sequence[Best]) -> list[Best]:
    counts = {2**power for power in range(len(best).bit_length())} | {len(best)}
    return [each for each in best if each.count in counts]


def _is_drawn(place: Place) -> bool:
    return len(_drawn(place, "defended")) >= _FEWEST


def _scores(place: Place, arm: Arm) -> list[float]:
    items = _drawn(place, arm) if _is_drawn(place) else _listed(place, arm)
    return [item.height(item.search) for item in items]


def _drawn(place: Place, arm: Arm) -> list[Configuration]:
    return [item for item in place.configurations(arm) if _has(item, "drawn")]


def _listed(place: Place, arm: Arm) -> list[Configuration]:
    return [item for item in place.configurations(arm) if _has(item, "listed")]


def _has(item: Configuration, origin: str) -> bool:
    return any(record.origin == origin for record in item.search)
