"""Sign with a key of one's own: ECDSA on P-256, the key in a PEM file or in the environment."""

import os
import stat
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from release_guard.dsse import Envelope, pae
from release_guard.errors import ReleaseGuardError
from release_guard.keys import fingerprint, load_public_key, public_pem, read_key, verified
from release_guard.signers import Signer

KEY_VARIABLE = "RELEASE_GUARD_SIGNING_KEY"
PASSWORD_VARIABLE = "RELEASE_GUARD_KEY_PASSWORD"  # noqa: S105  a name, not a password

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

    @property
    def public_key(self) -> bytes:
        return public_pem(self._public_key())

    def check(self) -> None:
        self._pair()

    def sign(self, statement: bytes) -> bytes:
        private, hint = self._pair()
        material = {"publicKey": {"hint": hint}, "tlogEntries": []}
        return Envelope(statement, _signature(private, pae(statement)), material).to_bytes()

    def verify(self, bundle: bytes) -> bytes:
        return verified(bundle, self._public_key())

    def _pair(self) -> tuple[ec.EllipticCurvePrivateKey, str]:
        """The key that signs and its fingerprint, once both halves are known to be of one pair."""
        private = self._private_key()
        hint = fingerprint(private.public_key())
        if self.public is not None and hint != fingerprint(load_public_key(self.public)):
            raise ReleaseGuardError(
                f"{self.public}: not the public half of the signing key; give the two that belong "
                "together"
            )
        return private, hint

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
            return _load_private_key(os.fsencode(given), KEY_VARIABLE)
        if not os.path.isfile(given):  # noqa: PTH113  Path.is_file raises for what is no path at all
            raise ReleaseGuardError(  # without repeating it: it may be a key in some other form
                f"{KEY_VARIABLE}: neither a private key in PEM form nor the path of a file"
            )
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
        encryption = serialization.BestAvailableEncryption(os.fsencode(password))
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    if taken := [path for path in (private_path, public_path) if os.path.lexists(path)]:
        raise ReleaseGuardError(f"{taken[0]}: already there; a key is never overwritten")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _create(private_path, pem, mode=0o600)
        _create(public_path, public_pem(private.public_key()), mode=0o644)
    except OSError as error:
        raise ReleaseGuardError(
            f"{error.filename or directory}: cannot be written ({error.strerror}); choose another "
            "--output"
        ) from None
    return private_path, public_path


def _load_private_key(pem: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    password = os.environ.get(PASSWORD_VARIABLE) or None
    if b"PUBLIC KEY-----" in pem:
        raise ReleaseGuardError(f"{where}: a public key; signing needs the private one (key.pem)")
    if b"-----BEGIN" not in pem:
        raise ReleaseGuardError(f"{where}: not a private key in PEM form")
    try:
        private: Any = serialization.load_pem_private_key(
            pem, os.fsencode(password) if password else None
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
    pem = read_key(path)
    if b"PUBLIC KEY-----" not in pem and path.stat().st_mode & _OTHERS:
        raise ReleaseGuardError(f"{path}: others can read this key; run: chmod 600 {path}")
    return pem


def _signature(private: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    try:  # the same statement, the same bundle: nothing depends on a random number being good
        return private.sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    except UnsupportedAlgorithm:  # built on an OpenSSL older than 3.2
        return private.sign(message, ec.ECDSA(hashes.SHA256()))


def _create(path: Path, content: bytes, *, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
