"""Who vouches. A signer turns the exact bytes of a statement into a Sigstore bundle, and back."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Protocol

from release_guard.plugins import Plugin


class Voucher(Protocol):
    """Whose signature counts: all that verifying asks of a signer."""

    @property
    def identity(self) -> str:
        """What a consumer pins: a key's fingerprint, or a certificate's name."""
        ...

    def verify(self, bundle: bytes) -> bytes:
        """The exact bytes that were signed; MUST raise `IntegrityError` if it cannot vouch."""
        ...


class Signer(Plugin):
    """Signs in-toto statements. Credentials are read when used, never when built."""

    if TYPE_CHECKING:  # one signer works it out, another is told it by an option of that name

        @property
        def identity(self) -> str:
            """What a consumer pins: a key's fingerprint, or a certificate's name."""

    @property
    def public_key(self) -> bytes | None:
        """PEM that a release carries for whoever knows the key's fingerprint; None: no key."""
        return None

    @abstractmethod
    def check(self) -> None:
        """See whether signing could work, before any cost; MUST fail here if `sign` would.

        Raises:
            ReleaseGuardError: No credential, or one that is not of use.
        """

    @abstractmethod
    def sign(self, statement: bytes) -> bytes:
        """Sigstore bundle (JSON) holding a DSSE envelope over exactly these bytes.

        Raises:
            ReleaseGuardError: No credential, or whoever has to help with it does not.
        """

    @abstractmethod
    def verify(self, bundle: bytes) -> bytes:
        """The exact bytes that were signed.

        Raises:
            IntegrityError: Malformed, another signer, or a signature that does not fit.
            ReleaseGuardError: What it takes to verify is not there.
        """
