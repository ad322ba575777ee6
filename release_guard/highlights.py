"""The key figures in large type: multipliers, random attacks, the retained skill."""

from release_guard import figures, page, wording
from release_guard.draws import Draws, draws
from release_guard.evidence import Evidence
from release_guard.figures import Utility
from release_guard.policy import Policy
from release_guard.release import Interval, Strength, Verdict
from release_guard.sweep import Place, places


def section(evidence: Evidence, verdict: Verdict, policy: Policy) -> str:
    """The weakest place's figures as tiles, those of all places as a table.

    What is left out of the release is in the table only.
    """
    tiles, out = [], verdict.left_out
    strengths = [each for each in verdict.strengths if each.precision not in out]
    if strengths:
        weakest = min(strengths, key=_kappa)
        tiles += _strength_tiles(weakest, policy, many=len(strengths) > 1)
    there = [place for place in places(evidence, policy) if place.precision not in out]
    drawn = [(place, found) for place in there if (found := draws(place)).pool]
    if drawn:
        tiles.append(_draws_tile(*max(drawn, key=lambda each: each[1].upper), many=len(drawn) > 1))
    kept = [each for each in figures.utilities(evidence, policy) if each.precision not in out]
    if kept:
        tiles.append(_loss_tile(max(kept, key=_bound), many=len(kept) > 1))
    if not tiles:
        return page.section("Key figures", "None: nothing was measured that could carry them.")
    how = "Ratios of the least cost at which an attack succeeded; bounds are one-sided, 95 %."
    return page.section("Key figures", how, page.tiles(tiles), _all_strengths(verdict))


def _strength_tiles(strength: Strength, policy: Policy, *, many: bool) -> list[str]:
    gate = policy.gate
    where = f"{strength.target} at {strength.precision}" + (", the weakest" if many else "")
    bar = (
        f"The policy asks for {wording.amount(gate.kappa)}, "
        f"and {wording.amount(gate.kappa_lower)} for the lower bound."
    )
    sigma = "The policy asks for nothing here."
    if gate.sigma_lower is not None:
        sigma = f"The policy asks for {wording.amount(gate.sigma_lower)} for the lower bound."
    return [
        _ratio_tile("kappa", strength.kappa, "× the cost of breaching the original.", bar, where),
        _ratio_tile(
            "sigma",
            strength.sigma,
            "× the cost from a model that never knew; 1 is as good as never having known.",
            sigma,
            where,
        ),
        _ratio_tile(
            "head start",
            strength.head_start,
            "× saved by starting from the original; below 3, sigma says nothing.",
            "",
            where,
        ),
        *_sham_tile(strength, where),
    ]


def _sham_tile(strength: Strength, where: str) -> list[str]:
    if strength.sham is None or strength.sham.estimate is None:
        return []
    what = "of the resistance index that a sham, which moved the weights as far, does not have."
    number, _, bounds = wording.difference(strength.sham).partition(" (")
    return [page.tile("lead over a sham", number, what, f"95 % bounds: {bounds[:-1]}.", where)]


def _ratio_tile(what: str, value: Interval | None, meaning: str, bar: str, where: str) -> str:
    if value is None or value.estimate is None:
        return page.tile(what, "not claimed", meaning, bar, where)
    sign = "≥ " if value.censored else ""
    number = f"{sign}{wording.amount(value.estimate)}"
    return page.tile(what, number, meaning, f"95 % bounds: {wording.bounds(value)}.", bar, where)


def _draws_tile(place: Place, found: Draws, *, many: bool) -> str:
    lost = f", {found.lost - found.breaches} were lost" if found.lost > found.breaches else ""
    return page.tile(
        "random attacks",
        f"≤ {wording.percent(found.upper)}",
        "of those that breach the original breach this model too (95 % bound).",
        f"Of {found.counted} drawn, {found.breaches} did{lost}.",
        f"{place.target} at {place.precision}" + (", the worst" if many else ""),
    )


def _loss_tile(kept: Utility, *, many: bool) -> str:
    if kept.loss.estimate is None or kept.loss.upper is None:
        return page.tile("retained loss", "not claimed", "Too few pairs to bound it.")
    return page.tile(
        "retained loss",
        wording.points(kept.loss.estimate),
        f"95 % bound: at most {wording.points(kept.loss.upper)}.",
        f"Margin: {wording.points(kept.margin)}.",
        f"{kept.pairs} examples at {kept.precision}" + (", the worst" if many else ""),
    )


def _all_strengths(verdict: Verdict) -> str:
    if len(verdict.strengths) < 2:  # noqa: PLR2004  one stands in the tiles already
        return ""
    head, rows = wording.strength_table(verdict.strengths)
    return page.table("Cost multipliers", head, rows)


def _kappa(strength: Strength) -> float:
    return strength.kappa.estimate or 0.0


def _bound(kept: Utility) -> float:
    return float("inf") if kept.loss.upper is None else kept.loss.upper
