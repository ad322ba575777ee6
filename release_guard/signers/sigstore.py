"""Sign without a key: a certificate for minutes, given for what a CI job can prove itself to be.

Sigstore: Fulcio turns an OIDC token into the certificate, a time stamping authority dates the
signature, Rekor logs it for everybody to see. Signing needs all of them; verifying needs their
public keys alone, which lie in the installed package or, renewed, in its cache.
"""

import base64
import json
import logging
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field

from release_guard.dsse import Envelope, read_json
from release_guard.errors import IntegrityError, ReleaseGuardError
from release_guard.signers import Signer
from release_guard.strict_json import canonical_json

if TYPE_CHECKING:
    from sigstore.oidc import IdentityToken
    from sigstore.sign import Signer as CertifiedSigner
    from sigstore.verify import Verifier
    from sigstore.verify.policy import Identity

_CHECKPOINT = re.compile(
    r"(?P<origin>\S+)(?: - \d+)?\n(?P<size>\d+)\n[^\n]+\n\n— (?P<log>\S+) (?P<signature>\S+)\n"
    r"(?:— \S+ \S+\n)*"
)  # the signed head of a log: who, how many entries, root hash; its signature, then witnesses'


class Sigstore(Signer):
    """A certificate that Sigstore issues to a CI job signs; the job's identity verifies.

    Signing needs the network and the OIDC credential of the job it runs in (on GitHub Actions
    `permissions: id-token: write`); verifying needs neither. Install the extra `sigstore`.
    """

    identity: str = Field(
        pattern=r"^\S+$",
        description="Who signs, as the certificate says; on GitHub Actions "
        "https://github.com/OWNER/REPO/.github/workflows/FILE@REF.",
    )
    issuer: str = Field(
        pattern=r"^https://\S+$",
        description="Who says so: https://token.actions.githubusercontent.com for GitHub Actions.",
    )

    def check(self) -> None:
        self._certified()

    def sign(self, statement: bytes) -> bytes:
        signer = self._certified()
        with _extra():
            from sigstore.dsse import Statement  # noqa: PLC0415
        try:
            bundle = signer.sign_dsse(Statement(statement))
        except Exception as error:  # of two services and as many libraries
            raise ReleaseGuardError(f"Sigstore did not log the signature: {_told(error)}") from None
        signed = canonical_json(json.loads(bundle.to_json()))
        if self.verify(signed) != statement:
            raise IntegrityError("Sigstore signed other bytes than it was given")
        return signed

    def verify(self, bundle: bytes) -> bytes:
        self._require_certificate(Envelope.from_bytes(bundle))
        with _extra():
            from sigstore.models import Bundle  # noqa: PLC0415
        verifier, policy = _verifier(), self._policy()
        value = read_json(bundle, "bundle")
        try:
            with warnings.catch_warnings(action="ignore"):  # of certificates that are malformed
                found = Bundle.from_json(bundle)
                _, payload = verifier.verify_dsse(found, policy)
                if undated := _without_the_logs_time(value):  # the time stamp has to hold alone
                    verifier.verify_dsse(Bundle.from_json(json.dumps(undated)), policy)
        except Exception as error:  # what a library stumbles over is no signature
            raise IntegrityError(
                f"not signed by {self.identity} of {self.issuer}: {_told(error)}"
            ) from None
        if read_json(found.to_json().encode(), "bundle") != value:
            raise IntegrityError("bundle: a value is not written as Sigstore writes it")
        _require_covered(value["verificationMaterial"]["tlogEntries"][0])
        return payload

    def _certified(self) -> "CertifiedSigner":
        """Holds a certificate of the identity that was asked for; nothing is signed or logged."""
        token = self._token()
        with _extra():
            from sigstore.models import ClientTrustConfig  # noqa: PLC0415
            from sigstore.sign import SigningContext  # noqa: PLC0415
        try:
            context = SigningContext.from_trust_config(ClientTrustConfig.production())
            with context.signer(token) as signer:
                self._policy().verify(signer._signing_cert())
                return signer
        except Exception as error:  # of two services and as many libraries
            raise ReleaseGuardError(
                f"Sigstore did not certify {self.identity}: {_told(error)}"
            ) from None

    def _policy(self) -> "Identity":
        with _extra():
            from sigstore.verify.policy import Identity  # noqa: PLC0415
        return Identity(identity=self.identity, issuer=self.issuer)

    def _token(self) -> "IdentityToken":
        """The job's own, if it is of the issuer it has to be; it is shown to nobody else."""
        with _extra():
            from sigstore.oidc import IdentityToken, detect_credential  # noqa: PLC0415
        advice = "a GitHub Actions job needs `permissions: id-token: write`"
        try:
            raw = detect_credential()
            token = IdentityToken(raw) if raw else None
        except Exception as error:  # whatever a CI system answers
            raise ReleaseGuardError(
                f"no OIDC token to sign with: {_told(error)}; {advice}"
            ) from None
        if token is None:
            raise ReleaseGuardError(f"no OIDC token to sign with outside of CI; {advice}")
        if token.federated_issuer != self.issuer:
            raise ReleaseGuardError(
                f"the OIDC token is of {token.federated_issuer!a}, but the policy's signer of "
                f"{self.issuer}"
            )
        return token

    def _require_certificate(self, envelope: Envelope) -> None:
        if "publicKey" in envelope.material:
            raise IntegrityError(f"bundle: signed by a key, not by {self.identity}")
        if "certificate" not in envelope.material or "x509CertificateChain" in envelope.material:
            raise IntegrityError("bundle: needs one `certificate` and no chain")


def _verifier() -> "Verifier":
    """Trusts what the installed package holds, or what Sigstore has renewed since; no network."""
    with _extra():
        from sigstore.verify import Verifier  # noqa: PLC0415
    logging.getLogger("sigstore").setLevel(logging.ERROR)  # it warns that it asks no server
    try:
        return Verifier.production(offline=True)
    except Exception as error:  # no place for its cache, or a damaged one
        raise ReleaseGuardError(f"Sigstore's public keys cannot be read: {_told(error)}") from None


def _without_the_logs_time(value: Any) -> Mapping[str, Any] | None:
    """The same bundle, dated by its time stamp alone; None if it has none.

    The library takes the log's time and passes over a time stamp that does not hold.
    """
    material = value["verificationMaterial"]
    stamps = material.get("timestampVerificationData", {}).get("rfc3161Timestamps", [])
    if not stamps:
        return None
    if len(stamps) > 1:
        raise IntegrityError("more than one time stamp")
    dates = {"inclusionPromise", "integratedTime"}
    (entry,) = material["tlogEntries"]
    entry = {key: item for key, item in entry.items() if key not in dates}
    return {**value, "verificationMaterial": {**material, "tlogEntries": [entry]}}


def _require_covered(entry: Mapping[str, Any]) -> None:
    """Refuse what stands in a log entry, is covered by no signature and read by nobody."""
    proof, time = entry["inclusionProof"], entry.get("integratedTime", "0")
    if ("inclusionPromise" in entry) != (time != "0"):
        raise IntegrityError("bundle: the log promises no time, or a time without a promise")
    if time == "0" and entry["logIndex"] != proof["logIndex"]:
        raise IntegrityError("bundle: the log entry is not the one that is proven to be there")
    head = _CHECKPOINT.fullmatch(proof["checkpoint"]["envelope"])
    if (
        head is None
        or head["log"] != head["origin"]
        or head["size"] != proof["treeSize"]
        or base64.b64encode(base64.b64decode(head["signature"])).decode() != head["signature"]
    ):
        raise IntegrityError("bundle: the log's checkpoint is not as the log writes it")


def _told(error: Exception) -> str:
    """What a library says, in one line that cannot move a cursor."""
    text = " ".join(str(error).split()) or type(error).__name__
    return ascii(textwrap.shorten(text, width=240, placeholder=" ..."))


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise ReleaseGuardError(
            "signatures without a key need more: pip install 'model-release-guard[sigstore]'"
        ) from None
