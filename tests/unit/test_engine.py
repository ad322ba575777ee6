"""Workers: one thread, no credentials, a dead one costs one trial at most."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pico
import pytest

from release_guard import engine
from release_guard.engine import Engine, Job, run_trial
from release_guard.evidence import Trial
from release_guard.plugins import Spec
from release_guard.policy import Budget, Policy


def job(policy: Policy, source: Path, **changes: object) -> Job:
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


@pytest.fixture
def policy(tmp_path: Path, image_data: Path) -> Policy:
    return Policy.load(pico.pico_policy(tmp_path, image_data))


def test_a_trial_ends_with_a_curve_to_its_budget(policy: Policy, classifier_folder: Path) -> None:
    outcome = run_trial(job(policy, classifier_folder))
    assert outcome.ending == "survived"
    assert [point.cost.steps for point in outcome.curve] == [1, 2]
    assert outcome.examples == 20


def test_a_trial_stops_at_its_first_breach(policy: Policy, classifier_folder: Path) -> None:
    changes = {"ceiling": 0.3, "budget": Budget(unit="steps", limit=200)}
    attack = Spec(name="finetune", lr=3e-3, optimizer="adam")
    outcome = run_trial(job(policy, classifier_folder, attack=attack, **changes))
    assert outcome.ending == "breached"
    assert outcome.curve[-1].score > 0.3
    assert all(point.score <= 0.3 for point in outcome.curve[:-1])


def test_a_model_that_is_not_finite_is_a_collapse(policy: Policy, classifier_folder: Path) -> None:
    attack = Spec(name="finetune", lr=1e30, optimizer="sgd", batch=16)
    outcome = run_trial(job(policy, classifier_folder, attack=attack))
    assert outcome.ending == "collapsed"
    assert "not finite" in outcome.note


def test_whatever_an_attack_raises_is_an_outcome(policy: Policy, classifier_folder: Path) -> None:
    outcome = run_trial(job(policy, classifier_folder, attack=Spec(name="finetune", batch=9_999)))
    assert outcome.ending == "failed"
    assert "ModelError" in outcome.note


def test_workers_do_what_this_process_does(policy: Policy, classifier_folder: Path) -> None:
    jobs = [job(policy, classifier_folder, seed=seed) for seed in range(3)]
    with Engine(2) as pool:
        found = {done.trial.seed: outcome for done, outcome in pool.run(jobs)}
    assert sorted(found) == [0, 1, 2]
    here = run_trial(jobs[1])
    assert [point.score for point in found[1].curve] == [point.score for point in here.curve]


def test_a_trial_that_kills_its_worker_twice_has_failed_and_the_others_go_on(
    policy: Policy, classifier_folder: Path, tmp_path: Path
) -> None:
    """The child installs an attack that kills its own process, as an out-of-memory kill would."""
    script = tmp_path / "child.py"
    script.write_text(
        f"""
import os, pickle, signal, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import release_guard.engine as engine

original = engine.run_trial

def run_trial(job):
    if job.trial.seed == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(job)

engine.run_trial = run_trial  # spawned workers import this file, so they have it too

if __name__ == "__main__":
    jobs = pickle.loads(sys.stdin.buffer.read())
    with engine.Engine(1) as pool:
        for job, outcome in pool.run(jobs):
            print(job.trial.seed, outcome.ending, outcome.note)
"""
    )
    jobs = [job(policy, classifier_folder, seed=seed) for seed in (7, 1)]
    done = subprocess.run(  # noqa: S603
        [sys.executable, script], input=pickle.dumps(jobs), capture_output=True, check=True
    )
    lines = sorted(done.stdout.decode().splitlines())
    assert lines[0].startswith("1 survived")
    assert lines[1].startswith("7 failed the worker died 2 times (exit code -9)")


def test_workers_start_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setenv("RELEASE_GUARD_KEY_PASSWORD", "canary")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "canary")
    with engine._worker_environment():
        assert "canary" not in os.environ.values()
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["HF_TOKEN"] == "canary"  # noqa: S105
