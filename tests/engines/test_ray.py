"""What only Ray does: addresses, versions, strangers."""

import importlib.util
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pico
import psutil
import pytest
from engine_jobs import job, kill, workers_of

from release_guard.engines import DIED, Engine, run_trial
from release_guard.engines import ray as module
from release_guard.engines.ray import Ray
from release_guard.errors import PolicyError, ReleaseGuardError
from release_guard.plugins import Spec
from release_guard.policy import Budget, Policy

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.enable_socket,  # a cluster has this machine's own address
    pytest.mark.xdist_group("ray"),  # one process starts the one cluster of the session
]
CHILD = """
import json, pickle, sys
from release_guard.engines.ray import Ray

with Ray(address=sys.argv[1]) as engine:
    for job, outcome in engine.run(pickle.loads(sys.stdin.buffer.read())):
        print(json.dumps([point.score for point in outcome.curve]))
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, image_data: Path) -> Policy:
    return Policy.load(pico.pico_policy(tmp_path_factory.mktemp("policy"), image_data))


@pytest.fixture
def address(cluster: Engine) -> str:
    found: str = module._ray().get_runtime_context().gcs_address
    return found


def child(*arguments: str, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    """A Python process that may use the cluster of this one."""
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": module._token(), "PYTHONPATH": paths}
    return subprocess.run(  # noqa: S603
        [sys.executable, *arguments],
        input=given,
        capture_output=True,
        env={**os.environ, **access},
        check=False,
    )


def test_another_process_uses_a_cluster_that_runs(
    address: str, policy: Policy, classifier_folder: Path
) -> None:
    one = job(policy, classifier_folder)
    done = child("-c", CHILD, address, given=pickle.dumps([one]))

    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == [point.score for point in run_trial(one).curve]


def test_a_node_with_other_versions_is_one_error(
    cluster: Engine, policy: Policy, classifier_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "__version__", "0.0.0")
    engine = Ray(workers=1)
    engine.start(job(policy, classifier_folder))

    with pytest.raises(ReleaseGuardError, match=r"Ray cannot run trials: .*release-guard 0\.0\.0"):
        list(engine.ended())


@pytest.mark.parametrize(("gpus", "alone", "left"), [(0.25, False, 0.75), (0.25, True, 0)])
def test_gpus_of_a_trial_are_asked_for(
    gpus: float, alone: bool, left: float, cluster: Engine, policy: Policy, classifier_folder: Path
) -> None:
    """Where a trial runs alone, it has a GPU to itself."""
    endless = job(policy, classifier_folder, budget=Budget(limit=1e9), ceiling=None)
    engine = Ray(gpus=gpus)
    engine.start(replace(endless, alone=alone))

    until(lambda: module._ray().available_resources().get("GPU", 0) == left)
    until(lambda: workers_of(psutil.Process()))
    kill(workers_of(psutil.Process()))
    ((_, outcome),) = engine.ended()
    assert outcome.note.startswith(DIED)
    until(lambda: module._ray().available_resources().get("GPU", 0) == 1)


def test_gpus_that_no_node_has_end_it_at_once(address: str) -> None:
    """Ray itself would wait for ever."""
    program = f"from release_guard.engines.ray import Ray; Ray(address={address!r}, gpus=2).open()"
    done = child("-c", program)

    assert done.returncode == 1
    told = "a trial asks for 2 GPUs and no node of the Ray cluster has more than 1"
    assert told in done.stderr.decode().splitlines()[-1]


@pytest.mark.parametrize("gpus", [-1, 1.5])
def test_gpus_that_are_none(gpus: float) -> None:
    with pytest.raises(PolicyError, match=r"--engine\.gpus: found"):
        Engine.build(Spec(name="ray", gpus=gpus), where="--engine")


def until(true: Callable[[], object]) -> None:
    """Ray tells of changes a little late."""
    while not true():
        time.sleep(0.05)


def test_nobody_at_the_address_is_one_error_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    for knock in (Ray(address=address).check, Ray(address=address).open):
        with pytest.raises(ReleaseGuardError, match=f"{address}: no Ray cluster answers there"):
            knock()


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:port", "", "auto"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(PolicyError, match=r"--engine\.address: found"):
        Engine.build(Spec(name="ray", address=address), where="--engine")
