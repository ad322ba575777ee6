"""The table of merges: what counts, what does not, what says nothing."""

from collections.abc import Callable

import pytest
from evidence_builder import MERGED, example_policy, passing_evidence

from release_guard import merge_table, tables
from release_guard.evidence import Evidence, Kept, Record
from release_guard.gate import gate
from release_guard.policy import Policy
from release_guard.report import render

LISTED = ("merge(method=linear)", "merge(method=ties)", "prune > merge_with_data")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return example_policy(*MERGED)


@pytest.fixture(scope="module")
def evidence(policy: Policy) -> Evidence:
    return passing_evidence(policy)


def changed(evidence: Evidence, which: Callable[[Record], bool], **update: object) -> Evidence:
    records = [
        record.model_copy(update={"outcome": record.outcome.model_copy(update=update)})
        if record.trial.target == "maths" and which(record)
        else record
        for record in evidence.records
    ]
    return evidence.model_copy(update={"records": tuple(records)})


def defended(record: Record) -> bool:
    return record.trial.arm == "defended"


def undefended(record: Record) -> bool:
    return record.trial.arm == "undefended"


def test_every_listed_merge_stands_there_with_both_scores(
    evidence: Evidence, policy: Policy
) -> None:
    page = merge_table.section(evidence, policy)
    assert "maths@fp32 (ceiling 0.500)" in page
    for label in LISTED:
        assert label.replace(">", "&gt;") in page
    assert page.count("0.050; donor&#x27;s task 0.800 of 0.850") == len(LISTED)
    assert page.count("0.990; donor&#x27;s task 0.800 of 0.850") == len(LISTED)
    assert '"bad"' not in page
    assert '"unsure"' not in page
    assert "footwear" not in page


def test_what_counts_and_what_does_not(evidence: Evidence, policy: Policy) -> None:
    high = next(r for r in evidence.records if undefended(r) and r.trial.target == "maths")
    breached = changed(evidence, defended, curve=high.outcome.curve)
    page = merge_table.section(breached, policy)
    assert page.count('"bad"') == len(LISTED)
    useless = Kept(merged=0.2, alone=0.85, examples=500)
    page = merge_table.section(changed(breached, defended, kept=useless), policy)
    assert '"bad"' not in page
    assert page.count("0.200 of 0.850: keeps too little") == len(LISTED)
    page = merge_table.section(
        changed(evidence, lambda r: undefended(r) and r.trial.split == "confirm", kept=useless),
        policy,
    )
    assert '"unsure"' not in page, "the search still shows that it works"


def test_a_merge_that_nothing_can_be_said_of_is_yellow(evidence: Evidence, policy: Policy) -> None:
    low = next(r for r in evidence.records if defended(r) and r.trial.target == "maths")
    idle = changed(evidence, undefended, curve=low.outcome.curve)
    assert merge_table.section(idle, policy).count('"unsure"') == len(LISTED)
    crashed = changed(evidence, defended, curve=(), kept=None, ending="failed", note="boom")
    assert merge_table.section(crashed, policy).count("failed: boom") == len(LISTED)


def test_policies_without_merge_targets_have_no_such_section() -> None:
    plain = example_policy()
    assert merge_table.section(passing_evidence(plain), plain) == ""


def test_the_ledger_counts_a_useless_merge_as_survived(evidence: Evidence, policy: Policy) -> None:
    high = next(r for r in evidence.records if undefended(r) and r.trial.target == "maths")
    breached = changed(evidence, defended, curve=high.outcome.curve)
    useless = Kept(merged=0.2, alone=0.85, examples=500)
    assert tables.ledger(changed(breached, defended, kept=useless)) == tables.ledger(evidence)
    assert tables.ledger(breached) != tables.ledger(evidence)


def test_it_stands_in_the_report(evidence: Evidence, policy: Policy) -> None:
    text = render(evidence, gate(evidence, policy), policy, title="acme/m")
    assert "Merges with a donor" in text
    assert "maths: examples that stand in the donor&#x27;s data" in text
