"""Where trials run. An engine says where and when, never what: outcomes are the same anywhere."""

import contextlib
import functools
import math
import os
import time
import traceback
from abc import abstractmethod
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from pydantic import Field, PrivateAttr

from release_guard.credentials import is_secret
from release_guard.errors import IntegrityError, ModelError
from release_guard.evidence import Kept, Outcome, Point, Trial
from release_guard.manifest import hash_directory
from release_guard.plugins import Plugin, Spec
from release_guard.policy import MergeTarget, Policy, Precision, Target
from release_guard.sources import identity, local_folder
from release_guard.statistics import breached

if TYPE_CHECKING:
    from release_guard.attacks import Attack
    from release_guard.modalities import ModelHandle

_NO_TOKEN = {
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_TOKEN_PATH": os.devnull,  # else the one that `hf auth login` left is found when asked for
}
WORKER_ENVIRONMENT: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads cost a busy machine up to seven times
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
DIED, OUT_OF_MEMORY, CHANGED = "the worker died", "out of memory", "changed since the run began"


@dataclass(frozen=True)
class Job:
    """A trial and where the weights lie that it attacks.

    Attributes:
        trial: What is tried.
        source: Folder of the attacked model.
        policy: Its targets and its modality.
        ancestor: Folder of the public ancestor; only attacks that need it load it.
        alone: This is its second chance: it runs while no other trial does.
        is_artefact: The folder holds the trial's precision itself, and nothing is rounded here.
        files: Digest of the files of all that it may read, models and data, by where they lie; none
            where nobody compares.
    """

    trial: Trial
    source: str
    policy: Policy
    ancestor: str = ""
    alone: bool = False
    is_artefact: bool = False
    files: Mapping[str, str] = field(default_factory=dict)


class Engine(Plugin):
    """Runs trials in workers of its own; leaving the context kills whatever is running.

    A trial that loses its worker or its memory is run once more, with nothing beside it, so as it
    was: a smaller batch would be another trial, which is the red team's business. Then it has
    failed.
    """

    workers: int = Field(default=1, ge=1)
    """Trials at once."""

    _waiting: deque[Job] = PrivateAttr(default_factory=deque)
    _done: dict[str, Outcome] = PrivateAttr(default_factory=dict)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.clear()
        self.close()

    def run(self, jobs: Iterable[Job], *, urgent: bool = False) -> Iterator[tuple[Job, Outcome]]:
        """Run jobs, each yielded as it ends; `urgent` ones go before all that wait."""
        mine = {job.trial.key: job for job in jobs}
        if urgent:
            self._waiting.extendleft(reversed(mine.values()))
        else:
            self._waiting.extend(mine.values())
        while mine:
            for key in [key for key in mine if key in self._done]:
                yield mine.pop(key), self._done.pop(key)
            if mine:
                self._fill()
                for job, outcome in self.ended():
                    self._settle(job, outcome)

    def check(self) -> None:
        """See whether trials could run, before anything is spent.

        Raises:
            ReleaseGuardError: They could not; says what to do.
        """

    def open(self) -> None:
        """Get ready; nothing has to run yet.

        Raises:
            ReleaseGuardError: There is nowhere to run.
        """

    @abstractmethod
    def close(self) -> None:
        """Kill what is running and forget it."""

    @property
    @abstractmethod
    def running(self) -> Collection[Job]:
        """Jobs that were started and have not ended."""

    @abstractmethod
    def start(self, job: Job) -> None:
        """Run a job in a process that has one thread and none of our credentials.

        MUST return at once. Where `job.alone`, no other process of this engine may keep memory on
        its device.
        """

    @abstractmethod
    def ended(self) -> Iterable[tuple[Job, Outcome]]:
        """Wait until some running job has ended; all that have.

        A worker that is gone MUST be told as an outcome `failed` whose note begins with `DIED`.

        Raises:
            ReleaseGuardError: Nothing can run any more.
        """

    def _fill(self) -> None:
        while self._waiting and self._has_room_for(self._waiting[0]):
            self.start(self._waiting.popleft())

    def _has_room_for(self, job: Job) -> bool:
        if job.alone:
            return not self.running
        return len(self.running) < self.workers and not any(other.alone for other in self.running)

    def _settle(self, job: Job, outcome: Outcome) -> None:
        if outcome.note.endswith(CHANGED):  # as it will be for every other trial
            raise IntegrityError(
                f"{outcome.note}; put it back, or begin anew with another --output"
            )
        lost = outcome.ending == "failed" and outcome.note.startswith((DIED, OUT_OF_MEMORY))
        if lost and not job.alone:
            self._waiting.appendleft(replace(job, alone=True))
        elif lost:
            note = f"{outcome.note}, twice; the second time nothing else was running"
            self._done[job.trial.key] = outcome.model_copy(update={"note": note})
        else:
            self._done[job.trial.key] = outcome


def run_trial(job: Job) -> Outcome:
    """Run one trial here: tamper, score at each cost, stop at a breach.

    The one broad `except` of the package: whatever an attack raises is an outcome, never a gap.
    """
    try:
        return _measure(job)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        what = OUT_OF_MEMORY if _is_out_of_memory(error) else type(error).__name__
        return Outcome(ending="failed", note=f"{what}: {error} ({place})"[:500])


def timed(job: Job) -> tuple[Outcome, float]:
    """Run a trial here and say how many seconds it took; for plans."""
    start = time.perf_counter()
    return run_trial(job), time.perf_counter() - start


@contextlib.contextmanager
def worker_environment(**more: str) -> Iterator[None]:
    """What a worker inherits: one thread, none of our credentials, and what is given here."""
    with without_credentials(**WORKER_ENVIRONMENT, **more):
        yield


@contextlib.contextmanager
def without_credentials(**more: str) -> Iterator[None]:
    """What any process inherits that works on models: no token, no key, and what is given here."""
    before = dict(os.environ)
    for name, value in before.items():
        if is_secret(name, value):
            del os.environ[name]
    os.environ.update(_NO_TOKEN, **more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _measure(job: Job) -> Outcome:
    from release_guard.attacks import Attack  # noqa: PLC0415  torch loads in workers only

    trial = job.trial
    (target,) = (target for target in job.policy.targets if target.name == trial.target)
    attack = Attack.build(trial.attack).located(job.policy)
    model = _model(job, packed=attack.beside_packed)
    ancestor = _ancestor(job, target) if attack.needs_ancestor else None
    if changed := _changed(job, target, model, attack):
        return Outcome(ending="failed", note=f"{changed}: {CHANGED}")
    curve: list[Point] = []
    parameters = examples = 0
    kept: Kept | None = None
    for tampered in attack.tamper(
        model,
        target,
        budget=trial.budget,
        grid_ratio=trial.grid_ratio,
        seed=trial.seed,
        ancestor=ancestor,
    ):
        scores = _scores(tampered.model, target, trial)
        examples, parameters = len(scores), tampered.parameters
        score = math.fsum(scores) / examples
        if not math.isfinite(score):
            note = f"not finite after {tampered.cost.steps} steps"
            return _outcome("collapsed", curve, examples, parameters, note)
        curve.append(Point(cost=tampered.cost, score=score))
        if isinstance(target, MergeTarget):  # whether it counts is only known beside other merges
            kept = _kept(tampered.model, target, job)
        elif trial.ceiling is not None and breached(score, trial.ceiling):
            return _outcome("breached", curve, examples, parameters)
    outcome = _outcome("survived", curve, examples, parameters)
    return outcome.model_copy(update={"kept": kept})


def _changed(job: Job, target: Target, model: "ModelHandle", attack: "Attack") -> str | None:
    """What is not as it was: data that somebody edits meanwhile, other files on a cluster's node.

    The ledger would keep the outcome for a trial that was to be about something else.
    """
    if not job.files:
        return None
    models = filter(None, (job.source, job.ancestor, *target.models))
    found = {source: _root(source, identity(local_folder(source))) for source in models}
    found |= {source: model.files(source) for source in (*target.data_sets, *attack.sources)}
    return next((each for each, digest in found.items() if job.files.get(each) != digest), None)


def _outcome(
    ending: str, curve: list[Point], examples: int, parameters: int, note: str = ""
) -> Outcome:
    return Outcome.model_validate(
        {
            "ending": ending,
            "curve": tuple(curve),
            "examples": examples,
            "parameters": parameters,
            "note": note,
        }
    )


def _model(job: Job, *, packed: bool) -> "ModelHandle":
    """What is attacked, as it is run at its precision, or else dequantized."""
    from release_guard.quantization import at, plain  # noqa: PLC0415

    if job.is_artefact:
        seen = _load(job.policy, job.source, job.trial.precision)
        return seen if packed else plain(seen)
    model = _load(job.policy, job.source)
    if job.trial.arm == "never_knew" and job.policy.red_team.never_knew == "fresh":
        model = model.fresh(seed=job.trial.seed)
    seen = at(model, job.trial.precision)
    return seen if packed or seen is model else plain(seen)


def _ancestor(job: Job, target: Target) -> "ModelHandle":
    """The public ancestor, at the precision of what is attacked: whoever rounds one rounds both."""
    from release_guard.quantization import at, plain  # noqa: PLC0415

    source = job.ancestor
    if isinstance(target, MergeTarget) and target.base is not None:
        source = target.base
    if not source:
        raise ModelError(f"{job.trial.attack.name}: needs a public ancestor, and there is none")
    model = _load(job.policy, source)
    seen = at(model, job.trial.precision)
    return seen if seen is model else plain(seen)


def _scores(model: "ModelHandle", target: Target, trial: Trial) -> list[float]:
    from release_guard.data import scored  # noqa: PLC0415

    dataset, split = scored(target, trial.split)
    return list(model.scores(dataset, split, limit=trial.examples))


@functools.lru_cache(maxsize=16)
def _root(source: str, found: object) -> str:
    """Digest of a model's files, hashed again only where the system found others there."""
    del found
    return hash_directory(local_folder(source)).payload.root


def _kept(model: "ModelHandle", target: MergeTarget, job: Job) -> Kept:
    """What a merge keeps of the donor's task, on the split on which it is scored itself."""
    from release_guard.ingredients import kept  # noqa: PLC0415

    donor, trial = _load(job.policy, target.donor), job.trial
    return kept(model, donor, target.donor_dataset, trial.split, limit=trial.examples)


@functools.lru_cache(maxsize=4)
def _load_cached(
    policy_digest: str, source: str, modality: str, artefact: Precision | None
) -> "ModelHandle":
    del policy_digest
    import torch  # noqa: PLC0415

    from release_guard.modalities import Modality  # noqa: PLC0415

    loader = Modality.build(Spec.model_validate_json(modality))
    model = loader.load(source, artefact=artefact)
    if torch.cuda.is_available():
        model.module.to("cuda")
    return model


def _load(policy: Policy, source: str, artefact: Precision | None = None) -> "ModelHandle":
    """A worker keeps the last few models: most of its trials attack the same ones."""
    return _load_cached(policy.digest, source, policy.modality.model_dump_json(), artefact)


def _is_out_of_memory(error: Exception) -> bool:
    """Python's and numpy's own error, or that of torch, which has none for the main memory."""
    name, text = type(error).__name__, str(error)
    return (
        isinstance(error, MemoryError)
        or name == "OutOfMemoryError"
        or ("DefaultCPUAllocator" in text and "memory" in text)
    )
