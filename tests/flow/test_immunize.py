"""`immunize`: stages alone, what they do to each other, killed and taken up, in two processes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pico
import psutil
import pytest
import torch
from engine_jobs import HereSession, below, kill
from evidence_builder import passing_evidence
from safetensors.torch import load_file

from release_guard.card import Publication
from release_guard.cli import main
from release_guard.errors import PolicyError
from release_guard.gate import gate
from release_guard.judging import immunize, pack
from release_guard.manifest import hash_directory
from release_guard.policy import Policy
from release_guard.preflight import Order
from release_guard.preparation import prepare

FIRST = {
    "name": "sophon",
    "outer_steps": 4,
    "attackers": 2,
    "batch": 16,
    "query": 16,
    "ntr_steps": 1,
    "ntr_batch": 16,
    "tail_steps": 2,
    "probe_every": 2,
    "probed": 60,
    "keep_every": 2,
}
SECOND = {**FIRST, "variant": "paper", "advance": 2, "horizon": [3, 3], "alpha": 1e-3}
TOLD = "immunize: sophon: "
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


def make_policy(folder: Path, data: Path, **changes: Any) -> Path:
    changed = {"stages": [FIRST], "retain": {"margin": 0.6}, **changes}
    return pico.pico_policy(folder, data, **changed)


def session(lines: list[str] | None = None) -> HereSession:
    said = [] if lines is None else lines
    return HereSession(
        1,
        lambda phase, done, total, line: said.append(f"{phase}: {done} of {total}; {line}"),
        lambda: datetime(2026, 1, 2, tzinfo=UTC),
    )


def test_each_stage_is_looked_at_after_every_later_one_and_publish_goes_on_from_there(
    image_data: Path, classifier_folder: Path, tmp_path: Path
) -> None:
    policy = Policy.load(make_policy(tmp_path, image_data, stages=[FIRST, SECOND]))
    order, folder = Order(str(classifier_folder), "acme/gratings", policy), tmp_path / "run"
    lines: list[str] = []
    done = immunize(order, folder, session(lines))
    assert sum(line.startswith(f"{TOLD}6 of 6") for line in lines) == 2
    first, second = done.stages
    assert [len(first.effects), len(second.effects)] == [2, 1]
    assert {effect.after for effect in first.effects} == {"sophon"}
    assert first.effects[0] != first.effects[1], "the second stage changed nothing?"
    assert first.cost is not None
    assert (first.cost.steps, first.options["variant"]) == (6, "hardened")
    assert [check.name for check in done.checks] == ["stages/0-sophon", "stages/1-sophon"]
    before, lines = hash_directory(folder / "immunized"), []
    subject, run = prepare(order, folder, session(lines))
    assert not lines, "what was immunized is not immunized again"
    assert hash_directory(run.immunized) == before
    assert subject.stages == done.stages
    judged = gate(passing_evidence(policy, stages=subject.stages), policy)
    found = [check for check in judged.checks if check.name.startswith("stages/")]
    assert found == list(done.checks)


def test_what_is_private_is_never_packed(
    image_data: Path, classifier_folder: Path, tmp_path: Path
) -> None:
    policy = Policy.load(make_policy(tmp_path, image_data))
    order = Order(str(classifier_folder), "acme/gratings", policy)
    subject, run = prepare(order, tmp_path / "run", session())
    (run.private / "gauge.safetensors").write_bytes(b"only the owner may know")
    assert run.private.stat().st_mode & 0o077 == 0
    root = hash_directory(run.immunized).payload.root
    evidence = passing_evidence(
        policy, stages=subject.stages, immunized=root, artefacts={"fp32": root}
    )
    publication = Publication("gratings", "hub/acme/gratings", "somebody")
    candidate = pack(order, run, evidence, gate(evidence, policy), publication)
    packed = [path for path in candidate.directory.rglob("*") if path.is_file()]
    assert packed
    assert not [path for path in packed if "private" in str(path.relative_to(candidate.directory))]
    assert not [path for path in packed if b"only the owner may know" in path.read_bytes()]


def test_an_other_policy_does_not_go_on_from_there(
    image_data: Path, classifier_folder: Path, tmp_path: Path
) -> None:
    order = Order(
        str(classifier_folder), "a/b", Policy.load(make_policy(tmp_path / "a", image_data))
    )
    immunize(order, tmp_path / "run", session())
    other = Policy.load(make_policy(tmp_path / "b", image_data, stages=[SECOND]))
    with pytest.raises(PolicyError, match="belongs to another run"):
        prepare(Order(str(classifier_folder), "a/b", other), tmp_path / "run", session())


def test_a_policy_without_a_stage_says_what_to_do(
    image_data: Path, classifier_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = make_policy(tmp_path, image_data, stages=[])
    arguments = ["immunize", str(classifier_folder), "--policy", str(policy)]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert "the policy has no stage" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["immunize", "plan", "publish", "policy check"])
def test_a_stage_for_other_models_is_told_before_any_model_is_touched(
    command: str, image_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = str(make_policy(tmp_path, image_data, stages=[FIRST, {"name": "concept_suppression"}]))
    wrong = "stages[1]: concept_suppression is for text_to_image, not for image_classification"
    more = {"policy check": [policy], "publish": ["--repo", "a/b"]}.get(command, [])
    source = [] if command == "policy check" else [str(tmp_path / "nowhere"), "--policy", policy]
    assert main([*command.split(), *source, *more]) == 2
    assert wrong in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(
    image_data: Path, classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """What one process makes of the model that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    policy = Policy.load(make_policy(folder, image_data))
    done = immunize(Order(str(classifier_folder), "a/b", policy), folder / "run", session())
    return load_file(done.folder / "model.safetensors")


@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
def test_sigkill_and_the_same_command_give_the_weights_that_nobody_interrupted(
    several: bool,
    whole: dict[str, torch.Tensor],
    image_data: Path,
    classifier_folder: Path,
    tmp_path: Path,
) -> None:
    policy, output = make_policy(tmp_path, image_data), tmp_path / "run"
    command = [
        sys.executable, *(TORCHRUN if several else ()), "-m", "release_guard", "immunize",
        classifier_folder, "--policy", policy, "--output", output, "-v", "--json",
    ]  # fmt: skip
    told, _ = _run_until(command, f"{TOLD}3 of 6")
    assert not (output / "immunized").exists()
    told, printed = _run_until(command, None)
    steps = [line.partition(" of ")[0] for line in told if line.startswith(TOLD)]
    assert steps == [f"{TOLD}{step}" for step in (3, 4, 5, 6)], "one process prints, from there on"
    assert several == ("2 processes share the model" in told)
    document = json.loads(printed)
    assert document["model"] == str(output / "immunized")
    assert document["stages"][0]["cost"]["steps"] == 6
    found = load_file(output / "immunized" / "model.safetensors")
    assert found.keys() == whole.keys()
    before = load_file(classifier_folder / "model.safetensors")
    for name, value in whole.items():
        if not several:
            assert torch.equal(found[name], value), name
        elif not name.endswith("key.bias"):  # changes no output: only rounding moves it
            apart, moved = (float((one - value).norm()) for one in (found[name], before[name]))
            assert apart <= 0.01 * moved, name


def _run_until(command: Sequence[Any], line: str | None) -> tuple[list[str], str]:
    """Run the command, its processes killed at a line if one is given; what it told and printed."""
    told = []
    paths = str(Path(__file__).parents[2])
    with subprocess.Popen(  # noqa: S603
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    ) as process:
        assert process.stderr is not None
        for each in process.stderr:
            told.append(each.rstrip())
            if line is not None and each.startswith(line):
                kill(below(psutil.Process(process.pid)))
                process.kill()
                break
        printed, _ = process.communicate()
    assert process.returncode == 0 or line is not None, "\n".join(told)[-3_000:]
    return told, printed
