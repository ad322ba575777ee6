"""A judged, attested and signed release without any training, for tests of the consumer's side."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import model_signing
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from evidence_builder import example_policy, passing_evidence

from release_guard.attestation import EVIDENCE_FILE, POLICY_FILE, attest
from release_guard.evidence import Evidence
from release_guard.gate import gate
from release_guard.manifest import SIGNATURE, DirectoryTree, hash_directory
from release_guard.oms import sign
from release_guard.policy import Policy
from release_guard.release import Candidate, Release
from release_guard.signers import Signer
from release_guard.signers.key import Key
from release_guard.verify import Trust, Verification, verify

NOW = datetime(2026, 2, 1, tzinfo=UTC)  # after the example evidence was gathered
FILES = {
    "README.md": b"# A model\n",
    "LICENSE": b"Apache-2.0\n",
    "config.json": b'{"hidden_size": 8}\n',
    "model.safetensors": bytes(range(256)) * 8,
    "sub/vocab \xe4.txt": b"one\ntwo\n",
}


@dataclass(frozen=True)
class Judged:
    """What a release was made of, and who signs."""

    candidate: Candidate
    policy: Policy
    evidence: Evidence
    signer: Signer

    def release(self) -> Release:
        """Attest and sign."""
        attested = attest(self.candidate, self.policy, self.evidence, self.signer)
        return sign(attested, self.signer)


def released(home: Path, **changes: Any) -> Judged:
    """The folder `model` in one, judged as `judge` does and signed with the first key."""
    made = judge(home / "model", fixed_key(home, 1), **changes)
    made.release()
    return made


def judge(folder: Path, signer: Signer, *, policy: Policy | None = None, **changes: Any) -> Judged:
    """Pack a folder, each further precision in its own below, and judge it.

    `changes` replace fields of the evidence.
    """
    policy = policy or example_policy()
    for name, content in FILES.items():
        write(folder, name, content)
    root = hash_directory(folder).payload.root
    others: dict[str, str] = {}
    for precision in policy.precisions[1:]:
        write(folder, f"{precision}/config.json", f'{{"as": "{precision}"}}\n'.encode())
        write(folder, f"{precision}/model.safetensors", precision.encode() * 100)
        others[precision] = hash_directory(folder / precision).payload.root
    payload = hash_directory(folder).payload
    evidence = passing_evidence(policy, immunized=root, **changes)
    evidence = about(evidence, root, **others)
    write(folder, POLICY_FILE, policy.source)
    write(folder, EVIDENCE_FILE, evidence.to_jsonl())
    write(folder, ".release-guard/report.html", b"<p>report</p>")
    return Judged(Candidate(folder, gate(evidence, policy), payload), policy, evidence, signer)


def fixed_key(folder: Path, number: int = 1) -> Key:
    """A key that anybody can work out again, so that what it signs can be compared byte by byte."""
    private = ec.derive_private_key(number, ec.SECP256R1())
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path = write(folder, f"{number}.pem", pem)
    path.chmod(0o600)
    return Key(path=path, public=write(folder, f"{number}.pub", public))


def about(evidence: Evidence, root: str, **others: str) -> Evidence:
    """The same evidence as if these weights had been attacked, in fp32 and in other precisions."""
    roots = {**evidence.artefacts, "fp32": root, **others}
    records = [
        record.model_copy(update={"trial": record.trial.model_copy(update={"weights": roots[at]})})
        if record.trial.arm == "defended" and (at := record.trial.precision) in roots
        else record
        for record in evidence.records
    ]
    changes = {"records": tuple(records), "artefacts": roots, "immunized": root}
    return evidence.model_copy(update=changes)


def write(folder: Path, name: str, content: bytes) -> Path:
    """Write one file of a release."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def check(folder: Path, signer: Signer, policy: str | None = None, **options: Any) -> Verification:
    """Verify a folder a month after it was made."""
    trust = Trust(signer, policy)
    return verify(DirectoryTree(folder), trust, **{"now": NOW, **options})


def theirs_accepts(folder: Path, key: Key) -> bool:
    """What the reference implementation says of a folder and its `model.sig`."""
    config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key.public)
    try:
        config.verify(folder, folder / SIGNATURE)
    except (ValueError, InvalidSignature):
        return False
    return True
