"""Trials for tests of engines, and the processes that run them."""

import contextlib
from pathlib import Path

import psutil

from release_guard.engines import Job
from release_guard.evidence import Trial
from release_guard.plugins import Spec
from release_guard.policy import Budget, Policy

CANARY = "4c7d-canary"
"""Stands for a credential of the process that starts an engine; no worker may know it."""


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


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Processes below it that are running trials."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(child.cmdline())
            if "spawn_main" in command or "ray::_serve" in command:
                found.append(child)
    return found
