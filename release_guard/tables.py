"""The report's tables: what was tried, what came of it, what was judged, what nobody tried."""

from collections.abc import Iterable, Mapping, Sequence

from release_guard import figures, wording
from release_guard.composition import told
from release_guard.evidence import Evidence, Origin
from release_guard.figures import ARM_NAMES, ARMS, ENDINGS, ORIGINS, Effort
from release_guard.page import Cell, bullets, folded, paragraph, section, subheading, table
from release_guard.policy import Policy, Unit
from release_guard.release import Result, Verdict
from release_guard.sweep import everywhere
from release_guard.usefulness import all_counted

_UNFOLDED = 40  # longer tables open on demand
_MEANING = {Result.PASS: "good", Result.FAIL: "bad", Result.INCONCLUSIVE: "unsure"}
_ENDINGS = {
    "breached": "the score rose above the ceiling",
    "survived": "the trial's own budget ran out first",
    "collapsed": "the model stopped giving finite numbers",
    "failed": "the attack itself crashed",
}
_ORIGIN_NAMES: Mapping[Origin, str] = {
    "listed": "listed in the policy",
    "tuned": "tuned for that arm",
    "drawn": "drawn at random",
    "searched": "found by adaptive search",
    "confirming": "confirming, fresh seeds",
    "long_run": "long run",
}


def checks(verdict: Verdict) -> str:
    """Every judged claim; those that did not pass come first."""
    order = (Result.FAIL, Result.INCONCLUSIVE, Result.PASS)
    ordered = sorted(verdict.checks, key=lambda check: order.index(check.result))
    rows = [
        (
            Cell(check.result.upper(), _MEANING[check.result]),
            Cell(check.name, "wide"),
            Cell(check.detail, "wide"),
        )
        for check in ordered
    ]
    how = (
        "The verdict is PASS only if every check here is, but for those of precisions that are "
        "left out; a run without checks never passes."
    )
    return section("Checks", how, table("Checks", ("result", "check", "detail"), rows))


def attacks(evidence: Evidence, policy: Policy) -> str:
    """Every attack with its options, seeds and budget to breach on each arm."""
    unit, tried_on = policy.red_team.budget.unit, figures.arms(evidence)
    rows: list[Sequence[str | Cell]] = []
    for place in everywhere(evidence, policy):
        by_arm = {arm: _by_label(figures.efforts(place, arm)) for arm in tried_on}
        labels = dict.fromkeys(label for efforts in by_arm.values() for label in efforts)
        for label in labels:
            tried = [by_arm[arm].get(label) for arm in tried_on]
            rows.append(
                (
                    Cell(label, "wide"),
                    place.name,
                    _kind(effort for effort in tried if effort),
                    _seeds(effort for effort in tried if effort),
                    *(_costs(effort, unit) for effort in tried),
                )
            )
    if not rows:
        return section("Attacks", "No trial was run.")
    how = (
        f"Budget to breach in {unit}, least and greatest over seeds; '>' means that it was not "
        "reached by then. Seeds are those of all models together."
    )
    names = (ARM_NAMES[arm] for arm in tried_on)
    head = ("attack and options", "target@precision", "kind", "seeds", *names)
    content = table("Attacks", head, rows)
    if len(rows) > _UNFOLDED:
        content = folded(f"All {len(rows)} attacks", content)
    return section("Attacks", how, content)


def confirmations(evidence: Evidence, policy: Policy) -> str:
    """Trials on fresh seeds and on examples that no search had seen, one row each."""
    unit = policy.red_team.budget.unit
    rows = [
        (
            ARM_NAMES[arm],
            Cell(effort.attack.label, "wide"),
            place.name,
            str(record.trial.seed),
            _ORIGIN_NAMES[record.origin],
            figures.ending(record, place.ceiling),
            wording.between(cost, unit),
            wording.score(max((point.score for point in record.outcome.curve), default=None)),
        )
        for place in everywhere(evidence, policy)
        for arm in ARMS
        for effort in figures.efforts(place, arm)
        for record, cost in zip(effort.records, effort.costs, strict=True)
        if record.trial.split == "confirm"
    ]
    how = (
        "The best attacks of the search again, on fresh seeds and on examples the search never "
        "saw: a lucky trial does not repeat itself. The highest score is over the whole trial, "
        "which in a long run goes beyond the budget."
    )
    if not rows:
        return section("Confirmations", "None: nothing was run on fresh seeds.")
    head = ("model", "attack", "target@precision", "seed", "kind", "ending", "breach", "highest")
    content = table("Confirmations", head, rows)
    if len(rows) > _UNFOLDED:
        content = folded(f"All {len(rows)} trials on fresh seeds", content)
    return section("Confirmations", how, content)


def ledger(evidence: Evidence) -> str:
    """Trials by arm, origin and ending."""
    rows: list[Sequence[str | Cell]] = []
    trials = tuple(all_counted(evidence.records))
    for arm in ARMS:
        for origin in ORIGINS:
            outcomes = [
                figures.ending(record, evidence.ceilings.get(record.trial.target, 0.0))
                for record in trials
                if (record.trial.arm, record.origin) == (arm, origin)
            ]
            counts = [outcomes.count(ending) for ending in ENDINGS]
            if outcomes:
                rows.append((ARM_NAMES[arm], _ORIGIN_NAMES[origin], *_numbers(counts)))
    head = ("model", "kind of trial", *ENDINGS, "together")
    meanings = "; ".join(f"{ending}: {meaning}" for ending, meaning in _ENDINGS.items())
    return table("Trials", head, rows) + paragraph(f"{meanings}.", "how")


def stages(evidence: Evidence) -> str:
    """What was done to the model before it was attacked."""
    how = (
        "The defence, in the order it was applied. Its own measures are reported, never judged; of "
        "its effect, by its own measure too, enough must be left after the last stage."
    )
    rows = [
        (
            stage.name,
            Cell(stage.paper, "wide", link=stage.paper),
            Cell(_pairs(stage.options), "wide"),
            Cell(_pairs(stage.measures), "wide"),
            Cell(told(stage), "wide"),
            Cell(wording.effort(stage.cost), "wide"),
            wording.duration(stage.seconds),
        )
        for stage in evidence.stages
    ]
    if not rows:
        return section("Stages", "None: the model was judged as it is.")
    head = ("stage", "source", "options", "its own measures", "effect", "training took", "took")
    caveats = [f"{stage.name}: {each}" for stage in evidence.stages for each in stage.caveats]
    left_out = [subheading("What the stages left out"), bullets(caveats)] if caveats else []
    return section("Stages", how, table("Stages", head, rows), *left_out)


def controls(evidence: Evidence, policy: Policy) -> str:
    """What makes the figures mean anything."""
    same = (
        "no: the defended files equal the undefended ones" if evidence.change.identical else "yes"
    )
    rows = [("weights changed by the defence", same)]
    merged = {target.name for target in policy.merge_targets}
    for target in evidence.ceilings:
        others = "the donor's data" if target in merged else "the retained data"
        exact = evidence.overlap.get(target)
        near = evidence.near_overlap.get(target)
        rows += [
            (f"{target}: examples that stand in {others}", _share(exact)),
            (f"{target}: examples with a near duplicate there", _share(near)),
        ]
    for arm, why in evidence.unavailable.items():
        rows.append((f"model '{ARM_NAMES[arm]}'", f"unavailable: {why}"))
    ended = f"{len(evidence.records)} of {evidence.planned}"
    rows += [("trials that ended, of those planned", ended), *figures.bar(policy)]
    how = (
        "The controls of the experiment, and the bar, which was fixed before anything was measured."
    )
    wide = [(Cell(name, "wide"), Cell(value, "wide")) for name, value in rows]
    return section("Controls and bar", how, table("Controls and bar", ("what", "value"), wide))


def not_tested(evidence: Evidence, verdict: Verdict, policy: Policy) -> str:
    """What nobody tried, and what succeeded at more than the budget."""
    beyond = figures.beyond_budget(evidence, policy)
    unit = policy.red_team.budget.unit
    parts = [
        bullets(verdict.not_tested) if verdict.not_tested else paragraph("Nothing was listed."),
        subheading("Breaches beyond the budget"),
    ]
    if beyond:
        parts.append(
            bullets(
                f"{effort.attack.label} on {place.name}: {figures.found(effort, unit)}"
                for place, effort in beyond
            )
        )
    else:
        rest = "the few that went so far did not; others may"
        parts.append(paragraph(f"None was seen of an attack that held off until then: {rest}."))
    how = "Nothing in this report says anything about the following."
    return section("Not tested", how, *parts)


def not_measured(missing: Sequence[str]) -> str:
    """What the evidence does not hold, one line each, in the place of empty pictures."""
    how = "Not in this evidence, so that there is no picture of it."
    return section("Not measured", how, bullets(missing))


def sources(evidence: Evidence, policy: Policy) -> str:
    """What the figures rest on: digests, dates, versions."""
    budget = policy.red_team.budget
    rows = [
        ("policy, SHA-256", evidence.policy),
        ("undefended files, payload root", evidence.base),
        ("defended files, payload root", evidence.immunized),
        *((f"those of {each}", root) for each, root in evidence.artefacts.items()),
        (
            "red team",
            f"profile {policy.red_team.profile}, {wording.cost(budget.limit, budget.unit)}",
        ),
        ("retained data", wording.dataset(policy.retain.dataset)),
        *((f"target {target.name}", wording.dataset(target.dataset)) for target in policy.targets),
        ("begun", evidence.started_at),
        ("ended", evidence.finished_at),
        ("suite", evidence.suite),
        ("tool", evidence.tool),
        *sorted(evidence.environment.items()),
    ]
    how = "Every trial can be run again from its key in .release-guard/evidence.jsonl."
    wide = [(Cell(name, "wide"), Cell(value, "wide")) for name, value in rows]
    return section("Where this comes from", how, table("Sources", ("what", "value"), wide))


def _by_label(efforts: Iterable[Effort]) -> Mapping[str, Effort]:
    return {effort.attack.label: effort for effort in efforts}


def _kind(efforts: Iterable[Effort]) -> str:
    """Why it was tried, whom it was written against, whether it needs no control."""
    records = [record for effort in efforts for record in effort.records]
    why = {_ORIGIN_NAMES[record.origin] for record in records if record.trial.split == "search"}
    against = {f"written against {record.against}" for record in records if record.against}
    surgical = {"surgical: needs no control"} if any(r.surgical for r in records) else set()
    return ", ".join([*sorted(why), *sorted(against), *surgical]) or "fresh seeds only"


def _seeds(efforts: Iterable[Effort]) -> str:
    seeds = {record.trial.seed for effort in efforts for record in effort.records}
    return ", ".join(str(seed) for seed in sorted(seeds))


def _costs(effort: Effort | None, unit: Unit) -> str:
    if effort is None:
        return "not run"
    ends = sorted(effort.costs, key=lambda cost: (cost.upper is None, cost.point))
    least, greatest = (wording.least(cost) for cost in (ends[0], ends[-1]))
    return least if least == greatest else f"{least} … {greatest}"


def _numbers(counts: Sequence[int]) -> list[Cell]:
    return [Cell(str(count), "number") for count in (*counts, sum(counts))]


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in sorted(values.items())) or "none"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _share(share: float | None) -> str:
    return "not measured" if share is None else wording.percent(share)
