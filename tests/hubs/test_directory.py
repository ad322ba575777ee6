import ctypes
import errno
import getpass
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from releases import CHANGED, FILES, make_release

from release_guard.errors import HubError, IntegrityError, PolicyError, PushRefusedError
from release_guard.hubs import NOTHING
from release_guard.hubs.directory import Directory
from release_guard.manifest import FileEntry, Manifest, hash_directory, hash_file
from release_guard.release import Release

REPO = "acme/model"
HERE = Path(__file__).parent


@pytest.fixture
def hub(tmp_path: Path) -> Directory:
    return Directory(path=tmp_path / "hub")


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return make_release(tmp_path / "first")


@pytest.fixture
def other(tmp_path: Path) -> Release:
    return make_release(tmp_path / "second", CHANGED)


def head_of(hub: Directory) -> Path:
    return hub.path / REPO


def test_the_head_lies_there_plainly(hub: Directory, release: Release) -> None:
    receipt = hub.push(release, REPO)
    plain = {
        path.relative_to(head_of(hub)).as_posix(): path.read_bytes()
        for path in head_of(hub).rglob("*")
        if path.is_file()
    }
    assert plain == FILES
    assert not head_of(hub).is_symlink()
    assert receipt.url == head_of(hub).as_uri()
    assert hub.preflight(REPO) == receipt.revision


def test_every_revision_is_kept(hub: Directory, release: Release, other: Release) -> None:
    first, second = hub.push(release, REPO), hub.push(other, REPO)
    assert hub.tree(REPO, first.revision).manifest == release.manifest
    assert hub.tree(REPO, first.revision).read("config.json") == FILES["config.json"]
    assert hub.tree(REPO, second.revision).manifest == other.manifest


def test_a_tree_stays_what_it_was_when_the_head_moves(
    hub: Directory, release: Release, other: Release
) -> None:
    hub.push(release, REPO)
    tree = hub.tree(REPO)
    hub.push(other, REPO)
    assert tree.manifest == release.manifest
    assert tree.read("empty.txt") == FILES["empty.txt"]


def test_an_edited_head_shows_and_spares_what_is_stored(
    hub: Directory, release: Release, other: Release
) -> None:
    first = hub.push(release, REPO)
    with (head_of(hub) / "model.safetensors").open("r+b") as weights:
        weights.write(b"\xff")
    assert hub.tree(REPO, first.revision).manifest != release.manifest
    hub.push(other, REPO)
    assert hub.tree(REPO, first.revision).manifest == release.manifest


def test_a_push_heals_an_edited_head(hub: Directory, release: Release) -> None:
    first = hub.push(release, REPO)
    (head_of(hub) / "extra.txt").write_text("stray")
    second = hub.push(release, REPO)
    assert second.revision != first.revision
    assert hub.tree(REPO).manifest == release.manifest


def test_a_link_in_the_head_does_not_pass_for_the_release(
    hub: Directory, release: Release, tmp_path: Path
) -> None:
    hub.push(release, REPO)
    outside = tmp_path / "outside.json"
    outside.write_bytes(FILES["config.json"])
    (head_of(hub) / "config.json").unlink()
    (head_of(hub) / "config.json").symlink_to(outside)
    with pytest.raises(IntegrityError, match="holds no links"):
        _ = hub.tree(REPO).manifest
    hub.push(release, REPO)
    assert hub.tree(REPO).manifest == release.manifest


def test_a_removed_head_is_not_made_up_from_the_objects(hub: Directory, release: Release) -> None:
    hub.push(release, REPO)
    head_of(hub).rename(hub.path / "gone")
    with pytest.raises(IntegrityError, match="no such folder"):
        _ = hub.tree(REPO).manifest


def test_damaged_storage_shows(hub: Directory, release: Release, other: Release) -> None:
    first = hub.push(release, REPO)
    hub.push(other, REPO)
    weights = release.manifest.get("model.safetensors")
    assert weights is not None
    stored = hub.path / ".revisions" / REPO / "objects" / weights.digest
    assert stored.stat().st_nlink == 1
    stored.chmod(0o644)
    stored.write_bytes(b"other")
    assert hub.tree(REPO, first.revision).manifest != release.manifest
    stored.unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        _ = hub.tree(REPO, first.revision).manifest
    hub.push(release, REPO)
    assert hub.tree(REPO, first.revision).manifest == release.manifest


def test_a_revision_rewritten_is_refused(hub: Directory, release: Release, other: Release) -> None:
    first = hub.push(release, REPO)
    hub.push(other, REPO)
    file = hub.path / ".revisions" / REPO / "revisions" / f"{first.revision}.json"
    file.write_text(file.read_text().replace("config.json", "konfig.json"))
    with pytest.raises(IntegrityError, match="was changed after it was made"):
        hub.tree(REPO, first.revision)
    file.write_text("{}")
    with pytest.raises(IntegrityError, match="is damaged"):
        hub.tree(REPO, first.revision)


def test_a_push_planned_on_another_head_is_refused(
    hub: Directory, release: Release, other: Release, tmp_path: Path
) -> None:
    planned = hub.push(release, REPO).revision
    newest = hub.push(other, REPO).revision
    late = make_release(tmp_path / "late", {**FILES, "late.txt": b"late"}, previous=planned)
    with pytest.raises(PushRefusedError, match=r"acme/model moved .*\(1 revision by \w") as refused:
        hub.push(late, REPO)
    assert refused.value.exit_code == 5
    assert hub.preflight(REPO) == newest
    again = make_release(tmp_path / "late", {}, previous=newest)
    assert hub.push(again, REPO).revision != newest


def test_a_push_planned_on_nothing_finds_something(
    hub: Directory, release: Release, tmp_path: Path
) -> None:
    assert hub.preflight(REPO) == NOTHING
    hub.push(release, REPO)
    with pytest.raises(PushRefusedError, match="moved"):
        hub.push(make_release(tmp_path / "late", CHANGED, previous=NOTHING), REPO)


def test_foreign_files_are_not_replaced(hub: Directory, release: Release) -> None:
    head_of(hub).mkdir(parents=True)
    (head_of(hub) / "thesis.txt").write_text("do not lose")
    with pytest.raises(PushRefusedError, match="holds files that were not pushed"):
        hub.push(release, REPO)
    assert (head_of(hub) / "thesis.txt").read_text() == "do not lose"


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_files_changed_since_signing_are_not_pushed(
    hub: Directory, release: Release, other: Release, change: str
) -> None:
    before = hub.push(release, REPO)
    weights = other.directory / "model.safetensors"
    if change == "gone":
        weights.unlink()
    else:
        weights.write_bytes(b"not what was signed")
    with pytest.raises(IntegrityError, match=f"model.safetensors: {change} since the release"):
        hub.push(other, REPO)
    assert hub.preflight(REPO) == before.revision
    assert hub.tree(REPO).manifest == release.manifest
    assert not (hub.path / ".revisions" / REPO / "incoming").exists()


def test_a_manifest_with_a_file_that_no_folder_shows(
    hub: Directory, release: Release, tmp_path: Path
) -> None:
    attributes = tmp_path / "first" / ".gitattributes"
    attributes.write_text("*.bin filter=lfs\n")
    entry = FileEntry(".gitattributes", *hash_file(attributes))
    odd = replace(release, manifest=Manifest.of([*release.manifest.entries, entry]))
    with pytest.raises(IntegrityError, match="the copied files are not the release"):
        hub.push(odd, REPO)
    assert hub.preflight(REPO) == NOTHING


def test_a_user_without_a_name(
    hub: Directory, release: Release, other: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nameless() -> str:
        raise KeyError(os.getuid())

    monkeypatch.setattr(getpass, "getuser", nameless)
    hub.push(release, REPO)
    with pytest.raises(PushRefusedError, match=rf"1 revision by user {os.getuid()}:"):
        hub.push(replace(other, previous=NOTHING), REPO)


def test_an_exchange_that_fails(
    hub: Directory, release: Release, other: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hub.push(release, REPO)
    library = SimpleNamespace(renameat2=lambda *_: -1)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EIO)
    with pytest.raises(HubError, match=r"Input/output error at .*; nothing was half-pushed"):
        hub.push(other, REPO)
    assert hub.preflight(REPO) == before.revision
    assert hub.tree(REPO).manifest == release.manifest


def test_of_two_pushers_at_once_one_is_told(hub: Directory, tmp_path: Path) -> None:
    head = hub.push(make_release(tmp_path / "base"), REPO).revision
    outcomes: list[object] = []

    def push(number: int) -> None:
        files = {**FILES, "number.txt": str(number).encode()}
        try:
            release = make_release(tmp_path / f"release-{number}", files, previous=head)
            outcomes.append(hub.push(release, REPO))
        except PushRefusedError as error:
            outcomes.append(error)

    pushers = [threading.Thread(target=push, args=(number,)) for number in range(2)]
    for pusher in pushers:
        pusher.start()
    for pusher in pushers:
        pusher.join()
    assert sum(isinstance(outcome, PushRefusedError) for outcome in outcomes) == 1


def test_a_file_system_without_exchange(
    hub: Directory, release: Release, other: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(release, REPO)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    hub.push(other, REPO)
    assert hub.tree(REPO).manifest == other.manifest
    assert hash_directory(head_of(hub)) == other.manifest


def test_unknown_repositories_and_revisions(hub: Directory, release: Release) -> None:
    with pytest.raises(HubError, match="nothing has been pushed"):
        hub.tree(REPO)
    hub.push(release, REPO)
    with pytest.raises(HubError, match="has no revision 'v9'"):
        hub.tree(REPO, "v9")
    with pytest.raises(PolicyError, match="not a repository id"):
        hub.tree("../etc")


def test_reading_a_file_that_is_not_there(hub: Directory, release: Release, other: Release) -> None:
    first = hub.push(release, REPO)
    hub.push(other, REPO)
    for revision in ("main", first.revision):
        with pytest.raises(IntegrityError, match=r"missing\.json"):
            hub.tree(REPO, revision).read("missing.json")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_leaves_the_old_head(hub: Directory, release: Release, tmp_path: Path) -> None:
    before = hub.push(release, REPO)
    big = make_release(tmp_path / "big", {**CHANGED, "model.safetensors": bytes(300_000)})
    with largest_file(100_000), pytest.raises(HubError, match="nothing was half-pushed") as full:
        hub.push(big, REPO)
    assert "\n" not in str(full.value)
    assert hub.preflight(REPO) == before.revision
    assert hub.tree(REPO).manifest == release.manifest
    assert not (hub.path / ".revisions" / REPO / "incoming").exists()
    hub.push(big, REPO)
    assert hub.tree(REPO).manifest == big.manifest


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write anywhere, so be somebody else for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_hub() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        hub = Directory(path=folder / "hub")
        release = make_release(folder / "first")
        head = hub.push(release, REPO).revision
        for path in (folder / "hub").rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        with as_nobody():
            assert hub.tree(REPO).manifest == release.manifest
            with pytest.raises(PushRefusedError, match=r"no permission at .*hub") as early:
                hub.preflight(REPO)
            with pytest.raises(PushRefusedError, match=r"no permission at .*hub") as late:
                hub.push(make_release(folder / "first", {}), REPO)
        assert "\n" not in str(early.value) + str(late.value)
        for path in (folder / "hub").rglob("*"):
            path.chmod(0o755)
        assert hub.preflight(REPO) == head


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder where flushing costs nothing, if the system has one: a hundred pushes are made."""
    shared = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        yield Path(name)


@pytest.mark.parametrize("first", [True, False])
def test_killed_at_any_moment_leaves_old_or_new(
    memory: Path, release: Release, other: Release, *, first: bool
) -> None:
    template = memory / "template"
    template.mkdir()
    if not first:
        Directory(path=template).push(release, REPO)
    done = subprocess.run(  # noqa: S603
        [sys.executable, HERE / "killed_push.py", template, other.directory, memory],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE.parent), *sys.path))},
    )
    assert done.returncode == 0, done.stderr
    hubs = [Directory(path=memory / str(event)) for event in range(1, int(done.stdout) + 1)]
    ends = [_end_of(hub, release, other) for hub in hubs]
    assert ends[0] == "old"
    assert ends[-1] == "new"
    assert ends == sorted(ends, reverse=True)
    assert len(ends) > 40  # else the events were not seen and nothing was tested


def _end_of(hub: Directory, release: Release, other: Release) -> str:
    head = hub.preflight(REPO)
    if head == NOTHING:
        assert not head_of(hub).exists()
        end = "old"
    else:
        seen = hub.tree(REPO).manifest
        assert hash_directory(head_of(hub)) == seen
        assert seen in (release.manifest, other.manifest)
        assert hub.tree(REPO, head).manifest == seen
        end = "new" if seen == other.manifest else "old"
    again = hub.push(other, REPO)
    assert end == "old" or again.revision == head
    assert hub.tree(REPO).manifest == other.manifest
    left = {path.name for path in (hub.path / ".revisions" / REPO).iterdir()}
    assert left == {"head", "lock", "objects", "revisions"}
    return end
