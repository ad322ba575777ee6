"""Releases that earlier versions signed, byte for byte: they must verify for ever."""

import json
import shutil
from pathlib import Path

import independent_verifier
import pytest
from judged import NOW, check

from release_guard.signers.key import Key
from release_guard.verify import State

FOLDER = Path(__file__).parents[1] / "compat"
RELEASES = sorted(path.stem for path in FOLDER.glob("*.pub"))


@pytest.mark.parametrize("name", RELEASES)
def test_an_old_release_verifies(name: str) -> None:
    key = FOLDER / f"{name}.pub"
    found = check(FOLDER / name, Key(public=key))
    assert (found.states, found.findings) == ((State.INTACT,), ())
    independent_verifier.verify(FOLDER / name, key, None, NOW)


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("changed", ["model.safetensors", "sub/vocab \xe4.txt"])
def test_it_is_still_about_its_own_files_alone(name: str, changed: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / name, tmp_path / name)
    (folder / changed).write_bytes(b"other")
    assert check(folder, Key(public=FOLDER / f"{name}.pub")).exit_code == 4


def test_one_is_of_two_precisions_that_were_rounded_from_one_set_of_files() -> None:
    first = (FOLDER / "schema-2/.release-guard/evidence.jsonl").read_bytes().split(b"\n", 1)[0]
    header = json.loads(first)["header"]
    assert header["schema_version"] == 2
    assert "artefacts" not in header
    policy = (FOLDER / "schema-2/.release-guard/policy.toml").read_text()
    assert 'precisions = ["fp32", "nf4"]' in policy
