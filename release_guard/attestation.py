"""Three signed claims about the payload: resistance, test-result, SVR. Built from evidence alone.

Formats: in-toto test-result v0.1, Simple Verification Result v0.2, and our own resistance v0.1.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from release_guard.dsse import Statement, Subject, as_digest
from release_guard.errors import IntegrityError
from release_guard.layout import Artefact, artefacts, require_as_attacked
from release_guard.manifest import (
    EVIDENCE_FOLDER,
    PAYLOAD,
    DirectoryTree,
    classify,
    root_digest,
    write_file,
)
from release_guard.release import Attested, Candidate, Result

if TYPE_CHECKING:
    from release_guard.evidence import Evidence
    from release_guard.policy import Policy
    from release_guard.signers import Signer

POLICY_FILE = f"{EVIDENCE_FOLDER}/policy.toml"
EVIDENCE_FILE = f"{EVIDENCE_FOLDER}/evidence.jsonl"
KEY_FILE = f"{EVIDENCE_FOLDER}/key.pub"  # of who signed, for whoever knows its fingerprint
MODEL = "model"  # subject that stands for the payload as a whole
PREDICATE_TYPES: Mapping[str, str] = {
    "resistance": "https://release-guard.dev/attestations/resistance/v0.1",
    "test-result": "https://in-toto.io/attestation/test-result/v0.1",
    "svr": "https://in-toto.io/attestation/svr/v0.2",
}
"""By file name; the first is this project's own."""


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

    def lacking(self, policy: "Policy") -> tuple[str, ...]:
        """Properties that must have been earned, and have not.

        Of the mandatory attacks where there is a concept, and of all that merge targets list.
        """
        from release_guard.predicates import svr_property  # noqa: PLC0415  the gate's side

        budget = policy.red_team.budget
        families = set(policy.gate.mandatory if policy.concepts else ())
        for target in policy.merge_targets:
            families.update(attack.family for attack in policy.aimed_at(target))
        wanted = {svr_property(family, budget, self.suite) for family in families}
        return tuple(sorted(wanted - self.properties))


def attest(
    candidate: Candidate, policy: "Policy", evidence: "Evidence", signer: "Signer"
) -> Attested:
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
    carried = candidate.directory / KEY_FILE
    carried.unlink(missing_ok=True)  # of another signer, if this one has no key
    if (pem := signer.public_key) is not None:
        write_file(carried, pem)
    return attested


def statements(candidate: Candidate, policy: "Policy", evidence: "Evidence") -> Mapping[str, bytes]:
    """The exact bytes of the three statements, by kind.

    Raises:
        IntegrityError: The evidence is of another policy or of other weights.
    """
    from release_guard.policy import Policy  # noqa: PLC0415  reading needs none of this
    from release_guard.predicates import resistance, svr, test_result  # noqa: PLC0415

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
    first, second, third = (
        _predicate(kind, sources, expected) for kind in ("resistance", "test-result", "svr")
    )
    policies = {first["policy"].sha256, *(each.sha256 for each in second["configuration"].items)}
    if len(policies) != 1:
        raise IntegrityError("resistance and test-result name different policies")
    verdict, passed = first["verdict"].result, second["result"].text
    if (verdict is Result.PASS) != (passed == "PASSED"):
        raise IntegrityError(f"resistance says {verdict.name}, test-result {passed!a}")
    return Claims(
        result=verdict,
        claim=first["claim"].text,
        policy=policies.pop(),
        report=first["report"].sha256,
        suite=first["suite"]["version"].text,
        finished=first["finishedAt"].moment,
        valid_until=first["validUntil"].moment,
        properties=frozenset(each.text for each in third["properties"].items),
        checks={each["name"].text: each["result"].result for each in first["checks"].items},
        artefacts=tuple(map(_artefact, first["artefacts"].items)) if "artefacts" in first else (),
    )


def _descriptor(name: str, content: bytes) -> Mapping[str, object]:
    return {"name": name, "digest": {"sha256": hashlib.sha256(content).hexdigest()}}


@dataclass(frozen=True)
class _Field:
    """A value of a predicate, and where it stands. Fields nobody asks for are ignored: in-toto."""

    kind: str
    value: Any
    where: str = ""

    def __getitem__(self, name: str) -> "_Field":
        where = f"{self.where}.{name}" if self.where else name
        if not isinstance(self.value, dict) or name not in self.value:
            _Field(self.kind, None, where).refuse()
        return _Field(self.kind, self.value[name], where)

    def __contains__(self, name: str) -> bool:
        return isinstance(self.value, dict) and name in self.value

    @property
    def items(self) -> tuple["_Field", ...]:
        if not isinstance(self.value, list):
            self.refuse()
        pairs = enumerate(self.value)
        return tuple(_Field(self.kind, each, f"{self.where}.{place}") for place, each in pairs)

    @property
    def text(self) -> str:
        return self.value if isinstance(self.value, str) else self.refuse()

    @property
    def result(self) -> Result:
        return Result[self.text] if self.text in Result.__members__ else self.refuse()

    @property
    def moment(self) -> datetime:
        try:
            found = datetime.fromisoformat(self.text)
        except ValueError:
            self.refuse()
        return found if found.utcoffset() is not None else self.refuse()

    @property
    def sha256(self) -> str:
        """Digest of what a resource descriptor names."""
        return as_digest(self["digest"]["sha256"].value, f"{self.kind}: {self.where}: digest")

    def refuse(self) -> NoReturn:
        raise IntegrityError(f"{self.kind}: {self.where!a} is missing or not as it must be")


def _predicate(kind: str, sources: Mapping[str, bytes], expected: Sequence[Subject]) -> _Field:
    statement = Statement.from_bytes(sources[kind])
    if statement.predicate_type != PREDICATE_TYPES[kind]:
        raise IntegrityError(f"{kind}: of another type, {statement.predicate_type!a}")
    if tuple(statement.subjects) != tuple(expected):
        raise IntegrityError(f"{kind}: about other weights or another configuration")
    return _Field(kind, statement.predicate)


def _artefact(found: _Field) -> Artefact:
    folder = found["folder"].text
    return Artefact(found["precision"].text, f"{folder}/" if folder else "", found.sha256)
