"""One self-contained HTML page: verdict, figures, pictures, tables. No script, nothing fetched.

Equal evidence gives equal bytes: the only dates are those of the evidence.
"""

from collections.abc import Iterable, Sequence

from release_guard import charts, figures, page, tables
from release_guard.charts import Curve, Reference, Row, Stack
from release_guard.evidence import Arm, Evidence
from release_guard.figures import ARM_NAMES, ARMS, ENDINGS, Utility
from release_guard.policy import Policy
from release_guard.release import Interval, Result, Strength, Verdict
from release_guard.svg import WIDTH, Axis
from release_guard.sweep import Place, places

_MOST_TENSORS = 15
_ACROSS = (8, WIDTH - 12)


def render(evidence: Evidence, verdict: Verdict, policy: Policy, *, title: str) -> str:
    """The report of one run as a single HTML file."""
    body = (
        _headline(evidence, verdict, policy, title),
        "<main>\n",
        page.section("What this means", "", page.paragraph(_meaning(verdict, policy))),
        _key_figures(evidence, verdict, policy),
        _harm(evidence, policy),
        tables.matrix(evidence, policy),
        _costs(evidence, verdict, policy),
        _utility(evidence, policy),
        tables.not_tested(evidence, verdict, policy),
        tables.checks(verdict),
        tables.attacks(evidence, policy),
        tables.confirmations(evidence, policy),
        _ledger(evidence),
        tables.stages(evidence),
        _distance(evidence),
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
    spent = figures.cost(budget.limit, budget.unit)
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
        f"The policy asks for {figures.amount(gate.kappa)}, "
        f"and {figures.amount(gate.kappa_lower)} for the lower bound."
    )
    sigma = "The policy asks for nothing here."
    if gate.sigma_lower is not None:
        sigma = f"The policy asks for {figures.amount(gate.sigma_lower)} for the lower bound."
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
    ]


def _ratio_tile(what: str, value: Interval | None, meaning: str, bar: str, where: str) -> str:
    if value is None or value.estimate is None:
        return page.tile(what, "not claimed", meaning, bar, where)
    sign = "≥ " if value.censored else ""
    number = f"{sign}{figures.amount(value.estimate)}"
    return page.tile(what, number, meaning, f"95 % bounds: {figures.bounds(value)}.", bar, where)


def _loss_tile(kept: Utility, *, many: bool) -> str:
    if kept.loss.estimate is None or kept.loss.upper is None:
        return page.tile("retained loss", "not claimed", "Too few pairs to bound it.")
    return page.tile(
        "retained loss",
        figures.points(kept.loss.estimate),
        f"95 % bound: at most {figures.points(kept.loss.upper)}.",
        f"Margin: {figures.points(kept.margin)}.",
        f"{kept.pairs} examples at {kept.precision}" + (", the worst" if many else ""),
    )


def _all_strengths(verdict: Verdict) -> str:
    if len(verdict.strengths) < 2:  # noqa: PLR2004  one stands in the tiles already
        return ""
    rows = [
        (
            f"{strength.target}@{strength.precision}",
            *(
                figures.ratio(value)
                for value in (
                    strength.kappa,
                    strength.sigma,
                    strength.head_start,
                    strength.long_run,
                )
            ),
        )
        for strength in verdict.strengths
    ]
    head = ("target@precision", "kappa", "sigma", "head start", "kappa, long run")
    return page.table("Cost multipliers", head, rows)


def _harm(evidence: Evidence, policy: Policy) -> str:
    how = (
        "Faint lines are single trials; a strong line is the worst case, the highest score any "
        "attack on that model had reached by that cost. The defence holds where its line stays "
        "under the dashed ceiling up to the budget; the shaded part lies beyond it."
    )
    pictures = [_harm_picture(place) for place in _seen(evidence, policy)]
    if not pictures:
        return page.section("Harm against cost", "No trial was run.")
    return page.section("Harm against cost", how, page.gallery(pictures))


def _harm_picture(place: Place) -> str:
    unit = place.policy.red_team.budget.unit
    curves = {arm: _curves(place, arm) for arm in ARMS}
    reached = "; ".join(
        f"{ARM_NAMES[arm]} at most {max(score for curve in lines for _, score in curve):.3f}"
        for arm, lines in curves.items()
        if lines
    )
    alt = f"Score against {unit} for {place.name}: {reached}; ceiling {place.ceiling:.3g}."
    picture = charts.harm(curves, ceiling=place.ceiling, budget=place.budget, unit=unit, alt=alt)
    return page.figure(picture, f"{place.target} at {place.precision}")


def _costs(evidence: Evidence, verdict: Verdict, policy: Policy) -> str:
    title = "What a breach costs"
    strengths = {(each.target, each.precision): each for each in verdict.strengths}
    pictures = []
    for place in _seen(evidence, policy):
        pictures.append(_cost_picture(place))
        strength = strengths.get((place.target, place.precision))
        if strength is not None and any(row.value for row in _ratio_rows(strength)):
            pictures.append(_ratio_picture(strength, policy))
    if not pictures:
        return page.section(title, "No trial was run.")
    how = (
        "Bars: the least cost at which any attack brought a model over the ceiling; longer is "
        "better for the defended one. Whiskers span the fresh seeds, each known up to the grid of "
        "costs; an arrow means that some seed had not breached by then. Ratios: kappa is the "
        "defended model's cost over the original's, sigma over that of a model that never knew; "
        "whiskers are one-sided 95 % bounds, open to the right where nothing limits them. The bar "
        "is what the policy asks of kappa and of its lower bound."
    )
    return page.section(title, how, page.gallery(pictures))


def _cost_picture(place: Place) -> str:
    unit = place.policy.red_team.budget.unit
    rows = [row for arm in ARMS for row in _cost_row(place, arm)]
    values = [value for row in rows for value in (row.low, row.value, row.high) if value]
    picture = charts.rows(
        rows,
        Axis.logarithmic([*values, place.budget], *_ACROSS),
        title=f"budget to breach, {unit} (log scale)",
        alt="; ".join(f"{row.label}: {row.note}" for row in rows),
        references=[Reference(place.budget, f"budget {figures.amount(place.budget)}", "budget")],
    )
    return page.figure(picture, f"{place.target} at {place.precision}: budget to breach")


def _cost_row(place: Place, arm: Arm) -> Iterable[Row]:
    best = figures.cheapest(place, arm)
    if best is None:
        return
    limit = place.budget if arm == "defended" else place.horizon
    costs = [cost.capped(limit) for cost in best.fresh or best.costs]
    breaches = [cost.upper for cost in costs if cost.upper is not None]
    css, censored = f"arm-{arm}", len(breaches) < len(costs)
    value = figures.typical(costs)
    note = f"{'>' if not breaches else '≥' if censored else ''} {figures.amount(value)}".strip()
    if len(costs) > 1:
        note += f" ({len(breaches)} of {len(costs)} seeds breached)"
    yield Row(
        label=ARM_NAMES[arm],
        note=note,
        value=value,
        low=min(cost.lower for cost in costs) if breaches else None,
        high=None if censored else max(breaches),
        css=css,
        shape=charts.SHAPES[arm],
        censored=censored,
        is_bar=True,
    )


def _ratio_picture(strength: Strength, policy: Policy) -> str:
    gate = policy.gate
    rows = [*_ratio_rows(strength)]
    values = [value for row in rows for value in (row.low, row.value, row.high) if value]
    references = [
        Reference(1, "1: no change", "unity"),
        Reference(gate.kappa_lower, f"bar, lower bound: {gate.kappa_lower:g}"),
        Reference(gate.kappa, f"bar, kappa: {gate.kappa:g}"),
    ]
    picture = charts.rows(
        rows,
        Axis.logarithmic([*values, *(each.value for each in references)], *_ACROSS),
        title="ratio of costs (log scale)",
        alt="; ".join(f"{row.label}: {row.note}" for row in rows),
        references=references,
    )
    return page.figure(picture, f"{strength.target} at {strength.precision}: ratios of costs")


def _ratio_rows(strength: Strength) -> Iterable[Row]:
    named = (
        ("kappa", strength.kappa, "diamond"),
        ("sigma", strength.sigma, "square"),
        ("head start", strength.head_start, "triangle"),
        ("kappa, long run", strength.long_run, "circle"),
    )
    for label, value, shape in named:
        if value is None or value.estimate is None:
            yield Row(label, "not claimed", None, css="plain")
            continue
        yield Row(
            label=label,
            note=figures.ratio(value),
            value=value.estimate,
            low=value.lower,
            high=None if value.censored else value.upper,
            css="arm-defended" if label == "kappa" else "plain",
            shape=shape,
            censored=value.censored,
        )


def _utility(evidence: Evidence, policy: Policy) -> str:
    kept = figures.utilities(evidence, policy)
    title = "What the model is for"
    if not kept:
        return page.section(title, "Not measured: no retained examples were scored.")
    how = (
        "Mean change of the retained score, example by example, from undefended to defended: left "
        "is loss. It passes if the whisker's left end, the 95 % bound, stays right of the margin."
    )
    rows = [_utility_row(each) for each in kept]
    values = [
        value for row in rows for value in (row.low, row.value, row.high) if value is not None
    ]
    margin = -policy.retain.margin
    reach = 1.25 * max(map(abs, [*values, margin]))
    picture = charts.rows(
        rows,
        Axis(-reach, reach, *_ACROSS),
        title="change of score, percentage points",
        alt="; ".join(f"{row.label}: {row.note}" for row in rows),
        references=[
            Reference(0, "no change", "unity"),
            Reference(margin, f"margin {figures.points(margin)}"),
        ],
        form=lambda value: f"{100 * value:.3g}",
    )
    table = page.table(
        title,
        ("precision", "undefended", "defended", "loss", "95 % bound", "margin", "pairs"),
        [_utility_cells(each) for each in kept],
    )
    return page.section(title, how, page.gallery([page.figure(picture, "Retained data")]), table)


def _utility_row(kept: Utility) -> Row:
    loss = kept.loss
    if loss.estimate is None or loss.upper is None or loss.lower is None:
        return Row(kept.precision, "too few pairs", None)
    worst = figures.points(-loss.upper)
    return Row(
        label=kept.precision,
        note=f"{figures.points(-loss.estimate)}, at worst {worst}",
        value=-loss.estimate,
        low=-loss.upper,
        high=-loss.lower,
    )


def _utility_cells(kept: Utility) -> Sequence[str]:
    loss, bound = kept.loss.estimate, kept.loss.upper
    return (
        kept.precision,
        figures.score(kept.base),
        figures.score(kept.immunized),
        "not claimed" if loss is None else figures.points(loss),
        "none" if bound is None else figures.points(bound),
        figures.points(kept.margin),
        str(kept.pairs),
    )


def _ledger(evidence: Evidence) -> str:
    how = (
        "How many trials ended, and how. Every trial counts, crashed ones too: a gap in the ledger "
        "is never taken for resistance."
    )
    content = []
    for arm in ARMS:
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
    return page.section("Ledger", how, page.gallery([picture]), tables.ledger(evidence))


def _distance(evidence: Evidence) -> str:
    title, moved = "Distance moved", evidence.change.relative_l2
    ordered = sorted(moved.items(), key=lambda item: (-item[1], item[0]))[:_MOST_TENSORS]
    if not ordered or not ordered[0][1]:
        return page.section(title, "Nothing moved: the defended weights equal the undefended ones.")
    how = (
        "How far the defence moved each tensor, relative to its length; the "
        f"{len(ordered)} that moved most of {len(moved)}. All at zero would be no defence at all."
    )
    rows = [
        Row(name, figures.percent(value), value, css="plain", shape="circle", is_bar=True)
        for name, value in ordered
    ]
    picture = charts.rows(
        rows,
        Axis(0, 1.1 * ordered[0][1], *_ACROSS),
        title="relative L2 distance, per cent",
        alt="; ".join(f"{row.label}: {row.note}" for row in rows),
        form=lambda value: f"{100 * value:.3g}",
    )
    return page.section(title, how, page.gallery([page.figure(picture, "Tensors")]))


def _seen(evidence: Evidence, policy: Policy) -> list[Place]:
    return [place for place in places(evidence, policy) if place.records]


def _curves(place: Place, arm: Arm) -> list[Curve]:
    unit = place.policy.red_team.budget.unit
    curves = (
        [(point.cost.of(unit), point.score) for point in record.outcome.curve]
        for record in place.records
        if record.trial.arm == arm
    )
    return [curve for curve in curves if curve]


def _kappa(strength: Strength) -> float:
    return strength.kappa.estimate or 0.0


def _bound(kept: Utility) -> float:
    return float("inf") if kept.loss.upper is None else kept.loss.upper


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
