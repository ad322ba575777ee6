import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_signing
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from goldens import same_as_golden
from hypothesis import given
from hypothesis import strategies as st
from judged import FILES, NOW, check, fixed_key, judge, theirs_accepts, write

from release_guard.errors import IntegrityError
from release_guard.manifest import (
    SIGNATURE,
    DirectoryTree,
    FileEntry,
    Manifest,
    hash_directory,
    require_canonical,
)
from release_guard.oms import from_statement, sign, to_statement
from release_guard.release import Attested
from release_guard.signers.key import KEY_VARIABLE, PASSWORD_VARIABLE, Key, generate_key
from release_guard.verify import State, Trust, verify  # the whole way a consumer goes

MANIFEST = Manifest.of(
    [
        FileEntry("config.json", "11" * 32, 3),
        FileEntry("model.safetensors", "22" * 32, 4),
        FileEntry("model/a", "33" * 32, 5),
        FileEntry("ä", "44" * 32, 6),
    ]
)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return fixed_key(tmp_path_factory.mktemp("keys"))


def fill(folder: Path) -> Path:
    for name, content in FILES.items():
        write(folder, name, content)
    return folder


def seal(folder: Path, key: Key) -> Path:
    """Sign a folder as a model, without any evidence."""
    statement = to_statement(hash_directory(folder).without(SIGNATURE), name=folder.name)
    return write(folder, SIGNATURE, key.sign(statement))


def theirs_signs(folder: Path, private: Path, **hashing: Any) -> None:
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=private)
    ignored = model_signing.hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE])
    if hashing:
        ignored.use_file_serialization(**hashing)
    config.set_hashing_config(ignored).sign(folder, folder / SIGNATURE)


def ours_accepts(folder: Path, key: Key) -> bool:
    """Whether we find the files as signed; such a folder holds no evidence, which is said too."""
    found = verify(DirectoryTree(folder), Trust(key), now=NOW)
    return found.states == (State.EVIDENCE_MISSING,)


def test_the_statement_is_byte_for_byte_the_golden_one(key: Key) -> None:
    statement = to_statement(MANIFEST, name="model")
    same_as_golden("oms_statement.json", statement)
    same_as_golden("oms_model.sig", key.sign(statement))


def test_a_statement_says_which_files_and_what_was_left_out() -> None:
    signed = from_statement(to_statement(MANIFEST, name="model"))
    assert signed.digests == {entry.name: entry.digest for entry in MANIFEST.entries}
    assert signed.root == MANIFEST.root
    assert signed.ignored == (".git", ".gitattributes", ".github", ".gitignore", "model.sig")


_NAMES = st.text(min_size=1, max_size=8).filter(lambda name: not _refused(name))


def _refused(name: str) -> bool:
    try:
        require_canonical(name)
    except IntegrityError:
        return True
    return False


@given(st.dictionaries(_NAMES, st.binary(min_size=32, max_size=32).map(bytes.hex), min_size=1))
def test_any_manifest_comes_back_as_it_went(files: dict[str, str]) -> None:
    manifest = Manifest.of(FileEntry(name, digest, 1) for name, digest in files.items())
    source = to_statement(manifest, name="m")
    signed = from_statement(source)
    assert (signed.digests, signed.root) == (files, manifest.root)


def test_nothing_is_not_signed() -> None:
    with pytest.raises(IntegrityError, match="no file"):
        to_statement(Manifest(()), name="model")


def change_serialization(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda statement: statement["predicate"]["serialization"].update(values)


def change_resource(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda statement: statement["predicate"]["resources"][0].update(values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(predicateType="https://model_signing/Digests/v0.1"), "not a model"),
        (lambda s: s["predicate"].update(more=1), "unknown field 'more'"),
        (lambda s: s["predicate"].pop("serialization"), "not an object"),
        (change_serialization(method="shards", shard_size=1), "unknown field"),
        (change_serialization(method="shards"), "only 'files' and 'sha256'"),
        (change_serialization(hash_type="blake3"), "only 'files' and 'sha256'"),
        (change_serialization(allow_symlinks="false"), "allow_symlinks"),
        (change_serialization(ignore_paths="model.sig"), "not a list"),
        (change_serialization(ignore_paths=[1]), "not a text"),
        (lambda s: s["predicate"].update(resources=[]), "lists no file"),
        (lambda s: s["predicate"].update(resources={}), "lists no file"),
        (lambda s: s["predicate"]["resources"].append("x"), "not an object"),
        (lambda s: s["predicate"]["resources"].reverse(), "not sorted"),
        (lambda s: s["predicate"]["resources"].insert(0, s["predicate"]["resources"][0]), "twice"),
        (lambda s: s["predicate"]["resources"].pop(), "root digest"),
        (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "root digest"),
        (lambda s: s["subject"].append(s["subject"][0]), "root digest"),
        (change_resource(name="../config.json"), "not a file name"),
        (change_resource(name="/config.json"), "not a file name"),
        (change_resource(name="./config.json"), "not a file name"),
        (change_resource(name="a//b"), "not a file name"),
        (change_resource(name=""), "not a text"),
        (change_resource(name=None), "not a text"),
        (change_resource(digest="11" * 31), "lowercase hex"),
        (change_resource(digest="AA" * 32), "lowercase hex"),
        (change_resource(algorithm="blake2b"), "not SHA-256"),
    ],
)
def test_other_statements_are_refused(change: Callable[[dict[str, Any]], Any], says: str) -> None:
    statement = json.loads(to_statement(MANIFEST, name="model"))
    change(statement)
    with pytest.raises(IntegrityError, match=says):
        from_statement(json.dumps(statement).encode())


def test_what_the_specification_leaves_open_is_accepted() -> None:
    statement = json.loads(to_statement(MANIFEST, name="model"))
    del statement["predicate"]["serialization"]["ignore_paths"]
    statement["predicate"]["serialization"]["allow_symlinks"] = True
    statement["predicate"]["resources"][0]["size"] = 3
    assert from_statement(json.dumps(statement).encode()).ignored == ()


def test_files_sorted_by_path_components_are_accepted() -> None:
    statement = json.loads(to_statement(MANIFEST, name="model"))
    resources = statement["predicate"]["resources"]
    resources[1], resources[2] = resources[2], resources[1]  # model/a before model.safetensors
    entries = [FileEntry(str(place), each["digest"], 0) for place, each in enumerate(resources)]
    statement["subject"][0]["digest"]["sha256"] = Manifest.of(entries).root
    signed = from_statement(json.dumps(statement).encode())
    assert list(signed.digests) == ["config.json", "model/a", "model.safetensors", "ä"]


def test_signing_refuses_what_was_not_judged(tmp_path: Path, key: Key) -> None:
    candidate = judge(tmp_path / "model", key).candidate
    attested = Attested(candidate.directory, candidate.verdict, candidate.payload)
    write(tmp_path / "model", "config.json", b'{"hidden_size": 9}')
    with pytest.raises(IntegrityError, match="changed since they were judged"):
        sign(attested, key)
    assert not (tmp_path / "model" / SIGNATURE).exists()


def test_signing_covers_every_file_and_comes_last(tmp_path: Path, key: Key) -> None:
    release = judge(tmp_path / "model", key).release()
    signed = from_statement(key.verify((tmp_path / "model" / SIGNATURE).read_bytes()))
    names = {entry.name for entry in hash_directory(tmp_path / "model").entries}
    assert set(signed.digests) == names - {SIGNATURE}
    assert {*FILES, ".release-guard/svr.sigstore.json"} <= set(signed.digests)
    assert release.manifest == hash_directory(tmp_path / "model")
    again = sign(release, key)
    assert again.manifest == release.manifest


def test_theirs_accepts_ours(tmp_path: Path, key: Key) -> None:
    folder = tmp_path / "model"
    judge(folder, key).release()
    assert theirs_accepts(folder, key)
    assert theirs_accepts(folder.rename(tmp_path / "renamed"), key)


def test_theirs_accepts_what_an_encrypted_key_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = generate_key(tmp_path / "keys", "pässword")
    monkeypatch.setenv(PASSWORD_VARIABLE, "pässword")
    monkeypatch.setenv(KEY_VARIABLE, private.read_text())
    folder = tmp_path / "mödel 模型"
    write(folder, "模型/weights ü.safetensors", b"weights")
    judge(folder, Key()).release()
    monkeypatch.delenv(KEY_VARIABLE)
    monkeypatch.delenv(PASSWORD_VARIABLE)
    assert theirs_accepts(folder, Key(public=public))
    assert check(folder, Key(public=public)).states == (State.INTACT,)


def test_their_command_accepts_ours(tmp_path: Path, key: Key) -> None:
    folder = tmp_path / "model"
    judge(folder, key).release()
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / SIGNATURE), "--public_key", str(key.public)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    assert done.returncode == 0, done.stderr
    write(folder, "config.json", b"{}")
    assert subprocess.run(command, capture_output=True, check=False, env=environment).returncode  # noqa: S603


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "other key", "flipped"])
def test_theirs_and_ours_refuse_the_same(tmp_path: Path, key: Key, damage: str) -> None:
    folder = fill(tmp_path / "model")
    seal(folder, key)
    assert theirs_accepts(folder, key)
    assert ours_accepts(folder, key)
    match damage:
        case "changed":
            write(folder, "model.safetensors", b"other")
        case "missing":
            (folder / "sub/vocab ä.txt").unlink()
        case "added":
            write(folder, "more.bin", b"x")
        case "other key":
            key = fixed_key(tmp_path, 2)
        case "flipped":
            source = json.loads((folder / SIGNATURE).read_bytes())
            sig = source["dsseEnvelope"]["signatures"][0]["sig"]
            source["dsseEnvelope"]["signatures"][0]["sig"] = sig[:20] + "AAAA" + sig[24:]
            write(folder, SIGNATURE, json.dumps(source).encode())
    assert not theirs_accepts(folder, key)
    assert not ours_accepts(folder, key)


@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name
)
@pytest.mark.parametrize("hashing", [{}, {"hashing_algorithm": "sha256", "allow_symlinks": True}])
def test_ours_accepts_theirs(
    tmp_path: Path, curve: ec.EllipticCurve, hashing: dict[str, Any]
) -> None:
    folder = fill(tmp_path / "model")
    write(folder, "model/nested.json", b"{}")  # sorts differently by components
    private = ec.generate_private_key(curve)
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    key = Key(public=write(tmp_path, "key.pub", public))
    theirs_signs(folder, write(tmp_path, "key.pem", pem), **hashing)
    assert ours_accepts(folder, key)
    write(folder, "config.json", b"[]")
    assert not ours_accepts(folder, key)


def test_their_blake2_is_refused_by_name(tmp_path: Path, key: Key) -> None:
    folder = fill(tmp_path / "model")
    assert key.path is not None
    theirs_signs(folder, key.path, hashing_algorithm="blake2")
    with pytest.raises(IntegrityError, match="'blake2b'"):
        from_statement(key.verify((folder / SIGNATURE).read_bytes()))
