"""Figures of all precisions beside each other, and what a page says of one that is left out."""

from typing import Any

import evidence_builder
import pytest
from evidence_builder import example_policy, passing_evidence
from rich_evidence import rich_evidence, rich_policy

from release_guard import blocks, by_precision, highlights
from release_guard.evidence import Evidence
from release_guard.gate import gate
from release_guard.outcome import verdict_document, verdict_lines
from release_guard.policy import Policy
from release_guard.report import render

POLICY = example_policy(
    ('["fp32"]', '["fp32", "nf4"]'), ("[gate]", '[gate]\nfailed_precision = "leave_out"')
)


def section(evidence: Evidence, policy: Policy) -> str:
    return by_precision.section(evidence, gate(evidence, policy), policy)


def useless(precision: str) -> Evidence:
    retention = [
        evidence_builder.retention(each, lost=200 if each == precision else 5)
        for each in POLICY.precisions
    ]
    return passing_evidence(POLICY, retention=tuple(retention))


def test_one_precision_is_compared_with_nothing() -> None:
    policy = example_policy()
    assert section(passing_evidence(policy), policy) == ""


def test_every_target_and_precision_has_its_row_and_picture() -> None:
    policy = rich_policy()
    page = section(rich_evidence(policy), policy)
    for words in ("footwear: kappa by precision", "hats: kappa by precision", "nf4, defended"):
        assert words in page
    rows = page[page.index("<table") :].count("<tr") - 1  # the head's
    assert rows == len(policy.targets) * len(policy.precisions)
    assert page.count(">passed<") == len(policy.precisions)


@pytest.mark.parametrize(
    ("precision", "kept", "update"),
    [("nf4", "fp32", {}), ("fp32", "nf4", {}), ("nf4", "fp32", {"retention": None})],
)
def test_what_is_left_out_is_told_everywhere(
    precision: str, kept: str, update: dict[str, Any]
) -> None:
    evidence = useless(precision)
    if update:
        there = tuple(each for each in evidence.retention if each.precision != precision)
        evidence = evidence.model_copy(update={"retention": there})
    verdict = gate(evidence, POLICY)
    assert verdict.passed
    report = render(evidence, verdict, POLICY, title="me/model")
    assert f"At what is published ({kept}), no attack got there" in report
    assert f"precision {precision}: not published, as it did not pass" in report
    assert "did not pass" in section(evidence, POLICY)
    tiles = highlights.section(evidence, verdict, POLICY).partition("<table")[0]
    assert f"at {kept}" in tiles
    assert f"at {precision}" not in tiles
    assert f"precision {precision}: not published" in blocks.not_tested(verdict)
    assert f"at the precisions {kept}, under" in " ".join(blocks.limits(verdict, POLICY).split())
    assert verdict_document(verdict, evidence)["left_out"] == [precision]
    assert any(line.endswith(f"says why: {precision}") for line in verdict_lines(verdict, POLICY))


def test_what_could_not_be_run_has_no_figures() -> None:
    evidence = passing_evidence(POLICY)
    evidence = evidence.model_copy(
        update={
            "unrunnable": {"nf4": "bitsandbytes cannot be imported"},
            "records": tuple(r for r in evidence.records if r.trial.precision == "fp32"),
            "unattacked": tuple(u for u in evidence.unattacked if u.precision == "fp32"),
            "retention": tuple(r for r in evidence.retention if r.precision == "fp32"),
        }
    )
    page = section(evidence, POLICY)
    assert ">could not be run<" in page
    assert "nf4, defended" not in page
