"""Who vouches. A signer turns the exact bytes of a statement into a Sigstore bundle, and back."""

from abc import abstractmethod

from release_guard.plugins import Plugin


class Signer(Plugin):
    """Signs in-toto statements. Credentials are read when used, never when built."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What a consumer pins: a key's fingerprint, or a certificate's name."""

    @abstractmethod
    def sign(self, statement: bytes) -> bytes:
        """Sigstore bundle (JSON) holding a DSSE envelope over exactly these bytes."""

    @abstractmethod
    def verify(self, bundle: bytes) -> bytes:
        """The exact bytes that were signed.

        Raises:
            IntegrityError: Malformed, another signer, or a signature that does not fit.
        """
