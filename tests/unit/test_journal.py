from dataclasses import replace
from pathlib import Path

import pytest
from releases import CHANGED, FILES, make_release

from release_guard.errors import ReleaseGuardError
from release_guard.journal import Journal
from release_guard.release import Release

REPO = "acme/model"


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return make_release(tmp_path / "release")


def test_it_lies_beside_the_folder(release: Release) -> None:
    journal = Journal.beside(release.directory)
    journal.begin(release, REPO)
    assert journal.path == release.directory.parent / "release.state.json"
    assert {path.name for path in journal.path.parent.iterdir()} == {"release", journal.path.name}


def test_the_same_files_are_tried_under_the_same_name(release: Release) -> None:
    journal = Journal.beside(release.directory)
    first = journal.begin(release, REPO)
    assert first == release
    again = journal.begin(replace(release, run="another"), REPO)
    assert again.run == first.run
    last = journal.last()
    assert last is not None
    assert (last.run, last.repo, last.root) == (first.run, REPO, release.manifest.root)


def test_another_signature_of_the_same_files_is_the_same_attempt(
    release: Release, tmp_path: Path
) -> None:
    journal = Journal.beside(release.directory)
    first = journal.begin(release, REPO)
    resigned = {**FILES, "model.sig": b"{}", ".release-guard/svr.sigstore.json": b"{}"}
    assert journal.begin(make_release(tmp_path / "b", resigned), REPO).run == first.run


@pytest.mark.parametrize("other", ["files", "name", "repo"])
def test_anything_else_is_another_attempt(release: Release, tmp_path: Path, other: str) -> None:
    journal = Journal.beside(release.directory)
    first = journal.begin(release, REPO)
    renamed = {("umlaut.txt" if name == "empty.txt" else name): FILES[name] for name in FILES}
    files = {"files": CHANGED, "name": renamed, "repo": FILES}[other]
    second = make_release(tmp_path / "second", files)
    assert journal.begin(second, "acme/other" if other == "repo" else REPO).run != first.run


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 5000, b'{"run": 5}', b"\xff\xfe"])
def test_a_damaged_one_is_no_journal(release: Release, content: bytes) -> None:
    journal = Journal.beside(release.directory)
    journal.path.write_bytes(content)
    assert journal.last() is None
    assert journal.begin(release, REPO) == release


def test_one_that_cannot_be_read_or_written_stops_the_push(release: Release) -> None:
    journal = Journal.beside(release.directory)
    journal.path.mkdir()
    with pytest.raises(ReleaseGuardError, match=r"state\.json: cannot be read"):
        journal.begin(release, REPO)
    journal.path.rmdir()
    journal.path.with_name(f"{journal.path.name}.partial").mkdir()
    with pytest.raises(
        ReleaseGuardError, match=r"state\.json: cannot be written .*nothing was sent"
    ):
        journal.begin(release, REPO)
