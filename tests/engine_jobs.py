"""Trials for tests of engines, and the processes that run them."""

import contextlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import psutil
from pydantic import PrivateAttr

from release_guard.engines import Engine, Job, run_trial
from release_guard.evidence import Outcome, Trial
from release_guard.plugins import Spec
from release_guard.policy import Budget, Policy
from release_guard.session import Session

CANARY = "4c7d-canary"
"""Stands for a credential of the process that starts an engine; no worker may know it."""
RAYS_WORKER = "ray::_serve"
WORKERS = ("spawn_main", RAYS_WORKER)


def job(policy: Policy, source: Path, **changes: object) -> Job:
    """Two steps of fine-tuning on the pico images."""
    trial = Trial(
        arm="defended",
        precision="fp32",
        target="odd-angles",
        attack=Spec(name="finetune", batch=16),
        seed=0,
        budget=Budget(unit="steps", limit=2),
        ceiling=0.6,
        split="search",
        examples=20,
        grid_ratio=1.5,
        weights="0" * 64,
        data="1" * 64,
    )
    return Job(trial.model_copy(update=changes), str(source), policy)


class Here(Engine):
    """Trials in this process, the youngest first: what depends on their order would show."""

    _running: list[Job] = PrivateAttr(default_factory=list)

    @property
    def running(self) -> Collection[Job]:
        return self._running

    def start(self, job: Job) -> None:
        self._running.append(job)

    def ended(self) -> Iterable[tuple[Job, Outcome]]:
        job = self._running.pop()
        return [(job, run_trial(job))]

    def close(self) -> None:
        self._running.clear()


class HereSession(Session):
    """A worker takes seconds to import torch; few tests are about workers."""

    def build_engine(self) -> Engine:
        return Here(workers=self.workers)

    def apart(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments, self)


def workers_of(process: psutil.Process, *names: str) -> list[psutil.Process]:
    """Processes below it that are running trials: ours and Ray's, or those with these names."""
    found = []
    for child in below(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = child.cmdline()
            # A mere fork still has its parent's command line.
            started = command != psutil.Process(child.ppid()).cmdline()
            if started and any(name in " ".join(command) for name in names or WORKERS):
                found.append(child)
    return found


def below(process: psutil.Process) -> list[psutil.Process]:
    """All its descendants; none where it has gone meanwhile."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL each that is still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
