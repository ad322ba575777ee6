"""The pool on this machine: a dead worker costs one trial at most."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pico
import pytest
from engine_jobs import job

from release_guard.engines import run_trial
from release_guard.engines.local import Local
from release_guard.policy import Policy

CHILD = """
import os, pickle, signal, sys
import torch
from release_guard import engines
from release_guard.engines.local import Local

measure = engines._measure

def unlucky(job):
    if job.trial.seed == 7 and not job.alone:
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory runs out
    if job.trial.seed == 8 and not job.alone:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")
    return measure(job)

engines._measure = unlucky  # spawned workers import this file, so they have it too

if __name__ == "__main__":
    jobs = pickle.loads(sys.stdin.buffer.read())
    with Local(workers=1) as engine:
        for job, outcome in engine.run(jobs):
            print(job.trial.seed, outcome.ending, outcome.note)
"""


@pytest.fixture
def policy(tmp_path: Path, image_data: Path) -> Policy:
    return Policy.load(pico.pico_policy(tmp_path, image_data))


def test_workers_do_what_this_process_does(policy: Policy, classifier_folder: Path) -> None:
    jobs = [job(policy, classifier_folder, seed=seed) for seed in range(3)]
    with Local(workers=2) as engine:
        found = {done.trial.seed: outcome for done, outcome in engine.run(jobs)}
    assert sorted(found) == [0, 1, 2]
    here = run_trial(jobs[1])
    assert [point.score for point in found[1].curve] == [point.score for point in here.curve]


def test_a_trial_that_loses_its_worker_or_its_memory_once_is_run_again(
    policy: Policy, classifier_folder: Path, tmp_path: Path
) -> None:
    jobs = [job(policy, classifier_folder, seed=seed) for seed in (7, 8, 1)]
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    done = subprocess.run(  # noqa: S603
        [sys.executable, script],
        input=pickle.dumps(jobs),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )

    assert done.returncode == 0, done.stderr.decode()
    assert sorted(done.stdout.decode().splitlines()) == [
        "1 survived ",
        "7 survived ",
        "8 survived ",
    ]


def test_gpus_are_shared_out_evenly(
    policy: Policy, classifier_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    with Local(workers=3) as engine:
        for seed in range(3):
            engine.start(job(policy, classifier_folder, seed=seed))
        assert sorted(str(worker.device) for worker in engine._pool) == ["GPU-a", "GPU-a", "GPU-b"]


def test_leaving_kills_what_is_running(policy: Policy, classifier_folder: Path) -> None:
    endless = policy.red_team.budget.model_copy(update={"limit": 1e9})
    with Local(workers=1) as engine:
        engine.start(job(policy, classifier_folder, budget=endless, ceiling=None))
        (worker,) = engine._pool
        assert worker.process.is_alive()
    assert worker.process.exitcode is not None
    assert engine.running == []
