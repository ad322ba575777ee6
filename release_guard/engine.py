"""Where trials run: one-thread worker processes on this machine.

Two one-thread processes do 1.5 times the work of one process with two threads, and a crash, an
endless loop or a memory error of an attack cannot take the run with it.
"""

import contextlib
import functools
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from release_guard.evidence import Outcome, Point, Trial
from release_guard.policy import Policy, Target
from release_guard.statistics import breached

if TYPE_CHECKING:
    from release_guard.modalities import ModelHandle

WORKER_ENVIRONMENT: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads cost a busy machine up to seven times
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
}
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_", "ACTIONS_ID_TOKEN_", "RELEASE_GUARD_")
_FAREWELL = 5.0  # seconds a worker may take to leave before it is killed
_ATTEMPTS = 2  # a worker that dies takes its trial with it; the trial gets one more chance


@dataclass(frozen=True)
class Job:
    """A trial and the folder that holds the weights it attacks."""

    trial: Trial
    source: str
    policy: Policy


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: Job | None = None


class Engine:
    """A pool of workers; leaving the context kills them, whatever they are doing."""

    def __init__(self, workers: int) -> None:
        self._num_workers = workers
        self._workers: list[_Worker] = []
        self._waiting: deque[Job] = deque()
        self._attempts: dict[str, int] = {}
        self._done: dict[str, Outcome] = {}

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()  # an idle worker ends by itself
            if worker.job is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=_FAREWELL)
            worker.process.kill()
            worker.process.join()
        self._workers.clear()

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
                self._assign()
                self._collect()

    def _assign(self) -> None:
        while self._waiting and len(self._workers) < min(
            self._num_workers, len(self._waiting) + self._num_busy
        ):
            self._workers.append(_start_worker())
        for worker in self._workers:
            if worker.job is None and self._waiting:
                worker.job = self._waiting.popleft()
                with contextlib.suppress(BrokenPipeError):  # a dead worker is found by _collect
                    worker.pipe.send(worker.job)

    @property
    def _num_busy(self) -> int:
        return sum(worker.job is not None for worker in self._workers)

    def _collect(self) -> None:
        busy = [worker for worker in self._workers if worker.job is not None]
        ready = wait([worker.pipe for worker in busy])
        for worker in busy:
            if worker.pipe in ready and worker.job is not None:
                job, worker.job = worker.job, None
                try:
                    self._done[job.trial.key] = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    self._bury(worker, job)

    def _bury(self, worker: _Worker, job: Job) -> None:
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        key = job.trial.key
        self._attempts[key] = self._attempts.get(key, 0) + 1
        if self._attempts[key] < _ATTEMPTS:
            self._waiting.appendleft(job)
        else:
            note = f"the worker died {_ATTEMPTS} times (exit code {worker.process.exitcode})"
            self._done[key] = Outcome(ending="failed", note=note)


def run_trial(job: Job) -> Outcome:
    """Run one trial here: tamper, score at each cost, stop at a breach.

    The one broad `except` of the package: whatever an attack raises is an outcome, never a gap.
    """
    try:
        return _measure(job)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        note = (
            f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        )
        return Outcome(ending="failed", note=note[:500])


def _measure(job: Job) -> Outcome:
    from release_guard.attacks import Attack  # noqa: PLC0415  torch loads in workers only

    trial = job.trial
    (target,) = (target for target in job.policy.targets if target.name == trial.target)
    attack = Attack.build(trial.attack)
    model = _model(job)
    curve: list[Point] = []
    parameters = examples = 0
    for tampered in attack.tamper(
        model, target, budget=trial.budget, grid_ratio=trial.grid_ratio, seed=trial.seed
    ):
        scores = _scores(tampered.model, target, trial)
        examples, parameters = len(scores), tampered.parameters
        score = math.fsum(scores) / examples
        if not math.isfinite(score):
            note = f"not finite after {tampered.cost.steps} steps"
            return _outcome("collapsed", curve, examples, parameters, note)
        curve.append(Point(cost=tampered.cost, score=score))
        if trial.ceiling is not None and breached(score, trial.ceiling):
            return _outcome("breached", curve, examples, parameters)
    return _outcome("survived", curve, examples, parameters)


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


def _model(job: Job) -> "ModelHandle":
    from release_guard.quantization import at  # noqa: PLC0415

    model = _load(job.policy, job.source)
    if job.trial.arm == "never_knew" and job.policy.red_team.never_knew == "fresh":
        model = model.fresh(seed=job.trial.seed)
    return at(model, job.trial.precision)


def _scores(model: "ModelHandle", target: Target, trial: Trial) -> list[float]:
    from release_guard.data import scored  # noqa: PLC0415

    dataset, split = scored(target, trial.split)
    return list(model.scores(dataset, split, limit=trial.examples))


@functools.lru_cache(maxsize=4)
def _load_cached(policy_digest: str, source: str, modality: str) -> "ModelHandle":
    del policy_digest
    from release_guard.modalities import Modality  # noqa: PLC0415
    from release_guard.plugins import Spec  # noqa: PLC0415

    return Modality.build(Spec.model_validate_json(modality)).load(source)


def _load(policy: Policy, source: str) -> "ModelHandle":
    """A worker keeps the last few models: most of its trials attack the same ones."""
    return _load_cached(policy.digest, source, policy.modality.model_dump_json())


def _start_worker() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    with _worker_environment():
        process.start()
    theirs.close()
    return _Worker(process, ours)


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """What a worker inherits: one thread, and none of our credentials."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(SECRETS)]:
        del os.environ[name]
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection) -> None:
    """Worker: a job in, an outcome out, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave in order, whatever is running
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(run_trial(pipe.recv()))


def timed(job: Job) -> tuple[Outcome, float]:
    """Run a trial here and say how many seconds it took; for plans."""
    start = time.perf_counter()
    return run_trial(job), time.perf_counter() - start
