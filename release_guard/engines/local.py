"""Workers on this machine: one-thread processes that a crash, a loop or a kill cannot leave.

Two one-thread processes do 1.5 times the work of one process with two threads.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from pydantic import PrivateAttr

from release_guard.engines import DIED, Engine, Job, run_trial, worker_environment
from release_guard.evidence import Outcome

_FAREWELL = 5.0  # seconds a worker may take to leave before it is killed
_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    device: str | None
    job: Job | None = None


class Local(Engine):
    """A pool of processes on this machine; GPUs, where there are any, are shared out evenly."""

    _pool: list[_Worker] = PrivateAttr(default_factory=list)

    @property
    def running(self) -> Collection[Job]:
        return [worker.job for worker in self._pool if worker.job is not None]

    def start(self, job: Job) -> None:
        if job.alone:
            self._dismiss()  # whoever is idle still holds models
        worker = next((worker for worker in self._pool if worker.job is None), None)
        if worker is None:
            worker = _start_worker(self._device())
            self._pool.append(worker)
        worker.job = job
        with contextlib.suppress(BrokenPipeError):  # a dead worker is found by `ended`
            worker.pipe.send(job)

    def ended(self) -> Iterable[tuple[Job, Outcome]]:
        ready = wait([worker.pipe for worker in self._pool if worker.job is not None])
        for worker in [worker for worker in self._pool if worker.pipe in ready]:
            if worker.job is not None:
                job, worker.job = worker.job, None
                try:
                    outcome = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    outcome = self._bury(worker)
                yield job, outcome

    def close(self) -> None:
        for worker in self._pool:
            if worker.job is not None:
                worker.process.terminate()
        self._dismiss()

    def _dismiss(self) -> None:
        for worker in self._pool:
            worker.pipe.close()  # an idle worker ends by itself
        for worker in self._pool:
            worker.process.join(timeout=_FAREWELL)
            worker.process.kill()
            worker.process.join()
        self._pool.clear()

    def _bury(self, worker: _Worker) -> Outcome:
        worker.process.join()
        worker.pipe.close()
        self._pool.remove(worker)
        return Outcome(ending="failed", note=f"{DIED} (exit code {worker.process.exitcode})")

    def _device(self) -> str | None:
        """The GPU that fewest workers have."""
        taken = Counter(worker.device for worker in self._pool)
        return min(_devices(), key=lambda device: taken[device], default=None)


def _devices() -> list[str]:
    """The GPUs that we may use, by the names the driver knows them by."""
    import torch  # noqa: PLC0415

    if (allowed := os.environ.get(_DEVICES)) is not None:
        return [name for name in allowed.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def _start_worker(device: str | None) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    with worker_environment(**({} if device is None else {_DEVICES: device})):
        process.start()
    theirs.close()
    return _Worker(process, ours, device)


def _serve(pipe: Connection) -> None:
    """Worker: a job in, an outcome out, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave in order, whatever is running
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(run_trial(pipe.recv()))
