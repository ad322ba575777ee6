"""Whom a consumer trusts, and what the pin file remembers of it."""

import base64
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import NOW, Judged, fixed_key, judge, released, write

from release_guard.attestation import KEY_FILE
from release_guard.dsse import Envelope
from release_guard.errors import IntegrityError, PolicyError, ReleaseGuardError
from release_guard.manifest import SIGNATURE, DirectoryTree, hash_directory
from release_guard.oms import to_statement
from release_guard.pins import Pins, choose
from release_guard.signers.key import Key
from release_guard.trust import MAX_KEY, Trusted, carried_key, first_seen
from release_guard.verify import State, Trust, Verification, verify

HEX = "ab" * 32
PLACE = "hf://acme/classifier"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return released(tmp_path_factory.mktemp("release"))


@pytest.fixture
def folder(judged: Judged, tmp_path: Path) -> Path:
    return Path(shutil.copytree(judged.candidate.directory, tmp_path / "model"))


@pytest.fixture
def pins(tmp_path: Path) -> Pins:
    return Pins(tmp_path / "config" / "pins.toml")


def check(folder: Path, trusted: Trusted) -> Verification:
    tree = DirectoryTree(folder)
    return verify(tree, Trust(trusted.voucher(tree)), now=NOW)


def resign(folder: Path, signer: Key, *, carried: bytes | None) -> None:
    """Everything signed by somebody else, with this as `key.pub`."""
    (folder / SIGNATURE).unlink()
    (folder / KEY_FILE).unlink(missing_ok=True)
    if carried is not None:
        write(folder, KEY_FILE, carried)
    write(folder, SIGNATURE, signer.sign(to_statement(hash_directory(folder), name="model")))


def pinned(pins: Pins, text: str) -> Pins:
    pins.path.parent.mkdir(parents=True, exist_ok=True)
    pins.path.write_text(text)
    pins.path.chmod(0o600)
    return pins


def test_a_fingerprint_is_enough_for_a_release_that_carries_its_key(
    folder: Path, judged: Judged
) -> None:
    found = check(folder, Trusted(fingerprint=judged.signer.identity))
    assert (found.states, found.identity) == ((State.INTACT,), judged.signer.identity)


@pytest.mark.parametrize("spelt", ["{}", "sha256:{}", "SHA256:{}"])
def test_a_fingerprint_may_be_spelt_as_others_do(judged: Judged, spelt: str) -> None:
    trusted = Trusted(fingerprint=spelt.format(judged.signer.identity.upper()))
    assert trusted.fingerprint == judged.signer.identity


def test_a_stranger_gains_nothing_by_carrying_a_key(
    folder: Path, judged: Judged, tmp_path: Path
) -> None:
    """His own is not the one that was asked for; that one does not fit what he signed."""
    stranger, trusted = fixed_key(tmp_path, 2), Trusted(fingerprint=judged.signer.identity)
    for carried in (stranger.public_key, judged.signer.public_key, None, b"", b"\xff", b"x" * 99):
        resign(folder, stranger, carried=carried)
        found = check(folder, trusted)
        assert (found.states, found.exit_code) == ((State.WRONG_SIGNER,), 4), carried


def test_a_private_key_by_mistake_is_no_key_to_check_with(
    folder: Path, judged: Judged, tmp_path: Path
) -> None:
    resign(folder, judged.signer, carried=Path(str(judged.signer.path)).read_bytes())
    assert check(folder, Trusted(fingerprint=judged.signer.identity)).exit_code == 4


def test_a_release_without_its_key_needs_the_key(folder: Path, judged: Judged) -> None:
    resign(folder, judged.signer, carried=None)
    found = check(folder, Trusted(fingerprint=judged.signer.identity))
    assert found.states == (State.WRONG_SIGNER,)
    assert "give the key itself with --key" in found.findings[0].message
    assert check(folder, Trusted(key=judged.signer.public)).states == (State.INTACT,)


def test_a_huge_key_is_not_read(folder: Path) -> None:
    write(folder, KEY_FILE, b"x" * (MAX_KEY + 1))
    assert carried_key(DirectoryTree(folder)) is None


def test_the_key_is_part_of_what_is_signed(folder: Path, judged: Judged, tmp_path: Path) -> None:
    write(folder, KEY_FILE, fixed_key(tmp_path, 2).public_key)
    found = check(folder, Trusted(key=judged.signer.public))
    assert found.states == (State.EVIDENCE_INVALID,)


def test_an_identity_is_for_the_sigstore_signer(folder: Path) -> None:
    trusted = Trusted(identity="a@example.org", issuer="https://example.org")
    try:
        found = check(folder, trusted)
    except ReleaseGuardError:
        return  # the plug-in, or what it needs, is not there
    assert found.states == (State.WRONG_SIGNER,)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"identity": "a"}, "give both"),
        ({"issuer": "https://x"}, "give both"),
        ({"key": Path("k"), "fingerprint": HEX}, "exactly one"),
        ({"key": Path("k"), "identity": "a", "issuer": "b"}, "exactly one"),
        ({"fingerprint": "abc"}, "64 digits"),
        ({"fingerprint": HEX[:-1]}, "64 digits"),
        ({"fingerprint": HEX + "\n"}, "64 digits"),
        ({"fingerprint": ""}, "64 digits"),
        ({"identity": "a\x1b[2J", "issuer": "b"}, "--identity: must be a name"),
        ({"identity": "a", "issuer": ""}, "--issuer: must be a name"),
    ],
)
def test_exactly_one_signer_can_be_named(options: dict[str, object], told: str) -> None:
    with pytest.raises(PolicyError, match=told) as error:
        Trusted.given({"key": None, **options})
    assert "\n" not in str(error.value)


def test_naming_nobody_is_no_error() -> None:
    assert Trusted.given(dict.fromkeys(("key", "fingerprint", "identity", "issuer"))) is None


def test_nobody_is_trusted_unless_somebody_says_so(folder: Path, pins: Pins) -> None:
    with pytest.raises(PolicyError, match="--fingerprint, or --identity") as error:
        choose(PLACE, DirectoryTree(folder), pins, given=None, first_use=False)
    assert error.value.exit_code == 2
    assert not pins.path.exists()


def test_first_use_trusts_whoever_signed_and_later_use_nobody_else(
    folder: Path, judged: Judged, pins: Pins, tmp_path: Path
) -> None:
    tree = DirectoryTree(folder)
    first = choose(PLACE, tree, pins, given=None, first_use=True)
    assert (first.source, first.trusted) == ("first use", first_seen(tree))
    pins.add(PLACE, first.trusted)

    stranger = fixed_key(tmp_path, 2)
    resign(folder, stranger, carried=stranger.public_key)
    later = choose(PLACE, tree, pins, given=None, first_use=True)
    assert (later.source, later.trusted) == ("pin file", first.trusted)
    assert check(folder, later.trusted).states == (State.WRONG_SIGNER,)
    with pytest.raises(IntegrityError, match="pinned to the key"):
        pins.add(PLACE, first_seen(tree))
    assert pins.get(PLACE) == first.trusted


def test_who_is_named_comes_before_who_is_pinned(folder: Path, pins: Pins) -> None:
    pins.add(PLACE, Trusted(fingerprint=HEX))
    named = Trusted(fingerprint="cd" * 32)
    choice = choose(PLACE, DirectoryTree(folder), pins, given=named, first_use=False)
    assert (choice.trusted, choice.source) == (named, "command line")


def test_first_use_needs_a_key_to_remember(folder: Path, pins: Pins) -> None:
    (folder / KEY_FILE).unlink()
    with pytest.raises(PolicyError, match="to trust on first use"):
        choose(PLACE, DirectoryTree(folder), pins, given=None, first_use=True)
    write(folder, KEY_FILE, b"nonsense")
    with pytest.raises(IntegrityError, match="not a public key"):
        choose(PLACE, DirectoryTree(folder), pins, given=None, first_use=True)


def certificate(*names: x509.GeneralName, issuer: bytes | None = b"https://issuer.org") -> bytes:
    """Signed by itself, so worth nothing, but written as Sigstore's are."""
    private, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    made = made.public_key(private.public_key()).serial_number(1)
    made = made.not_valid_before(NOW).not_valid_after(NOW)
    if names:
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=True)
    if issuer is not None:
        oid = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
        made = made.add_extension(x509.UnrecognizedExtension(oid, issuer), critical=False)
    return made.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def keyless(folder: Path, raw: object) -> DirectoryTree:
    """A release that names a certificate instead of a key."""
    (folder / KEY_FILE).unlink(missing_ok=True)
    material = {"certificate": {"rawBytes": raw}, "tlogEntries": []}
    write(folder, SIGNATURE, Envelope(b"{}", b"x", material).to_bytes())
    return DirectoryTree(folder)


WORKFLOW = x509.UniformResourceIdentifier("https://github.com/a/b/.github/workflows/c.yml@main")


def test_first_use_of_a_keyless_release_names_the_identity_and_its_issuer(
    folder: Path, pins: Pins
) -> None:
    tree = keyless(folder, base64.b64encode(certificate(WORKFLOW)).decode())
    seen = choose(PLACE, tree, pins, given=None, first_use=True).trusted
    assert seen == Trusted(identity=WORKFLOW.value, issuer="https://issuer.org")
    pins.add(PLACE, seen)
    assert pins.get(PLACE) == seen
    try:  # and that it claims to be it is not enough
        assert check(folder, seen).states == (State.WRONG_SIGNER,)
    except ReleaseGuardError as error:
        assert "sigstore" in str(error)  # noqa: PT017  not installed


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"nonsense",
        certificate(),
        certificate(WORKFLOW, issuer=None),
        certificate(WORKFLOW, issuer=b"\xff"),
        certificate(WORKFLOW, issuer=b"https://x\x1b[2J"),
        certificate(WORKFLOW, x509.RFC822Name("a@b.c")),
        certificate(x509.DNSName("")),
    ],
    ids=range(8),
)
def test_a_certificate_that_names_nobody_is_refused(folder: Path, raw: bytes) -> None:
    with pytest.raises(IntegrityError, match="names nobody"):
        first_seen(keyless(folder, base64.b64encode(raw).decode()))


@pytest.mark.parametrize("raw", [None, 3, [], "?"])
def test_what_is_no_certificate_is_refused(folder: Path, raw: object) -> None:
    with pytest.raises(IntegrityError, match="names nobody"):
        first_seen(keyless(folder, raw))


def test_a_pin_is_for_its_owner_alone_and_for_one_model(pins: Pins) -> None:
    before = os.umask(0)
    try:
        pins.add(PLACE, Trusted(fingerprint=HEX))
    finally:
        os.umask(before)
    assert stat.S_IMODE(pins.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(pins.path.parent.stat().st_mode) == 0o700
    assert pins.get(PLACE) == Trusted(fingerprint=HEX)
    assert pins.get("hf://acme/other") is None


def test_what_the_owner_wrote_stays(pins: Pins) -> None:
    text = '# mine\n[pins."a"]\nidentity = "me@x.org"\nissuer = "https://x.org"\n[pins.b]\n'
    pinned(pins, f'{text}fingerprint = "{HEX}"')
    pins.add(PLACE, Trusted(fingerprint=HEX))
    assert pins.path.read_text().startswith(text)
    assert pins.get("a") == Trusted(identity="me@x.org", issuer="https://x.org")
    assert pins.get("b") == pins.get(PLACE) == Trusted(fingerprint=HEX)
    assert sorted(path.name for path in pins.path.parent.iterdir()) == [
        "pins.toml",
        "pins.toml.lock",
    ]


def test_a_pinned_key_lies_beside_the_pin_file(
    folder: Path, judged: Judged, pins: Pins, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned(pins, f'[pins."{PLACE}"]\nkey = "acme.pub"\n')
    shutil.copy(str(judged.signer.public), pins.path.with_name("acme.pub"))
    monkeypatch.chdir("/")
    trusted = pins.get(PLACE)
    assert trusted is not None
    assert check(folder, trusted).states == (State.INTACT,)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[pins", "not TOML"),
        ("schema_version = 2", "schema_version"),
        ("other = 1", "other"),
        ("pins = 3", "pins"),
        ('[pins."hf://acme/classifier"]', "exactly one"),
        ('[pins."hf://acme/classifier"]\nfingerprint = "abc"', "fingerprint"),
        ('[pins."hf://acme/classifier"]\nfingerprint = 3', "fingerprint"),
        ('[pins."hf://acme/classifier"]\nfingerprnt = "abc"', "fingerprnt"),
        (f'[pins."x"]\nfingerprint = "{HEX}"\nkey = "k"', "exactly one"),
        ("\x00", "not TOML"),
        ("a=" + "[" * 5000, "not TOML"),
        ("#" * ((1 << 20) + 1), "larger than"),
    ],
)
def test_a_pin_file_that_is_not_understood_says_nothing(pins: Pins, text: str, told: str) -> None:
    pinned(pins, text)
    for ask in (lambda: pins.get(PLACE), lambda: pins.add(PLACE, Trusted(fingerprint=HEX))):
        with pytest.raises(PolicyError, match=told) as error:
            ask()
        assert "\n" not in str(error.value)
        assert str(pins.path) in str(error.value)
    assert pins.path.read_text() == text


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_pin_file_that_others_can_write_is_not_believed(pins: Pins, mode: int) -> None:
    pins.add(PLACE, Trusted(fingerprint=HEX))
    pins.path.chmod(mode)
    with pytest.raises(PolicyError, match="others can write it"):
        pins.get(PLACE)


def test_a_pin_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, "config", b"a file, no folder")
    pins = Pins(tmp_path / "config" / "pins.toml")
    with pytest.raises(ReleaseGuardError, match="nothing is pinned"):
        pins.add(PLACE, Trusted(fingerprint=HEX))


@settings(max_examples=100, deadline=None)
@given(
    st.text(min_size=1).filter(lambda text: text.isprintable())
    | st.sampled_from(["\x7f", "a\nb", '"', "\\", "\U0001f600", "é", "]", "a.b", "'", "#"])
)
def test_any_name_is_pinned_as_itself_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    pins = Pins(tmp_path_factory.mktemp("config") / "pins.toml")
    try:
        pins.add(name, Trusted(fingerprint=HEX))
    except PolicyError:
        assert not pins.path.exists()
    else:
        assert pins.get(name) == Trusted(fingerprint=HEX)
        assert pins.get(f"{name} ") is None


def test_of_two_first_uses_at_once_only_one_signer_is_pinned(pins: Pins) -> None:
    """Ten processes' worth of hurry: whoever comes second must be told, not believed."""
    said: list[str] = []

    def add(number: int) -> None:
        try:
            pins.add(PLACE, Trusted(fingerprint=f"{number:02x}" * 32))
        except IntegrityError:
            said.append("refused")
        else:
            said.append(f"{number:02x}" * 32)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (each for each in said if each != "refused")
    assert pins.get(PLACE) == Trusted(fingerprint=winner)


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"RELEASE_GUARD_PINS": "/a/b.toml"}, "/a/b.toml"),
        ({"XDG_CONFIG_HOME": "/x"}, "/x/release-guard/pins.toml"),
        ({"XDG_CONFIG_HOME": "relative"}, "/home/me/.config/release-guard/pins.toml"),
        ({}, "/home/me/.config/release-guard/pins.toml"),
    ],
)
def test_where_the_pin_file_lies(
    variables: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RELEASE_GUARD_PINS", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Pins.default().path == Path(wanted)


class Keyless(Key):
    """Signs, but has no key that would be worth publishing."""

    @property
    def public_key(self) -> None:  # type: ignore[override]
        return None


def test_a_signer_without_a_key_leaves_no_key_of_another(judged: Judged, tmp_path: Path) -> None:
    signer = Keyless(path=judged.signer.path, public=judged.signer.public)
    for each, carries in ((judged.signer, True), (signer, False), (judged.signer, True)):
        folder = tmp_path / str(carries)
        write(folder, KEY_FILE, b"of an earlier signer")
        judge(folder, each).release()
        assert (folder / KEY_FILE).exists() is carries
        assert check(folder, Trusted(key=judged.signer.public)).states == (State.INTACT,)


def test_trust_loads_no_client_of_the_hub() -> None:
    code = "import sys, release_guard.pins, release_guard.targets, release_guard.inspection\n"
    code += "sys.exit(str(sorted({'torch', 'huggingface_hub', 'httpx2'} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.stderr.strip() == "[]"
