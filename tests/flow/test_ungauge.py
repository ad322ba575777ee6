"""The private way back: from the folder of a release, by the command; and never into a release."""

import json
import shutil
from pathlib import Path
from typing import Any

import merge_family
import pico
import pytest
import torch
from evidence_builder import example_policy, passing_evidence
from workspaces import quiet

from release_guard.cli import main
from release_guard.errors import IntegrityError
from release_guard.gate import gate
from release_guard.gauging import FILE
from release_guard.judging import pack
from release_guard.manifest import hash_directory
from release_guard.modalities import ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.preflight import Order
from release_guard.run import Run
from release_guard.stages import Stage


@pytest.fixture(scope="module")
def model(classifier_folder: Path, image_data: Path) -> ModelHandle:
    base = merge_family.base_model(classifier_folder)
    return merge_family.trained(base, image_data / "restricted.parquet", seed=1)


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    model: ModelHandle,
    classifier_folder: Path,
    image_data: Path,
) -> Path:
    """`release`, a gauged model, and `private`, which leads back."""
    folder = tmp_path_factory.mktemp("gauged")
    task = str(image_data / "restricted.parquet")
    target = {
        "name": "task",
        "dataset": task,
        "ceiling": 0.6,
        "donor": str(classifier_folder),
        "base": str(classifier_folder),
        "donor_dataset": str(image_data / "retained.parquet"),
    }
    path = pico.pico_policy(folder, image_data, concepts=None, merge_targets=[target])
    stage = Stage.build(Spec(name="merge_guard", preset="params"))
    stage.immunize(model, Policy.load(path), quiet(folder)).save(folder / "release")
    return folder


def ungauge(
    home: Path, output: Path, *, source: Path | None = None, private: Path | None = None
) -> int:
    record = private or home / "private" / FILE
    model = source or home / "release"
    return main(["ungauge", str(model), "--private", str(record), "--output", str(output)])


def test_the_release_comes_back_as_it_was(
    home: Path, model: ModelHandle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plain"
    assert ungauge(home, output) == 0
    assert capsys.readouterr().out.strip() == str(output)
    wanted, found = model.state(), model.peer(str(output)).state()
    hidden = model.peer(str(home / "release")).state()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(hidden[name], wanted[name]) for name in wanted)
    assert ungauge(home, output) == 2  # nothing is written over


def test_what_does_not_belong_together_is_told_in_one_line(
    home: Path, model: ModelHandle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(code: int, **changes: Any) -> str:
        assert ungauge(home, tmp_path / "no", **changes) == code
        assert not (tmp_path / "no").exists()
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    model.save(tmp_path / "another")
    assert "another model, or changed since" in told(4, source=tmp_path / "another")
    record = json.loads((home / "private" / FILE).read_text())
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(record | {"secret": "11" * 32}))
    assert "the record is damaged, or another's" in told(4, private=wrong)
    wrong.write_text("{}")
    assert "not the private record of a gauge" in told(1, private=wrong)
    assert "cannot be read" in told(1, private=tmp_path / "nowhere")
    assert "no such folder" in told(1, source=tmp_path / "nowhere")


@pytest.mark.parametrize("name", [FILE, "notes.md"])
def test_nothing_private_is_ever_packed(name: str, home: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(home / "release", source)
    shutil.copyfile(home / "private" / FILE, source / name)  # under its own name or another
    run = Run(tmp_path / "run")
    shutil.copytree(home / "release", run.immunized)
    shutil.copyfile(home / "private" / FILE, run.private / FILE)
    policy = example_policy()
    root = hash_directory(run.immunized).payload.root
    roots = {"immunized": root, "artefacts": {"fp32": root}}
    evidence = passing_evidence(policy).model_copy(update=roots)
    order = Order(str(source), "acme/m", policy)
    with pytest.raises(IntegrityError, match="nothing private is published"):
        pack(order, run, evidence, gate(evidence, policy), None)  # type: ignore[arg-type]
    assert not run.release.exists()
