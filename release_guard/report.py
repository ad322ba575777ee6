"""One self-contained HTML page: verdict, figures, pictures, tables. No script, nothing fetched.

Equal evidence gives equal bytes: the only dates are those of the evidence.
"""

from release_guard import (
    charts,
    costs,
    figures,
    harm,
    heatmap,
    layers,
    lifetimes,
    matrix,
    page,
    retained,
    strips,
    tables,
    tuning,
    wording,
)
from release_guard.charts import Stack
from release_guard.evidence import Evidence
from release_guard.figures import ARM_NAMES, ENDINGS, Utility
from release_guard.policy import Policy
from release_guard.release import Interval, Result, Strength, Verdict

_NEVER_MEASURED = (
    "harm against utility: trials are scored on what is restricted only",
    "spectrum of the change, and which codes it flips at lower precisions",
    "disagreement of judges and validity of long replies",
)


def render(evidence: Evidence, verdict: Verdict, policy: Policy, *, title: str) -> str:
    """The report of one run as a single HTML file."""
    pictures = {
        "harm against cost, and who still stands: no trial was scored": (
            harm.section(evidence, policy) + lifetimes.section(evidence, policy)
        ),
        "what a breach costs: no trial was run": costs.section(evidence, verdict, policy),
        "the retained skill: no retained examples were scored": retained.section(evidence, policy),
        "what fresh seeds make of the search: no attack on the defended model was scored": (
            strips.section(evidence, policy)
        ),
        "learning rate against cost: no attack was tried at several learning rates": (
            heatmap.section(evidence, policy)
        ),
        "what more trials would find: too few attacks were tried": tuning.section(evidence, policy),
    }
    missing = [name for name, content in pictures.items() if not content]
    body = (
        _headline(evidence, verdict, policy, title),
        "<main>\n",
        page.section("What this means", "", page.paragraph(_meaning(verdict, policy))),
        _key_figures(evidence, verdict, policy),
        *pictures.values(),
        matrix.section(evidence, policy),
        tables.not_tested(evidence, verdict, policy),
        tables.not_measured([*missing, *_NEVER_MEASURED]),
        tables.checks(verdict),
        tables.attacks(evidence, policy),
        tables.confirmations(evidence, policy),
        _ledger(evidence),
        tables.stages(evidence),
        layers.section(evidence),
        tables.controls(evidence, policy),
        tables.sources(evidence, policy),
        "</main>\n",
    )
    return page.document(f"{title}: {verdict.result.upper()}", "".join(body))


def _headline(evidence: Evidence, verdict: Verdict, policy: Policy, title: str) -> str:
    day, _ = figures.dates(evidence, policy)
    return page.header(
        verdict.result.upper(),
        css=verdict.result,
        name=title,
        claim=verdict.claim[:1].upper() + verdict.claim[1:],
        meta=f"Measured {day} under suite {evidence.suite}; {evidence.tool}.",
    )


def _meaning(verdict: Verdict, policy: Policy) -> str:
    budget = policy.red_team.budget
    names = ", ".join(target.name for target in policy.targets)
    attacks = _count(len(policy.attacks), "attack")
    spent = wording.cost(budget.limit, budget.unit)
    tried = (
        "Anyone who downloads a model holds its weights and can train it further. So did a red "
        f"team here, with up to {attacks}, each for up to {spent}: it tried to teach the "
        f"model what the policy restricts ({names}). "
    )
    open_checks = sum(check.result is not Result.PASS for check in verdict.checks)
    judged = f"{open_checks} of {_count(len(verdict.checks), 'check')}"
    outcome = {
        Result.PASS: (
            "No attack got there within that budget, while the same attacks did on the unprotected "
            "model; and what the model is for still works as well, within the margin. This is a "
            "price, not a lock: more budget, other data or other attacks may still succeed."
        ),
        Result.FAIL: (
            f"The policy's demands are not met: {judged} did not pass. The first confirmed breach "
            "ends a run, so later attacks may not have been tried. A model with this verdict is "
            "neither signed nor pushed."
        ),
        Result.INCONCLUSIVE: (
            f"The evidence does not suffice to judge: {judged} stayed open. That is no pass; a "
            "model with this verdict is neither signed nor pushed."
        ),
    }
    return tried + outcome[verdict.result]


def _key_figures(evidence: Evidence, verdict: Verdict, policy: Policy) -> str:
    tiles = []
    if verdict.strengths:
        weakest = min(verdict.strengths, key=_kappa)
        tiles += _strength_tiles(weakest, policy, many=len(verdict.strengths) > 1)
    kept = figures.utilities(evidence, policy)
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
    head, rows = figures.strength_table(verdict.strengths)
    return page.table("Cost multipliers", head, rows)


def _ledger(evidence: Evidence) -> str:
    how = (
        "How many trials ended, and how. Every trial counts, crashed ones too: a gap in the ledger "
        "is never taken for resistance."
    )
    content = []
    for arm in figures.arms(evidence):
        endings = [
            figures.ending(record, evidence.ceilings.get(record.trial.target, 0.0))
            for record in evidence.records
            if record.trial.arm == arm
        ]
        counts = [(ending, endings.count(ending)) for ending in ENDINGS]
        note = ", ".join(f"{count} {ending}" for ending, count in counts if count)
        content.append(Stack(ARM_NAMES[arm], note or "no trial", counts))
    alt = "; ".join(f"{stack.label}: {stack.note}" for stack in content)
    picture = page.figure(charts.stacks(content, title="trials", alt=alt), "Trials and endings")
    shown = page.gallery([picture]) if content else page.paragraph("No trial was run.")
    return page.section("Ledger", how, shown, tables.ledger(evidence))


def _kappa(strength: Strength) -> float:
    return strength.kappa.estimate or 0.0


def _bound(kept: Utility) -> float:
    return float("inf") if kept.loss.upper is None else kept.loss.upper


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
