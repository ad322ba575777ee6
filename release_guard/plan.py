"""What a run will do, before anything is spent: trials, steps, time and disk, all at most.

Whatever the red team chooses later (the best attacks) is taken to be the slowest, and no breach to
end it early, so a run costs less than its plan, never more, as far as this machine keeps its pace.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from release_guard.evidence import Arm, Trial, canonical_json, cost_grid
from release_guard.plugins import Spec
from release_guard.policy import Concept, Policy, Precision
from release_guard.redteam import (
    CONFIRM,
    CONFIRM_CONTROL,
    CONTROL,
    LONG_RUN,
    MIDPOINT,
    SEARCH,
    TUNE,
    Ground,
    Phase,
)
from release_guard.search import best_of_each_family, from_scratch, listed, retuned

_CHECKPOINT_COPIES = 20  # weights, optimizer moments, simulated attackers with theirs; kept twice
_LINE_BYTES, _POINT_BYTES = 900, 90  # of a trial in ledger and evidence


@dataclass(frozen=True)
class Pace:
    """How fast one attack goes here at one precision.

    Attributes:
        steps_per_unit: Optimizer steps one unit of the policy's budget pays for.
        seconds_per_step: Of the attack itself.
        seconds_per_example: Of scoring.
        seconds_per_trial: Whatever does not grow: copying, new heads, first batches.
        grows: False: it yields once, whatever the budget (closed form).
    """

    steps_per_unit: float
    seconds_per_step: float
    seconds_per_example: float
    seconds_per_trial: float
    grows: bool = True

    def steps(self, trial: Trial) -> int:
        """Optimizer steps of a trial that nothing ends early."""
        return max(1, math.floor(trial.budget.limit * self.steps_per_unit)) if self.grows else 0

    def seconds(self, trial: Trial) -> float:
        """Time of such a trial, in one process."""
        steps = self.steps(trial)
        scored = len(cost_grid(steps, trial.grid_ratio)) if self.grows else 1
        work = steps * self.seconds_per_step + scored * trial.examples * self.seconds_per_example
        return self.seconds_per_trial + work


Paces = Mapping[tuple[str, Precision], Pace]
"""By attack family and precision."""


@dataclass(frozen=True)
class Part:
    """A phase on one arm and target: `chosen` of `attacks`, at every precision, on every seed."""

    phase: Phase
    arm: Arm
    concept: Concept
    attacks: tuple[Spec, ...]
    chosen: int


@dataclass(frozen=True)
class Row:
    """What a part comes to, at most.

    Attributes:
        phase: Its name, as shown while it runs.
        arm: Whose weights.
        target: Name of the concept.
        trials: How many.
        held: How many of them the ledger has already.
        steps: Optimizer steps of all the others.
        seconds: Their time in one process.
    """

    phase: str
    arm: Arm
    target: str
    trials: int
    held: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Everything a run will do.

    Attributes:
        stages: Names of the stages; their time is not in `seconds`.
        rows: The red team's work.
        workers: Trials at once.
        disk_bytes: New files, at most, with the checkpoints of the stages.
        free_bytes: Room there.
    """

    stages: tuple[str, ...]
    rows: tuple[Row, ...]
    workers: int
    disk_bytes: int
    free_bytes: int

    @property
    def trials(self) -> int:
        return sum(row.trials for row in self.rows)

    @property
    def held(self) -> int:
        return sum(row.held for row in self.rows)

    @property
    def steps(self) -> int:
        return sum(row.steps for row in self.rows)

    @property
    def seconds(self) -> float:
        """Wall time of the red team, if every worker has a core."""
        return sum(row.seconds for row in self.rows) / self.workers


def parts(policy: Policy) -> list[Part]:
    """The phases of a red team that no breach ends, in their order."""
    knows_never = policy.red_team.never_knew != "unavailable"
    found: list[Part] = []
    for concept in policy.concepts:
        attacks = listed(policy, concept)
        scratch = from_scratch(attacks)
        if concept.ceiling == "midpoint":
            found.append(Part(MIDPOINT, "undefended", concept, attacks, len(attacks)))
            found.append(Part(MIDPOINT, "never_knew", concept, scratch, len(scratch)))
        found.append(Part(SEARCH, "defended", concept, attacks, len(attacks)))
        found.append(Part(CONFIRM, "defended", concept, attacks, len(attacks)))
    for concept in policy.concepts:
        found += _controls(policy, concept, knows_never=knows_never)
    return [part for part in found if part.attacks]


def rows(
    wanted: Iterable[Part], ground: Ground, paces: Paces, held: Collection[Trial]
) -> tuple[Row, ...]:
    """What each part comes to, less what the ledger holds."""
    known = {_blind(trial) for trial in held}
    return tuple(_row(part, ground, paces, known) for part in wanted)


def disk(policy: Policy, *, payload: int, num_trials: int, immunizes: bool) -> int:
    """Bytes a run writes at most: model, checkpoints, ledger, evidence, a hub that is a folder."""
    copies = 1 + _CHECKPOINT_COPIES * len(policy.stages) if immunizes else 0
    copies += 2 if policy.hub.name == "directory" else 0  # its head and the stored revision
    limit = max(2, round(policy.red_team.budget.limit * policy.red_team.long_run))
    points = len(cost_grid(limit, policy.red_team.grid_ratio))
    return copies * payload + 4 * num_trials * (_LINE_BYTES + _POINT_BYTES * points)


def _controls(policy: Policy, concept: Concept, *, knows_never: bool) -> list[Part]:
    attacks = listed(policy, concept)
    families = len(best_of_each_family(attacks))
    longest = min(policy.red_team.long_run_best, len(attacks))
    found = [
        Part(CONTROL, "undefended", concept, attacks, len(attacks)),
        Part(CONFIRM_CONTROL, "undefended", concept, attacks, families),
    ]
    if knows_never and (scratch := from_scratch(attacks)):
        tuned = [retuned(best, scratch) for best in scratch]
        variants = tuple({spec.label: spec for specs in tuned for spec in specs}.values())
        found += [
            Part(CONTROL, "never_knew", concept, scratch, len(scratch)),
            Part(TUNE, "never_knew", concept, variants, max(map(len, tuned))),
            Part(CONFIRM_CONTROL, "never_knew", concept, (*scratch, *variants), 1),
        ]
    return [*found, Part(LONG_RUN, "defended", concept, attacks, longest)]


def _row(part: Part, ground: Ground, paces: Paces, known: Collection[bytes]) -> Row:
    precisions = ground.policy.precisions
    trials = ground.trials(part.phase, part.arm, part.concept, part.attacks, precisions, 0.0)
    worst = [
        trial
        for precision in precisions
        for trial in _slowest([t for t in trials if t.precision == precision], part.chosen, paces)
    ]
    held = min(len(worst), sum(_blind(trial) in known for trial in trials))
    left = 1 - held / len(worst)
    return Row(
        phase=part.phase.name,
        arm=part.arm,
        target=part.concept.name,
        trials=len(worst),
        held=held,
        steps=round(left * sum(_pace(trial, paces).steps(trial) for trial in worst)),
        seconds=left * sum(_pace(trial, paces).seconds(trial) for trial in worst),
    )


def _slowest(trials: Sequence[Trial], chosen: int, paces: Paces) -> list[Trial]:
    """All seeds of the slowest configurations; `trials` are ordered by configuration."""
    groups = [list(group) for _, group in groupby(trials, key=lambda trial: trial.attack.label)]
    groups.sort(key=lambda group: -_pace(group[0], paces).seconds(group[0]))
    return [trial for group in groups[:chosen] for trial in group]


def _pace(trial: Trial, paces: Paces) -> Pace:
    return paces[trial.attack.name, trial.precision]


def _blind(trial: Trial) -> bytes:
    """The trial but for its ceiling, which may be unknown yet; only whether it stops there."""
    stops = trial.ceiling is not None
    return canonical_json({**trial.model_dump(mode="json"), "ceiling": stops})
