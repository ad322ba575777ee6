"""In-toto statements in DSSE envelopes in Sigstore bundles: exact bytes out, strict reading in.

Formats: in-toto Statement v1, DSSE v1, Sigstore bundle v0.3 as JSON. Nothing here knows a key.
"""

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from release_guard.errors import IntegrityError
from release_guard.strict_json import canonical_json, loads

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
MAX_BUNDLE = 16 << 20  # bytes; ten thousand files make about two million

_HEX = frozenset("0123456789abcdef")
_DIGEST_LENGTH = 64
_BUNDLE_KEYS = frozenset({"mediaType", "verificationMaterial", "dsseEnvelope"})
_MATERIAL_KEYS = frozenset(
    {"publicKey", "certificate", "x509CertificateChain", "tlogEntries", "timestampVerificationData"}
)
_ENVELOPE_KEYS = frozenset({"payload", "payloadType", "signatures"})
_SIGNATURE_KEYS = frozenset({"sig", "keyid"})


@dataclass(frozen=True, order=True)
class Subject:
    """What a statement is about: a name and a SHA-256 in lowercase hex."""

    name: str
    digest: str


@dataclass(frozen=True)
class Statement:
    """An in-toto Statement v1.

    Attributes:
        predicate_type: URI that says what `predicate` means.
        subjects: What it is about, in the order written.
        predicate: The claim itself, JSON values only.
    """

    predicate_type: str
    subjects: Sequence[Subject]
    predicate: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal statements give equal bytes."""
        return canonical_json(
            {
                "_type": STATEMENT_TYPE,
                "subject": [
                    {"name": subject.name, "digest": {"sha256": subject.digest}}
                    for subject in self.subjects
                ],
                "predicateType": self.predicate_type,
                "predicate": self.predicate,
            }
        )

    @classmethod
    def from_bytes(cls, source: bytes) -> "Statement":
        """Read a statement; fields unknown to in-toto are ignored, as its rules ask.

        Raises:
            IntegrityError: Not strict JSON, another type, or a shape that is not a statement's.
        """
        value = as_object(read_json(source, "statement"), "statement")
        if value.get("_type") != STATEMENT_TYPE:
            raise IntegrityError(f"statement: `_type` is not {STATEMENT_TYPE}")
        predicate_type = as_text(value.get("predicateType"), "statement: predicateType")
        subjects = tuple(_subjects(value.get("subject")))
        predicate = as_object(value.get("predicate"), "statement: predicate")
        return cls(predicate_type, subjects, predicate)


@dataclass(frozen=True)
class Envelope:
    """A signed payload, not yet verified.

    Attributes:
        payload: The exact bytes that were signed.
        signature: Raw signature over `pae(payload)`.
        material: What the bundle says of the signer; a hint, never to be trusted by itself.
    """

    payload: bytes
    signature: bytes
    material: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """Sigstore bundle v0.3 as canonical JSON."""
        signatures = [{"sig": _encode(self.signature), "keyid": ""}]
        return canonical_json(
            {
                "mediaType": MEDIA_TYPE,
                "verificationMaterial": self.material,
                "dsseEnvelope": {
                    "payload": _encode(self.payload),
                    "payloadType": PAYLOAD_TYPE,
                    "signatures": signatures,
                },
            }
        )

    @classmethod
    def from_bytes(cls, bundle: bytes) -> "Envelope":
        """Read a bundle; nothing is verified yet.

        Raises:
            IntegrityError: Another media type, more than one signature, unknown or doubled fields.
        """
        value = _closed(read_json(bundle, "bundle"), _BUNDLE_KEYS, "bundle")
        if value.get("mediaType") != MEDIA_TYPE:
            raise IntegrityError(f"bundle: `mediaType` is not {MEDIA_TYPE}; no other is read")
        material = _closed(
            value.get("verificationMaterial"), _MATERIAL_KEYS, "bundle: verificationMaterial"
        )
        envelope = _closed(value.get("dsseEnvelope"), _ENVELOPE_KEYS, "bundle: dsseEnvelope")
        if envelope.get("payloadType") != PAYLOAD_TYPE:
            raise IntegrityError(f"bundle: `payloadType` is not {PAYLOAD_TYPE}")
        signature = _only_signature(envelope.get("signatures"))
        return cls(_decode(envelope.get("payload"), "payload"), signature, material)


def pae(payload: bytes) -> bytes:
    """DSSE pre-authentication encoding: what is really signed; lengths are decimal, in bytes."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def read_json(source: bytes, what: str) -> Any:
    """Read JSON that means the same to everyone: UTF-8, no doubled key, finite numbers, a size cap.

    Raises:
        IntegrityError: Anything else; `what` begins the message.
    """
    if len(source) > MAX_BUNDLE:
        raise IntegrityError(f"{what}: larger than {MAX_BUNDLE >> 20} MiB; not read")
    try:
        return loads(source)
    except ValueError as error:
        raise IntegrityError(f"{what}: not valid JSON ({error})") from None


def as_object(value: Any, what: str) -> Mapping[str, Any]:
    """Require a JSON object."""
    if not isinstance(value, dict):
        raise IntegrityError(f"{what}: not an object")
    return value


def as_text(value: Any, what: str) -> str:
    """Require a non-empty string."""
    if not isinstance(value, str) or not value:
        raise IntegrityError(f"{what}: not a text")
    return value


def as_digest(value: Any, what: str) -> str:
    """Require a SHA-256 in lowercase hex."""
    text = as_text(value, what)
    if len(text) != _DIGEST_LENGTH or not _HEX.issuperset(text):
        raise IntegrityError(f"{what}: not a SHA-256 in lowercase hex")
    return text


def _subjects(value: Any) -> Iterable[Subject]:
    if not isinstance(value, list) or not value:
        raise IntegrityError("statement: no subject")
    for item in value:
        subject = as_object(item, "statement: subject")
        name = as_text(subject.get("name"), "statement: subject name")
        digests = as_object(subject.get("digest"), f"statement: subject {name!r}: digest")
        yield Subject(name, as_digest(digests.get("sha256"), f"statement: subject {name!r}"))


def _closed(value: Any, known: frozenset[str], what: str) -> Mapping[str, Any]:
    found = as_object(value, what)
    if unknown := sorted(set(found) - known):
        raise IntegrityError(f"{what}: unknown field {unknown[0]!r}")
    return found


def _only_signature(value: Any) -> bytes:
    if not isinstance(value, list) or len(value) != 1:
        raise IntegrityError("bundle: needs exactly one signature")
    signature = _closed(value[0], _SIGNATURE_KEYS, "bundle: signature")
    if signature.get("keyid") not in ("", None):
        raise IntegrityError("bundle: `keyid` must be empty")
    return _decode(signature.get("sig"), "sig")


def _encode(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _decode(value: Any, what: str) -> bytes:
    text = as_text(value, f"bundle: {what}")
    try:
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        decoded = b""
    if _encode(decoded) != text:  # also refuses unused bits that no reader looks at
        raise IntegrityError(f"bundle: {what}: not base64")
    return decoded
