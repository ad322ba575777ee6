"""What commands tell people."""

import shlex
from pathlib import Path

import pytest
from evidence_builder import example_policy, passing_evidence, refused_evidence

from release_guard.gate import gate
from release_guard.outcome import advice_lines, verdict_document, verdict_lines, verify_command
from release_guard.plugins import Spec
from release_guard.release import Check, Receipt, Result, Verdict

POLICY = example_policy()


def test_pass_is_told_with_its_figures() -> None:
    first, *others = verdict_lines(gate(passing_evidence(POLICY), POLICY), POLICY)

    assert first.startswith("PASS: no breach found within")
    assert others[0].startswith("  footwear@fp32: kappa ≥ ")
    assert "the policy's bar: kappa 5, lower bound 2" in others[1]
    assert "listed in the report" in others[-1]


def test_refusal_begins_with_what_failed() -> None:
    lines = list(verdict_lines(gate(refused_evidence(POLICY), POLICY), POLICY))

    assert lines[0] == "REFUSED (FAIL), because:"
    assert lines[1].startswith("  resists/finetune/footwear@fp32: ")


def test_no_evidence_is_a_reason() -> None:
    assert "  there is no evidence at all" in verdict_lines(Verdict(()), POLICY)


@pytest.mark.parametrize(
    ("result", "told"), [(Result.FAIL, "strengthen the stages"), (Result.INCONCLUSIVE, "too thin")]
)
def test_advice_fits_the_verdict(result: Result, told: str) -> None:
    (line,) = advice_lines(Verdict((Check("kappa/x@fp32", result, ""),)))

    assert line.startswith("next: ")
    assert told in line


def test_document_has_every_check() -> None:
    evidence = passing_evidence(POLICY)
    verdict = gate(evidence, POLICY)
    document = verdict_document(verdict, evidence)

    assert [check["name"] for check in document["checks"]] == [c.name for c in verdict.checks]
    assert {check["result"] for check in document["checks"]} == {"PASS"}
    assert document["trials"] == len(evidence.records)


@pytest.mark.parametrize("hub", ["directory", "huggingface"])
def test_verify_command_can_be_pasted(hub: str, tmp_path: Path) -> None:
    folder = tmp_path / "my hub" / "acme" / "pico"
    url = folder.as_uri() if hub == "directory" else "https://huggingface.co/acme/pico"
    signer = Spec(name="key", public="my key.pub")
    policy = POLICY.model_copy(update={"signer": signer})
    words = shlex.split(verify_command(policy, "acme/pico", Receipt(url=url, revision="abc")))

    target = str(folder) if hub == "directory" else "hf://acme/pico@abc"
    assert words == ["release-guard", "verify", target, "--key", "my key.pub"]


def test_verify_command_of_a_release_without_a_key() -> None:
    identity = "https://github.com/acme/pico/.github/workflows/release.yml@refs/heads/a'b"
    issuer = "https://token.actions.githubusercontent.com"
    policy = POLICY.model_copy(
        update={"signer": Spec(name="sigstore", identity=identity, issuer=issuer)}
    )
    pushed = Receipt(url="https://huggingface.co/acme/pico", revision="abc")
    words = shlex.split(verify_command(policy, "acme/pico", pushed))

    target = "hf://acme/pico@abc"
    assert words == [
        *("release-guard", "verify", target, "--identity", identity, "--issuer", issuer)
    ]
