"""Run one trial of published evidence again, and say whether it comes to the same.

The evidence says what was tried, down to the seed; whoever has the weights and the data can try it.
Whether the evidence is the publisher's is another question, which `verify` answers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from release_guard import SUITE
from release_guard.engines import Job
from release_guard.errors import IntegrityError, PolicyError
from release_guard.evidence import Evidence, Outcome, Point, Record
from release_guard.manifest import EVIDENCE_FOLDER, Manifest, hash_directory
from release_guard.modalities import Modality
from release_guard.phases import Folders, Ground
from release_guard.policy import Policy, Precision
from release_guard.session import Session
from release_guard.sources import local_folder

_SHOWN = 5


class Agreement(StrEnum):
    """How a replayed outcome compares with the recorded one."""

    IDENTICAL = "bit-identical"
    CLOSE = "within tolerance"
    DIFFERENT = "different"


@dataclass(frozen=True)
class Request:
    """What is to be run again.

    Attributes:
        record: One line of the evidence.
        policy: The very policy it was made under; its data are used.
        source: Folder of the weights that the trial attacked.
        ancestor: Folder of the public ancestor, for trials that use one.
        artefacts: Precisions that the evidence has files of their own for.
    """

    record: Record
    policy: Policy
    source: Path
    ancestor: Path | None = None
    artefacts: Collection[Precision] = ()

    @property
    def is_artefact(self) -> bool:
        """Whether the trial attacked files of its precision, instead of rounding others."""
        return self.record.trial.arm == "defended" and self.record.trial.precision in self.artefacts

    @property
    def folder(self) -> Path:
        """Where the attacked files lie: in a release that may be a folder of its own."""
        inside = self.source / self.record.trial.precision
        return inside if self.is_artefact and inside.is_dir() else self.source


@dataclass(frozen=True)
class Replay:
    """A trial as it was recorded, and as it came out now."""

    record: Record
    outcome: Outcome
    tolerance: float

    @property
    def distance(self) -> float | None:
        """Largest difference of scores; None where the curves do not have the same costs.

        Those on a donor's task are scores as well.
        """
        before, after = self.record.outcome.curve, self.outcome.curve
        if [_spent(point) for point in before] != [_spent(point) for point in after]:
            return None
        pairs = [(old.score, new.score) for old, new in zip(before, after, strict=True)]
        pairs += zip(_kept(self.record.outcome), _kept(self.outcome), strict=True)
        return max((abs(old - new) for old, new in pairs), default=0.0)

    @property
    def agreement(self) -> Agreement:
        """Another ending, or scores at other costs, is never within a tolerance.

        Nor is a crash for another reason: it may be this machine's own.
        """
        before, after = self.record.outcome, self.outcome
        if before.ending != after.ending or self.distance is None:
            return Agreement.DIFFERENT
        if after.ending == "failed" and before.note != after.note:
            return Agreement.DIFFERENT
        if self.distance == 0:
            return Agreement.IDENTICAL
        return Agreement.CLOSE if self.distance <= self.tolerance else Agreement.DIFFERENT

    @property
    def agrees(self) -> bool:
        """Bit by bit, or within the tolerance."""
        return self.agreement is not Agreement.DIFFERENT


def find(evidence: Evidence, prefix: str) -> Record:
    """The record whose trial's key begins so.

    Raises:
        PolicyError: None does, or several do.
    """
    keys = {record.trial.key: record for record in evidence.records}
    found = sorted(key for key in keys if key.startswith(prefix.lower()))
    if not found:
        raise PolicyError(f"{prefix}: no trial of this evidence; it has {len(keys)}")
    if len(found) > 1:
        listed = ", ".join(key[: len(prefix) + 4] for key in found[:_SHOWN])
        raise PolicyError(f"{prefix}: {len(found)} trials begin so ({listed} ...); write more")
    return keys[found[0]]


def ancestor_of(policy: Policy, base: str | None) -> Path | None:
    """Folder of the public ancestor: what was given, else what the policy names.

    Raises:
        ModelError: It cannot be had.
    """
    named = base or policy.red_team.ancestor
    if named is None or named == "undefended":
        return None
    return local_folder(named)


def evidence_of(folder: Path) -> Path:
    """The evidence file of a run's folder, or of a release's."""
    inside = folder / EVIDENCE_FOLDER / "evidence.jsonl"
    return inside if inside.is_file() else folder / "evidence.jsonl"


def replay(request: Request, session: Session, *, tolerance: float) -> Replay:
    """Run the trial again, on exactly the weights, the data and the rules that it names.

    Args:
        request: Which trial, and where everything lies.
        session: Where it runs.
        tolerance: Largest difference of scores, each in [0, 1], that other processors may make.

    Raises:
        IntegrityError: Weights, ancestor, data or suite are not those of the trial.
        ModelError: The model cannot be loaded.
    """
    trial = request.record.trial
    if trial.suite != SUITE:
        raise IntegrityError(f"a trial of suite {trial.suite!a}; this version has suite {SUITE}")
    files = _require_same(request)
    ancestor = str(request.ancestor) if trial.ancestor else ""
    place, policy = str(request.folder), request.policy
    job = Job(trial, place, policy, ancestor, is_artefact=request.is_artefact, files=files)
    with session.build_engine() as engine:
        session.progress("replay", 0, 1, f"{trial.attack.label} seed {trial.seed}")
        ((_, outcome),) = engine.run([job])
    session.progress("replay", 1, 1, outcome.ending)
    return Replay(request.record, outcome, tolerance)


def _require_same(request: Request) -> Mapping[str, str]:
    """Hashed by the code that gave the trial its digests; those of files, for the worker."""
    trial, policy = request.record.trial, request.policy
    artefact = trial.precision if request.is_artefact else None
    model = Modality.build(policy.modality).load(str(request.folder), artefact=artefact)
    ground = Ground.of(model, Folders(request.folder, ancestor=request.ancestor), policy)
    is_fresh = trial.arm == "never_knew" and policy.red_team.never_knew == "fresh"
    weights = ground.roots["never_knew"] if is_fresh else _root(request)
    _compare(weights, trial.weights, f"{request.folder}: not the weights that were attacked")
    _compare(ground.data.get(trial.target, ""), trial.data, f"{trial.target}: other examples")
    if trial.ancestor:
        named = request.ancestor or "--base"
        _compare(ground.roots["ancestor"], trial.ancestor, f"{named}: not the trial's ancestor")
    return ground.files


def _root(request: Request) -> str:
    """Payload root of the files attacked; of a release's top without the other precisions."""
    others = tuple(f"{each}/" for each in request.artefacts)
    payload = hash_directory(request.folder).payload
    mine = (entry for entry in payload.entries if not entry.name.startswith(others))
    return Manifest.of(mine).root


def _compare(found: str, wanted: str, what: str) -> None:
    if found != wanted:
        raise IntegrityError(f"{what} (found {found[:16] or 'nothing'}, wanted {wanted[:16]})")


def _kept(outcome: Outcome) -> tuple[float, ...]:
    kept = outcome.kept
    return (0.0, 0.0) if kept is None else (kept.merged, kept.alone)


def _spent(point: Point) -> tuple[int, int, float]:
    """Cost but for the time it took."""
    return point.cost.steps, point.cost.samples, point.cost.flops
