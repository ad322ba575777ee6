"""The red team: arms x attacks x precisions -> Evidence. It tries; it does not judge.

Order: listed attacks on the defended model, cheapest first, of these the first precision's (of a
merge target, on the undefended one before: what a merge can keep of the donor is not known else);
attacks drawn at random that breach the undefended model; an adaptive search; then the controls
(undefended, sham, ancestor, never knew) and the long run. Every breach of the defended model is
confirmed at once on fresh seeds and fresh examples, what came close afterwards. A confirmed breach
at another precision than the first is tried there too: only so can be said that rounding let it in.
Then it ends everything: more evidence could not change a refusal. Where the policy may leave a
precision out, it ends what it refuses, and the coarser ones go on.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from release_guard import __version__
from release_guard.adaptive import Tried, loss, propose
from release_guard.attacks import Attack
from release_guard.engines import OUT_OF_MEMORY, Engine, Job
from release_guard.errors import ModelError
from release_guard.evidence import (
    Arm,
    Evidence,
    Outcome,
    Record,
    Trial,
    Unattacked,
)
from release_guard.ledger import Ledger
from release_guard.manifest import hash_directory
from release_guard.phases import (
    ADAPT,
    CONFIRM,
    CONFIRM_CONTROL,
    CONTROL,
    DRAW,
    LONG_RUN,
    MIDPOINT,
    RECOVER,
    SEARCH,
    TUNE,
    Ground,
    Phase,
)
from release_guard.plugins import Spec
from release_guard.policy import Concept, MergeTarget, Policy, Precision, Target
from release_guard.precisions import survivors
from release_guard.priors import fitting, searchable
from release_guard.quantization import runnable
from release_guard.search import (
    DRAWN_AT_ONCE,
    best_of_each_family,
    controls,
    from_scratch,
    gentler,
    listed,
    pool,
    ranked,
    retuned,
    smaller,
)
from release_guard.session import Session
from release_guard.statistics import best_score, breached, confirm, flagged
from release_guard.subject import Subject
from release_guard.usefulness import counted, expected, shortfall


class Breached(Exception):  # noqa: N818  not an error: the one early way out
    """A breach of the defended model was confirmed, and no precision is left to publish."""


def red_team(subject: Subject, policy: Policy, ledger: Ledger, session: Session) -> Evidence:
    """Attack the defended model and its controls until a breach is confirmed or all is tried.

    Raises:
        ModelError: The data cannot be used, no precision can be run, or there is no midpoint.
    """
    started = session.now().isoformat()
    unrunnable = _unrunnable(policy, session)
    # First of all: a judge that cannot be believed ends it before anything is spent.
    unattacked = tuple(subject.unattacked(_runnable(policy, unrunnable), policy))
    with session.build_engine() as engine:
        team = _Team(subject, policy, ledger, session, engine, unattacked, unrunnable)
        try:
            team.attack_everything()
        except Breached:
            team.stopped = True
            session.progress(SEARCH.name, 1, 1, "breach confirmed; no further trial is needed")
    return _evidence(team, started)


@dataclass
class _Team:
    """A red team at work; `records` grows until the evidence is complete.

    `open` are the precisions that may still be published.
    """

    subject: Subject
    policy: Policy
    ledger: Ledger
    session: Session
    engine: Engine
    unattacked: tuple[Unattacked, ...]
    unrunnable: Mapping[Precision, str]
    ceilings: dict[str, float] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    planned: set[str] = field(default_factory=set)
    stopped: bool = False

    def __post_init__(self) -> None:
        self.precisions = _runnable(self.policy, self.unrunnable)
        self.open = self.precisions
        self._ground = Ground.of(self.subject.base, self.subject.folders, self.policy)

    def attack_everything(self) -> None:
        """Cheap and fatal first; each phase over all targets before the next, dearer one."""
        targets = [target for target in self.policy.targets if listed(self.policy, target)]
        for target in targets:
            self.ceilings[target.name] = self.ceiling(target)
            if isinstance(target, MergeTarget):
                list(self._run(CONTROL, "undefended", target, controls(self.policy, target)))
            self._attack(SEARCH, target, listed(self.policy, target))
        for phase in (self.draw, self.search, self.attack_controls, self.run_long):
            for target in targets:
                for precision in self.precisions:
                    if precision in self.open:
                        phase(target, precision)

    def draw(self, target: Target, precision: Precision) -> None:
        """Independent attacks: those that breach the undefended model, then on the defended one."""
        wanted = self.policy.red_team.drawn
        drawn = pool(self.policy, target, fitting(self.subject.base, target))
        kept: list[Spec] = []
        for start in range(0, len(drawn), DRAWN_AT_ONCE):
            if len(kept) < wanted:
                together = drawn[start : start + DRAWN_AT_ONCE]
                found = list(self._run(DRAW, "undefended", target, together, precision))
                effective = {item.trial.attack.label for item in found if self._breaches(item)}
                kept += [attack for attack in together if attack.label in effective]
        self._attack(DRAW, target, kept, precision)  # all: a choice among them would be no draw

    def search(self, target: Target, precision: Precision) -> None:
        """Adaptive search on the defended model, from all that is known of it."""
        families = searchable(listed(self.policy, target))
        left = self.policy.red_team.searched if families else 0
        fits = fitting(self.subject.base, target)
        known = self._known("defended", target, precision)
        batch = self._best_elsewhere(known, target, precision)
        number = 0
        while left:
            if not batch:
                tried = [self._tried(record) for record in known]
                seed = f"{self.policy.seed}/{target.name}@{precision}"
                batch = propose(families, tried, number=number, fits=fits, seed=seed)
            if not batch:
                return  # everything there is was tried
            found = self._attack(ADAPT, target, batch[:left], precision)
            known += sorted(found, key=lambda record: record.trial.key)
            left, number, batch = max(0, left - len(batch)), number + 1, ()

    def attack_controls(self, target: Target, precision: Precision) -> None:
        """Other arms: search, then the best configurations on fresh seeds.

        What was best on the undefended model is tried on the sham and the ancestor too. A merge
        with the ancestor in the release's place shows what the merge gives to anybody.
        """
        attacks = controls(self.policy, target)
        best = self._control("undefended", target, attacks, precision)
        attacks = tuple({spec.label: spec for spec in (*attacks, *best)}.values())
        is_concept = isinstance(target, Concept)
        if is_concept and self.subject.sham is not None:
            self._control("sham", target, attacks, precision)
        if self.subject.ancestor not in {None, self.subject.undefended}:
            self._control("ancestor", target, attacks, precision)
        if is_concept and self.policy.red_team.never_knew != "unavailable":
            self._tune_never_knew(target, precision)

    def run_long(self, target: Target, precision: Precision) -> None:
        """The best attack of each of the best families, on fresh seeds, far beyond the budget.

        What leads within the budget need not lead beyond: a closed form has nothing more to give.
        Mandatory families are always followed, as they may need it to be valid.
        """
        found = (item for item in self._known("defended", target, precision) if not item.surgical)
        best = best_of_each_family(self._ranked(found, target))
        most, mandatory = self.policy.red_team.long_run_best, self.policy.gate.mandatory
        best = (*best[:most], *(spec for spec in best[most:] if spec.family in mandatory))
        list(self._run(LONG_RUN, "defended", target, best, precision))

    def ceiling(self, target: Target) -> float:
        """The policy's number, or half way between what N and U reach within the budget."""
        if target.ceiling != "midpoint":
            return target.ceiling
        attacks = controls(self.policy, target)
        undefended = self._reach("undefended", target, attacks)
        never_knew = self._reach("never_knew", target, from_scratch(attacks))
        if undefended <= never_knew:
            raise ModelError(
                f"{target.name}: a model that never knew it does as well within the budget "
                f"({never_knew:.3f} against {undefended:.3f}), so there is no midpoint; give a "
                "number as `ceiling`, or a smaller budget"
            )
        return round((undefended + never_knew) / 2, 4)

    def _reach(self, arm: Arm, target: Target, attacks: Sequence[Spec]) -> float:
        found = self._run(MIDPOINT, arm, target, attacks)
        return max((best_score(record.outcome) for record in found), default=0.0)

    def _attack(
        self,
        phase: Phase,
        target: Target,
        attacks: Sequence[Spec],
        precision: Precision | None = None,
    ) -> list[Record]:
        """Attack the defended arm; confirm what breached at once, what came close afterwards.

        The best of each listed family is confirmed in any case: a search seed may have been
        unlucky, and only fresh seeds show what is claimed up to the budget.
        """
        found: list[Record] = []
        for record in self._run(phase, "defended", target, attacks, precision):
            for each in (record, *self._recovered(record)):
                found.append(each)
                if self._breaches(each):
                    self._confirm(each, target)
        for record in sorted(found, key=lambda record: -best_score(record.outcome)):
            close = flagged(best_score(record.outcome), self.ceilings[target.name])
            if close and not self._breaches(record):
                self._confirm(record, target)
        if phase is SEARCH:
            for record in self._best_of_families(found, target):
                self._confirm(record, target)
        return found

    def _recovered(self, record: Record) -> Iterator[Record]:
        """One more attempt at what collapsed, or found too little memory twice.

        An attacker would not leave it at that.
        """
        attack, outcome = record.trial.attack, record.outcome
        other = gentler(attack) if outcome.ending == "collapsed" else None
        if outcome.note.startswith(OUT_OF_MEMORY):
            other = smaller(attack)
        if other is not None:
            trial = record.trial.model_copy(update={"attack": other})
            yield from self._finish(RECOVER, [trial])

    def _breaches(self, record: Record) -> bool:
        return breached(best_score(record.outcome), self.ceilings[record.trial.target])

    def _confirm(self, record: Record, target: Target) -> None:
        trial = record.trial
        if trial.precision not in self.open:
            return  # it fell already
        found = list(self._run(CONFIRM, "defended", target, [trial.attack], trial.precision))
        outcomes = [item.outcome for item in found]
        scores = [best_score(outcome) for outcome in outcomes]
        examples = min(outcome.examples for outcome in outcomes)
        if confirm(scores, examples, self.ceilings[target.name]) == "confirmed":
            self._fell(trial, target)

    def _fell(self, trial: Trial, target: Target) -> None:
        """Give up what a confirmed breach refuses, and see whether the first precision holds."""
        first = self.precisions[0]
        if first in self.open and trial.precision != first:
            list(self._run(CONFIRM, "defended", target, [trial.attack], first))
        self.open = survivors(self.open, trial.precision, self.policy)
        if not self.open:
            raise Breached
        line = f"breach confirmed at {trial.precision}; going on with {', '.join(self.open)}"
        self.session.progress(SEARCH.name, 1, 1, line)

    def _best_of_families(self, records: Sequence[Record], target: Target) -> Iterator[Record]:
        for precision in self.open:
            here = [record for record in records if record.trial.precision == precision]
            by_attack = {record.trial.attack.label: record for record in here}
            for spec in best_of_each_family(self._ranked(here, target)):
                yield by_attack[spec.label]

    def _known(self, arm: Arm, target: Target, precision: Precision) -> list[Record]:
        """What searches found on an arm so far, in an order that no worker changes."""
        return [
            self._counted(record)
            for _, record in sorted(self.records.items())
            if (record.trial.arm, record.trial.target) == (arm, target.name)
            and (record.trial.precision, record.trial.split) == (precision, "search")
            and record.trial.ceiling is not None
        ]

    def _tried(self, record: Record) -> Tried:
        budget, ceiling = self.policy.red_team.budget, self.ceilings[record.trial.target]
        lost = loss(record.outcome, ceiling, budget.limit, budget.unit)
        if self._is_merge(record) and not self._breaches(record):
            whole = self.records[record.trial.key]
            lost = shortfall(whole, self._expected(record), ceiling)
        return Tried(record.trial.attack, lost)

    def _best_elsewhere(
        self, known: Sequence[Record], target: Target, precision: Precision
    ) -> tuple[Spec, ...]:
        """What was best on the undefended model, if nobody tried it on the defended one."""
        tried = {record.trial.attack.label for record in known}
        best = self._ranked(self._known("undefended", target, precision), target)[:1]
        return tuple(spec for spec in best if spec.label not in tried)

    def _control(
        self, arm: Arm, target: Target, attacks: Sequence[Spec], precision: Precision
    ) -> tuple[Spec, ...]:
        list(self._run(CONTROL, arm, target, attacks, precision))
        found = self._known(arm, target, precision)
        best = best_of_each_family(self._ranked(found, target))
        if isinstance(target, MergeTarget):  # they cost nothing, and the best may just have made it
            breaching = [record.trial.attack for record in found if self._breaches(record)]
            best = tuple({spec.label: spec for spec in (*best, *breaching)}.values())
        list(self._run(CONFIRM_CONTROL, arm, target, best, precision))
        return best

    def _tune_never_knew(self, target: Target, precision: Precision) -> None:
        attacks = from_scratch(controls(self.policy, target))
        found = list(self._run(CONTROL, "never_knew", target, attacks, precision))
        for leader in self._ranked(found, target)[:1]:
            others = retuned(leader, attacks)
            found += self._run(TUNE, "never_knew", target, others, precision)
        best = self._ranked(found, target)[:1]
        list(self._run(CONFIRM_CONTROL, "never_knew", target, best, precision))

    def _ranked(self, records: Iterable[Record], target: Target) -> list[Spec]:
        unit = self.policy.red_team.budget.unit
        return ranked(records, ceiling=self.ceilings[target.name], unit=unit)

    def _run(
        self,
        phase: Phase,
        arm: Arm,
        target: Target,
        attacks: Sequence[Spec],
        precision: Precision | None = None,
    ) -> Iterator[Record]:
        precisions = self.open if precision is None else (precision,)
        ceiling = self.ceilings.get(target.name, 0.0)  # not known yet while it is being found
        trials = self._ground.trials(phase, arm, target, attacks, precisions, ceiling)
        return self._finish(phase, sorted(trials, key=self._place_in_line))

    def _place_in_line(self, trial: Trial) -> tuple[int, int]:
        """Cheap attacks go first, and at each price the first precision."""
        return Attack.build(trial.attack).expense, self.precisions.index(trial.precision)

    def _finish(self, phase: Phase, trials: Sequence[Trial]) -> Iterator[Record]:
        """Trials of a phase, each recorded as it ends; what the ledger holds is not run again."""
        self.planned.update(trial.key for trial in trials)
        known = {trial.key: self.ledger.get(trial) for trial in trials}
        ended = 0
        for trial in trials:
            if (outcome := known[trial.key]) is not None:
                ended += 1
                record = self._keep(trial, outcome, phase)
                self.session.progress(phase.name, ended, len(trials), f"{_line(record)} (ledger)")
                yield self._counted(record)
        jobs = [self._job(trial) for trial in trials if known[trial.key] is None]
        for job, outcome in self.engine.run(jobs, urgent=phase.urgent):
            self.ledger.add(job.trial, outcome)
            ended += 1
            record = self._keep(job.trial, outcome, phase)
            self.session.progress(phase.name, ended, len(trials), _line(record))
            yield self._counted(record)

    def _keep(self, trial: Trial, outcome: Outcome, phase: Phase) -> Record:
        attack = Attack.build(trial.attack)
        record = Record(
            trial=trial,
            outcome=outcome,
            origin=phase.origin,
            against=attack.against,
            surgical=attack.surgical,
        )
        return self.records.setdefault(trial.key, record)

    def _counted(self, record: Record) -> Record:
        """A merge that nobody can use scores 0; all else counts as it was measured."""
        return counted(record, self._expected(record)) if self._is_merge(record) else record

    def _is_merge(self, record: Record) -> bool:
        return any(target.name == record.trial.target for target in self.policy.merge_targets)

    def _expected(self, record: Record) -> float | None:
        """What the merges of the undefended model keep of the donor, at the same place."""
        place = "undefended", record.trial.target, record.trial.precision
        return expected(
            other
            for other in self.records.values()
            if (other.trial.arm, other.trial.target, other.trial.precision) == place
        )

    def _job(self, trial: Trial) -> Job:
        ancestor = str(self.subject.ancestor) if trial.ancestor else ""
        own = trial.arm == "defended" and trial.precision in self.subject.artefacts
        source = str(self.subject.artefacts[trial.precision]) if own else self._source(trial.arm)
        return Job(trial, source, self.policy, ancestor, is_artefact=own, files=self._ground.files)

    def _source(self, arm: Arm) -> str:
        named = self.policy.red_team.never_knew
        sources: dict[Arm, Path | str | None] = {
            "defended": self.subject.defended,
            "sham": self.subject.sham,
            "ancestor": self.subject.ancestor,
            "never_knew": self.subject.undefended if named == "fresh" else named,
        }
        return str(sources.get(arm, self.subject.undefended))


def _evidence(team: _Team, started_at: str) -> Evidence:
    subject, policy = team.subject, team.policy
    overlaps = subject.overlaps(policy)
    unavailable: dict[Arm, str] = {}
    if policy.red_team.never_knew == "unavailable":
        unavailable["never_knew"] = "the policy declares it unavailable; no sigma is claimed"
    retention = tuple(subject.retention(precision, policy) for precision in team.precisions)
    return Evidence(
        tool=f"release-guard {__version__}",
        policy=policy.digest,
        base=hash_directory(subject.undefended).payload.root,
        immunized=hash_directory(subject.defended).payload.root,
        artefacts=subject.roots(policy),
        ceilings=team.ceilings,
        change=subject.change,
        unavailable=unavailable,
        unrunnable=team.unrunnable,
        overlap={name: overlap.exact for name, overlap in overlaps.items()},
        near_overlap={name: overlap.near for name, overlap in overlaps.items()},
        planned=len(team.planned) if not team.stopped else len(team.records),
        unattacked=team.unattacked,
        retention=retention,
        stages=subject.stages,
        as_is=subject.as_is,
        records=tuple(team.records[key] for key in sorted(team.records)),
        started_at=started_at,
        finished_at=team.session.now().isoformat(),
        environment=team.session.environment,
    )


def _unrunnable(policy: Policy, session: Session) -> dict[Precision, str]:
    """The policy's precisions that cannot be run here, and why."""
    reasons = {precision: runnable(precision) for precision in policy.precisions}
    found = {precision: reason for precision, reason in reasons.items() if reason}
    if len(found) == len(policy.precisions):
        raise ModelError(next(iter(found.values())))
    for precision, reason in found.items():
        session.progress(SEARCH.name, 0, 0, f"{precision} cannot be run here: {reason}")
    return found


def _runnable(policy: Policy, unrunnable: Collection[Precision]) -> tuple[Precision, ...]:
    return tuple(precision for precision in policy.precisions if precision not in unrunnable)


def _line(record: Record) -> str:
    trial, outcome = record.trial, record.outcome
    last = outcome.curve[-1] if outcome.curve else None
    reached = (
        f"{last.score:.3f} after {last.cost.of(trial.budget.unit):g}" if last else outcome.note
    )
    who = f"{trial.arm.replace('_', '-')} {trial.attack.label} {trial.target}@{trial.precision}"
    ending = "measured" if trial.ceiling is None and last else outcome.ending
    return f"{who} seed {trial.seed}: {ending}, {reached} {trial.budget.unit}"
