import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from hypothesis import given, settings
from hypothesis import strategies as st

from release_guard.dsse import Envelope, pae
from release_guard.errors import IntegrityError, ReleaseGuardError
from release_guard.keys import fingerprint, load_public_key
from release_guard.plugins import Spec
from release_guard.signers import Signer
from release_guard.signers.key import KEY_VARIABLE, PASSWORD_VARIABLE, Key, generate_key

STATEMENT = b'{"a":1}'
PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


@pytest.fixture(autouse=True)
def _no_key_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return generate_key(tmp_path_factory.mktemp("key") / "new")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return generate_key(tmp_path_factory.mktemp("other"), "secret")


def write_private(path: Path, key: PrivateKeyTypes, mode: int = 0o600) -> Path:
    path.write_bytes(key.private_bytes(PEM, PKCS8, serialization.NoEncryption()))
    path.chmod(mode)
    return path


def write_public(path: Path, key: ec.EllipticCurvePrivateKey) -> Path:
    public = key.public_key()
    path.write_bytes(public.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path


def test_what_is_signed_is_verified_by_the_public_half_alone(made: tuple[Path, Path]) -> None:
    private, public = made
    bundle = Key(path=private).sign(STATEMENT)
    assert Key(public=public).verify(bundle) == STATEMENT
    assert Key(path=private).verify(bundle) == STATEMENT
    assert Key(path=private).identity == Key(public=public).identity


def test_the_hint_is_the_fingerprint_of_the_pem(made: tuple[Path, Path]) -> None:
    private, public = made
    bundle = json.loads(Key(path=private).sign(STATEMENT))
    material = bundle["verificationMaterial"]
    assert material == {"publicKey": {"hint": Key(public=public).identity}, "tlogEntries": []}
    assert Key(public=public).identity == fingerprint(load_public_key(public))


def test_the_same_statement_gives_the_same_bundle(made: tuple[Path, Path]) -> None:
    assert Key(path=made[0]).sign(STATEMENT) == Key(path=made[0]).sign(STATEMENT)


def test_built_from_a_policy_without_reading_any_key(tmp_path: Path) -> None:
    spec = Spec.model_validate({"name": "key", "path": str(tmp_path / "nowhere.pem")})
    signer = Signer.build(spec)
    with pytest.raises(ReleaseGuardError, match="No such file"):
        signer.sign(STATEMENT)


def test_generated_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    private, public = generate_key(tmp_path / "a" / "b")
    assert (private.name, public.name) == ("key.pem", "key.pub")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    with pytest.raises(ReleaseGuardError, match="already there"):
        generate_key(tmp_path / "a" / "b")
    private.unlink()
    with pytest.raises(ReleaseGuardError, match=r"key\.pub: already there"):
        generate_key(tmp_path / "a" / "b")
    assert not private.exists()
    private.symlink_to(tmp_path / "elsewhere")
    public.unlink()
    with pytest.raises(ReleaseGuardError, match="already there"):
        generate_key(tmp_path / "a" / "b")
    assert not (tmp_path / "elsewhere").exists()
    assert b"BEGIN PRIVATE KEY" in before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReleaseGuardError, match="cannot be written"):
        generate_key(tmp_path / "file" / "sub")


def test_a_password_from_the_environment(
    other: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = other
    assert b"ENCRYPTED" in private.read_bytes()
    with pytest.raises(ReleaseGuardError, match="is encrypted; set RELEASE_GUARD_KEY_PASSWORD"):
        Key(path=private).sign(STATEMENT)
    monkeypatch.setenv(PASSWORD_VARIABLE, "wrong")
    with pytest.raises(ReleaseGuardError, match="RELEASE_GUARD_KEY_PASSWORD is wrong"):
        Key(path=private).sign(STATEMENT)
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    assert Key(public=public).verify(Key(path=private).sign(STATEMENT)) == STATEMENT


PRIVATE_FORMS = {
    "PKCS8": (PKCS8, None),
    "PKCS8 encrypted": (PKCS8, "pässword"),
    "SEC1": (serialization.PrivateFormat.TraditionalOpenSSL, None),
    "SEC1 encrypted": (serialization.PrivateFormat.TraditionalOpenSSL, "pässword"),
}


@pytest.mark.parametrize("form", PRIVATE_FORMS)
@pytest.mark.parametrize("place", ["file", "environment", "file named in the environment"])
def test_a_key_of_any_form_from_any_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, place: str
) -> None:
    """PKCS8 is what `keygen` and openssl write, SEC1 what older openssl does."""
    layout, password = PRIVATE_FORMS[form]
    private = ec.generate_private_key(ec.SECP256R1())
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password.encode())
        monkeypatch.setenv(PASSWORD_VARIABLE, password)
    pem = private.private_bytes(PEM, layout, encryption)
    assert (b"ENCRYPTED" in pem) == (password is not None)
    path = tmp_path / "key.pem"
    path.write_bytes(pem)
    path.chmod(0o600)
    if place != "file":
        monkeypatch.setenv(KEY_VARIABLE, pem.decode() if place == "environment" else str(path))
    signer = Key(path=path) if place == "file" else Key()
    signer.check()
    public = write_public(tmp_path / "key.pub", private)
    assert Key(public=public).verify(signer.sign(STATEMENT)) == STATEMENT
    assert signer.identity == Key(public=public).identity


def test_no_password_is_in_any_message(
    other: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "canary")
    monkeypatch.setenv(KEY_VARIABLE, other[0].read_text())
    for use in (Key().check, lambda: Key().sign(STATEMENT), lambda: Key().identity):
        with pytest.raises(ReleaseGuardError, match="is wrong") as caught:
            use()
        assert "canary" not in str(caught.value)
        assert other[0].read_text().splitlines()[1] not in str(caught.value)


def test_an_empty_password_is_none(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CI systems set a variable to nothing where a secret is missing."""
    monkeypatch.setenv(PASSWORD_VARIABLE, "")
    Key(path=made[0]).check()


def test_a_password_for_a_key_that_has_none(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    with pytest.raises(ReleaseGuardError, match="not encrypted; unset"):
        Key(path=made[0]).sign(STATEMENT)


@pytest.mark.parametrize("form", ["path", "pem"])
def test_a_key_from_the_environment(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    private, public = made
    monkeypatch.setenv(KEY_VARIABLE, str(private) if form == "path" else private.read_text())
    assert Key(public=public).verify(Key().sign(STATEMENT)) == STATEMENT
    assert Key().identity == Key(public=public).identity


def test_no_key_at_all() -> None:
    for use in (Key().check, lambda: Key().sign(STATEMENT)):
        with pytest.raises(ReleaseGuardError, match="set RELEASE_GUARD_SIGNING_KEY"):
            use()


def test_a_damaged_key_in_the_environment_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        KEY_VARIABLE, "-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----"
    )
    with pytest.raises(
        ReleaseGuardError, match="RELEASE_GUARD_SIGNING_KEY: not a private"
    ) as caught:
        Key().sign(STATEMENT)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777, 0o620])
def test_a_key_that_others_can_use_is_refused(
    made: tuple[Path, Path], tmp_path: Path, mode: int
) -> None:
    copy = Path(shutil.copy(made[0], tmp_path / "key.pem"))
    copy.chmod(mode)
    with pytest.raises(ReleaseGuardError, match=r"chmod 600 .*key\.pem"):
        Key(path=copy).sign(STATEMENT)


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    others: list[PrivateKeyTypes] = [
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256K1()),
        ec.generate_private_key(ec.SECP384R1()),
    ]
    for number, key in enumerate(others):
        path = write_private(tmp_path / f"{number}.pem", key)
        with pytest.raises(ReleaseGuardError, match="not an EC key on P-256"):
            Key(path=path).sign(STATEMENT)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x00\xff", b"-----BEGIN PRIVATE KEY-----\nMIG\n-----END PRIVATE KEY-----\n"],
)
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ReleaseGuardError, match="PEM"):
        Key(path=path).sign(STATEMENT)
    with pytest.raises(ReleaseGuardError, match=r"private key|not a public key in PEM"):
        Key(public=path).verify(b"{}")


def test_the_wrong_half(made: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = made
    with pytest.raises(ReleaseGuardError, match="a public key; signing needs the private one"):
        Key(path=public).sign(STATEMENT)
    with pytest.raises(ReleaseGuardError, match="a private key; give the public one"):
        Key(public=private).verify(b"{}")
    write_public(tmp_path / "k1.pub", ec.generate_private_key(ec.SECP256K1()))
    with pytest.raises(ReleaseGuardError, match="P-256, P-384 or P-521"):
        Key(public=tmp_path / "k1.pub").verify(b"{}")


def test_halves_of_different_pairs(made: tuple[Path, Path], other: tuple[Path, Path]) -> None:
    mixed = Key(path=made[0], public=other[1])
    for use in (mixed.check, lambda: mixed.sign(STATEMENT)):
        with pytest.raises(ReleaseGuardError, match="not the public half"):
            use()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_key_that_cannot_be_read(made: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copy(made[0], tmp_path / "key.pem"))
    copy.chmod(0)
    with pytest.raises(ReleaseGuardError, match="cannot be read"):
        Key(path=copy).sign(STATEMENT)


def test_another_signer_is_refused(made: tuple[Path, Path], other: tuple[Path, Path]) -> None:
    bundle = Key(path=made[0]).sign(STATEMENT)
    with pytest.raises(IntegrityError, match="signed by the key"):
        Key(public=other[1]).verify(bundle)
    forged = json.loads(bundle)
    forged["verificationMaterial"]["publicKey"]["hint"] = Key(public=other[1]).identity
    with pytest.raises(IntegrityError, match="does not fit"):
        Key(public=other[1]).verify(json.dumps(forged).encode())


@pytest.mark.parametrize(
    ("curve", "algorithm"),
    [
        (ec.SECP256R1(), hashes.SHA256()),
        (ec.SECP384R1(), hashes.SHA384()),
        (ec.SECP521R1(), hashes.SHA512()),
    ],
    ids=["P-256", "P-384", "P-521"],
)
@pytest.mark.parametrize("material", ["hint", "empty hint", "raw", "without log"])
def test_bundles_of_other_tools_are_verified(
    tmp_path: Path, curve: ec.EllipticCurve, algorithm: hashes.HashAlgorithm, material: str
) -> None:
    private = ec.generate_private_key(curve)
    public = write_public(tmp_path / "key.pub", private)
    hint = fingerprint(private.public_key())
    materials = {
        "hint": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "empty hint": {"publicKey": {"hint": ""}, "tlogEntries": []},
        "raw": {"publicKey": {"rawBytes": "YQ==", "keyDetails": "X"}, "tlogEntries": []},
        "without log": {"publicKey": {"hint": hint}},
    }
    signature = private.sign(pae(STATEMENT), ec.ECDSA(algorithm))
    bundle = Envelope(STATEMENT, signature, materials[material]).to_bytes()
    assert Key(public=public).verify(bundle) == STATEMENT
    weak = private.sign(pae(STATEMENT), ec.ECDSA(hashes.SHA1()))  # noqa: S303  must be refused
    with pytest.raises(IntegrityError, match="does not fit"):
        Key(public=public).verify(Envelope(STATEMENT, weak, materials[material]).to_bytes())


@pytest.mark.parametrize(
    "material",
    [
        {},
        {"publicKey": None},
        {"publicKey": {}},
        {"publicKey": {"hint": 1}},
        {"publicKey": {"hint": ["x"]}},
        {"certificate": {"rawBytes": "YQ=="}},
        {"publicKey": {"hint": ""}, "tlogEntries": [{}]},
        {"publicKey": {"hint": ""}, "tlogEntries": {}},
    ],
)
def test_other_material_is_refused(made: tuple[Path, Path], material: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match="bundle"):
        Key(public=made[1]).verify(Envelope(STATEMENT, b"x", material).to_bytes())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_flipped_bit_of_a_bundle_is_refused(
    made: tuple[Path, Path], data: st.DataObject
) -> None:
    bundle = bytearray(Key(path=made[0]).sign(STATEMENT))
    place = data.draw(st.integers(0, len(bundle) - 1))
    bundle[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(IntegrityError):
        Key(public=made[1]).verify(bytes(bundle))
