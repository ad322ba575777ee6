"""Releases that somebody tampered with, and what each has to be found to be.

Every case changes a release in its folder; some sign it again, as a publisher who lies could. Our
verifier and the independent one must agree on each: neither may call it intact.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evidence_builder import refused_evidence
from judged import NOW, Judged, about, write

from release_guard.attestation import (
    EVIDENCE_FILE,
    KEY_FILE,
    POLICY_FILE,
    bundle_name,
    statements,
)
from release_guard.gate import gate
from release_guard.manifest import SIGNATURE, hash_directory
from release_guard.oms import to_statement
from release_guard.release import Candidate
from release_guard.signers.key import Key
from release_guard.verify import State

RESISTANCE, TEST_RESULT, SVR = (bundle_name(kind) for kind in ("resistance", "test-result", "svr"))
Json = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """A release of two precisions to tamper with, and a signer that nobody trusts."""

    folder: Path
    judged: Judged
    stranger: Key

    def flip(self, name: str) -> None:
        content = bytearray((self.folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        write(self.folder, name, bytes(content))

    def rename(self, old: str, new: str) -> None:
        path = self.folder / new
        path.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / old).rename(path)

    def exchange(self, one: str, other: str) -> None:
        """Two files in each other's place."""
        first, second = (self.folder / one).read_bytes(), (self.folder / other).read_bytes()
        write(self.folder, one, second)
        write(self.folder, other, first)

    def seal(self, signer: Key | None = None, change: Callable[[Json], object] = dict) -> None:
        """Sign whatever lies there; `change` edits what is signed first."""
        (self.folder / SIGNATURE).unlink(missing_ok=True)
        found = json.loads(to_statement(hash_directory(self.folder), name="model"))
        change(found)
        signer = signer or self.judged.signer
        write(self.folder, SIGNATURE, signer.sign(json.dumps(found, sort_keys=True).encode()))

    def state(self, kind: str, change: Callable[[Json], object], signer: Key | None = None) -> None:
        """Sign another statement in the place of one, and the whole again."""
        judged = self.judged
        found = json.loads(statements(judged.candidate, judged.policy, judged.evidence)[kind])
        change(found)
        signer = signer or judged.signer
        write(self.folder, bundle_name(kind), signer.sign(json.dumps(found).encode()))
        self.seal()

    def replace_proof(self, name: str, kinds: Mapping[str, str], content: bytes) -> None:
        """Another policy or other evidence, named by the statements (kind: field) and signed."""
        write(self.folder, name, content)
        digest = hash_directory(self.folder).get(name)
        assert digest is not None

        def named(field: str) -> Callable[[Json], None]:
            def change(found: Json) -> None:
                described = found["predicate"][field]
                for each in described if isinstance(described, list) else [described]:
                    each["digest"]["sha256"] = digest.digest

            return change

        for kind, field in kinds.items():
            self.state(kind, named(field))

    def edit_header(self, change: Callable[[Json], object]) -> None:
        """Evidence with another header, attested and signed as if it were the run's."""
        first, _, rest = (self.folder / EVIDENCE_FILE).read_bytes().partition(b"\n")
        header = json.loads(first)
        change(header["header"])
        line = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        self.replace_proof(EVIDENCE_FILE, {"resistance": "report"}, line + b"\n" + rest)

    def judged_otherwise(self, *, honest: bool) -> None:
        """Evidence of a model that broke, with the verdict it deserves or with the old one."""
        judged = self.judged
        roots = dict(judged.evidence.artefacts)
        evidence = about(refused_evidence(judged.policy), roots.pop("fp32"), **roots)
        verdict = gate(evidence, judged.policy) if honest else judged.candidate.verdict
        write(self.folder, EVIDENCE_FILE, evidence.to_jsonl())
        claim = Candidate(self.folder, verdict, judged.candidate.payload)
        for kind, source in statements(claim, judged.policy, evidence).items():
            write(self.folder, bundle_name(kind), judged.signer.sign(source))
        self.seal()


@dataclass(frozen=True)
class Case:
    """One way to tamper.

    Attributes:
        change: What is done to the release.
        state: The gravest thing that our verifier must find.
        by_gate: Only judging the evidence again shows it, which the independent one does not do.
        policy: SHA-256 of the policy that the consumer requires.
        now: When it is verified.
    """

    change: Callable[[Made], object]
    state: State
    by_gate: bool = False
    policy: str | None = None
    now: datetime = NOW


def _predicate(**fields: Any) -> Callable[[Json], None]:
    return lambda found: found["predicate"].update(fields)


def _serialization(**fields: Any) -> Callable[[Json], None]:
    return lambda found: found["predicate"]["serialization"].update(fields)


def _artefact(place: int, **fields: Any) -> Callable[[Json], None]:
    return lambda found: found["predicate"]["artefacts"][place].update(fields)


def _double(found: Json) -> None:
    resources = found["predicate"]["resources"]
    resources.insert(0, resources[0])


def _resource(place: int, **fields: Any) -> Callable[[Json], None]:
    return lambda found: found["predicate"]["resources"][place].update(fields)


def _older_suite(found: Json) -> None:
    found["predicate"]["suite"]["version"] = "1.9"


def _hidden(made: Made) -> None:
    """The signer says to ignore a folder; what lies there is still a file too many."""
    made.seal(change=_serialization(ignore_paths=["hidden"]))
    write(made.folder, "hidden/model.bin", b"x")


def _exchanged_and_signed(made: Made) -> None:
    made.exchange("model.safetensors", "nf4/model.safetensors")
    made.seal()


def _exchanged_in_the_claim(made: Made) -> None:
    def change(found: Json) -> None:
        one, other = found["predicate"]["artefacts"]
        one["folder"], other["folder"] = other["folder"], one["folder"]

    made.state("resistance", change)


def _fewer_subjects(found: Json) -> None:
    found["subject"].pop()


def _reformatted(made: Made, change: Callable[[Json], object]) -> None:
    """The bundle's own fields, which nobody signs."""
    path = made.folder / SIGNATURE
    found = json.loads(path.read_bytes())
    change(found)
    path.write_text(json.dumps(found, indent=1))


def _doubled_key(made: Made) -> None:
    path = made.folder / SIGNATURE
    path.write_bytes(b'{"mediaType":"x",' + path.read_bytes()[1:])


def _other_evidence(made: Made) -> None:
    """Of another run of the same model: signed, but not what was attested."""
    write(made.folder, EVIDENCE_FILE, (made.folder / EVIDENCE_FILE).read_bytes() + b"\n")
    made.seal()


def _other_policy(made: Made) -> None:
    lax = (made.folder / POLICY_FILE).read_bytes().replace(b"kappa = 5.0", b"kappa = 2.0")
    write(made.folder, POLICY_FILE, lax)
    made.seal()


def _lax_policy_attested(made: Made) -> None:
    lax = (made.folder / POLICY_FILE).read_bytes().replace(b"kappa = 5.0", b"kappa = 2.0")
    fields = {"resistance": "policy", "test-result": "configuration"}
    made.replace_proof(POLICY_FILE, fields, lax)


def _added_and_signed(made: Made) -> None:
    write(made.folder, "nf4/modeling.py", b"import os")
    made.seal()


W, C, D = State.WEIGHTS_CHANGED, State.CONFIG_CHANGED, State.DOCUMENTATION_CHANGED
MISSING, INVALID, EXPIRED = (
    State.EVIDENCE_MISSING, State.EVIDENCE_INVALID, State.EVIDENCE_EXPIRED,
)  # fmt: skip
_KINDS = {
    "model.safetensors": W, "nf4/model.safetensors": W, "config.json": C, "nf4/config.json": C,
    "sub/vocab \xe4.txt": C, "README.md": D, "LICENSE": D, POLICY_FILE: INVALID,
    EVIDENCE_FILE: INVALID, KEY_FILE: INVALID, ".release-guard/report.html": INVALID,
    RESISTANCE: INVALID, TEST_RESULT: INVALID, SVR: INVALID, SIGNATURE: State.WRONG_SIGNER,
}  # fmt: skip
_GONE = {INVALID: MISSING, State.WRONG_SIGNER: State.UNSIGNED}
_ADDED = {
    "more.safetensors": W, "nf4/more.bin": W, "sub/modeling.py": C, "key.pub": C, "NOTICE": D,
    "sub/.gitignore": C, "sub/.cache/huggingface/x": C, ".cache/other": C,
    ".release-guard/more.json": INVALID, ".release-guard/x.sigstore.json": INVALID,
}  # fmt: skip

CASES: Mapping[str, Case] = {
    **{
        f"flipped: {name}": Case(lambda made, name=name: made.flip(name), state)
        for name, state in _KINDS.items()
    },
    **{
        f"missing: {name}": Case(
            lambda made, name=name: (made.folder / name).unlink(), _GONE.get(state, state)
        )
        for name, state in _KINDS.items()
    },
    **{
        f"added: {name}": Case(lambda made, name=name: write(made.folder, name, b"x"), state)
        for name, state in _ADDED.items()
    },
    "emptied": Case(lambda made: write(made.folder, "model.safetensors", b""), W),
    "renamed": Case(lambda made: made.rename("model.safetensors", "model-1.safetensors"), W),
    "renamed to another class": Case(lambda made: made.rename("config.json", "config.md"), C),
    "renamed to another case": Case(lambda made: made.rename("config.json", "Config.json"), C),
    "moved": Case(lambda made: made.rename("nf4/config.json", "sub/config.json"), C),
    "precisions exchanged": Case(
        lambda made: made.exchange("model.safetensors", "nf4/model.safetensors"), W
    ),
    "precisions exchanged and signed": Case(_exchanged_and_signed, INVALID),
    "precisions exchanged in the claim": Case(_exchanged_in_the_claim, INVALID),
    "a precision left out": Case(
        lambda made: made.state("resistance", lambda found: found["predicate"]["artefacts"].pop()),
        INVALID,
    ),
    "a precision doubled": Case(
        lambda made: made.state("resistance", _artefact(1, precision="fp32")), INVALID
    ),
    "artefacts of no folder": Case(
        lambda made: made.state("resistance", _artefact(1, folder="int8")), INVALID
    ),
    "artefacts left out": Case(
        lambda made: made.state("resistance", _predicate(artefacts=[])), INVALID
    ),
    "a file added and signed": Case(_added_and_signed, INVALID),
    "another signer's model.sig": Case(lambda made: made.seal(made.stranger), State.WRONG_SIGNER),
    "another signer's attestation": Case(
        lambda made: made.state("svr", dict, made.stranger), INVALID
    ),
    "an attestation as model.sig": Case(lambda made: made.exchange(SVR, SIGNATURE), State.UNSIGNED),
    "attestations exchanged": Case(
        lambda made: (made.exchange(SVR, TEST_RESULT), made.seal()), INVALID
    ),
    "policy swapped": Case(_other_policy, INVALID),
    "policy swapped and attested": Case(_lax_policy_attested, INVALID),
    "evidence swapped": Case(_other_evidence, INVALID),
    "another policy than required": Case(lambda _: None, INVALID, policy="0" * 64),
    "expired": Case(lambda _: None, EXPIRED, now=datetime(2027, 1, 1, tzinfo=UTC)),
    "expiry without a zone": Case(
        lambda made: made.state("resistance", _predicate(validUntil="2099-01-01T00:00:00")), INVALID
    ),
    "older suite": Case(lambda made: made.state("resistance", _older_suite), INVALID),
    "not passed": Case(lambda made: made.judged_otherwise(honest=True), State.NOT_PASSED),
    "passed in spite of the evidence": Case(
        lambda made: made.judged_otherwise(honest=False), INVALID, by_gate=True
    ),
    "verdicts differ": Case(
        lambda made: made.state("test-result", _predicate(result="FAILED")), INVALID
    ),
    "passed with warnings": Case(
        lambda made: made.state("test-result", _predicate(result="WARNED")), INVALID
    ),
    "no property": Case(lambda made: made.state("svr", _predicate(properties=[])), INVALID),
    "properties in one text": Case(
        lambda made: made.state("svr", _predicate(properties="ALL")), INVALID
    ),
    "a property too few": Case(
        lambda made: made.state("svr", lambda found: found["predicate"]["properties"].pop(0)),
        INVALID,
        by_gate=True,
    ),
    "a subject too few": Case(lambda made: made.state("svr", _fewer_subjects), INVALID),
    "another predicate type": Case(
        lambda made: made.state("svr", lambda found: found.update(predicateType="https://x")),
        INVALID,
    ),
    "another statement type": Case(
        lambda made: made.state("svr", lambda found: found.update(_type="https://x")), INVALID
    ),
    "evidence of another policy": Case(
        lambda made: made.edit_header(lambda found: found.update(policy="0" * 64)), INVALID
    ),
    "evidence of other weights": Case(
        lambda made: made.edit_header(lambda found: found.update(immunized="0" * 64)), INVALID
    ),
    "evidence of other rounded weights": Case(
        lambda made: made.edit_header(lambda found: found["artefacts"].update(nf4="0" * 64)),
        INVALID,
    ),
    "evidence of an older schema": Case(
        lambda made: made.edit_header(lambda found: found.update(schema_version=2, artefacts={})),
        INVALID,
    ),
    "evidence of a schema to come": Case(
        lambda made: made.edit_header(lambda found: found.update(schema_version=4)), INVALID
    ),
    "a root of other files": Case(
        lambda made: made.seal(
            change=lambda found: found["subject"][0]["digest"].update(sha256="0" * 64)
        ),
        State.UNSIGNED,
    ),
    "no root": Case(
        lambda made: made.seal(change=lambda found: found.update(subject=[])), State.UNSIGNED
    ),
    "two roots": Case(
        lambda made: made.seal(change=lambda found: found.update(subject=found["subject"] * 2)),
        State.UNSIGNED,
    ),
    "doubled names": Case(lambda made: made.seal(change=_double), State.UNSIGNED),
    "not sorted": Case(
        lambda made: made.seal(change=lambda found: found["predicate"]["resources"].reverse()),
        State.UNSIGNED,
    ),
    "a name that leads away": Case(
        lambda made: made.seal(change=_resource(0, name="../x")), State.UNSIGNED
    ),
    "a name with a backslash": Case(
        lambda made: made.seal(change=_resource(-1, name="sub\\x")), State.UNSIGNED
    ),
    "another algorithm": Case(
        lambda made: made.seal(change=_resource(0, algorithm="blake3")), State.UNSIGNED
    ),
    "another method": Case(
        lambda made: made.seal(change=_serialization(method="shards")), State.UNSIGNED
    ),
    "an unknown field that is signed": Case(
        lambda made: made.seal(change=_predicate(more=1)), State.UNSIGNED
    ),
    "foreign ignore entries": Case(_hidden, W),
    "a field nobody signed": Case(
        lambda made: _reformatted(made, lambda found: found.update(more=1)), State.WRONG_SIGNER
    ),
    "another media type": Case(
        lambda made: _reformatted(made, lambda found: found.update(mediaType="x")),
        State.WRONG_SIGNER,
    ),
    "no signature": Case(
        lambda made: _reformatted(made, lambda found: found["dsseEnvelope"].update(signatures=[])),
        State.WRONG_SIGNER,
    ),
    "two signatures": Case(
        lambda made: _reformatted(
            made,
            lambda found: found["dsseEnvelope"].update(
                signatures=found["dsseEnvelope"]["signatures"] * 2
            ),
        ),
        State.WRONG_SIGNER,
    ),
    "a certificate beside the key": Case(
        lambda made: _reformatted(
            made, lambda found: found["verificationMaterial"].update(certificate={})
        ),
        State.WRONG_SIGNER,
    ),
    "a key in the bundle twice": Case(_doubled_key, State.WRONG_SIGNER),
}


def _own_key_fields(found: Json) -> None:
    found["verificationMaterial"] = {"publicKey": {"rawBytes": "YQ==", "keyDetails": "X"}}


def _without_keyid(found: Json) -> None:
    del found["dsseEnvelope"]["signatures"][0]["keyid"]


HARMLESS: Mapping[str, Callable[[Made], object]] = {
    "nothing": lambda _: None,
    "git's files": lambda made: [
        write(made.folder, name, b"x")
        for name in (".git/config", ".gitattributes", ".github/x.yml", ".gitignore")
    ],
    "a worktree's .git": lambda made: write(made.folder, ".git", b"gitdir: /elsewhere\n"),
    "what a download leaves": lambda made: write(made.folder, ".cache/huggingface/x", b"x"),
    "an empty folder": lambda made: (made.folder / "empty").mkdir(),
    "the bundle written otherwise": lambda made: _reformatted(made, dict),
    "a bundle of another tool": lambda made: _reformatted(made, _own_key_fields),
    "no keyid": lambda made: _reformatted(made, _without_keyid),
    "more in a statement": lambda made: made.state("resistance", _predicate(more={"of": "it"})),
    "another attestation": lambda made: (
        write(made.folder, ".release-guard/sbom.sigstore.json", b"{}"),
        made.seal(),
    ),
    "nothing ignored": lambda made: made.seal(
        change=lambda found: found["predicate"]["serialization"].pop("ignore_paths")
    ),
}
