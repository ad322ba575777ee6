"""What noise on all weights brings out: score against how much of it there is, on each model."""

from collections.abc import Mapping, Sequence

from release_guard import page, wording
from release_guard.curves import Line, Plane, picture
from release_guard.evidence import Arm, Evidence
from release_guard.figures import ARM_NAMES, ARMS
from release_guard.policy import Policy
from release_guard.sweep import Place, places

_ATTACK, _OPTION = "weight_noise", "deviation"
_FEWEST = 2  # sizes of noise that make a curve
_HOW = (
    "A line is the highest score of any seed with so much noise on every weight; its band spans "
    "the seeds. Noise only costs a model some of what it can do, so a line that rises anywhere "
    "shows that something was hidden rather than lost."
)


def section(evidence: Evidence, policy: Policy) -> str:
    """A picture for each place where several sizes were tried; nothing if there is none."""
    found = [(place, _lines(place)) for place in places(evidence, policy)]
    pictures = [_figure(place, lines) for place, lines in found if lines]
    return page.section("Noise on the weights", _HOW, page.gallery(pictures)) if pictures else ""


def scores(place: Place, arm: Arm) -> Mapping[float, Sequence[float]]:
    """Score of each seed by size of the noise, a share of each tensor's root mean square."""
    by_size: dict[float, list[float]] = {}
    for item in place.configurations(arm):
        size = item.attack.options.get(_OPTION)
        if item.attack.name == _ATTACK and size is not None:
            records = [*item.search, *(run for runs in item.fresh.values() for run in runs)]
            scored = [item.height([record]) for record in records if record.outcome.curve]
            by_size.setdefault(float(size), []).extend(scored)
    return {size: sorted(found) for size, found in sorted(by_size.items()) if found}


def _lines(place: Place) -> list[Line]:
    found = [(arm, scores(place, arm)) for arm in ARMS]
    return [
        Line(
            arm,
            [(100 * size, of[-1]) for size, of in by_size.items()],
            [(100 * size, of[0], of[-1]) for size, of in by_size.items()],
        )
        for arm, by_size in found
        if len(by_size) >= _FEWEST
    ]


def _figure(place: Place, lines: Sequence[Line]) -> str:
    said = "; ".join(f"{ARM_NAMES[line.arm]} {_span(line)}" for line in lines)
    plane = Plane(
        "noise, per cent of each tensor's RMS (log scale)",
        "score",
        is_staircase=False,
        ceiling=place.ceiling,
    )
    drawn = picture(lines, plane, alt=f"Score with noise on all weights for {place.name}: {said}.")
    return page.figure(drawn, f"{place.target} at {place.precision}", _table(place, lines))


def _span(line: Line) -> str:
    first, last = line.curve[0], line.curve[-1]
    return (
        f"{wording.score(first[1])} with {wording.amount(first[0])} per cent, "
        f"{wording.score(last[1])} with {wording.amount(last[0])}"
    )


def _table(place: Place, lines: Sequence[Line]) -> str:
    rows = [
        (
            ARM_NAMES[line.arm],
            f"{wording.amount(size)} %",
            wording.score(most),
            f"{wording.score(least)} to {wording.score(most)}",
        )
        for line in lines
        for size, least, most in line.band
    ]
    head = ("model", "noise", "highest score", "seeds")
    return page.table(f"Noise on the weights, {place.name}", head, rows)
