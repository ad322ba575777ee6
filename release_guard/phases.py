"""What is tried when: the phases of a red team, and the trials that each of them comes to."""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from release_guard.attacks import Attack
from release_guard.evidence import Arm, Origin, ScoredSplit, Trial
from release_guard.manifest import Manifest, hash_directory
from release_guard.plugins import Spec
from release_guard.policy import NO_CHECKPOINT, Budget, MergeTarget, Policy, Precision, Target
from release_guard.sources import local_folder
from release_guard.statistics import REFUTING_SEEDS

if TYPE_CHECKING:
    from release_guard.modalities import ModelHandle

_OWN_SEEDS = 1_000_000  # seeds of attacks that have one of their own begin here
_NUM_OWN_SEEDS = 1_000_000


@dataclass(frozen=True)
class Phase:
    """How the trials of a phase are run.

    Attributes:
        name: Shown while it runs.
        origin: Mark on its records.
        split: Examples scored; `confirm` is seen by no search.
        offset: First seed beyond the policy's, so that no seed serves two phases.
        long: Run to `long_run` times the budget.
        stops: End a trial at its first breach.
        own_seed: Every attack has one seed, which follows from its options: who says that
            configurations were drawn independently must not give all of them the same luck.
        urgent: Goes before whatever waits.
    """

    name: str
    origin: Origin
    split: ScoredSplit
    offset: int = 0
    long: bool = False
    stops: bool = True
    own_seed: bool = False
    urgent: bool = False


MIDPOINT = Phase("find the midpoint", "listed", "search", stops=False)
SEARCH = Phase("attack the release", "listed", "search")
DRAW = Phase("draw attacks at random", "drawn", "search", own_seed=True)
ADAPT = Phase("search for attacks", "searched", "search", own_seed=True)
RECOVER = Phase("recover what came to nothing", "tuned", "search", urgent=True)
CONFIRM = Phase(
    "confirm a finding", "confirming", "confirm", offset=1_000, stops=False, urgent=True
)
CONTROL = Phase("attack the controls", "listed", "search", long=True)
TUNE = Phase("tune the never-knew arm", "tuned", "search", long=True)
CONFIRM_CONTROL = Phase("confirm the controls", "confirming", "confirm", offset=1_000, long=True)
LONG_RUN = Phase("long run", "long_run", "confirm", offset=2_000, long=True)


@dataclass(frozen=True)
class Folders:
    """Where the models lie; None: there is none, or it is not made yet.

    Attributes:
        undefended: The base model.
        defended: The very files to be published.
        sham: Moved as far as the defended one, to no purpose.
        ancestor: The public relative; the undefended folder if that one is public itself.
        artefacts: The files of precisions that have some of their own; at others the defended ones
            are rounded in memory.
    """

    undefended: Path
    defended: Path | None = None
    sham: Path | None = None
    ancestor: Path | None = None
    artefacts: Mapping[Precision, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Ground:
    """What all trials of a run share.

    Attributes:
        policy: Seeds, budgets, numbers of examples.
        roots: Digest of each arm's files.
        data: Digest of each target's examples, of the donor it is merged with, and of whatever else
            the attacks on it read.
        artefacts: Digest of the defended arm's files at precisions that have some of their own.
        files: Digest of the files of every model and every data set, by where they lie: a worker
            that finds others there does not measure them.
    """

    policy: Policy
    roots: Mapping[Arm, str]
    data: Mapping[str, str]
    artefacts: Mapping[Precision, str]
    files: Mapping[str, str]

    @classmethod
    def of(cls, base: "ModelHandle", folders: Folders, policy: Policy) -> "Ground":
        """Hash whatever trials read, each folder once."""
        arms: dict[Arm, Path | None] = {
            "undefended": folders.undefended,
            "defended": folders.defended,
            "sham": folders.sham,
            "ancestor": folders.ancestor,
        }
        there = {*filter(None, arms.values()), *folders.artefacts.values()}
        manifests = {folder: hash_directory(folder) for folder in there}
        named = _named_roots(policy)
        roots = {
            arm: manifests[folder].payload.root if folder else "" for arm, folder in arms.items()
        }
        roots["never_knew"] = _never_knew_root(manifests[folders.undefended], policy, named)
        read = {source for target in policy.targets for source in _read_for(target, policy)}
        return cls(
            policy,
            roots,
            _data_digests(base, policy, named),
            {each: manifests[folder].payload.root for each, folder in folders.artefacts.items()},
            {
                **{source: base.files(source) for source in read},
                **named,
                **{str(folder): manifest.payload.root for folder, manifest in manifests.items()},
            },
        )

    def trials(
        self,
        phase: Phase,
        arm: Arm,
        target: Target,
        attacks: Sequence[Spec],
        precisions: Sequence[Precision],
        ceiling: float,
    ) -> list[Trial]:
        """Every trial of a phase on one arm; `ceiling` ends those that stop at a breach."""
        red = self.policy.red_team
        searches = phase.split == "search"
        limit = red.budget.limit * (red.long_run if phase.long else 1)
        return [
            Trial(
                arm=arm,
                precision=precision,
                target=target.name,
                attack=attack,
                seed=seed,
                budget=Budget(unit=red.budget.unit, limit=limit),
                ceiling=ceiling if phase.stops else None,
                split=phase.split,
                examples=red.search_examples if searches else red.confirm_examples,
                grid_ratio=red.grid_ratio,
                weights=self.weights(arm, precision),
                data=self.data[target.name],
                ancestor=self._ancestor(attack, target),
            )
            for attack in attacks
            for precision in precisions
            for seed in self.seeds(phase, attack)
        ]

    def weights(self, arm: Arm, precision: Precision) -> str:
        """Digest of the files that an arm is at a precision."""
        own = self.artefacts if arm == "defended" else {}
        return own.get(precision, self.roots[arm])

    def seeds(self, phase: Phase, attack: Spec) -> Sequence[int]:
        """Seeds of one attack in a phase."""
        red, first = self.policy.red_team, self.policy.seed + phase.offset
        if phase.own_seed:
            return (first + _OWN_SEEDS + zlib.crc32(attack.label.encode()) % _NUM_OWN_SEEDS,)
        count = red.search_seeds if phase.split == "search" else red.confirm_seeds
        if phase is CONFIRM:  # fewer refute nothing
            count = max(count, REFUTING_SEEDS)
        return range(first, first + count)

    def _ancestor(self, attack: Spec, target: Target) -> str:
        """Of a merge target that names its base, that is the ancestor; `data` digests it."""
        if isinstance(target, MergeTarget) and target.base is not None:
            return ""
        return self.roots["ancestor"] if Attack.build(attack).needs_ancestor else ""


def data_digests(base: "ModelHandle", policy: Policy) -> dict[str, str]:
    """Digest of all that trials read, by target."""
    return _data_digests(base, policy, _named_roots(policy))


def _never_knew_root(undefended: Manifest, policy: Policy, named: Mapping[str, str]) -> str:
    """Fresh weights depend on the configuration alone; a named checkpoint on its files."""
    if policy.red_team.never_knew in NO_CHECKPOINT:
        files = (entry for entry in undefended.entries if entry.kind == "configuration")
        return Manifest.of(files).root
    return named[policy.red_team.never_knew]


def _named_roots(policy: Policy) -> dict[str, str]:
    """Of what lies there now: a branch or a tag of the Hub may name other files tomorrow."""
    models = {source for target in policy.merge_targets for source in target.models}
    models |= {policy.red_team.never_knew} - NO_CHECKPOINT
    return {source: hash_directory(local_folder(source)).payload.root for source in models}


def _data_digests(base: "ModelHandle", policy: Policy, named: Mapping[str, str]) -> dict[str, str]:
    """One for all trials of a target: what any attack on it reads is part of it."""
    digests = {}
    for target in policy.targets:
        parts = [base.digest(source) for source in _read_for(target, policy)]
        parts += [named[source] for source in target.models]
        digests[target.name] = hashlib.sha256("".join(parts).encode()).hexdigest()
    return digests


def _read_for(target: Target, policy: Policy) -> list[str]:
    """Data sets that score a target or that attacks on it read."""
    attacks = [Attack.build(spec).located(policy) for spec in policy.aimed_at(target)]
    read = dict.fromkeys(source for attack in attacks for source in attack.sources)
    return [*target.data_sets, *read]
