"""docs/attestation-format.md is normative, so it names every field there is, and no other."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from evidence_builder import MERGED, example_policy, passing_evidence
from judged import about
from pydantic import BaseModel
from rich_evidence import rich_evidence, rich_policy

from release_guard.attestation import statements
from release_guard.evidence import (
    Arm,
    Change,
    Cost,
    Ending,
    Evidence,
    Kept,
    Origin,
    Outcome,
    Point,
    Record,
    Retention,
    ScoredSplit,
    StageReport,
    Trial,
)
from release_guard.gate import gate
from release_guard.ledger import Ledger
from release_guard.manifest import FileEntry, Manifest
from release_guard.policy import Policy, Precision, Unit
from release_guard.release import Candidate

DOCUMENT = (Path(__file__).parents[2] / "docs/attestation-format.md").read_text()
NAMES = re.compile(r"`([^`]+)`")
RATIOS = {"sigma", "headStart", "longRun", "outside", "ancestor", "sham"}  # described as kappa is


def table(heading: str) -> dict[str, str]:
    """What the first table under a heading says of each field."""
    (below,) = re.findall(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL
    )
    rows = re.findall(r"(?m)^\| (`.*?) \| (.*) \|$", below)
    return {name: content for names, content in rows for name in NAMES.findall(names)}


def resistance(policy: Policy, evidence: Evidence) -> dict[str, Any]:
    names = ["model.safetensors", "nf4/model.safetensors"][: len(policy.precisions)]
    parts = [
        Manifest.of([FileEntry(name, f"{place}2" * 32, 4)]) for place, name in enumerate(names)
    ]
    payload = Manifest.of([entry for part in parts for entry in part.entries])
    others = dict(zip(["nf4"], (part.root for part in parts[1:]), strict=False))
    found = about(evidence, parts[0].root, **others)
    made = statements(Candidate(Path(), gate(found, policy), payload), policy, found)
    return json.loads(made["resistance"])["predicate"]


def keys(value: object, loose: set[str]) -> set[str]:
    """Names of all fields inside, but for what stands in a loose one."""
    if isinstance(value, list):
        return {name for item in value for name in keys(item, loose)}
    if isinstance(value, dict):
        inner = [item for name, item in value.items() if name not in loose]
        return set(value) | keys(inner, loose)
    return set()


@pytest.mark.parametrize(
    ("heading", "model", "elsewhere"),
    [
        ("`header`", Evidence, {"retention", "records"}),
        ("`retention`", Retention, set()),
        ("`record`", Record, set()),
        ("`trial`", Trial, set()),
        ("`outcome`", Outcome, set()),
    ],
)
def test_every_field_of_the_evidence_is_described(
    heading: str, model: type[BaseModel], elsewhere: set[str]
) -> None:
    assert set(table(heading)) == set(model.model_fields) - elsewhere


@pytest.mark.parametrize(
    ("heading", "field", "names"),
    [
        ("`header`", "change", Change.model_fields),
        ("`header`", "stages", StageReport.model_fields),
        ("`outcome`", "curve", {**Point.model_fields, **Cost.model_fields}),
        ("`outcome`", "kept", Kept.model_fields),
        ("`outcome`", "ending", get_args(Ending)),
        ("`record`", "origin", get_args(Origin)),
        ("`trial`", "arm", get_args(Arm)),
        ("`trial`", "precision", get_args(Precision)),
        ("`trial`", "split", get_args(ScoredSplit)),
        ("`trial`", "budget", ("unit", "limit", *get_args(Unit))),
    ],
)
def test_what_a_field_holds_is_described(heading: str, field: str, names: Any) -> None:
    assert set(names) <= set(NAMES.findall(table(heading)[field]))


def test_every_default_is_described() -> None:
    """Empty, none, null, false or 0: what a reader takes a missing field for."""
    for heading, model in (("`header`", Evidence), ("`record`", Record), ("`outcome`", Outcome)):
        said = table(heading)
        for name, field in model.model_fields.items():
            if name in said and not field.is_required() and name not in {"suite", "schema_version"}:
                assert "default" in said[name], name


@pytest.mark.parametrize(
    ("policy", "build"),
    [(rich_policy(), rich_evidence), (example_policy(*MERGED), passing_evidence)],
    ids=["rich", "merges"],
)
def test_every_field_of_the_predicate_is_described(policy: Policy, build: Any) -> None:
    found, said = resistance(policy, build(policy)), table("Predicate `resistance` v0.1")
    assert set(said) == set(found)
    loose = {"options", "measures", "environment", "unavailable"}  # anything may stand there
    for name, value in found.items():
        words = set(NAMES.findall(said[name])) | (
            {"target", "precision"} if "place" in said[name] else set()
        )
        if name in RATIOS:
            words |= set(NAMES.findall(said["kappa"]))
        assert keys({name: value}, loose) <= {*words, name}, name


def test_a_key_is_the_digest_of_the_bytes_in_the_line() -> None:
    evidence = passing_evidence(example_policy())
    header, *lines = evidence.to_jsonl().splitlines()
    assert header.startswith(b'{"header":{')
    trials = [re.search(rb'"trial":(\{.*\})\}\}$', line) for line in lines if b'"trial":' in line]
    found = [hashlib.sha256(trial[1]).hexdigest() for trial in trials if trial]
    assert found == sorted(record.trial.key for record in evidence.records)


def test_a_line_of_the_ledger_has_the_digest_of_its_outcome(tmp_path: Path) -> None:
    record = passing_evidence(example_policy()).records[0]
    Ledger(tmp_path / "trials.jsonl", print).add(record.trial, record.outcome)
    line = json.loads((tmp_path / "trials.jsonl").read_bytes())
    assert set(line) == {"key", "trial", "outcome", "outcome_digest"}
    content = json.dumps(line["outcome"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert line["outcome_digest"] == hashlib.sha256(content.encode()).hexdigest()
    assert all(f"`{name}`" in DOCUMENT for name in line)
