"""What only Ray does: addresses, versions, strangers."""

import importlib.util
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pico
import pytest
from engine_jobs import job

from release_guard.engines import Engine, run_trial
from release_guard.engines import ray as module
from release_guard.engines.ray import Ray
from release_guard.errors import PolicyError, ReleaseGuardError
from release_guard.plugins import Spec
from release_guard.policy import Policy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)
CHILD = """
import json, pickle, sys
sys.path.insert(0, sys.argv[2])
from release_guard.engines.ray import Ray

with Ray(address=sys.argv[1]) as engine:
    for job, outcome in engine.run(pickle.loads(sys.stdin.buffer.read())):
        print(json.dumps([point.score for point in outcome.curve]))
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, image_data: Path) -> Policy:
    return Policy.load(pico.pico_policy(tmp_path_factory.mktemp("policy"), image_data))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster that was started here."""
    with Ray(workers=1):
        yield module._ray().get_runtime_context().gcs_address


def test_another_process_uses_a_cluster_that_runs(
    cluster: str, policy: Policy, classifier_folder: Path
) -> None:
    one = job(policy, classifier_folder)
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": module._token()}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", CHILD, cluster, str(Path(__file__).parents[2])],
        input=pickle.dumps([one]),
        capture_output=True,
        timeout=240,
        env={**os.environ, **access},
        check=False,
    )

    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == [point.score for point in run_trial(one).curve]


def test_a_node_with_other_versions_is_one_error(
    cluster: str, policy: Policy, classifier_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "__version__", "0.0.0")
    engine = Ray(workers=1)
    engine.start(job(policy, classifier_folder))

    with pytest.raises(ReleaseGuardError, match=r"Ray cannot run trials: .*release-guard 0\.0\.0"):
        list(engine.ended())


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
