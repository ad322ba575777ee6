"""What all engines share: how a trial runs, and what becomes of one that loses its worker."""

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path

import numpy
import pico
import pytest
import torch
from engine_jobs import job
from pydantic import PrivateAttr

from release_guard import engines
from release_guard.engines import (
    DIED,
    OUT_OF_MEMORY,
    Engine,
    Job,
    run_trial,
    worker_environment,
)
from release_guard.evidence import Outcome
from release_guard.modalities import Modality
from release_guard.phases import Folders, Ground
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


@pytest.fixture
def begun(policy: Policy, classifier_folder: Path) -> Job:
    """A trial that knows what its run was begun with."""
    base = Modality.build(policy.modality).load(str(classifier_folder))
    ground = Ground.of(base, Folders(classifier_folder), policy)
    assert {Path(source).name for source in ground.files} >= {"restricted.parquet"}
    return replace(job(policy, classifier_folder), files=ground.files)


def test_what_the_run_was_begun_with_is_attacked(begun: Job) -> None:
    assert run_trial(begun).ending == "survived"


@pytest.mark.parametrize("what", ["data", "model"])
def test_nothing_else_is_attacked(what: str, begun: Job, classifier_folder: Path) -> None:
    """Its outcome would stand in the ledger as that of what should have been there."""
    data = begun.policy.concepts[0].dataset
    place = data if what == "data" else str(classifier_folder)
    outcome = run_trial(replace(begun, files={**begun.files, place: "0" * 64}))

    assert (outcome.ending, outcome.curve) == ("failed", ())
    assert outcome.note == f"{place}: changed since the run began"


def test_a_source_that_the_run_did_not_know_is_not_attacked(begun: Job) -> None:
    files = {source: digest for source, digest in begun.files.items() if ".parquet" not in source}
    assert "changed since the run began" in run_trial(replace(begun, files=files)).note


def test_whatever_an_attack_raises_is_an_outcome(policy: Policy, classifier_folder: Path) -> None:
    outcome = run_trial(job(policy, classifier_folder, attack=Spec(name="finetune", batch=9_999)))
    assert outcome.ending == "failed"
    assert "ModelError" in outcome.note


def test_workers_start_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setenv("RELEASE_GUARD_KEY_PASSWORD", "canary")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "canary")
    monkeypatch.setenv("SIGSTORE_ID_TOKEN", "canary")
    with worker_environment(MORE="this"):
        assert "canary" not in os.environ.values()
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert os.environ["MORE"] == "this"
    assert os.environ["HF_TOKEN"] == "canary"  # noqa: S105
    assert "MORE" not in os.environ


class Scripted(Engine):
    """Trials end in the order they were started, in the ways that are written here, by seed."""

    script: dict[int, list[str]]
    """Notes of the failures of each seed's goes; a seed without one is well."""
    _running: list[Job] = PrivateAttr(default_factory=list)
    _seen: list[tuple[int, bool, int]] = PrivateAttr(default_factory=list)

    @property
    def running(self) -> Collection[Job]:
        return self._running

    def start(self, job: Job) -> None:
        self._running.append(job)
        self._seen.append((job.trial.seed, job.alone, len(self._running)))

    def ended(self) -> Iterable[tuple[Job, Outcome]]:
        job = self._running.pop(0)
        if notes := self.script.get(job.trial.seed):
            yield job, Outcome(ending="failed", note=notes.pop(0))
        else:
            yield job, Outcome(ending="survived")

    def close(self) -> None:
        self._running.clear()


def seeds(policy: Policy, number: int) -> list[Job]:
    return [job(policy, Path("model"), seed=seed) for seed in range(number)]


@pytest.mark.parametrize("note", [f"{DIED} (exit code -9)", f"{OUT_OF_MEMORY}: 80 GB (x.py:1)"])
def test_a_lost_trial_is_run_once_more_with_nothing_beside_it(policy: Policy, note: str) -> None:
    engine = Scripted(workers=2, script={1: [note]})
    with engine:
        found = {done.trial.seed: outcome.ending for done, outcome in engine.run(seeds(policy, 5))}

    assert found == dict.fromkeys(range(5), "survived")
    again = [seen for seen in engine._seen if seen[1]]
    assert again == [(1, True, 1)]
    position = engine._seen.index((1, True, 1))
    assert engine._seen[position + 1][2] == 1  # whoever comes next has waited for its end


def test_a_trial_lost_twice_has_failed_and_says_so(policy: Policy) -> None:
    note = f"{OUT_OF_MEMORY}: 80 GB (x.py:1)"
    with Scripted(workers=2, script={0: [note, note]}) as engine:
        found = {done.trial.seed: outcome for done, outcome in engine.run(seeds(policy, 2))}

    assert found[0].ending == "failed"
    assert found[0].note == f"{note}, twice; the second time nothing else was running"
    assert found[1].ending == "survived"


def test_what_an_attack_itself_raised_is_not_tried_again(policy: Policy) -> None:
    with Scripted(script={0: ["ModelError: no (x.py:1)"]}) as engine:
        ((_, outcome),) = engine.run(seeds(policy, 1))

    assert outcome.note == "ModelError: no (x.py:1)"
    assert len(engine._seen) == 1


def test_no_more_trials_at_once_than_workers(policy: Policy) -> None:
    engine = Scripted(workers=3, script={})
    with engine:
        list(engine.run(seeds(policy, 9)))

    assert max(together for *_, together in engine._seen) == 3


def test_only_attacks_that_need_the_ancestor_load_it(
    policy: Policy, classifier_folder: Path, tmp_path: Path
) -> None:
    plain = replace(job(policy, classifier_folder), ancestor=str(tmp_path / "nowhere"))
    assert run_trial(plain).ending == "survived"

    needs = job(policy, classifier_folder, attack=Spec(name="restore"))
    told = run_trial(needs)
    assert told.ending == "failed"
    assert "restore: needs a public ancestor" in told.note
    assert run_trial(replace(needs, ancestor=str(classifier_folder))).ending == "survived"


@pytest.mark.parametrize(
    "allocate", [lambda: torch.empty(1 << 50), lambda: numpy.empty(1 << 50), lambda: bytes(1 << 60)]
)
def test_running_out_of_memory_is_told_from_other_errors(allocate: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert engines._is_out_of_memory(caught.value)
    assert not engines._is_out_of_memory(RuntimeError("shapes do not match"))
