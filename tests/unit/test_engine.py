"""What all engines share: how a trial runs, and what becomes of one that loses its worker."""

import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

import pico
import pytest
from engine_jobs import job
from pydantic import PrivateAttr

from release_guard.engines import (
    DIED,
    OUT_OF_MEMORY,
    Engine,
    Job,
    run_trial,
    worker_environment,
)
from release_guard.evidence import Outcome, Trial
from release_guard.plugins import Spec
from release_guard.policy import Budget, Policy


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


def test_workers_start_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setenv("RELEASE_GUARD_KEY_PASSWORD", "canary")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "canary")
    with worker_environment(MORE="this"):
        assert "canary" not in os.environ.values()
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert os.environ["MORE"] == "this"
    assert os.environ["HF_TOKEN"] == "canary"  # noqa: S105
    assert "MORE" not in os.environ
