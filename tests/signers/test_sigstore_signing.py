"""Signing without a key, from token to log, against services on the loopback.

The public services were never asked: these tests show that the real client and ours agree with
each other and with the published formats, as the real bundles in `test_sigstore.py` do.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import model_signing
import pytest
from judged import FILES, check, fixed_key, judge, write
from sigstoreserver import ISSUER, OTHER_WORKFLOW, SigstoreServer

from release_guard.attestation import bundle_name
from release_guard.dsse import Statement, Subject
from release_guard.errors import IntegrityError, ReleaseGuardError
from release_guard.manifest import SIGNATURE, hash_directory
from release_guard.oms import to_statement
from release_guard.signers.sigstore import Sigstore
from release_guard.verify import State

STATEMENT = Statement("https://example.org/claim/v1", [Subject("ä", "ab" * 32)], {"n": 1})
SPACED = json.dumps(json.loads(STATEMENT.to_bytes()), indent=3).encode()  # as we never write it
CERTIFY, LOG = "api/v2/signingCert", "api/v1/log/entries"


@pytest.fixture(scope="module")
def services() -> Iterator[SigstoreServer]:
    with SigstoreServer() as server:
        yield server


@pytest.fixture
def server(
    services: SigstoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SigstoreServer]:
    """As new, but for its keys and its log."""
    services.enter(monkeypatch, tmp_path / "home")
    services.requests.clear()
    yield services
    services.mode = "normal"


@pytest.fixture
def signer(server: SigstoreServer) -> Sigstore:
    return Sigstore(identity=server.workflow, issuer=ISSUER)


@pytest.mark.parametrize("statement", [STATEMENT.to_bytes(), SPACED], ids=["canonical", "spaced"])
def test_what_is_signed_comes_back_byte_for_byte(
    server: SigstoreServer, signer: Sigstore, statement: bytes
) -> None:
    bundle = signer.sign(statement)
    assert signer.verify(bundle) == statement
    value = json.loads(bundle)
    assert base64.b64decode(value["dsseEnvelope"]["payload"]) == statement
    material = value["verificationMaterial"]
    assert len(material["timestampVerificationData"]["rfc3161Timestamps"]) == 1
    assert base64.b64decode(material["tlogEntries"][0]["canonicalizedBody"]) == server.entries[-1]
    once = ("timestamp.json", CERTIFY, "timestamp", LOG)
    assert [each for each in server.requests if each in once] == list(once)


def test_a_consumer_needs_no_service(
    server: SigstoreServer, signer: Sigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = [signer.sign(STATEMENT.to_bytes()) for _ in range(5)]
    for name in ("GITHUB_ACTIONS", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"):
        monkeypatch.delenv(name)
    server.requests.clear()
    for bundle in bundles:
        assert signer.verify(bundle) == STATEMENT.to_bytes()
    assert server.requests == []


def test_who_does_not_know_this_sigstore_believes_nothing(
    signer: Sigstore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = signer.sign(STATEMENT.to_bytes())
    monkeypatch.setattr("sigstore.models.DEFAULT_TUF_URL", "https://tuf-repo-cdn.sigstore.dev")
    with pytest.raises(IntegrityError, match="certificate chain"):
        signer.verify(bundle)
    with SigstoreServer() as another:
        another.enter(monkeypatch, tmp_path / "another")
        signer.check()
        with pytest.raises(IntegrityError, match="certificate chain"):
            signer.verify(bundle)


def test_checking_signs_and_logs_nothing(server: SigstoreServer, signer: Sigstore) -> None:
    signer.check()
    assert server.requests[-1] == CERTIFY


@pytest.mark.parametrize("mode", ["other-job", "impostor"])
def test_a_certificate_of_another_job_is_refused_before_anything_is_logged(
    server: SigstoreServer, signer: Sigstore, mode: str
) -> None:
    server.mode = mode
    for use in (signer.check, lambda: signer.sign(STATEMENT.to_bytes())):
        with pytest.raises(ReleaseGuardError, match=OTHER_WORKFLOW) as caught:
            use()
        assert str(caught.value).startswith(f"Sigstore did not certify {signer.identity}: ")
    assert not {"timestamp", LOG} & set(server.requests)


def test_a_token_of_another_issuer_is_shown_to_nobody(server: SigstoreServer) -> None:
    signer = Sigstore(identity=server.workflow, issuer="https://gitlab.com")
    for use in (signer.check, lambda: signer.sign(STATEMENT.to_bytes())):
        with pytest.raises(ReleaseGuardError, match=f"token is of '{ISSUER}', but .*gitlab"):
            use()
    assert set(server.requests) == {"token"}


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("no-token", "no OIDC token to sign with: .*403.*; a GitHub Actions job needs"),
        ("no-tuf", "Sigstore did not certify .*TUF"),
        ("no-fulcio", "Sigstore did not certify .*Fulcio"),
        ("no-rekor", "Sigstore did not log the signature: .*503"),
        ("garbled", "Sigstore did not log the signature: "),
        ("forger", "not signed by .*inclusion promise"),
        ("late", "not signed by .*certificate"),
    ],
)
def test_a_service_that_fails_leaves_no_bundle_and_one_line(
    server: SigstoreServer, signer: Sigstore, mode: str, says: str
) -> None:
    server.mode = mode
    with pytest.raises(ReleaseGuardError, match=says) as caught:
        signer.sign(STATEMENT.to_bytes())
    assert str(caught.value).isprintable()


def test_without_a_time_stamp_the_log_tells_the_time(
    server: SigstoreServer, signer: Sigstore
) -> None:
    server.mode = "no-tsa"
    bundle = signer.sign(STATEMENT.to_bytes())
    assert signer.verify(bundle) == STATEMENT.to_bytes()


def test_a_log_that_tells_no_time_needs_the_time_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rekor v2, to which Sigstore means to move; witnesses may sign its checkpoints, too."""
    with SigstoreServer(rekor_version=2, witness=True) as server:
        server.enter(monkeypatch, tmp_path / "home")
        signer = Sigstore(identity=server.workflow, issuer=ISSUER)
        bundles = [signer.sign(statement) for statement in (STATEMENT.to_bytes(), SPACED)]
        assert [signer.verify(bundle) for bundle in bundles] == [STATEMENT.to_bytes(), SPACED]
        assert "api/v2/log/entries" in server.requests
        swapped = json.loads(bundles[0])
        other = json.loads(bundles[1])["verificationMaterial"]["tlogEntries"]
        swapped["verificationMaterial"]["tlogEntries"] = other
        with pytest.raises(IntegrityError, match="inconsistent"):
            signer.verify(json.dumps(swapped).encode())
        for name, value in (("integratedTime", "1"), ("logIndex", "7")):
            lying = json.loads(bundles[0])
            lying["verificationMaterial"]["tlogEntries"][0][name] = value
            with pytest.raises(IntegrityError, match="bundle: the log"):
                signer.verify(json.dumps(lying).encode())
        server.mode = "no-tsa"
        with pytest.raises(ReleaseGuardError, match="promise or signed timestamp"):
            signer.sign(STATEMENT.to_bytes())


def test_outside_of_ci_there_is_nothing_to_sign_with(
    server: SigstoreServer, signer: Sigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN")
    with pytest.raises(ReleaseGuardError, match=r"ACTIONS_ID_TOKEN_REQUEST_TOKEN.*id-token: write"):
        signer.sign(STATEMENT.to_bytes())
    monkeypatch.delenv("GITHUB_ACTIONS")
    with pytest.raises(ReleaseGuardError, match="no OIDC token to sign with outside of CI"):
        signer.check()
    assert server.requests == []


@pytest.mark.parametrize("statement", [b"", b"{}", b"[]", b"\xff", b'{"_type": "x"}'])
def test_only_statements_are_signed(
    server: SigstoreServer, signer: Sigstore, statement: bytes
) -> None:
    with pytest.raises(ReleaseGuardError, match=r"did not log the signature: .*statement"):
        signer.sign(statement)
    assert LOG not in server.requests


@pytest.mark.parametrize("mode", ["normal", "no-tuf", "no-fulcio", "no-rekor", "impostor"])
def test_the_token_is_in_no_bundle_and_no_message(
    server: SigstoreServer, signer: Sigstore, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [server.token()]
    monkeypatch.setattr(server, "token", lambda: tokens[0])
    server.mode = mode
    try:
        said = signer.sign(STATEMENT.to_bytes()).decode()
    except ReleaseGuardError as error:
        said = f"{error} {error.__cause__}"
    for secret in (tokens[0], tokens[0].rpartition(".")[2], "request-token"):
        assert secret not in said


def test_a_whole_release_without_a_key(signer: Sigstore, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    judge(folder, signer).release()
    assert check(folder, signer).states == (State.INTACT,)
    other = signer.model_copy(update={"identity": f"https://github.com/{OTHER_WORKFLOW}"})
    assert check(folder, other).states == (State.WRONG_SIGNER,)
    assert check(folder, fixed_key(tmp_path)).states == (State.WRONG_SIGNER,)
    write(folder, "model.safetensors", FILES["model.safetensors"] + b"\0")
    assert check(folder, signer).states == (State.WEIGHTS_CHANGED,)


def test_the_reference_implementation_verifies_it_too(signer: Sigstore, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    judge(folder, signer).release()

    def verify_theirs(identity: str) -> None:
        config = model_signing.verifying.Config().use_sigstore_verifier(
            identity=identity, oidc_issuer=ISSUER
        )
        config.verify(folder, folder / SIGNATURE)

    verify_theirs(signer.identity)
    with pytest.raises(Exception, match="SANs do not match"):
        verify_theirs(f"https://github.com/{OTHER_WORKFLOW}")
    write(folder, "config.json", b"[]")
    with pytest.raises(ValueError, match=r"config\.json"):
        verify_theirs(signer.identity)


def test_theirs_is_verified_by_us(signer: Sigstore, server: SigstoreServer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for name, content in FILES.items():
        write(folder, name, content)
    config = model_signing.signing.Config().use_sigstore_signer(identity_token=server.token())
    config.sign(folder, folder / SIGNATURE)
    assert check(folder, signer).states == (State.EVIDENCE_MISSING,)
    write(folder, "config.json", b"[]")
    assert State.CONFIG_CHANGED in check(folder, signer).states


def test_an_attestation_of_another_signer_spoils_a_release(
    signer: Sigstore, tmp_path: Path
) -> None:
    """The one signature that says who vouches is right, one of the claims is somebody else's."""
    folder = tmp_path / "model"
    judge(folder, signer).release()
    name = bundle_name("svr")
    statement = signer.verify((folder / name).read_bytes())
    write(folder, name, fixed_key(tmp_path).sign(statement))
    (folder / SIGNATURE).unlink()
    write(folder, SIGNATURE, signer.sign(to_statement(hash_directory(folder), name="model")))
    assert check(folder, signer).states == (State.EVIDENCE_INVALID,)
