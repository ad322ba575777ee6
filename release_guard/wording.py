"""Numbers in words: amounts with their units, shares, ratios and differences with their bounds.

And the command that verifies a release, which several places tell.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import get_args

from release_guard.evidence import Cost
from release_guard.plugins import Spec
from release_guard.policy import HUB_PREFIX, Unit
from release_guard.release import Interval, Strength
from release_guard.statistics import Censored

_MINUTE, _HOUR = 60, 3_600
_MILLION = 1_000_000


def amount(value: float) -> str:
    """Three significant digits, thousands apart, no exponent below a million."""
    if value >= _MILLION:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004  three digits


def count(number: int, noun: str) -> str:
    """A number of things: `1 attack`, `2 attacks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def cost(value: float, unit: Unit) -> str:
    """An amount with its unit."""
    names = {"flops": "FLOPs", "seconds": "s"}
    return f"{amount(value)} {names.get(unit, unit)}"


def effort(spent: Cost | None) -> str:
    """What training took: `800 steps, 25,600 samples, 8e+08 FLOPs, 11 s`."""
    if spent is None:
        return "none counted"
    units: tuple[Unit, ...] = get_args(Unit)
    return ", ".join(cost(spent.of(unit), unit) for unit in units)


def score(value: float | None) -> str:
    """A score in [0, 1] to three places."""
    return "none" if value is None else f"{value:.3f}"


def percent(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.3g} %"


def points(share: float) -> str:
    """A difference of scores in percentage points."""
    return f"{round(100 * share, 2) + 0.0:.2f} points"  # + 0.0: no minus before a zero


def ratio(interval: Interval | None) -> str:
    """A ratio with its bounds: `12.5 (3.1 to 40)`, `≥ 12.5 (3.1 or more)`."""
    if interval is None or interval.estimate is None:
        return "not claimed"
    return f"{'≥ ' if interval.censored else ''}{amount(interval.estimate)} ({bounds(interval)})"


def bounds(interval: Interval) -> str:
    """Both bounds of a ratio in words; what lies above a censored one is not known."""
    lower = None if interval.lower is None else amount(interval.lower)
    upper = None if interval.upper is None or interval.censored else amount(interval.upper)
    if lower is None:
        return "no bounds" if upper is None else f"{upper} or less"
    return f"{lower} or more" if upper is None else f"{lower} to {upper}"


def difference(interval: Interval | None) -> str:
    """A difference of shares with its bounds: `12.00 points (3.00 to 20.00)`."""
    if interval is None or interval.estimate is None:
        return "not claimed"
    lower, upper = (
        "no bound" if bound is None else f"{100 * bound:.2f}"
        for bound in (interval.lower, interval.upper)
    )
    return f"{points(interval.estimate)} ({lower} to {upper})"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds >= _HOUR:
        return f"{seconds / _HOUR:.1f} h"
    return f"{seconds / _MINUTE:.1f} min" if seconds >= _MINUTE else f"{seconds:.3g} s"


def least(found: Censored) -> str:
    """The cost of a breach, or `>` and the cost it was not reached by."""
    return f"> {amount(found.lower)}" if found.upper is None else amount(found.upper)


def between(found: Censored, unit: Unit) -> str:
    """Between which two costs a breach lies."""
    if found.upper is None:
        return f"none by {cost(found.lower, unit)}"
    return f"{amount(found.lower)} to {cost(found.upper, unit)}"


def dataset(source: str) -> str:
    """A data set's name; of a local one the file's alone, as its folder is nobody's business."""
    return source if source.startswith(HUB_PREFIX) else PurePath(source).name


def multipliers(strength: Strength) -> Mapping[str, Interval | None]:
    """Ratios of budgets to breach by name; those with an ancestor only where one was attacked."""
    always = {
        "kappa": strength.kappa,
        "sigma": strength.sigma,
        "head start": strength.head_start,
        "kappa, long run": strength.long_run,
    }
    others = {"over the way out": strength.outside, "ancestor": strength.ancestor}
    return always | {name: value for name, value in others.items() if value is not None}


def strength_table(strengths: Sequence[Strength]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Head and rows of everything that compares arms, a row each target and precision."""
    names = list(dict.fromkeys(name for each in strengths for name in multipliers(each)))
    head = ["target@precision", *names]
    rows = [
        [
            f"{each.target}@{each.precision}",
            *(ratio(multipliers(each).get(name)) for name in names),
        ]
        for each in strengths
    ]
    if any(each.sham is not None for each in strengths):
        head.append("lead over a sham")
        for row, each in zip(rows, strengths, strict=True):
            row.append(difference(each.sham))
    if any(each.rounding is not None for each in strengths):
        head.append("kappa, first precision over this")
        for row, each in zip(rows, strengths, strict=True):
            row.append("-" if each.rounding is None else amount(each.rounding))
    return head, rows


def verify_command(target: str, signer: Spec, key: str) -> str:
    """What to paste to verify a release.

    Args:
        target: A folder or `hf://OWNER/NAME`.
        signer: As the policy names it; one with an `issuer` signs without a key.
        key: Where the public key lies, if there is one.
    """
    trust = ["--key", key]
    if "issuer" in signer.options:
        trust = [
            part
            for name in ("identity", "issuer")
            for part in (f"--{name}", str(signer.options[name]))
        ]
    return shlex.join(["release-guard", "verify", target, *trust])
