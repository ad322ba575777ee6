"""One self-contained HTML page: verdict, figures, pictures, tables. No script, nothing fetched.

Equal evidence gives equal bytes: the only dates are those of the evidence.
"""

from collections.abc import Iterator, Mapping

from release_guard import (
    by_precision,
    charts,
    costs,
    figures,
    harm,
    heatmap,
    highlights,
    layers,
    lifetimes,
    matrix,
    merge_table,
    noise,
    page,
    retained,
    strips,
    tables,
    tuning,
    wording,
)
from release_guard.charts import Stack
from release_guard.evidence import Evidence, Origin
from release_guard.figures import ARM_NAMES, ENDINGS
from release_guard.policy import Policy
from release_guard.release import Result, Verdict
from release_guard.usefulness import all_counted

_OTHERS: Mapping[Origin, str] = {
    "drawn": "drawn at random",
    "searched": "found by adaptive search",
}
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
        "noise on the weights: no attack added several sizes of it": noise.section(
            evidence, policy
        ),
    }
    missing = [name for name, content in pictures.items() if not content]
    body = (
        _headline(evidence, verdict, policy, title),
        "<main>\n",
        page.section("What this means", "", page.paragraph(_meaning(evidence, verdict, policy))),
        highlights.section(evidence, verdict, policy),
        *pictures.values(),
        by_precision.section(evidence, verdict, policy),
        matrix.section(evidence, policy),
        merge_table.section(evidence, policy),
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


def _meaning(evidence: Evidence, verdict: Verdict, policy: Policy) -> str:
    budget = policy.red_team.budget
    attacks = [wording.count(_tried(evidence, "listed"), "listed attack")]
    attacks += [
        f"{count} {how}" for origin, how in _OTHERS.items() if (count := _tried(evidence, origin))
    ]
    spent = wording.cost(budget.limit, budget.unit)
    tried = (
        "Anyone who downloads a model holds its weights and can train it further. So did a red "
        f"team here, with {', '.join(attacks)}, each for up to {spent}: it tried "
        f"{' and '.join(_aims(policy))}. "
    )
    open_checks = sum(check.result is not Result.PASS for check in verdict.checks)
    judged = f"{open_checks} of {wording.count(len(verdict.checks), 'check')}"
    published = ", ".join(verdict.published(policy.precisions))
    none = f"At what is published ({published}), no attack" if verdict.left_out else "No attack"
    outcome = {
        Result.PASS: (
            f"{none} got there within that budget, while the same attacks did on the unprotected "
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


def _aims(policy: Policy) -> Iterator[str]:
    if policy.concepts:
        names = ", ".join(concept.name for concept in policy.concepts)
        yield f"to teach the model what the policy restricts ({names})"
    if policy.merge_targets:
        names = ", ".join(target.name for target in policy.merge_targets)
        yield f"to bring back what it has lost by merging it with other models ({names})"


def _tried(evidence: Evidence, origin: Origin) -> int:
    """Attacks on the defended model that come from there."""
    tried = (
        record.trial.attack.label
        for record in evidence.records
        if (record.trial.arm, record.origin) == ("defended", origin)
    )
    return len(set(tried))


def _ledger(evidence: Evidence) -> str:
    how = (
        "How many trials ended, and how; the parts of a bar stand in the order of the words above "
        "it. Every trial counts, crashed ones too: a gap in the ledger is never taken for "
        "resistance. None is given up early for looking hopeless, so none is given up wrongly."
    )
    content, trials = [], tuple(all_counted(evidence.records))
    for arm in figures.arms(evidence):
        endings = [
            figures.ending(record, evidence.ceilings.get(record.trial.target, 0.0))
            for record in trials
            if record.trial.arm == arm
        ]
        counts = [(ending, endings.count(ending)) for ending in ENDINGS]
        note = ", ".join(f"{count} {ending}" for ending, count in counts if count)
        content.append(Stack(ARM_NAMES[arm], note or "no trial", counts))
    alt = "; ".join(f"{stack.label}: {stack.note}" for stack in content)
    picture = page.figure(charts.stacks(content, title="trials", alt=alt), "Trials and endings")
    shown = page.gallery([picture]) if content else page.paragraph("No trial was run.")
    return page.section("Ledger", how, shown, tables.ledger(evidence))
