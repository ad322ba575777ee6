"""Public keys, as whoever verifies needs them: ECDSA on P-256, P-384 or P-521, in PEM form."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from release_guard.dsse import Envelope, pae
from release_guard.errors import IntegrityError, ReleaseGuardError

_HASHES: dict[str, hashes.HashAlgorithm] = {  # by curve, as OMS v1.0 pairs them
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
_LONGEST = 64 << 10  # bytes that are read of a key's file; what is longer is none


@dataclass(frozen=True)
class PublicKey:
    """Verifies what one key signed; a `Voucher` that loads in a moment."""

    key: ec.EllipticCurvePublicKey

    @property
    def identity(self) -> str:
        """Its fingerprint."""
        return fingerprint(self.key)

    def verify(self, bundle: bytes) -> bytes:
        """The exact bytes that the key signed; else `IntegrityError`."""
        return verified(bundle, self.key)


def fingerprint(public: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the SubjectPublicKeyInfo PEM in hex: the `hint` of an OMS bundle."""
    return hashlib.sha256(public_pem(public)).hexdigest()


def verified(bundle: bytes, public: ec.EllipticCurvePublicKey) -> bytes:
    """The exact bytes that this key signed.

    Raises:
        IntegrityError: Malformed, signed by another key, or a signature that does not fit.
    """
    envelope = Envelope.from_bytes(bundle)
    hint = _hint(envelope)
    if hint is not None and hint != fingerprint(public):
        raise IntegrityError(
            f"signed by the key {hint[:16]!a}..., not by {fingerprint(public)[:16]}..."
        )
    try:
        algorithm = ec.ECDSA(_HASHES[public.curve.name])
        public.verify(envelope.signature, pae(envelope.payload), algorithm)
    except InvalidSignature:
        raise IntegrityError(
            f"the signature does not fit the key {fingerprint(public)[:16]}..."
        ) from None
    return envelope.payload


def load_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Read a public key.

    Raises:
        ReleaseGuardError: No file, not PEM, a private key, or not P-256, P-384 or P-521.
    """
    return parse_public_key(read_key(path), where=str(path))


def parse_public_key(pem: bytes, *, where: str) -> ec.EllipticCurvePublicKey:
    """The public key that a PEM holds.

    Args:
        pem: What was read.
        where: It was read from, to begin messages with.

    Raises:
        ReleaseGuardError: Not PEM, a private key, or not P-256, P-384 or P-521.
    """
    if b"PRIVATE KEY-----" in pem:
        raise ReleaseGuardError(f"{where}: a private key; give the public one (key.pub)")
    try:
        public: Any = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ReleaseGuardError(f"{where}: not a public key in PEM form") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name not in _HASHES:
        raise ReleaseGuardError(f"{where}: not an EC key on P-256, P-384 or P-521")
    return public


def public_pem(public: ec.EllipticCurvePublicKey) -> bytes:
    """The key as PEM, SubjectPublicKeyInfo: what its fingerprint is taken of."""
    return public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def read_key(path: Path) -> bytes:
    """What a key's file holds, as far as it could be a key."""
    try:
        with path.open("rb") as file:
            return file.read(_LONGEST)
    except (OSError, ValueError) as error:  # a path with a NUL is no path
        reason = getattr(error, "strerror", None) or error
        raise ReleaseGuardError(f"{path}: cannot be read ({reason})") from None


def _hint(envelope: Envelope) -> str | None:
    """The fingerprint a bundle names; None where an older tool wrote the key itself instead."""
    if "certificate" in envelope.material:
        raise IntegrityError(
            "bundle: signed without a key, by a certificate; verify it by identity and issuer"
        )
    if envelope.material.get("tlogEntries") not in (None, []):
        raise IntegrityError("bundle: signed through a log; a key cannot verify it")
    if unknown := sorted(set(envelope.material) - {"publicKey", "tlogEntries"}):
        raise IntegrityError(f"bundle: not signed by a key alone (it has a {unknown[0]!r})")
    key = envelope.material.get("publicKey")
    if not isinstance(key, dict) or not ({"hint", "rawBytes"} & set(key)):
        raise IntegrityError("bundle: not signed by a key (no `publicKey`)")
    hint = key.get("hint")
    if hint is not None and not isinstance(hint, str):
        raise IntegrityError("bundle: `hint` is not a text")
    return hint or None
