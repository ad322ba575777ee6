"""What a run will do, before anything is spent: trials, steps, time and disk, all at most.

Whatever the red team chooses later (the best attacks) is taken to be the slowest, and no breach to
end it early, so a run costs less than its plan, never more, as far as this machine keeps its pace.
Only what collapses on the defended model gets one more trial that no plan foresees.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from release_guard.evidence import Arm, Trial, cost_grid
from release_guard.phases import (
    ADAPT,
    CONFIRM,
    CONFIRM_CONTROL,
    CONTROL,
    DRAW,
    LONG_RUN,
    MIDPOINT,
    SEARCH,
    TUNE,
    Ground,
    Phase,
)
from release_guard.plugins import Spec
from release_guard.policy import MergeTarget, Policy, Precision, Target
from release_guard.priors import searchable
from release_guard.search import (
    DRAWN_AT_ONCE,
    best_of_each_family,
    controls,
    from_scratch,
    listed,
    retuned,
)
from release_guard.strict_json import canonical_json

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
    """A phase on one arm and target: `chosen` of `attacks`, at every precision, on every seed.

    More may be chosen than there are: others of these families, which nobody knows yet.
    """

    phase: Phase
    arm: Arm
    target: Target
    attacks: tuple[Spec, ...]
    chosen: int


@dataclass(frozen=True)
class Row:
    """What a part comes to, at most.

    Attributes:
        phase: Its name, as shown while it runs.
        arm: Whose weights.
        target: Its name.
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


Pools = Mapping[str, tuple[Spec, ...]]
"""Attacks drawn at random for each target, by its name."""


def parts(policy: Policy, pools: Pools) -> list[Part]:
    """The phases of a red team that no breach ends, in their order."""
    found: list[Part] = []
    for target in policy.targets:
        found += _listed(policy, target)
    for target in policy.targets:
        found += _drawn_and_searched(policy, target, pools.get(target.name, ()))
    for target in policy.targets:
        found += _controls(policy, target, pools.get(target.name, ()))
    return [part for part in found if part.attacks and part.chosen]


def rows(
    wanted: Iterable[Part], ground: Ground, paces: Paces, held: Collection[Trial]
) -> tuple[Row, ...]:
    """What each part comes to, less what the ledger holds."""
    known = {_blind(trial) for trial in held}
    found = []
    for part in wanted:
        trials = _trials(part, ground)
        mine = known & {_blind(trial) for trial in trials}
        known -= mine  # what two parts might choose is run once
        found.append(_row(part, trials, paces, len(mine)))
    return tuple(found)


def disk(policy: Policy, *, payload: int, num_trials: int, immunizes: bool) -> int:
    """Bytes a run writes at most: model, checkpoints, ledger, evidence, a hub that is a folder."""
    copies = 1 + _CHECKPOINT_COPIES * len(policy.stages) if immunizes else 0
    copies += sum(precision != "fp32" for precision in policy.precisions)
    if policy.hub.name == "directory":  # its head and the stored revision
        copies += 2 * len(policy.precisions)
    limit = max(2, round(policy.red_team.budget.limit * policy.red_team.long_run))
    points = len(cost_grid(limit, policy.red_team.grid_ratio))
    return copies * payload + 4 * num_trials * (_LINE_BYTES + _POINT_BYTES * points)


def _listed(policy: Policy, target: Target) -> list[Part]:
    attacks, others = listed(policy, target), controls(policy, target)
    found = []
    if target.ceiling == "midpoint":
        scratch = from_scratch(others)
        found.append(Part(MIDPOINT, "undefended", target, others, len(others)))
        found.append(Part(MIDPOINT, "never_knew", target, scratch, len(scratch)))
    found.append(Part(SEARCH, "defended", target, attacks, len(attacks)))
    found.append(Part(CONFIRM, "defended", target, attacks, len(attacks)))
    return found


def _drawn_and_searched(policy: Policy, target: Target, pool: tuple[Spec, ...]) -> list[Part]:
    kept = min(policy.red_team.drawn + DRAWN_AT_ONCE - 1, len(pool))
    families, num_searched = searchable(listed(policy, target)), policy.red_team.searched
    return [
        Part(DRAW, "undefended", target, pool, len(pool)),
        Part(DRAW, "defended", target, pool, kept),
        Part(CONFIRM, "defended", target, pool, kept),
        Part(ADAPT, "defended", target, families, num_searched),
        Part(CONFIRM, "defended", target, families, num_searched),
    ]


def _controls(policy: Policy, target: Target, pool: tuple[Spec, ...]) -> list[Part]:
    red, attacks = policy.red_team, controls(policy, target)
    if isinstance(target, MergeTarget):
        return _merge_controls(policy, target, attacks)
    families = len(best_of_each_family(attacks))
    known = (*attacks, *pool)
    found = [
        Part(CONTROL, "undefended", target, attacks, len(attacks)),
        Part(CONFIRM_CONTROL, "undefended", target, known, families),
    ]
    found += _other_arms(policy, target, known)
    most = red.long_run_best + len(policy.gate.mandatory)  # these are always followed
    longest = min(most, len(best_of_each_family(known)))
    return [*found, Part(LONG_RUN, "defended", target, known, longest)]


def _merge_controls(policy: Policy, target: Target, attacks: tuple[Spec, ...]) -> list[Part]:
    """Every merge may breach the undefended model, and is confirmed then; none gets a long run."""
    arms: list[Arm] = ["undefended"]
    if policy.red_team.ancestor not in {None, "undefended"}:
        arms.append("ancestor")
    return [
        Part(phase, arm, target, attacks, len(attacks))
        for arm in arms
        for phase in (CONTROL, CONFIRM_CONTROL)
    ]


def _other_arms(policy: Policy, target: Target, known: tuple[Spec, ...]) -> list[Part]:
    red, attacks = policy.red_team, controls(policy, target)
    families = len(best_of_each_family(attacks))
    added = families if len(known) > len(attacks) else 0  # what was best on the undefended model
    has_ancestor = red.ancestor not in {None, "undefended"}
    arms: dict[Arm, bool] = {"sham": red.sham, "ancestor": has_ancestor}
    found = []
    for arm in [arm for arm, wanted in arms.items() if wanted]:
        found.append(Part(CONTROL, arm, target, known, len(attacks) + added))
        found.append(Part(CONFIRM_CONTROL, arm, target, known, families))
    if red.never_knew != "unavailable" and (scratch := from_scratch(attacks)):
        tuned = [retuned(best, scratch) for best in scratch]
        variants = tuple({spec.label: spec for specs in tuned for spec in specs}.values())
        found += [
            Part(CONTROL, "never_knew", target, scratch, len(scratch)),
            Part(TUNE, "never_knew", target, variants, max(map(len, tuned))),
            Part(CONFIRM_CONTROL, "never_knew", target, (*scratch, *variants), 1),
        ]
    return found


def _trials(part: Part, ground: Ground) -> list[Trial]:
    precisions = ground.policy.precisions
    return ground.trials(part.phase, part.arm, part.target, part.attacks, precisions, 0.0)


def _row(part: Part, trials: Sequence[Trial], paces: Paces, num_held: int) -> Row:
    worst = [
        trial
        for precision in dict.fromkeys(trial.precision for trial in trials)
        for trial in _slowest([t for t in trials if t.precision == precision], part.chosen, paces)
    ]
    held = min(len(worst), num_held)
    left = 1 - held / len(worst)
    return Row(
        phase=part.phase.name,
        arm=part.arm,
        target=part.target.name,
        trials=len(worst),
        held=held,
        steps=round(left * sum(_pace(trial, paces).steps(trial) for trial in worst)),
        seconds=left * sum(_pace(trial, paces).seconds(trial) for trial in worst),
    )


def _slowest(trials: Sequence[Trial], chosen: int, paces: Paces) -> list[Trial]:
    """All seeds of the slowest configurations; `trials` are ordered by configuration."""
    groups = [list(group) for _, group in groupby(trials, key=lambda trial: trial.attack.label)]
    groups.sort(key=lambda group: -_pace(group[0], paces).seconds(group[0]))
    groups = groups[:chosen] + [groups[0]] * (chosen - len(groups))
    return [trial for group in groups for trial in group]


def _pace(trial: Trial, paces: Paces) -> Pace:
    return paces[trial.attack.family, trial.precision]


def _blind(trial: Trial) -> bytes:
    """The trial but for its ceiling, which may be unknown yet; only whether it stops there."""
    stops = trial.ceiling is not None
    return canonical_json({**trial.model_dump(mode="json"), "ceiling": stops})
