"""Precision by attack: what each attack reached on the undefended and on the defended model."""

from collections.abc import Mapping, Sequence

from release_guard import figures, page, wording
from release_guard.evidence import Arm, Evidence
from release_guard.figures import Effort
from release_guard.page import Cell
from release_guard.policy import Policy, Unit
from release_guard.statistics import Finding
from release_guard.sweep import Place, everywhere

_FINDINGS: Mapping[Finding, str] = {
    "confirmed": "bad",
    "unresolved": "unsure",
    "refuted": "good",
}
_HOW = (
    "One row an attack, one pair of columns a precision: the highest score within the budget, "
    "or the least cost of a breach; of attacks that are not listed, the worst of a kind. "
    "In the 'defended' column orange is a breach that fresh seeds confirm, blue is none, "
    "yellow is open. A breach in the 'undefended' column shows that an attack works at all; "
    "yellow there means that it shows nothing. An attack that teaches nothing needs no control."
)

_ARMS: tuple[Arm, ...] = ("undefended", "defended")


def section(evidence: Evidence, policy: Policy) -> str:
    """Precision x attack: what each attack reached within the budget, undefended and defended."""
    by_target: dict[str, list[Place]] = {}
    for place in everywhere(evidence, policy):
        by_target.setdefault(place.target, []).append(place)
    parts = []
    for target, here in by_target.items():
        ceiling = evidence.ceilings.get(target)
        known = "unknown" if ceiling is None else wording.score(ceiling)
        parts += [page.subheading(f"{target} (ceiling {known})"), _table(here, policy)]
    return page.section("Precision by attack", _HOW, *parts)


def _table(here: Sequence[Place], policy: Policy) -> str:
    """Listed attacks in the policy's order, then the worst of each kind of others."""
    names = [attack.label for attack in here[0].attacks]
    columns = [_pairs(place) for place in here]
    known = {name for pairs in columns for efforts in pairs for name in efforts}
    names += sorted(known.difference(names))
    rows = [
        (
            Cell(name, "wide"),
            *(cell for pairs in columns for cell in _cells(name, pairs, policy)),
        )
        for name in names
    ]
    head = ["attack", *(f"{place.precision}, {arm}" for place in here for arm in _ARMS)]
    return page.table(f"Precision by attack, {here[0].target}", head, rows)


def _pairs(place: Place) -> Sequence[Mapping[str, Effort]]:
    """Undefended and defended: what is listed by its label, of others the worst of a kind."""
    listed = {attack.label for attack in place.attacks}
    return [
        {
            **{e.attack.label: e for e in figures.efforts(place, arm) if e.attack.label in listed},
            **figures.worst_unlisted(place, arm),
        }
        for arm in _ARMS
    ]


def _cells(name: str, pairs: Sequence[Mapping[str, Effort]], policy: Policy) -> Sequence[Cell]:
    undefended, defended = (efforts.get(name) for efforts in pairs)
    unit = policy.red_team.budget.unit
    return _control(name, undefended, defended, unit), _judged(name, defended, unit)


def _control(name: str, undefended: Effort | None, defended: Effort | None, unit: Unit) -> Cell:
    """What shows that an attack works at all."""
    if undefended is not None:
        is_void = not undefended.breaches and not undefended.is_surgical
        return Cell(_found(name, undefended, unit), "unsure" if is_void else "")
    if defended is not None and defended.is_surgical:
        return Cell("needs no control")
    return Cell("not run", "unsure")


def _judged(name: str, defended: Effort | None, unit: Unit) -> Cell:
    if defended is None:
        return Cell("not run", "unsure")
    said = _found(name, defended, unit)
    if defended.finding is not None:
        return Cell(f"{said}; on fresh seeds {defended.finding}", _FINDINGS[defended.finding])
    endings = {record.outcome.ending for record in defended.records}
    return Cell(said, "good" if endings & {"survived", "breached"} else "unsure")


def _found(name: str, effort: Effort, unit: Unit) -> str:
    said, label = figures.found(effort, unit), effort.attack.label
    return said if name == label else f"{label}: {said}"
