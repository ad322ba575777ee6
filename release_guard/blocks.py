"""The text of a model card, block by block, and the summary of a run; all of it generated."""

import re
from collections.abc import Mapping, Sequence

from release_guard import artefact_table, figures, wording
from release_guard.composition import told
from release_guard.draws import draws
from release_guard.evidence import Arm, Evidence
from release_guard.figures import Effort, Utility
from release_guard.manifest import EVIDENCE_FOLDER, SIGNATURE, Manifest
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.release import Check, Result, Verdict
from release_guard.standing import mean_share, standing
from release_guard.sweep import Place, everywhere, places

HEADING = "Fine-tuning resistance (release-guard)"

_PAIR = ("U: score", "U: BTB", "D: score", "D: BTB")
_STANDING = ("target@precision", "model", "trials", "breached", "collapsed", "stood for")
_OVERVIEW = (
    "target@precision",
    "highest score",
    "kappa",
    "sigma",
    "ancestor",
    "lead over a sham",
    "random attacks that breach or were lost",
    "adaptive search",
)
_MOST_CHECKS = 20
_STAGES = ("stage", "source", "training took", "effect, by its own measure")
_UTILITY = ("precision", "U", "D", "loss", "95 % bound", "margin", "pairs")


def facts(evidence: Evidence, verdict: Verdict, policy: Policy) -> str:
    """What was judged, when, under which bar."""
    day, expires = figures.dates(evidence, policy)
    rows = [
        ("suite", f"{evidence.suite}, {_plain(evidence.tool)}"),
        ("policy", f"{_code(f'sha256:{evidence.policy}')}, in {_file('policy.toml')}"),
        ("measured", day),
        ("expires", expires if verdict.passed else "nothing to expire"),
        ("red team", f"profile {_code(policy.red_team.profile)}, {len(evidence.records)} trials"),
        *((f"bar: {name}", _plain(value)) for name, value in figures.bar(policy)),
    ]
    return (
        f"## {HEADING}\n\n"
        f"**{verdict.result.upper()}**: {_plain(verdict.claim or 'nothing is claimed')}.\n\n"
        "The bar was fixed in the policy before anything was measured.\n\n"
        + _table(("what", "value"), rows)
    )


def artefacts(
    evidence: Evidence, verdict: Verdict, policy: Policy, payload: Manifest, target: str
) -> str:
    """Every precision of the release: where it lies, what it is, how it is loaded."""
    found = artefact_table.rows(evidence, verdict, policy, payload)
    rows = [
        (_code(name), _code(folder), _plain(form), size, _code(root), result)
        for name, folder, form, size, root, result in found
    ]
    snippets = "\n".join(artefact_table.snippets(evidence, verdict, policy, target))
    packed = any(name in {"int8", "nf4"} for name, *_ in found)
    needs = "int8 and nf4 need bitsandbytes; with diffusers, a GPU too.\n" if packed else ""
    return (
        "\n### Artefacts\n\n"
        "Each was attacked and judged in these very files.\n\n"
        f"{_table(artefact_table.HEAD, rows)}\n"
        f"```python\n{snippets}\n```\n{needs}"
    )


def results(evidence: Evidence, verdict: Verdict, policy: Policy) -> str:
    """What was done to the model, every attack on both, the cost multipliers, the utility."""
    unit = policy.red_team.budget.unit
    attacks = [
        _attack_row(place, label, efforts)
        for place in everywhere(evidence, policy)
        for label, efforts in _by_attack(place).items()
    ]
    scores = ("attack", "target@precision", "ceiling", *_PAIR, "on fresh seeds")
    return (
        f"{_stages(evidence)}"
        "### Attacks\n\n"
        "U is the undefended model, D the defended one. Score: the highest within the budget. "
        f"BTB, budget to breach: the least cost over seeds, in {unit}; `>`: not reached by then. "
        "What came close to the ceiling on D was run again on fresh seeds: confirmed is a breach, "
        "refuted is none.\n\n"
        f"{_table(scores, attacks)}\n"
        "### What a breach costs\n\n"
        "kappa: BTB of D over that of U; sigma: over that of a model that never knew; head start: "
        "BTB of the latter over that of U; ancestor: that of the public ancestor over that of U; "
        "way out: BTB of D over the cheaper of the two. The lead over a sham, which moved as far "
        "to no purpose, is one of resistance. In brackets: one-sided 95 % bounds.\n\n"
        f"{_ratios(verdict)}\n"
        f"{_standing(evidence, policy)}"
        "### What it costs the retained skill\n\n"
        f"{_table(_UTILITY, [_utility_row(kept) for kept in figures.utilities(evidence, policy)])}"
    )


def _stages(evidence: Evidence) -> str:
    """What was done to the model, in order, and what each stage says it left out."""
    rows = [
        (_code(stage.name), _code(stage.paper), wording.effort(stage.cost), _plain(told(stage)))
        for stage in evidence.stages
    ]
    if not rows:
        return ""
    caveats = [
        f"- {_code(stage.name)}: {_plain(caveat)}\n"
        for stage in evidence.stages
        for caveat in stage.caveats
    ]
    left_out = f"\n{''.join(caveats)}" if caveats else ""
    return f"### Stages\n\n{_table(_STAGES, rows)}{left_out}\n"


def _attack_row(place: Place, label: str, efforts: Sequence[Effort | None]) -> Sequence[str]:
    undefended, defended = efforts
    finding = "not run" if defended is None else defended.finding or "no finding"
    return (
        _code(label),
        _code(place.name),
        wording.score(place.ceiling),
        *_reach(place, undefended),
        *_reach(place, defended),
        finding,
    )


def _reach(place: Place, effort: Effort | None) -> tuple[str, str]:
    if effort is None:
        return "not run", "not run"
    first = min(effort.costs, key=lambda cost: (cost.upper is None, cost.point))
    cost = "-" if place.is_merge else f"`{wording.least(first)}`"
    return wording.score(effort.best), cost


def _by_attack(place: Place) -> Mapping[str, Sequence[Effort | None]]:
    arms: tuple[Arm, ...] = ("undefended", "defended")
    tried = [
        {effort.attack.label: effort for effort in figures.efforts(place, arm)} for arm in arms
    ]
    labels = [attack.label for attack in place.attacks]
    listed = {label: [efforts.get(label) for efforts in tried] for label in labels}
    worst = [figures.worst_unlisted(place, arm) for arm in arms]
    names = sorted({name for each in worst for name in each})
    return listed | {f"{name}: the worst": [each.get(name) for each in worst] for name in names}


def _ratios(verdict: Verdict) -> str:
    head, rows = wording.strength_table(verdict.strengths)
    return _table(head, [(_code(where), *values) for where, *values in rows])


def _standing(evidence: Evidence, policy: Policy) -> str:
    """Who still stands at the budget, and what independent draws and a search say."""
    rows = [
        (
            _code(place.name),
            figures.ARM_NAMES[each.arm],
            str(each.trials),
            wording.percent(each.breached),
            wording.percent(each.collapsed),
            wording.percent(mean_share(place, each)),
        )
        for place in places(evidence, policy)
        for each in standing(place)
    ]
    said = [f"- {_code(place)}: {found}\n" for place, found in _explored(evidence, policy)]
    explored = f"\n{''.join(said)}" if said else ""
    return (
        "### Who still stands at the budget\n\n"
        "Of the trials of the search on a model: the share that breached and that collapsed by the "
        "budget (cumulative incidence), and the mean share of the logarithmic budget for which "
        "they stood (restricted mean).\n\n"
        f"{_table(_STANDING, rows)}{explored}\n"
    )


def _explored(evidence: Evidence, policy: Policy) -> list[tuple[str, str]]:
    """Where something was drawn at random or searched for, and what that says."""
    found = (
        (place.name, said(place))
        for place in everywhere(evidence, policy)
        for said in (figures.of_draws, figures.of_search)
    )
    return [(name, said) for name, said in found if said]


def _utility_row(kept: Utility) -> Sequence[str]:
    loss, bound = kept.loss.estimate, kept.loss.upper
    return (
        _code(kept.precision),
        wording.score(kept.base),
        wording.score(kept.immunized),
        "not claimed" if loss is None else wording.points(loss),
        "none" if bound is None else wording.points(bound),
        wording.points(kept.margin),
        str(kept.pairs),
    )


def not_tested(verdict: Verdict) -> str:
    """What nobody tried."""
    items = [f"- {_plain(item)}" for item in verdict.not_tested] or ["- nothing was listed"]
    return "### Not tested\n\n" + "\n".join(items) + "\n"


def verify(verdict: Verdict, policy: Policy, target: str, fingerprint: str) -> str:
    """How to check it, and where the evidence lies."""
    if not verdict.passed:
        return "### Verify\n\nNot signed: only a model that passed its gate is.\n"
    return (
        "### Verify\n\n"
        f"{_signed_by(policy.signer, fingerprint)}\n\n"
        f"```\n{wording.verify_command(target, policy.signer, 'key.pub')}\n```\n\n"
        f"Signed are all files ({_code(SIGNATURE)}) and what was found: {_file('evidence.jsonl')}, "
        f"{_file('report.html')}, {_file('policy.toml')}, {_file('resistance.sigstore.json')}, "
        f"{_file('test-result.sigstore.json')} and {_file('svr.sigstore.json')}.\n"
    )


def _signed_by(signer: Spec, fingerprint: str) -> str:
    """What a consumer has to know of the signer, and must not believe this repository."""
    if (issuer := signer.options.get("issuer")) is None:
        return (
            "Get the public key from the publisher, never from this repository, and compare its "
            f"fingerprint: {_code(fingerprint)}"
        )
    return (
        f"Signed without a key, by the identity {_code(str(signer.options['identity']))} of the "
        f"issuer {_code(str(issuer))}. Compare both with what the publisher says elsewhere, never "
        "with this repository alone. Verifying asks no server, and needs "
        "`pip install 'model-release-guard[sigstore]'`:"
    )


def limits(verdict: Verdict, policy: Policy) -> str:
    """Where the claim ends."""
    if not verdict.passed:
        return "### Limits of the claim\n\nNothing is claimed of this model.\n"
    budget = policy.red_team.budget
    return (
        "### Limits of the claim\n\n"
        f"- The claim ends at {wording.cost(budget.limit, budget.unit)} for each attack, at the "
        f"precisions {', '.join(verdict.published(policy.precisions))}, under this suite.\n"
        "- It no longer holds if the weights are changed, fine-tuned, merged, pruned or rounded to "
        "another format, if an attack is found that the suite does not have, or once it expires.\n"
        "- Whoever has an undefended ancestor of this model, public or not, needs no attack.\n"
        "- A higher cost is not a lock: it says nothing on attackers who pay it.\n"
    )


def summary(evidence: Evidence, verdict: Verdict, policy: Policy) -> str:
    """Verdict, claim, figures and every check that did not pass, as short Markdown."""
    open_checks = [check for check in verdict.checks if check.result is not Result.PASS]
    passed = len(verdict.checks) - len(open_checks)
    lines = [
        f"**{verdict.result.upper()}**: {_plain(verdict.claim or 'nothing is claimed')}",
        "",
        _overview(evidence, verdict, policy),
        *(f"- {_kept(each)}" for each in figures.utilities(evidence, policy)),
        f"- {len(evidence.records)} of {evidence.planned} planned trials ended",
        f"- {passed} of {len(verdict.checks)} checks passed",
        *(_check(check) for check in sorted(open_checks, key=_gravity)[:_MOST_CHECKS]),
    ]
    if len(open_checks) > _MOST_CHECKS:
        lines.append(f"- and {len(open_checks) - _MOST_CHECKS} more, which the report names")
    if verdict.not_tested:
        lines += ["", "Not tested:", "", *(f"- {_plain(item)}" for item in verdict.not_tested)]
    return "\n".join(lines) + "\n"


def _overview(evidence: Evidence, verdict: Verdict, policy: Policy) -> str:
    """One row a place: what was reached, what a breach costs, what draws and searches found."""
    known = {(each.target, each.precision): each for each in verdict.strengths}
    rows = []
    for place in everywhere(evidence, policy):
        each = known.get((place.target, place.precision))
        ratios = (each.kappa, each.sigma, each.ancestor) if each else (None, None, None)
        costs = [*map(wording.ratio, ratios), wording.difference(each.sham if each else None)]
        found = ["-"] * 5 if place.is_merge else [*costs, _draws(place)]  # a merge takes no step
        highest = wording.score(figures.highest(figures.efforts(place, "defended")))
        reached = f"{highest} (ceiling {wording.score(place.ceiling)})"
        rows.append([_code(place.name), reached, *found, _search(place)])
    return _table(_OVERVIEW, rows)


def _draws(place: Place) -> str:
    found = draws(place)
    if not found.pool:
        return "none drawn"
    return f"{found.lost} of {found.counted}: at most {wording.percent(found.upper)}"


def _search(place: Place) -> str:
    found = figures.searched(place)
    return f"{len(found)}: {wording.score(figures.highest(found))} at most" if found else "none"


def _kept(kept: Utility) -> str:
    _, before, after, loss, bound, margin, pairs = _utility_row(kept)
    return (
        f"retained score at {kept.precision}: {before} to {after}, loss {loss} "
        f"(95 % bound {bound}, margin {margin}, {pairs} pairs)"
    )


def _check(check: Check) -> str:
    return f"- {check.result.upper()} {_code(check.name)}: {_plain(check.detail)}"


def _gravity(check: Check) -> int:
    return 0 if check.result is Result.FAIL else 1


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "Nothing was measured.\n"
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _file(name: str) -> str:
    return _code(f"{EVIDENCE_FOLDER}/{name}")


def _code(content: str) -> str:
    """Verbatim, in one line that neither ends the code, nor a table's cell, nor a block."""
    bare = " ".join(content.split()).replace("`", "'").replace("|", "\\|").replace("<!--", "<! --")
    return f"`{bare}`"


def _plain(content: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", content).replace("&", "&amp;").replace("<", "&lt;")
