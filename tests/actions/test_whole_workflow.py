"""The workflow that `init` writes, from checkout to Hub, on a model small enough to be attacked."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pico
import pytest
from fake_runner import Runner
from judged import Judged
from oidcserver import TrustedHub
from packed import pack
from sigstoreserver import ISSUER, SigstoreServer

from release_guard.signers.key import generate_key
from release_guard.signers.sigstore import Sigstore
from release_guard.workflow import release_workflow

REPO = "acme/model"


@pytest.fixture
def one_core() -> Iterator[None]:
    """One trial at a time; more processes would only wait for each other's imports."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def workflow() -> str:
    return release_workflow(
        model="a model",
        policy="policy.toml",
        repo=REPO,
        action=f"acme/model-release-guard@{'0' * 40}",
    )


@pytest.mark.usefixtures("one_core")
def test_an_unprotected_model_ends_it_in_its_first_job(
    runner: Runner, hub: TrustedHub, image_data: Path, classifier_folder: Path, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    _, public = generate_key(tmp_path / "owner")
    few = {"search_examples": 60, "confirm_examples": 60}
    policy = pico.pico_policy(checkout, image_data, hub="huggingface", signer=None, red_team=few)
    shutil.copy(public, checkout)
    with policy.open("a") as file:
        file.write('signer = { name = "key", public = "key.pub" }\n')
    shutil.copytree(classifier_folder, checkout / "a model")
    variables = {"HF_ENDPOINT": hub.url, "OMP_NUM_THREADS": "1"}
    jobs = replace(runner, checkout=checkout, variables=variables).run(workflow())

    judge, guard = jobs["judge"], jobs["judge"].step("guard")
    assert guard.code == 3, judge.log
    assert guard.outputs["verdict"] == "FAIL"
    assert "**FAIL**" in guard.summary
    assert 1 <= len([kind for kind, _, _ in guard.commands if kind == "error"]) <= 10
    assert jobs["publish"].outcome == "skipped"
    assert [path.name for path in (runner.folder / "artifacts").iterdir()] == ["report"]
    assert [name for name in guard.environment if "TOKEN" in name or "KEY" in name] == []
    assert hub.requests == []


@pytest.fixture
def handing(runner: Runner, judged: Judged) -> Runner:
    """A runner whose first job hands over what was judged without any training."""
    root = judged.candidate.payload.root
    script = f"""
cp -r "{judged.candidate.directory}" "$RUNNER_TEMP/release"
touch "$RUNNER_TEMP/report.html"
printf '%s\\n' payload-root={root} "candidate=$RUNNER_TEMP/release" \\
  "report=$RUNNER_TEMP/report.html" >> "$GITHUB_OUTPUT"
"""
    checkout = runner.folder.with_name("checkout")
    checkout.mkdir()
    shutil.copy(judged.candidate.directory / ".release-guard/policy.toml", checkout)
    replaced = {**runner.replaced, "judge/guard": script}
    return replace(runner, checkout=checkout, replaced=replaced)


def test_what_passed_in_one_job_is_published_by_the_other(
    handing: Runner, hub: TrustedHub, judged: Judged
) -> None:
    jobs = handing.run(workflow())

    publish = jobs["publish"]
    assert publish.outcome == "success", publish.log
    head = hub.repositories[REPO].head
    assert ".release-guard/evidence.jsonl" in head.files
    assert "model.sig" in head.files
    assert publish.step("guard").outputs["commit-url"].endswith(head.oid)
    assert {*hub.arrived} == {f"Bearer {hub.given[0]}"}
    identity = "ACTIONS_ID_TOKEN_REQUEST_TOKEN"
    assert [ran.id for ran in jobs["judge"].ran if identity in ran.environment] == []


def test_no_key_is_needed_either(
    handing: Runner, hub: TrustedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One identity of the job opens the Hub, another Sigstore: here both on the loopback."""
    with SigstoreServer() as sigstore:
        hub.sigstore = sigstore
        sigstore.enter(monkeypatch, tmp_path / "client")
        signer = Sigstore(identity=sigstore.workflow, issuer=ISSUER)
        shutil.rmtree(tmp_path / "packed")
        options = f'''hub = "huggingface"
signer = {{ name = "sigstore", identity = "{signer.identity}", issuer = "{ISSUER}" }}'''
        pack(tmp_path / "packed", signer, options)
        shutil.copy(tmp_path / "packed/.release-guard/policy.toml", handing.checkout)
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "SIGSTORE_ON_LOOPBACK": sigstore.url,
            "XDG_DATA_HOME": str(tmp_path / "client" / "data"),
        }
        publish = replace(handing, variables=variables).run(workflow())["publish"]

    assert publish.outcome == "success", publish.log
    assert "verified" in publish.log
    assert len(sigstore.entries) >= 4  # three attestations and the release
    files = hub.repositories[REPO].head.files
    assert b"certificate" in files["model.sig"].content
    assert b"publicKey" not in files["model.sig"].content


@pytest.mark.parametrize(
    "name", ["model.safetensors", ".release-guard/evidence.jsonl", ".release-guard/policy.toml"]
)
def test_what_changed_between_the_jobs_is_not_published(
    name: str, handing: Runner, hub: TrustedHub
) -> None:
    def change(artifact: Path) -> None:
        path = artifact / name
        if artifact.name == "candidate":
            path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))

    publish = replace(handing, between=change).run(workflow())["publish"]
    assert publish.step("guard").code in {2, 4}, publish.log
    assert hub.writes() == []


def test_a_laxer_policy_than_the_one_checked_out_is_not_published(
    handing: Runner, hub: TrustedHub
) -> None:
    """The job that judged runs the model's code, and could have written one."""
    assert handing.checkout is not None
    asked = handing.checkout / "policy.toml"
    asked.write_text(asked.read_text().replace("kappa = 5.0", "kappa = 50.0"))
    publish = handing.run(workflow())["publish"]
    assert publish.step("guard").code == 4, publish.log
    assert "not packed by the policy that was asked for" in publish.log
    assert hub.writes() == []


def test_an_artifact_without_hidden_files_is_not_published(
    handing: Runner, hub: TrustedHub
) -> None:
    text = workflow()
    assert "include-hidden-files: true" in text
    publish = handing.run(text.replace("include-hidden-files: true", ""))["publish"]
    assert publish.step("guard").code == 4, publish.log
    assert hub.writes() == []
