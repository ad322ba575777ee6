"""Verifying without a key: real bundles of other people, and all that is not one of theirs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import check, fixed_key

from release_guard.dsse import Envelope
from release_guard.errors import IntegrityError, PolicyError, ReleaseGuardError
from release_guard.oms import from_statement
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.signers import Signer
from release_guard.signers.key import Key
from release_guard.signers.sigstore import Sigstore
from release_guard.verify import State

VECTORS = Path(__file__).parents[1] / "vectors" / "sigstore"
GITHUB = "https://token.actions.githubusercontent.com"
JOB = Sigstore(
    identity="https://github.com/trailofbits/pypi-attestation-models"
    "/.github/workflows/release.yml@refs/tags/v0.0.4a2",
    issuer=GITHUB,
)
MODELLER = Sigstore(identity="stefanb@us.ibm.com", issuer="https://sigstore.verify.ibm.com/oauth2")
BUNDLE = (VECTORS / "github-actions.sigstore.json").read_bytes()
MODEL = VECTORS / "oms"
OMS_BUNDLE = (MODEL / "model.sig").read_bytes()

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the library keeps a copy of the root of trust: that of the installed package."""
    folder = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setenv("XDG_DATA_HOME", str(folder / "data"))
    yield folder
    patch.undo()


def changed(bundle: bytes, change: Change) -> bytes:
    value = json.loads(bundle)
    change(value)
    return json.dumps(value).encode()


def entry(value: Mapping[str, Any]) -> dict[str, Any]:
    (found,) = value["verificationMaterial"]["tlogEntries"]
    return dict_of(found)


def dict_of(value: Any) -> dict[str, Any]:
    assert isinstance(value, dict)
    return value


def refused(signer: Signer, bundle: bytes) -> str:
    with pytest.raises(IntegrityError) as caught:
        signer.verify(bundle)
    line = str(caught.value)
    assert line.isprintable()
    return line


def test_a_real_bundle_is_verified_offline_and_gives_the_exact_statement() -> None:
    payload = Envelope.from_bytes(BUNDLE).payload
    assert JOB.verify(BUNDLE) == payload
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"][0]["name"] == "pypi_attestation_models-0.0.4a2.tar.gz"


def test_one_with_a_time_stamp_too() -> None:
    assert MODELLER.verify(OMS_BUNDLE) == Envelope.from_bytes(OMS_BUNDLE).payload


def test_no_server_is_asked_and_nothing_is_written_on_a_terminal() -> None:
    """In a fresh process: the library warns that it is offline, which is no news."""
    code = (
        "import os, sys; asked = {'socket.connect', 'socket.getaddrinfo'};"
        "sys.addaudithook(lambda what, _: what not in asked or os._exit(9));"
        "from release_guard.signers.sigstore import Sigstore;"
        f"signer = Sigstore(identity={JOB.identity!r}, issuer={JOB.issuer!r});"
        "assert signer.verify(open(sys.argv[1], 'rb').read());"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    path = str(VECTORS / "github-actions.sigstore.json")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=False)  # noqa: S603
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    "other",
    [
        {"identity": JOB.identity.replace("v0.0.4a2", "v0.0.4")},
        {"identity": JOB.identity[:-1]},
        {"identity": JOB.identity.upper()},
        {"identity": MODELLER.identity},
        {"issuer": f"{GITHUB}/"},
        {"issuer": "https://gitlab.com"},
        {"issuer": "https://token.actions.githubusercontent.com.example.org"},
    ],
    ids=lambda other: next(iter(other.values())),
)
def test_another_identity_or_issuer_is_refused(other: dict[str, str]) -> None:
    signer = Sigstore(**{"identity": JOB.identity, "issuer": JOB.issuer, **other})
    line = refused(signer, BUNDLE)
    assert line.startswith(f"not signed by {signer.identity} of {signer.issuer}: ")


def test_another_sigstore_is_refused() -> None:
    bundle = (VECTORS / "staging.sigstore.json").read_bytes()
    assert "certificate chain" in refused(JOB, bundle)


def move_time(value: dict[str, Any], seconds: int) -> None:
    found = entry(value)
    found["integratedTime"] = str(int(found["integratedTime"]) + seconds)


def swap_log_entry(value: dict[str, Any]) -> None:
    value["verificationMaterial"]["tlogEntries"] = [entry(json.loads(OMS_BUNDLE))]


def sign_message(value: dict[str, Any]) -> None:
    digest = {"algorithm": "SHA2_256", "digest": "ab=="}
    signature = value.pop("dsseEnvelope")["signatures"][0]["sig"]
    value["messageSignature"] = {"messageDigest": digest, "signature": signature}


def in_checkpoint(old: str, new: str) -> Change:
    def change(value: dict[str, Any]) -> None:
        checkpoint = entry(value)["inclusionProof"]["checkpoint"]
        assert old in checkpoint["envelope"]
        checkpoint["envelope"] = checkpoint["envelope"].replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v["verificationMaterial"].update(tlogEntries=[]), "exactly one log entry"),
        (lambda v: v["verificationMaterial"].pop("tlogEntries"), "tlogEntries"),
        (lambda v: v["verificationMaterial"]["tlogEntries"].append(entry(v)), "one log entry"),
        (swap_log_entry, "not signed by"),
        (lambda v: move_time(v, 3600), "CertificateExpired|certificate"),
        (lambda v: move_time(v, 1), "inclusion promise"),
        (lambda v: entry(v).update(integratedTime="9" * 19), "not signed by"),
        (lambda v: entry(v).update(integratedTime="9" * 40), "not signed by"),
        (lambda v: entry(v).update(logIndex="1"), "inclusion promise"),
        (lambda v: entry(v).pop("inclusionPromise"), "inclusion promise"),
        (lambda v: entry(v).pop("inclusionProof"), "inclusionProof"),
        (lambda v: entry(v)["inclusionProof"].pop("checkpoint"), "checkpoint"),
        (lambda v: entry(v)["inclusionProof"].update(treeSize="97323999"), "not signed by|log's"),
        (lambda v: entry(v)["inclusionProof"]["hashes"].pop(), "wrong size"),
        (lambda v: entry(v).update(kindVersion={"kind": "intoto", "version": "0.0.2"}), "dsse"),
        (in_checkpoint("— rekor.sigstore.dev", "— rekor.sigstore.org"), "log's checkpoint"),
        (in_checkpoint("\n\n", "\nmore\n\n"), "not signed by"),
        (lambda v: entry(v).update(more="1"), "Extra inputs"),
        (lambda v: v["verificationMaterial"].update(more=1), "unknown field 'more'"),
        (lambda v: v.update(more=1), "unknown field 'more'"),
        (lambda v: v["verificationMaterial"].pop("certificate"), "needs one `certificate`"),
        (
            lambda v: v["verificationMaterial"].update(x509CertificateChain={"certificates": []}),
            "needs one `certificate`",
        ),
        (lambda v: v["verificationMaterial"].update(publicKey={"hint": "x"}), "signed by a key"),
        (lambda v: v["verificationMaterial"]["certificate"].update(rawBytes="AAAA"), "not signed"),
        (lambda v: v["verificationMaterial"]["certificate"].update(rawBytes=7), "not signed"),
        (sign_message, "unknown field 'messageSignature'"),
        (lambda v: v["dsseEnvelope"].update(payloadType="text/plain"), "payloadType"),
        (lambda v: v["dsseEnvelope"]["signatures"].clear(), "exactly one signature"),
        (lambda v: v["dsseEnvelope"].update(payload="e30="), "not signed by"),
        (lambda v: v.update(mediaType="application/vnd.dev.sigstore.bundle+json"), "mediaType"),
    ],
)
def test_what_is_not_as_it_was_logged_is_refused(change: Change, says: str) -> None:
    line = refused(JOB, changed(BUNDLE, change))
    assert any(word in line for word in says.split("|")), line


def stamps(value: Mapping[str, Any]) -> list[dict[str, str]]:
    found = value["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda v: stamps(v).append(stamps(v)[0]),
        lambda v: stamps(v)[0].update(signedTimestamp="AAAA"),
        lambda v: stamps(v)[0].update(  # of the hash that was dated
            signedTimestamp=stamps(v)[0]["signedTimestamp"].replace("a5YfS9uN", "a5YfS9uO")
        ),
        lambda v: stamps(v)[0].update(  # of the signature over it
            signedTimestamp=stamps(v)[0]["signedTimestamp"].replace("5930xAA+", "5930xAB+")
        ),
    ],
    ids=["two", "none", "of something else", "forged"],
)
def test_a_time_stamp_that_does_not_hold_is_refused_though_the_log_has_a_time(
    change: Change,
) -> None:
    with_another = changed(OMS_BUNDLE, change)
    assert json.loads(with_another) != json.loads(OMS_BUNDLE)
    assert refused(MODELLER, with_another)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: entry(v).pop("inclusionPromise"),
        lambda v: entry(v).pop("integratedTime"),
        lambda v: entry(v).update(integratedTime="0"),
        lambda v: [entry(v).pop(name) for name in ("inclusionPromise", "integratedTime")],
    ],
    ids=["no promise", "no time", "time 0", "neither"],
)
def test_a_time_stamp_makes_up_for_no_part_of_the_log_entry(change: Change) -> None:
    assert "bundle: the log" in refused(MODELLER, changed(OMS_BUNDLE, change))


def test_a_bundle_of_a_key_is_refused_and_a_key_refuses_these(tmp_path: Path) -> None:
    key = fixed_key(tmp_path)
    assert refused(JOB, key.sign(b"{}")) == f"bundle: signed by a key, not by {JOB.identity}"
    assert refused(key, BUNDLE) == (
        "bundle: signed without a key, by a certificate; verify it by identity and issuer"
    )


def test_a_signature_of_a_key_does_not_become_the_jobs(tmp_path: Path) -> None:
    """The certificate and the log entry of a real bundle around a statement that a key signed."""
    ours = Envelope.from_bytes(fixed_key(tmp_path).sign(Envelope.from_bytes(BUNDLE).payload))
    theirs = Envelope.from_bytes(BUNDLE)
    forged = Envelope(ours.payload, ours.signature, theirs.material).to_bytes()
    assert "invalid signature" in refused(JOB, forged)
    again = Envelope(b"{}", theirs.signature, theirs.material).to_bytes()
    assert "invalid signature" in refused(JOB, again)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_refused(data: st.DataObject) -> None:
    bundle = bytearray(BUNDLE)
    place = data.draw(st.integers(0, len(bundle) - 1).filter(lambda at: bundle[at] not in b" \n"))
    bundle[place] ^= 1 << data.draw(st.integers(0, 7))
    refused(JOB, bytes(bundle))


@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_noise_is_refused(noise: bytes) -> None:
    refused(JOB, noise)


def test_too_long_a_bundle_is_not_read() -> None:
    assert "larger than 16 MiB" in refused(JOB, b" " * ((16 << 20) + 1))


def test_a_whole_model_of_another_tool_is_verified(tmp_path: Path) -> None:
    """The files of the specification's own test vector; it holds no evidence, which is said."""
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    found = check(folder, MODELLER)
    assert found.states == (State.EVIDENCE_MISSING,)
    assert found.signed is not None
    assert set(found.signed.digests) == {"signme-1", "signme-2"}
    assert found.identity == MODELLER.identity


@pytest.mark.parametrize(
    ("name", "content", "state"),
    [
        ("signme-1", b"signme-3", State.CONFIG_CHANGED),
        ("signme-1", None, State.CONFIG_CHANGED),
        ("more.bin", b"x", State.WEIGHTS_CHANGED),
        ("ignore-me", b"x", State.CONFIG_CHANGED),  # it is among `ignore_paths`
        ("model.sig", BUNDLE, State.WRONG_SIGNER),
        ("model.sig", None, State.UNSIGNED),
    ],
)
def test_one_that_was_tampered_with_is_not(
    tmp_path: Path, name: str, content: bytes | None, state: State
) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    found = check(folder, MODELLER)
    assert (found.states[0], found.exit_code) == (state, 4)


def test_what_signs_no_model_is_no_model(tmp_path: Path) -> None:
    """A genuine signature of the right signer, but over something else."""
    (tmp_path / "model.sig").write_bytes(BUNDLE)
    assert check(tmp_path, JOB).states == (State.UNSIGNED,)
    with pytest.raises(IntegrityError, match="not a model"):
        from_statement(JOB.verify(BUNDLE))


def test_a_damaged_root_of_trust_is_no_verdict_about_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert JOB.verify(BUNDLE)
    (copy,) = tmp_path.rglob("trusted_root.json")
    copy.write_text("{}")
    with pytest.raises(ReleaseGuardError, match="public keys cannot be read") as caught:
        JOB.verify(BUNDLE)
    assert not isinstance(caught.value, IntegrityError)
    assert str(caught.value).isprintable()


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sigstore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sigstore", None)
    signer = Signer.build(Spec(name="sigstore", identity=JOB.identity, issuer=JOB.issuer))
    assert signer.identity == JOB.identity
    for use in (lambda: signer.verify(BUNDLE), lambda: signer.sign(b"{}"), signer.check):
        with pytest.raises(
            ReleaseGuardError, match=r"pip install 'model-release-guard\[sigstore\]'"
        ):
            use()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "signer.identity: missing"),
        ({"identity": "a b", "issuer": GITHUB}, "signer.identity: found 'a b'"),
        ({"identity": "", "issuer": GITHUB}, "signer.identity: found ''"),
        ({"identity": "x", "issuer": "http://example.org"}, "signer.issuer: found"),
        ({"identity": "x", "issuer": GITHUB, "staging": True}, "signer.staging: not an option"),
    ],
)
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Signer.build(Spec(name="sigstore", **options), where="signer")
    assert str(caught.value).startswith(says)


def test_a_policy_names_it_and_takes_no_option_for_a_path(tmp_path: Path) -> None:
    source = (Path(__file__).parents[2] / "policies" / "quick.toml").read_text()
    table = f'[signer]\nname = "sigstore"\nidentity = "{JOB.identity}"\nissuer = "{GITHUB}"\n'
    before, _, after = source.partition("[signer]\n")
    path = tmp_path / "policy.toml"
    path.write_text(f"{before}{table}\n[hub]{after.partition('[hub]')[2]}")
    assert Signer.build(Policy.load(path).signer) == JOB
    path.write_text(source)
    key = Signer.build(Policy.load(path).signer)
    assert isinstance(key, Key)
    assert key.path == tmp_path / "key.pem"
