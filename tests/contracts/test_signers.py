"""What every signer owes, whatever it signs with."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from sigstoreserver import ISSUER, SigstoreServer

from release_guard.dsse import Envelope, Statement, Subject
from release_guard.errors import IntegrityError, ReleaseGuardError
from release_guard.plugins import Spec
from release_guard.signers import Signer
from release_guard.signers.key import KEY_VARIABLE, PASSWORD_VARIABLE, generate_key

STATEMENT = Statement("https://example.org/claim/v1", [Subject("ä", "ab" * 32)], {}).to_bytes()
Options = Mapping[str, object]


@pytest.fixture(scope="module")
def services() -> Iterator[SigstoreServer]:
    with SigstoreServer() as server:
        yield server


@pytest.fixture
def options(
    services: SigstoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Mapping[str, Options]:
    """By signer what a consumer knows of it; credentials are in the environment."""
    services.enter(monkeypatch, tmp_path)
    private, public = generate_key(tmp_path / "keys")
    monkeypatch.setenv(KEY_VARIABLE, str(private))
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    return {
        "key": {"public": str(public)},
        "sigstore": {"identity": services.workflow, "issuer": ISSUER},
    }


@pytest.fixture(params=Signer.available())
def signer(request: pytest.FixtureRequest, options: Mapping[str, Options]) -> Signer:
    return Signer.build(Spec(name=request.param, **options[request.param]))


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes every credential away."""

    def take() -> None:
        for name in (KEY_VARIABLE, "GITHUB_ACTIONS", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"):
            monkeypatch.delenv(name, raising=False)

    return take


def test_what_was_signed_comes_back_exactly(signer: Signer) -> None:
    signer.check()
    bundle = signer.sign(STATEMENT)
    assert signer.verify(bundle) == STATEMENT
    assert Envelope.from_bytes(bundle).payload == STATEMENT


def test_a_consumer_needs_no_credential(signer: Signer, nobody: Callable[[], None]) -> None:
    bundle = signer.sign(STATEMENT)
    nobody()
    assert signer.verify(bundle) == STATEMENT
    assert isinstance(signer.identity, str)
    assert signer.identity


def test_without_a_credential_nothing_is_signed(signer: Signer, nobody: Callable[[], None]) -> None:
    nobody()
    for use in (signer.check, lambda: signer.sign(STATEMENT)):
        with pytest.raises(ReleaseGuardError) as caught:
            use()
        assert not isinstance(caught.value, IntegrityError)
        assert "\n" not in str(caught.value)


def test_another_statement_under_the_same_signature_is_refused(signer: Signer) -> None:
    signed = Envelope.from_bytes(signer.sign(STATEMENT))
    other = STATEMENT.replace(b"ab", b"ac")
    with pytest.raises(IntegrityError):
        signer.verify(Envelope(other, signed.signature, signed.material).to_bytes())


def test_signers_do_not_believe_each_other(signer: Signer, options: Mapping[str, Options]) -> None:
    bundle = signer.sign(STATEMENT)
    for name in set(Signer.available()) - {signer.name}:
        with pytest.raises(IntegrityError):
            Signer.build(Spec(name=name, **options[name])).verify(bundle)


@pytest.mark.parametrize("bundle", [b"", b"{}", b"\xff", b"[" * 100_000, b'{"mediaType": null}'])
def test_what_is_no_bundle_is_refused_in_one_line(signer: Signer, bundle: bytes) -> None:
    with pytest.raises(IntegrityError) as caught:
        signer.verify(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["", "verificationMaterial", "dsseEnvelope"])
def test_an_unknown_field_is_refused(signer: Signer, place: str) -> None:
    value = json.loads(signer.sign(STATEMENT))
    (value[place] if place else value)["more"] = 1
    with pytest.raises(IntegrityError, match="unknown field 'more'"):
        signer.verify(json.dumps(value).encode())
