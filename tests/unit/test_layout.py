"""Where precisions lie in a release, what is left out, and what must not lie there."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import independent_verifier
import pytest
from evidence_builder import example_policy, passing_evidence, retention
from judged import NOW, about, check, fixed_key, theirs_accepts, write

from release_guard.attestation import (
    EVIDENCE_FILE,
    POLICY_FILE,
    PREDICATE_TYPES,
    attest,
    bundle_name,
)
from release_guard.dsse import Statement
from release_guard.errors import IntegrityError
from release_guard.evidence import Evidence
from release_guard.gate import gate
from release_guard.layout import Artefact, artefacts, require_as_attacked
from release_guard.manifest import Manifest, hash_directory, root_digest
from release_guard.oms import sign
from release_guard.policy import Policy, Precision
from release_guard.release import Candidate, Check, Result, Verdict
from release_guard.signers.key import Key
from release_guard.verify import State

THREE: tuple[Precision, ...] = ("fp32", "int8", "nf4")
PASSED = Verdict([Check(f"resists/finetune/footwear@{each}", Result.PASS, "") for each in THREE])


def policy_of(*precisions: str, failed: str = "refuse") -> Policy:
    listed = ", ".join(f'"{each}"' for each in precisions)
    return example_policy(
        ('precisions = ["fp32"]', f"precisions = [{listed}]"),
        ("kappa = 5.0", f'kappa = 5.0\nfailed_precision = "{failed}"'),
    )


def laid_out(evidence: Evidence, verdict: Verdict, policy: Policy) -> dict[str, str]:
    return {each.folder: each.precision for each in artefacts(evidence, verdict, policy)}


def test_the_first_lies_at_the_top_the_others_in_folders_of_their_names() -> None:
    policy = policy_of("int8", "fp32", "nf4")
    evidence = passing_evidence(policy)
    assert laid_out(evidence, PASSED, policy) == {"": "int8", "fp32/": "fp32", "nf4/": "nf4"}


@pytest.mark.parametrize(
    ("left_out", "wanted"),
    [
        (("nf4",), {"": "fp32", "int8/": "int8"}),
        (("fp32",), {"": "int8", "nf4/": "nf4"}),
        (("fp32", "nf4"), {"": "int8"}),
    ],
)
def test_what_is_left_out_lies_nowhere(left_out: tuple[str, ...], wanted: dict[str, str]) -> None:
    policy = policy_of(*THREE)
    verdict = replace(PASSED, left_out=left_out)
    assert laid_out(passing_evidence(policy), verdict, policy) == wanted


def test_of_a_refused_release_everything_that_was_attacked_is_packed() -> None:
    policy = policy_of(*THREE)
    evidence = passing_evidence(policy)
    refused = Verdict([Check("resists/finetune/footwear@nf4", Result.FAIL, "")])
    assert list(laid_out(evidence, refused, policy).values()) == list(THREE)
    fewer = {each: root for each, root in evidence.artefacts.items() if each != "int8"}
    unrunnable = evidence.model_copy(update={"artefacts": fewer})
    assert laid_out(unrunnable, refused, policy) == {"": "fp32", "nf4/": "nf4"}


def test_what_nobody_attacked_is_not_published() -> None:
    policy = policy_of(*THREE)
    evidence = passing_evidence(policy)
    fewer = {each: root for each, root in evidence.artefacts.items() if each != "nf4"}
    with pytest.raises(IntegrityError, match="nf4: no files of this precision were attacked"):
        artefacts(evidence.model_copy(update={"artefacts": fewer}), PASSED, policy)


def roots(evidence: Evidence, **changes: Any) -> str:
    """What the gate says of evidence whose artefacts are changed so."""
    policy = policy_of("fp32", "nf4")
    found = gate(evidence.model_copy(update=changes), policy)
    (said,) = [item for item in found.checks if item.name == "controls/provenance"]
    assert found.result is Result.FAIL
    assert said.result is Result.FAIL
    return said.detail


def test_evidence_of_files_that_were_not_made_for_each_precision_fails() -> None:
    policy = policy_of("fp32", "nf4")
    evidence = passing_evidence(policy)
    fp32, nf4 = evidence.artefacts["fp32"], evidence.artefacts["nf4"]
    assert gate(evidence, policy).passed
    assert "no files were made and attacked at nf4" in roots(evidence, artefacts={"fp32": fp32})
    assert "no files were made and attacked at fp32, nf4" in roots(evidence, artefacts={})
    assert "trials are of other weights" in roots(
        evidence, artefacts={"fp32": fp32, "nf4": "a" * 64}
    )
    same = {"fp32": fp32, "nf4": fp32}
    assert "those of another precision or model" in roots(evidence, artefacts=same)
    base = {"fp32": fp32, "nf4": evidence.base}
    assert "those of another precision or model" in roots(evidence, artefacts=base)
    more = {"fp32": fp32, "nf4": nf4, "int8": "b" * 64}
    assert "files of int8 were made, which the policy does not" in roots(evidence, artefacts=more)
    assert "not those that the stages made" in roots(evidence, immunized="c" * 64)


def test_trials_of_another_precisions_files_fail() -> None:
    evidence = passing_evidence(policy_of("fp32", "nf4"))
    records = [
        record.model_copy(
            update={
                "trial": record.trial.model_copy(update={"weights": evidence.artefacts["fp32"]})
            }
        )
        if (record.trial.arm, record.trial.precision) == ("defended", "nf4")
        else record
        for record in evidence.records
    ]
    assert "trials are of other weights" in roots(evidence, records=tuple(records))


def test_old_evidence_is_of_one_set_of_files_whatever_it_was_rounded_to() -> None:
    policy = policy_of("fp32", "nf4")
    old = passing_evidence(policy).model_copy(update={"schema_version": 2, "artefacts": {}})
    records = [
        record.model_copy(
            update={"trial": record.trial.model_copy(update={"weights": old.immunized})}
        )
        if record.trial.arm == "defended"
        else record
        for record in old.records
    ]
    old = old.model_copy(update={"records": tuple(records)})
    assert gate(old, policy).passed
    assert artefacts(old, PASSED, policy) == (Artefact("fp32", "", old.immunized),)


FILES = {
    "README.md": b"# A model\n",
    "config.json": b"{}\n",
    "model.safetensors": bytes(range(256)),
    "nf4/config.json": b'{"quantization_config": {}}\n',
    "nf4/model.safetensors": bytes(range(64)),
}


def released(folder: Path, signer: Key, *, failing: bool) -> Candidate:
    """A release of fp32 and nf4, or of fp32 alone because nf4 fails: packed and signed."""
    policy = policy_of("fp32", "nf4", failed="leave_out")
    for name, content in FILES.items():
        write(folder, name, content)
    own = {
        "fp32": Manifest.of(hash_directory(folder).payload.entries[:2]).root,
        "nf4": hash_directory(folder / "nf4").payload.root,
    }
    if failing:  # of too little use
        (folder / "nf4" / "config.json").unlink()
        (folder / "nf4" / "model.safetensors").unlink()
    lost = (retention("fp32"), retention("nf4", lost=200 if failing else 5))
    evidence = about(passing_evidence(policy, retention=lost), own["fp32"], nf4=own["nf4"])
    write(folder, POLICY_FILE, policy.source)
    write(folder, EVIDENCE_FILE, evidence.to_jsonl())
    candidate = Candidate(folder, gate(evidence, policy), hash_directory(folder).payload)
    sign(attest(candidate, policy, evidence, signer), signer)
    return candidate


@pytest.mark.parametrize("failing", [False, True])
def test_a_release_without_what_was_left_out_is_intact(tmp_path: Path, failing: bool) -> None:
    ours = fixed_key(tmp_path / "keys")
    candidate = released(tmp_path / "release", ours, failing=failing)
    assert candidate.verdict.left_out == (("nf4",) if failing else ())
    found = check(tmp_path / "release", ours, every_check=True)
    assert (found.states, found.findings) == ((State.INTACT,), ())
    assert found.claims is not None
    published = ["fp32"] if failing else ["fp32", "nf4"]
    assert [each.precision for each in found.claims.artefacts] == published
    independent_verifier.verify(tmp_path / "release", ours.public, None, NOW)
    assert theirs_accepts(tmp_path / "release", ours)


def test_every_attestation_is_bound_to_every_file_of_every_precision(tmp_path: Path) -> None:
    ours, folder = fixed_key(tmp_path / "keys"), tmp_path / "release"
    released(folder, ours, failing=False)
    files = {name for name in FILES if name != "README.md"}
    for kind in PREDICATE_TYPES:
        bundle = (folder / bundle_name(kind)).read_bytes()
        model, *others = Statement.from_bytes(ours.verify(bundle)).subjects
        bound = {subject.name: subject.digest for subject in others}
        assert bound == {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files
        }
        assert model.digest == root_digest(bound[name] for name in sorted(bound))


def test_what_was_left_out_cannot_be_put_back(tmp_path: Path) -> None:
    """Though it was attacked, and whoever has the key signs it."""
    ours = fixed_key(tmp_path / "keys")
    candidate = released(tmp_path / "release", ours, failing=True)
    folder = candidate.directory
    for name in ("nf4/config.json", "nf4/model.safetensors"):
        write(folder, name, FILES[name])
    evidence = Evidence.read(folder / EVIDENCE_FILE)
    policy = Policy.parse((folder / POLICY_FILE).read_bytes(), name="policy.toml")
    with_nf4 = Candidate(folder, candidate.verdict, hash_directory(folder).payload)
    with pytest.raises(IntegrityError, match="the top of the release: not the fp32 weights"):
        attest(with_nf4, policy, evidence, ours)
    assert check(folder, ours).states[0] is State.WEIGHTS_CHANGED


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nf4/model.safetensors": "1" * 64}, "nf4/: not the nf4 weights"),
        ({"nf4/more.json": "1" * 64}, "nf4/: not the nf4 weights"),
        ({"int8/model.safetensors": "1" * 64}, "the top of the release: not the fp32 weights"),
        ({"nf4x/model.safetensors": "1" * 64}, "the top of the release: not the fp32 weights"),
        ({"model.safetensors": None}, "the top of the release: not the fp32 weights"),
        ({"nf4/model.safetensors": None, "nf4/config.json": None}, "nf4/: the nf4 weights are"),
    ],
)
def test_a_payload_of_anything_else_is_refused(changes: dict[str, Any], said: str) -> None:
    digests = {name: f"{place:064x}" for place, name in enumerate(FILES)}
    found = [_part("fp32", "", digests), _part("nf4", "nf4/", digests)]
    require_as_attacked({**digests, "nf4/README.md": "2" * 64}, found)
    changed = {name: digest for name, digest in {**digests, **changes}.items() if digest}
    with pytest.raises(IntegrityError, match=said):
        require_as_attacked(changed, found)


def _part(precision: str, folder: str, digests: dict[str, str]) -> Artefact:
    names = [f"{folder}config.json", f"{folder}model.safetensors"]
    return Artefact(precision, folder, root_digest(digests[name] for name in names))


def test_a_release_of_nothing_is_refused() -> None:
    with pytest.raises(IntegrityError, match="no weights that were attacked"):
        require_as_attacked({}, ())
