"""Tasks of a Ray cluster: one that is started here, or one that runs already.

A task takes one CPU and `gpus` GPUs; Ray finds it a place. A cluster's nodes need this very version
of release-guard, and model, data and policy at the same paths.
"""

import functools
import importlib.util
import logging
import math
import secrets
import socket
from collections.abc import Collection, Iterable
from importlib.metadata import version
from typing import Any

from pydantic import Field, PrivateAttr, field_validator

from release_guard import __version__
from release_guard.engines import (
    DIED,
    WORKER_ENVIRONMENT,
    Engine,
    Job,
    run_trial,
    worker_environment,
)
from release_guard.errors import ReleaseGuardError
from release_guard.evidence import Outcome

_PATIENCE = 5.0  # seconds a head node may take to answer
_OBJECTS = 80 << 20  # bytes; jobs and outcomes are small, Ray's own default is a third of memory
_SILENCE = 10.0  # seconds without an outcome after which the cluster is looked at
_LOST = ("WorkerCrashedError", "LocalRayletDiedError", "NodeDiedError", "OutOfMemoryError",
         "ObjectLostError")  # fmt: skip


class Ray(Engine):
    """Ray's workers, on this machine or many."""

    address: str | None = Field(default=None, pattern=r"^[^/\s]+:\d+$")
    """`HOST:PORT` of a head node; none: a cluster of `workers` CPUs on this machine."""
    gpus: float = Field(default=0, ge=0)
    """GPUs a trial takes; 0.25 lets four share one."""

    _tasks: dict[Any, Job] = PrivateAttr(default_factory=dict)

    @field_validator("gpus")
    @classmethod
    def _shared_or_whole(cls, gpus: float) -> float:
        if gpus > 1 and gpus % 1:
            raise ValueError("a trial takes a share of one GPU, or a whole number of them")
        return gpus

    @property
    def running(self) -> Collection[Job]:
        return self._tasks.values()

    def check(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ReleaseGuardError(
                "the engine ray needs Ray; install it: pip install 'model-release-guard[ray]'"
            )
        if self.address is not None:
            _require_listening(self.address)

    def open(self) -> None:
        self.check()  # Ray itself would try for minutes
        here = {
            "num_cpus": self.workers,
            "include_dashboard": False,
            "object_store_memory": _OBJECTS,
        }
        access = {} if self.address else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}
        with worker_environment(RAY_USAGE_STATS_ENABLED="0", **access):
            _start(
                address=self.address or "local",  # without one, RAY_ADDRESS would decide
                runtime_env={"env_vars": dict(WORKER_ENVIRONMENT)},
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if self.address else here),
            )
        self._require_gpus()

    def close(self) -> None:
        self._tasks.clear()
        _ray().shutdown()  # ends this job's workers too

    def start(self, job: Job) -> None:
        gpus = math.ceil(self.gpus) if job.alone else self.gpus
        # Ray gives a GPU task a process of its own, which takes its memory with it when it ends.
        task = _task().options(num_gpus=gpus).remote(job, _versions())
        self._tasks[task] = job

    def ended(self) -> Iterable[tuple[Job, Outcome]]:
        while not (ready := _ray().wait(list(self._tasks), timeout=_SILENCE)[0]):
            _require_alive()  # Ray waits for ever where its own node is gone
        for task in ready:
            yield self._tasks.pop(task), _outcome(task)

    def _require_gpus(self) -> None:
        """Ray would wait for ever for a node that has them."""
        most = max(node["Resources"].get("GPU", 0) for node in _ray().nodes() if node["Alive"])
        if most < self.gpus:
            _ray().shutdown()
            raise ReleaseGuardError(
                f"a trial asks for {self.gpus:g} GPUs and no node of the Ray cluster has more than "
                f"{most:g}; give a smaller --gpus"
            )


def _start(**options: Any) -> None:
    """Start or join a cluster; Ray gives a node 30 seconds, which a busy machine may outlast."""
    for goes_left in (1, 0):
        try:
            _ray().init(**options)
        except Exception as error:  # Ray has no kind of its own for a node that is late
            _ray().shutdown()
            if not goes_left:
                raise _unusable(error) from None
        else:
            return


@functools.cache
def _task() -> Any:
    """Sent to a cluster once, not with every trial."""
    return _ray().remote(num_cpus=1, max_retries=0)(_serve)


def _serve(job: Job, versions: tuple[str, ...]) -> Outcome:
    """Worker: one trial, by the code and the arithmetic that its record will name."""
    import torch  # noqa: PLC0415

    if _versions() != versions:
        raise RuntimeError(f"it has {_versions()}, this run {versions}")
    torch.set_num_threads(1)
    return run_trial(job)


def _versions() -> tuple[str, ...]:
    return (f"release-guard {__version__}", f"torch {version('torch')}")


def _outcome(task: Any) -> Outcome:
    ray = _ray()
    try:
        outcome: Outcome = ray.get(task)
    except tuple(getattr(ray.exceptions, name) for name in _LOST) as error:
        _require_alive()  # else the next trial would wait for a cluster that is gone
        return Outcome(ending="failed", note=f"{DIED} ({type(error).__name__})")
    except (ray.exceptions.RayError, OSError) as error:
        raise _unusable(error) from None
    return outcome


@functools.cache
def _token() -> str:
    """Without it any user of this network could run code here; Ray reads it once a process."""
    return secrets.token_hex(32)


def _require_alive() -> None:
    _require_listening(_ray().get_runtime_context().gcs_address)  # without it Ray ends the process
    try:
        nodes = _ray().nodes()
    except (_ray().exceptions.RayError, OSError) as error:
        raise _unusable(error) from None
    if not any(node["Alive"] for node in nodes):
        raise _unusable(RuntimeError("all its nodes are gone"))


def _require_listening(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ReleaseGuardError(
            f"{address}: no Ray cluster answers there ({error}); start one with "
            "`ray start --head`, or leave --address out. What has ended is in the ledger"
        ) from None


def _unusable(error: Exception) -> ReleaseGuardError:
    """Ray's own words are long; the last line is what happened."""
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return ReleaseGuardError(
        f"Ray cannot run trials: {last.strip()}; what has ended is in the ledger, run the same "
        "command again once Ray is well, or with `--engine local`"
    )


def _ray() -> Any:
    """Not imported before it has a token: it reads its settings as it loads."""
    return importlib.import_module("ray")
