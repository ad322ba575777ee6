"""Whole attacks: beside each other, on a damaged ledger, on Ray, on a Ray that goes away."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pico
import psutil
import pytest
from engine_jobs import RAYS_WORKER, below, kill, workers_of

from release_guard.cli import main
from release_guard.evidence import Evidence
from release_guard.ledger import Ledger

pytestmark = pytest.mark.xdist_group("ray")  # Ray's processes start one after another
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)
RED_TEAM = {
    "budget": {"unit": "steps", "limit": 30},
    "search_examples": 60,
    "confirm_examples": 60,
    "grid_ratio": 2.0,
}


@pytest.fixture(scope="module")
def command(
    tmp_path_factory: pytest.TempPathFactory, image_data: Path, classifier_folder: Path
) -> list[str]:
    """An attack on an unprotected model, which ends at its first confirmed breach."""
    policy = pico.pico_policy(tmp_path_factory.mktemp("policy"), image_data, red_team=RED_TEAM)
    return ["attack", str(classifier_folder), "--policy", str(policy), "--workers", "1"]


def start(command: list[str], output: Path, *engine: str) -> "subprocess.Popen[str]":
    """A process of its own; `output` is the folder of its run, the ledger lies beside that."""
    arguments = [*command, "--output", str(output), *engine]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "release_guard", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


def outcomes(run: Path) -> dict[str, Any]:
    """What came of every trial of a run, but for the seconds."""
    found = {}
    for record in Evidence.read(run / "evidence.jsonl").records:
        found[record.trial.key] = record.outcome.model_dump()
        for point in found[record.trial.key]["curve"]:
            del point["cost"]["seconds"]
    return found


def refuse(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, command: list[str]) -> Path:
    """Folder of two runs that went on at once, a and b, and of their ledger."""
    folder = tmp_path_factory.mktemp("runs")
    both = [start(command, folder / name) for name in "ab"]
    told = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [3, 3], told
    return folder


def test_two_runs_at_once_share_a_ledger(runs: Path) -> None:
    ledger = Ledger(runs / "trials.jsonl", refuse)

    assert outcomes(runs / "a") == outcomes(runs / "b")
    assert {trial.key for trial in ledger} == outcomes(runs / "a").keys()


def test_a_damaged_line_is_named_and_its_trial_run_again(
    runs: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (runs / "trials.jsonl").read_bytes().splitlines()
    whole = {line.split(b'"key":')[1][:66]: line for line in lines}  # one of each trial
    first, *others = whole.values()
    ledger = tmp_path / "trials.jsonl"
    ledger.write_bytes(b"\n".join([first[:-9], *others]) + b"\n")

    assert main([*command, "--output", str(tmp_path / "c")]) == 3
    assert f"{ledger}:1: not a ledger line; skipped" in capsys.readouterr().err
    assert outcomes(tmp_path / "c") == outcomes(runs / "a")
    assert len(ledger.read_bytes().splitlines()) == len(whole) + 1


@needs_ray
def test_ray_finds_the_same_bit_for_bit(runs: Path, command: list[str], tmp_path: Path) -> None:
    process = start(command, tmp_path / "a", "--engine", "ray")
    _, errors = process.communicate()

    assert process.returncode == 3, errors
    assert outcomes(tmp_path / "a") == outcomes(runs / "a")


@needs_ray
def test_a_ray_that_goes_away_is_one_error_and_keeps_the_ledger(
    runs: Path, command: list[str], tmp_path: Path
) -> None:
    ledger = tmp_path / "trials.jsonl"
    held = (runs / "trials.jsonl").read_bytes()
    ledger.write_bytes(held)
    # Nothing can end it but the kill: it has no budget to speak of, and it never learns.
    text, endless = Path(command[3]).read_text(), Path(command[3]).with_name("endless.toml")
    for finite, infinite in {
        "limit = 30": "limit = 1e9",
        "lr = 0.003": "lr = 1e-12",
    }.items():
        assert finite in text
        text = text.replace(finite, infinite)
    endless.write_text(text)
    process = start([*command[:3], str(endless), *command[4:]], tmp_path / "a", "--engine", "ray")
    while not (rays := workers_of(psutil.Process(process.pid), RAYS_WORKER)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raylet, judging, *_ = rays[0].parents()
    assert raylet.name() == "raylet"
    kill(below(judging))
    _, errors = process.communicate()

    assert process.returncode == 1, errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: ")
    assert "no Ray cluster answers there" in last
    assert "What has ended is in the ledger" in last
    assert ledger.read_bytes() == held
