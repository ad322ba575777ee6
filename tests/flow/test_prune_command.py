"""`prune`: a smaller pipeline by one command."""

import json
from pathlib import Path

import pytest

from release_guard import pipelines
from release_guard.cli import main


def prune(source: Path, output: Path, *options: str) -> int:
    return main(["prune", str(source), "--output", str(output), *options])


def test_a_pruned_pipeline_can_be_loaded_and_says_what_it_saves(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(pipeline_folder, tmp_path / "small", "--pruner", "width", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    before, after = document["macs"]
    assert 0 < after < before
    small = pipelines.load(document["output"]).network.state_dict()
    whole = pipelines.load(str(pipeline_folder)).network.state_dict()
    assert {name: part.shape for name, part in small.items()} == {
        name: part.shape for name, part in whole.items()
    }


def test_what_cannot_be_cut_leaves_nothing_behind(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(pipeline_folder, tmp_path / "small") == 1  # one layer a block already
    assert "no layer to cut; prune its width" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_what_is_there_is_not_overwritten(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(pipeline_folder, tmp_path) == 2
    assert "exists already" in capsys.readouterr().err
