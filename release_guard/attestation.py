"""Three signed claims about the payload: resistance, test-result, SVR. Built from evidence alone.

Formats: in-toto test-result v0.1, Simple Verification Result v0.2, and our own resistance v0.1.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from release_guard.dsse import Statement, Subject, as_digest
from release_guard.errors import IntegrityError
from release_guard.evidence import Evidence
from release_guard.layout import Artefact, artefacts, require_as_attacked
from release_guard.manifest import (
    EVIDENCE_FOLDER,
    PAYLOAD,
    DirectoryTree,
    classify,
    root_digest,
    write_file,
)
from release_guard.policy import Policy
from release_guard.predicates import resistance, svr, svr_property, test_result
from release_guard.release import Attested, Candidate, Result

if TYPE_CHECKING:
    from release_guard.signers import Signer

POLICY_FILE = f"{EVIDENCE_FOLDER}/policy.toml"
EVIDENCE_FILE = f"{EVIDENCE_FOLDER}/evidence.jsonl"
MODEL = "model"  # subject that stands for the payload as a whole
PREDICATE_TYPES: Mapping[str, str] = {
    "resistance": "https://release-guard.dev/attestations/resistance/v0.1",
    "test-result": "https://in-toto.io/attestation/test-result/v0.1",
    "svr": "https://in-toto.io/attestation/svr/v0.2",
}
"""By file name; the first is this project's own."""

_Lenient = ConfigDict(frozen=True, extra="ignore")  # in-toto: ignore what you do not know


class _Named(BaseModel):
    model_config = _Lenient
    name: str = ""
    version: str = ""
    digest: Mapping[str, str] = {}


class _Artefact(BaseModel):
    model_config = _Lenient
    precision: str
    folder: str
    digest: Mapping[str, str]


class _Judged(BaseModel):
    model_config = _Lenient
    name: str
    result: Literal["PASS", "FAIL", "INCONCLUSIVE"]


class _Resistance(BaseModel):
    model_config = _Lenient
    suite: _Named
    policy: _Named
    report: _Named
    artefacts: tuple[_Artefact, ...] = ()
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    claim: str
    checks: tuple[_Judged, ...]
    finished: AwareDatetime = Field(alias="finishedAt")
    valid_until: AwareDatetime = Field(alias="validUntil")


class _TestResult(BaseModel):
    model_config = _Lenient
    result: str
    configuration: tuple[_Named, ...]


class _Svr(BaseModel):
    model_config = _Lenient
    properties: tuple[str, ...]


_Predicate = TypeVar("_Predicate", _Resistance, _TestResult, _Svr)


@dataclass(frozen=True)
class Claims:
    """What the three attestations say together, once they agree with each other.

    Attributes:
        result: The gate's verdict.
        claim: Its one sentence.
        policy: SHA-256 of the policy file it was judged by.
        report: SHA-256 of the full evidence.
        suite: Version of attacks and rules.
        finished: When the red team ended.
        valid_until: When the claim expires.
        properties: What a consumer's own policy may ask for by name.
        checks: Result of every check, by its name.
        artefacts: What the release consists of; none in old attestations.
    """

    result: Result
    claim: str
    policy: str
    report: str
    suite: str
    finished: datetime
    valid_until: datetime
    properties: frozenset[str]
    checks: Mapping[str, Result]
    artefacts: tuple[Artefact, ...] = ()

    def lacking(self, policy: Policy) -> tuple[str, ...]:
        """Properties that must have been earned, and have not.

        Of the mandatory attacks where there is a concept, and of all that merge targets list.
        """
        budget = policy.red_team.budget
        families = set(policy.gate.mandatory if policy.concepts else ())
        for target in policy.merge_targets:
            families.update(attack.family for attack in policy.aimed_at(target))
        wanted = {svr_property(family, budget, self.suite) for family in families}
        return tuple(sorted(wanted - self.properties))


def attest(candidate: Candidate, policy: Policy, evidence: Evidence, signer: "Signer") -> Attested:
    """Sign what the gate found and put it beside the payload.

    Args:
        candidate: Packed folder, holding the policy's and the evidence's exact bytes.
        policy: That it was judged by.
        evidence: That it was judged on.
        signer: Who vouches.

    Raises:
        IntegrityError: The verdict is not PASS, or folder, policy and evidence are not of one run.
    """
    attested = Attested(candidate.directory, candidate.verdict, candidate.payload)
    written = DirectoryTree(candidate.directory)
    for name, content in ((POLICY_FILE, policy.source), (EVIDENCE_FILE, evidence.to_jsonl())):
        if written.read(name) != content:
            raise IntegrityError(
                f"{candidate.directory / name}: not what was judged; publish again"
            )
    for kind, statement in statements(candidate, policy, evidence).items():
        write_file(candidate.directory / bundle_name(kind), signer.sign(statement))
    return attested


def statements(candidate: Candidate, policy: Policy, evidence: Evidence) -> Mapping[str, bytes]:
    """The exact bytes of the three statements, by kind.

    Raises:
        IntegrityError: The evidence is of another policy or of other weights.
    """
    if evidence.policy != policy.digest:
        raise IntegrityError("the evidence is of another policy or other weights; publish again")
    digests = {entry.name: entry.digest for entry in candidate.payload.entries}
    parts = artefacts(evidence, candidate.verdict, policy)
    require_as_attacked(digests, parts)
    written = Policy.parse(policy.source, name=POLICY_FILE)  # sources as the publisher names them
    descriptors = {
        "policy": _descriptor(POLICY_FILE, policy.source),
        "report": _descriptor(EVIDENCE_FILE, evidence.to_jsonl()),
    }
    verdict = candidate.verdict
    predicates = {
        "resistance": resistance(evidence, verdict, written, files=descriptors, parts=parts),
        "test-result": test_result(verdict, descriptors["policy"]),
        "svr": svr(evidence, verdict, written, descriptors["policy"]),
    }
    about = subjects(digests)
    return {
        kind: Statement(PREDICATE_TYPES[kind], about, predicate).to_bytes()
        for kind, predicate in predicates.items()
    }


def subjects(digests: Mapping[str, str]) -> tuple[Subject, ...]:
    """The payload root as `model`, then every weights and configuration file.

    in-toto matches by digest alone, so tools that start from one real file find the claim too.

    Args:
        digests: SHA-256 of files by name; documentation and evidence among them do not count.
    """
    names = sorted(name for name in digests if classify(name) in PAYLOAD)
    root = root_digest(digests[name] for name in names)
    return (Subject(MODEL, root), *(Subject(name, digests[name]) for name in names))


def bundle_name(kind: str) -> str:
    """Where the bundle of a kind of attestation lies."""
    return f"{EVIDENCE_FOLDER}/{kind}.sigstore.json"


def read_claims(sources: Mapping[str, bytes], expected: Sequence[Subject]) -> Claims:
    """Read the three statements; only ever call it on bytes whose signatures were verified.

    Args:
        sources: Statement by kind; all three.
        expected: `subjects` of the files they must be about.

    Raises:
        IntegrityError: Another type, other subjects, a missing field, or claims that differ.
    """
    first = _read(_Resistance, "resistance", sources, expected)
    second = _read(_TestResult, "test-result", sources, expected)
    third = _read(_Svr, "svr", sources, expected)
    policies = {_sha256(first.policy), *map(_sha256, second.configuration)}
    if len(policies) != 1:
        raise IntegrityError("resistance and test-result name different policies")
    if (first.verdict == "PASS") != (second.result == "PASSED"):
        raise IntegrityError(f"resistance says {first.verdict}, test-result {second.result!a}")
    return Claims(
        result=Result[first.verdict],
        claim=first.claim,
        policy=policies.pop(),
        report=_sha256(first.report),
        suite=first.suite.version,
        finished=first.finished,
        valid_until=first.valid_until,
        properties=frozenset(third.properties),
        checks={check.name: Result[check.result] for check in first.checks},
        artefacts=tuple(map(_artefact, first.artefacts)),
    )


def _descriptor(name: str, content: bytes) -> Mapping[str, object]:
    return {"name": name, "digest": {"sha256": hashlib.sha256(content).hexdigest()}}


def _read(
    model: type[_Predicate], kind: str, sources: Mapping[str, bytes], expected: Sequence[Subject]
) -> _Predicate:
    statement = Statement.from_bytes(sources[kind])
    if statement.predicate_type != PREDICATE_TYPES[kind]:
        raise IntegrityError(f"{kind}: of another type, {statement.predicate_type!a}")
    if tuple(statement.subjects) != tuple(expected):
        raise IntegrityError(f"{kind}: about other weights or another configuration")
    try:
        return model.model_validate(statement.predicate)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise IntegrityError(f"{kind}: {where!a} is missing or not as it must be") from None


def _artefact(found: _Artefact) -> Artefact:
    folder = f"{found.folder}/" if found.folder else ""
    root = as_digest(found.digest.get("sha256"), "digest of an artefact")
    return Artefact(found.precision, folder, root)


def _sha256(named: _Named) -> str:
    return as_digest(named.digest.get("sha256"), "digest of the policy or the evidence")
