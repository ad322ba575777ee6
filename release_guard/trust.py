"""Whom a consumer trusts: a key, a key's fingerprint, or an identity that an issuer vouches for."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from release_guard.attestation import KEY_FILE
from release_guard.dsse import MAX_BUNDLE, Envelope
from release_guard.errors import IntegrityError, PolicyError, ReleaseGuardError
from release_guard.keys import fingerprint, parse_public_key, verified
from release_guard.manifest import SIGNATURE, Tree
from release_guard.plugins import Spec
from release_guard.signers import Signer, Voucher

_ISSUER = "1.3.6.1.4.1.57264.1.1"  # extension of a certificate: the OIDC token's issuer
MAX_KEY = 1 << 14  # bytes of a public key in PEM form; a real one has some 250


def _bare(value: Any) -> Any:
    return value.lower().removeprefix("sha256:") if isinstance(value, str) else value


def _printable(value: str) -> str:
    if not value or not value.isprintable():
        raise ValueError("must be a name that can be shown")
    return value


class Trusted(BaseModel):
    """One signer, as the command line and the pin file name it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Path | None = None
    fingerprint: Annotated[str | None, BeforeValidator(_bare), Field(pattern=r"^[0-9a-f]{64}$")] = (
        None
    )
    identity: Annotated[str, AfterValidator(_printable)] | None = None
    issuer: Annotated[str, AfterValidator(_printable)] | None = None

    @model_validator(mode="after")
    def _names_one(self) -> "Trusted":
        if (self.identity is None) != (self.issuer is None):
            raise ValueError("an identity counts only with its issuer; give both")
        if sum(given is not None for given in (self.key, self.fingerprint, self.identity)) != 1:
            raise ValueError("give exactly one of key, fingerprint, or identity with issuer")
        return self

    @classmethod
    def given(cls, options: Mapping[str, Any]) -> "Trusted | None":
        """What a command line says; None if it says nothing.

        Raises:
            PolicyError: More than one signer, half of one, or no fingerprint.
        """
        named = {name: value for name, value in options.items() if value is not None}
        if not named:
            return None
        try:
            return cls.model_validate(named)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            text = first["msg"].removeprefix("Value error, ")
            if first["loc"] == ("fingerprint",):
                raise PolicyError("--fingerprint: not a SHA-256, 64 digits in hex") from None
            if first["loc"]:
                raise PolicyError(f"--{first['loc'][0]}: {text}") from None
            raise PolicyError(f"{text}: {', '.join(f'--{name}' for name in named)}") from None

    def __str__(self) -> str:
        if self.identity is not None:
            return f"{self.identity} by {self.issuer}"
        return f"the key {self.key or self.fingerprint}"

    def voucher(self, tree: Tree) -> Voucher:
        """Who verifies the bundles of this release.

        Raises:
            ReleaseGuardError: The key cannot be read, or keyless signatures not be verified here.
        """
        if self.fingerprint is not None:
            return CarriedKey(self.fingerprint, carried_key(tree))
        if self.key is not None:
            return Signer.build(Spec(name="key", public=str(self.key)), where="--key")
        options = {"identity": self.identity, "issuer": self.issuer}
        return Signer.build(Spec(name="sigstore", **options), where="--identity")


@dataclass(frozen=True)
class CarriedKey:
    """A key known by its fingerprint alone. The release carries the key itself.

    That is safe: what decides is the fingerprint, and it comes from the caller. Nobody can make
    another key with the same SHA-256.

    Attributes:
        digest: Fingerprint, SHA-256 of the key's PEM in hex.
        carried: What lies in the release as `key.pub`; None if nothing does.
    """

    digest: str
    carried: bytes | None

    @property
    def identity(self) -> str:
        return self.digest

    def verify(self, bundle: bytes) -> bytes:
        if self.carried is None:
            raise IntegrityError(
                f"a fingerprint is no key, and the release has no {KEY_FILE}; give the key itself "
                "with --key"
            )
        found = _fingerprint(self.carried)
        if found != self.digest:
            raise IntegrityError(
                f"the release carries the key {found[:16]}..., not {self.digest[:16]}..."
            )
        return verified(bundle, parse_public_key(self.carried, where=KEY_FILE))


def carried_key(tree: Tree) -> bytes | None:
    """The key that a release carries; worth nothing unless its fingerprint is known elsewhere."""
    entry = tree.manifest.get(KEY_FILE)
    return tree.read(KEY_FILE) if entry is not None and entry.size <= MAX_KEY else None


def first_seen(tree: Tree) -> Trusted:
    """Whoever claims to have signed a release, for those who decide to trust them from now on.

    It is a claim: whether they did sign is for the `voucher` to find out.

    Raises:
        PolicyError: It names nobody, so there is nobody to remember.
        IntegrityError: The key that it carries, or its signature, is malformed.
    """
    if (carried := carried_key(tree)) is not None:
        return Trusted(fingerprint=_fingerprint(carried))
    entry = tree.manifest.get(SIGNATURE)
    if entry is not None and entry.size <= MAX_BUNDLE:
        material = Envelope.from_bytes(tree.read(SIGNATURE)).material
        if (certificate := material.get("certificate")) is not None:
            return _certified(certificate)
    raise PolicyError(
        f"it carries neither a certificate nor {KEY_FILE}, so there is nobody to trust on first "
        "use; give --key, --fingerprint, or --identity and --issuer"
    )


def _certified(certificate: Any) -> Trusted:
    """Who a certificate is for, and who said so, as Sigstore writes it there."""
    from cryptography import x509  # noqa: PLC0415  a tenth of the start-up time

    try:
        found = x509.load_der_x509_certificate(base64.b64decode(certificate["rawBytes"]))
        extensions = found.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (name,) = names
        issuer: Any = extensions.get_extension_for_oid(
            x509.ObjectIdentifier(_ISSUER)
        ).value  # bytes of no known type
        return Trusted(identity=str(name.value), issuer=issuer.value.decode())
    except (
        *(ValueError, TypeError, KeyError, AttributeError, x509.ExtensionNotFound),
        *(x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType),
    ):
        raise IntegrityError(f"{SIGNATURE}: its certificate names nobody") from None


def _fingerprint(pem: bytes) -> str:
    try:
        return fingerprint(parse_public_key(pem, where=KEY_FILE))
    except ReleaseGuardError as error:  # the release's fault, not the caller's
        raise IntegrityError(str(error)) from None
