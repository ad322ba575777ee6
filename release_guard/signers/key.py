"""Sign with a key of one's own: ECDSA on P-256, the key in a PEM file or in the environment."""

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from release_guard.dsse import Envelope, pae
from release_guard.errors import IntegrityError, ReleaseGuardError
from release_guard.signers import Signer

KEY_VARIABLE = "RELEASE_GUARD_SIGNING_KEY"
PASSWORD_VARIABLE = "RELEASE_GUARD_KEY_PASSWORD"  # noqa: S105  a name, not a password

_HASHES: dict[str, hashes.HashAlgorithm] = {  # by curve, as OMS v1.0 pairs them
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Key(Signer):
    """A P-256 private key signs; its public half, also on P-384 or P-521, verifies.

    The password of an encrypted key comes from `RELEASE_GUARD_KEY_PASSWORD`.
    """

    path: Path | None = Field(
        None, description="Private key (PEM); none: RELEASE_GUARD_SIGNING_KEY, a path or the PEM."
    )
    public: Path | None = Field(
        None, description="Public key (PEM); none: that of the private key."
    )

    @property
    def identity(self) -> str:
        """Fingerprint: SHA-256 of the public key's PEM, in hex."""
        return fingerprint(self._public_key())

    def sign(self, statement: bytes) -> bytes:
        private = self._private_key()
        hint = fingerprint(private.public_key())
        if self.public is not None and hint != fingerprint(load_public_key(self.public)):
            raise ReleaseGuardError(
                f"{self.public}: not the public half of the signing key; give the two that belong "
                "together"
            )
        material = {"publicKey": {"hint": hint}, "tlogEntries": []}
        return Envelope(statement, _signature(private, pae(statement)), material).to_bytes()

    def verify(self, bundle: bytes) -> bytes:
        public = self._public_key()
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

    def _public_key(self) -> ec.EllipticCurvePublicKey:
        if self.public is not None:
            return load_public_key(self.public)
        return self._private_key().public_key()

    def _private_key(self) -> ec.EllipticCurvePrivateKey:
        if self.path is not None:
            return _load_private_key(_read_private(self.path), str(self.path))
        given = os.environ.get(KEY_VARIABLE)
        if not given:
            raise ReleaseGuardError(
                f"no signing key; set {KEY_VARIABLE} to one (`release-guard keygen` makes it)"
            )
        if "-----BEGIN" in given:
            return _load_private_key(given.encode(), KEY_VARIABLE)
        return _load_private_key(_read_private(Path(given)), given)


def generate_key(directory: Path, password: str | None = None) -> tuple[Path, Path]:
    """Make a P-256 key pair: `key.pem` (PKCS8, mode 0600) and `key.pub`.

    Args:
        directory: Where; made if it is not there.
        password: Encrypts the private key; none: it lies there in clear.

    Raises:
        ReleaseGuardError: One of the two files is already there, or nothing can be written.
    """
    private_path, public_path = directory / "key.pem", directory / "key.pub"
    private = ec.generate_private_key(ec.SECP256R1())
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        encryption = serialization.BestAvailableEncryption(password.encode())
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    if taken := [path for path in (private_path, public_path) if os.path.lexists(path)]:
        raise ReleaseGuardError(f"{taken[0]}: already there; a key is never overwritten")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _create(private_path, pem, mode=0o600)
        _create(public_path, _public_pem(private.public_key()), mode=0o644)
    except OSError as error:
        raise ReleaseGuardError(
            f"{error.filename or directory}: cannot be written ({error.strerror}); choose another "
            "--output"
        ) from None
    return private_path, public_path


def fingerprint(public: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the SubjectPublicKeyInfo PEM in hex: the `hint` of an OMS bundle."""
    return hashlib.sha256(_public_pem(public)).hexdigest()


def load_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Read a public key.

    Raises:
        ReleaseGuardError: No file, not PEM, a private key, or not P-256, P-384 or P-521.
    """
    pem = _read(path)
    if b"PRIVATE KEY-----" in pem:
        raise ReleaseGuardError(f"{path}: a private key; give the public one (key.pub)")
    try:
        public: Any = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ReleaseGuardError(f"{path}: not a public key in PEM form") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name not in _HASHES:
        raise ReleaseGuardError(f"{path}: not an EC key on P-256, P-384 or P-521")
    return public


def _load_private_key(pem: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    password = os.environ.get(PASSWORD_VARIABLE) or None
    if b"PUBLIC KEY-----" in pem:
        raise ReleaseGuardError(f"{where}: a public key; signing needs the private one (key.pem)")
    if b"-----BEGIN" not in pem:
        raise ReleaseGuardError(f"{where}: not a private key in PEM form")
    try:
        private: Any = serialization.load_pem_private_key(
            pem, password.encode() if password else None
        )
    except TypeError:  # a password where none is needed, or none where one is
        advice = f"is not encrypted; unset {PASSWORD_VARIABLE}"
        if password is None:
            advice = f"is encrypted; set {PASSWORD_VARIABLE}"
        raise ReleaseGuardError(f"{where}: the private key {advice}") from None
    except (ValueError, UnsupportedAlgorithm):
        doubt = f"{PASSWORD_VARIABLE} is wrong, or the file is damaged"
        reason = doubt if b"ENCRYPTED" in pem else "not a private key in PEM form"
        raise ReleaseGuardError(f"{where}: {reason}") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name != "secp256r1":
        raise ReleaseGuardError(
            f"{where}: not an EC key on P-256; `release-guard keygen` makes one"
        )
    return private


def _read_private(path: Path) -> bytes:
    pem = _read(path)
    if b"PUBLIC KEY-----" not in pem and path.stat().st_mode & _OTHERS:
        raise ReleaseGuardError(f"{path}: others can read this key; run: chmod 600 {path}")
    return pem


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReleaseGuardError(f"{path}: cannot be read ({error.strerror})") from None


def _signature(private: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    try:  # the same statement, the same bundle: nothing depends on a random number being good
        return private.sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    except UnsupportedAlgorithm:  # built on an OpenSSL older than 3.2
        return private.sign(message, ec.ECDSA(hashes.SHA256()))


def _hint(envelope: Envelope) -> str | None:
    """The fingerprint a bundle names; None where an older tool wrote the key itself instead."""
    if envelope.material.get("tlogEntries") not in (None, []):
        raise IntegrityError("bundle: signed through a log; a key cannot verify it")
    key = envelope.material.get("publicKey")
    if not isinstance(key, dict) or not ({"hint", "rawBytes"} & set(key)):
        raise IntegrityError("bundle: not signed by a key (no `publicKey`)")
    hint = key.get("hint")
    if hint is not None and not isinstance(hint, str):
        raise IntegrityError("bundle: `hint` is not a text")
    return hint or None


def _public_pem(public: ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _create(path: Path, content: bytes, *, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
