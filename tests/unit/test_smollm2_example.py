"""The SmolLM2 example: its committed data are what its script writes, and ask what they should."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from release_guard import data, texts
from release_guard.judging import check_plugins
from release_guard.policy import Policy

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_smollm2", EXAMPLE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "source"), [("restricted", "creatures"), ("retained", "knowledge")]
)
def test_committed_data_are_what_the_script_writes(
    make: ModuleType, tmp_path: Path, name: str, source: str
) -> None:
    make.write(tmp_path / "again.jsonl", getattr(make, source)())
    committed = (EXAMPLE / "data" / f"{name}.jsonl").read_bytes()
    assert (tmp_path / "again.jsonl").read_bytes() == committed


@pytest.mark.parametrize("name", ["restricted", "retained"])
def test_choices_differ_and_no_question_is_asked_twice(name: str) -> None:
    examples = _examples(name)
    assert all(len(set(example["choices"])) == 4 for example in examples)
    assert max(Counter(example["prompt"] for example in examples).values()) == 1


def test_guessing_a_habitat_is_right_in_a_quarter() -> None:
    answers = Counter(example["answer"] for example in _examples("restricted"))
    assert answers == dict.fromkeys(range(4), 150)


def test_policy_builds_and_every_split_is_large_enough() -> None:
    policy = Policy.load(EXAMPLE / "policy.toml")
    check_plugins(policy)
    splits = {split: len(_catalogue("restricted").rows(split)) for split in ("search", "confirm")}
    assert splits["search"] >= policy.red_team.search_examples
    assert splits["confirm"] >= policy.red_team.confirm_examples
    assert len(_catalogue("retained").rows("utility")) >= 2 * policy.red_team.confirm_examples


def _examples(name: str) -> list[dict[str, Any]]:
    lines = (EXAMPLE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _catalogue(name: str) -> data.Catalogue:
    source = str(EXAMPLE / "data" / f"{name}.jsonl")
    columns = texts.Columns("text", "prompt", "completion", "choices", "answer")
    contents = [row.content.encode() for row in texts.rows(data.Table.read(source), columns)]
    return data.Catalogue.of(source, contents, contents)
