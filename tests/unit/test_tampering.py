"""Two verifiers that share no code must say the same of every release, intact or tampered with."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import independent_verifier
import pytest
from evidence_builder import example_policy
from goldens import FOLDER
from judged import NOW, Judged, check, fixed_key, released, write
from make_compat import PRECISIONS, make
from tampering import CASES, HARMLESS, Made

from release_guard.attestation import PREDICATE_TYPES
from release_guard.errors import IntegrityError
from release_guard.keys import load_public_key
from release_guard.manifest import hash_directory
from release_guard.oms import from_statement
from release_guard.signers.key import Key
from release_guard.verify import State

COMPAT = Path(__file__).parents[1] / "compat"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return released(tmp_path_factory.mktemp("release"), policy=example_policy(PRECISIONS))


@pytest.fixture
def made(judged: Judged, tmp_path: Path) -> Made:
    folder = shutil.copytree(judged.candidate.directory, tmp_path / "model")
    return Made(Path(folder), judged, fixed_key(tmp_path, 2))


def agrees(folder: Path, key: Path, policy: str | None = None, now: datetime = NOW) -> str:
    """What the other verifier says: nothing, or what is wrong."""
    try:
        independent_verifier.verify(folder, key, policy, now)
    except independent_verifier.FAULTS as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("name", CASES)
def test_both_find_that_a_release_was_tampered_with(made: Made, name: str) -> None:
    case, key = CASES[name], made.judged.signer.public
    assert key is not None
    case.change(made)

    found = check(made.folder, Key(public=key), case.policy, now=case.now)
    assert found.states[0] is case.state, found.findings
    fault = agrees(made.folder, key, case.policy, case.now)
    assert bool(fault) is not case.by_gate, fault
    if case.by_gate:  # what the other one covers is what ours finds without the gate
        assert check(made.folder, Key(public=key), rejudge=False).states == (State.INTACT,)


@pytest.mark.parametrize("name", HARMLESS)
def test_both_find_a_release_intact_that_nobody_harmed(made: Made, name: str) -> None:
    key = made.judged.signer.public
    assert key is not None
    HARMLESS[name](made)

    found = check(made.folder, Key(public=key))
    assert (found.states, found.findings) == ((State.INTACT,), ())
    assert agrees(made.folder, key) == ""


@pytest.mark.parametrize("target", ["config.json", "sub", "nowhere", "/etc/hostname"])
def test_neither_takes_a_link(made: Made, target: str) -> None:
    (made.folder / "link").symlink_to(target)
    key = made.judged.signer.public
    assert key is not None
    with pytest.raises(Exception, match="links"):
        check(made.folder, Key(public=key))
    assert "a link" in agrees(made.folder, key)


def test_both_read_the_golden_signature_and_nothing_that_differs_in_a_byte(tmp_path: Path) -> None:
    """But for white space, there is not one byte in it that may be another."""
    signer, golden = fixed_key(tmp_path, 1), (FOLDER / "oms_model.sig").read_bytes()
    path, key = write(tmp_path, "model.sig", golden), Key(public=signer.public)
    public = load_public_key(tmp_path / "1.pub")
    found = independent_verifier.signed_files(independent_verifier.statement(path, public))
    assert found == from_statement(key.verify(golden)).digests
    for place in range(len(golden)):
        changed = golden[:place] + bytes([golden[place] ^ 1]) + golden[place + 1 :]
        path.write_bytes(changed)
        with pytest.raises(IntegrityError):
            from_statement(key.verify(changed))
        with pytest.raises(independent_verifier.FAULTS):
            independent_verifier.signed_files(independent_verifier.statement(path, public))


@pytest.mark.parametrize("kind", independent_verifier.CLAIMS)
def test_both_take_the_golden_statements_for_what_they_are(kind: str) -> None:
    found = json.loads((FOLDER / f"{kind}_statement.json").read_bytes())
    assert found["predicateType"] == independent_verifier.CLAIMS[kind] == PREDICATE_TYPES[kind]


@pytest.mark.parametrize("number", [2, 3])
def test_both_find_stored_releases_intact_and_a_changed_byte_in_any_file(
    number: int, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(COMPAT / f"schema-{number}", tmp_path / "release"))
    key = COMPAT / f"schema-{number}.pub"
    assert check(folder, Key(public=key)).states == (State.INTACT,)
    assert agrees(folder, key) == ""
    for entry in hash_directory(folder).entries:
        path = folder / entry.name
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert check(folder, Key(public=key)).states != (State.INTACT,), entry.name
        assert agrees(folder, key), entry.name
        path.write_bytes(before)


def test_todays_release_is_made_as_the_stored_one_was(tmp_path: Path) -> None:
    """Files apart that time or version change; what is signed is written the same for now."""
    made = make(tmp_path)
    stored = COMPAT / made.name
    assert [entry.name for entry in hash_directory(made).entries] == [
        entry.name for entry in hash_directory(stored).entries
    ]
