"""Every engine beside the contract, found by itself: the same outcomes, no credentials."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pico
import psutil
import pytest
from engine_jobs import CANARY, below, job, kill, workers_of

from release_guard.engines import DIED, Engine, Job, run_trial
from release_guard.evidence import Outcome
from release_guard.plugins import Spec
from release_guard.policy import Budget, Policy

pytestmark = pytest.mark.enable_socket  # a cluster has this machine's own address
ENGINES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in Engine.available()]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, image_data: Path) -> Policy:
    return Policy.load(pico.pico_policy(tmp_path_factory.mktemp("policy"), image_data))


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Open, with one worker, and started by a process that has credentials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", CANARY)
        if request.param == "ray":
            yield request.getfixturevalue("cluster")
        else:
            with Engine.build(Spec(name=request.param, workers=1)) as opened:
                yield opened


@pytest.fixture
def jobs(policy: Policy, classifier_folder: Path) -> list[Job]:
    """One that survives, one at another precision, one that breaches, one that crashes."""
    eager = Spec(name="finetune", lr=3e-3, optimizer="adam")
    return [
        job(policy, classifier_folder),
        job(policy, classifier_folder, precision="int8", seed=1),
        job(policy, classifier_folder, attack=eager, budget=Budget(limit=30), ceiling=0.05),
        job(policy, classifier_folder, attack=Spec(name="finetune", batch=9_999)),
    ]


def without_seconds(outcome: Outcome) -> dict[str, object]:
    dumped = outcome.model_dump()
    for point in dumped["curve"]:
        del point["cost"]["seconds"]
    return dumped


def test_outcomes_are_the_same_bit_for_bit(engine: Engine, jobs: list[Job]) -> None:
    found = {done.trial.key: without_seconds(outcome) for done, outcome in engine.run(jobs)}

    assert found == {one.trial.key: without_seconds(run_trial(one)) for one in jobs}
    assert [found[one.trial.key]["ending"] for one in jobs] == [
        "survived",
        "survived",
        "breached",
        "failed",
    ]


def test_urgent_trials_go_before_those_that_wait(engine: Engine, jobs: list[Job]) -> None:
    ended = []
    for done, _ in engine.run(jobs[:3]):
        if not ended:
            ended += [urgent for urgent, _ in engine.run([jobs[3]], urgent=True)]
        ended.append(done)

    assert ended.index(jobs[3]) == 0
    assert sorted(one.trial.key for one in ended) == sorted(one.trial.key for one in jobs)


def test_workers_know_none_of_our_credentials(engine: Engine, jobs: list[Job]) -> None:
    assert os.environ["HF_TOKEN"] == CANARY
    list(engine.run(jobs[:1]))

    known = []
    for process in below(psutil.Process()):
        with contextlib.suppress(psutil.NoSuchProcess):
            known.append(process.environ().values())
    assert known, "no process was seen"
    assert not any(CANARY in values for values in known)


def test_a_killed_worker_costs_one_trial_at_most(
    engine: Engine, jobs: list[Job], policy: Policy, classifier_folder: Path
) -> None:
    """Killed once, the trial is run again, alone; killed twice, it has failed. Others go on."""
    endless = job(policy, classifier_folder, budget=Budget(limit=1e9), ceiling=None)
    killer = threading.Thread(target=kill_both_goes, args=(engine,), daemon=True)
    killer.start()
    endings = {done.trial.key: outcome for done, outcome in engine.run([endless, jobs[0]])}
    killer.join()

    lost = endings[endless.trial.key]
    assert (lost.ending, lost.note[: len(DIED)]) == ("failed", DIED)
    assert "twice; the second time nothing else was running" in lost.note
    assert endings[jobs[0].trial.key].ending == "survived"


def kill_both_goes(engine: Engine) -> None:
    """SIGKILL whatever runs its first trial, then whatever runs it again."""
    for alone in (False, True):
        while not any(running.alone is alone for running in list(engine.running)):
            time.sleep(0.05)
        while not (found := workers_of(psutil.Process())):
            time.sleep(0.05)
        kill(found)


@pytest.mark.parametrize("name", Engine.available())
def test_it_builds_with_its_defaults(name: str) -> None:
    assert Engine.build(Spec(name=name)).workers == 1
