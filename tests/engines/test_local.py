"""The pool on this machine: a dead worker costs one trial at most."""

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
sys.path.insert(0, {root!r})
import release_guard.engines.local as local

original = local.run_trial

def run_trial(job):
    if job.trial.seed == 7 {condition}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(job)

local.run_trial = run_trial  # spawned workers import this file, so they have it too

if __name__ == "__main__":
    jobs = pickle.loads(sys.stdin.buffer.read())
    with local.Local(workers=1) as engine:
        for job, outcome in engine.run(jobs):
            print(job.trial.seed, outcome.ending, outcome.note)
"""


@pytest.fixture
def policy(tmp_path: Path, image_data: Path) -> Policy:
    return Policy.load(pico.pico_policy(tmp_path, image_data))


def run_child(script: Path, condition: str, jobs: object) -> list[str]:
    """What a process says whose workers kill themselves, as an out-of-memory kill would."""
    script.write_text(CHILD.format(root=str(Path(__file__).parents[2]), condition=condition))
    done = subprocess.run(  # noqa: S603
        [sys.executable, script], input=pickle.dumps(jobs), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return sorted(done.stdout.decode().splitlines())


def test_workers_do_what_this_process_does(policy: Policy, classifier_folder: Path) -> None:
    jobs = [job(policy, classifier_folder, seed=seed) for seed in range(3)]
    with Local(workers=2) as engine:
        found = {done.trial.seed: outcome for done, outcome in engine.run(jobs)}
    assert sorted(found) == [0, 1, 2]
    here = run_trial(jobs[1])
    assert [point.score for point in found[1].curve] == [point.score for point in here.curve]


def test_a_trial_that_kills_its_worker_twice_has_failed_and_the_others_go_on(
    policy: Policy, classifier_folder: Path, tmp_path: Path
) -> None:
    jobs = [job(policy, classifier_folder, seed=seed) for seed in (7, 1)]
    one, seven = run_child(tmp_path / "child.py", "", jobs)
    assert one.startswith("1 survived")
    assert seven.startswith("7 failed the worker died (exit code -9), twice")


def test_a_trial_that_loses_its_worker_once_is_run_again(
    policy: Policy, classifier_folder: Path, tmp_path: Path
) -> None:
    jobs = [job(policy, classifier_folder, seed=seed) for seed in (7, 1)]
    one, seven = run_child(tmp_path / "child.py", "and not job.alone", jobs)
    assert (one, seven) == ("1 survived ", "7 survived ")


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
