from pathlib import Path
from unittest.mock import patch

import judged
import pytest
from judged import fixed_key, judge, write
from releases import make_release

from release_guard import outcome
from release_guard.changes import Changes, changes, require_known
from release_guard.commands.shared import agreement
from release_guard.errors import PushRefusedError
from release_guard.hubs import NOTHING
from release_guard.hubs.directory import Directory
from release_guard.release import Release
from release_guard.signers.key import Key
from release_guard.terminal import Terminal

REPO = "acme/model"


@pytest.fixture
def hub(tmp_path: Path) -> Directory:
    return Directory(path=tmp_path / "hub")


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return fixed_key(tmp_path)


@pytest.fixture
def old(tmp_path: Path, key: Key) -> Release:
    with patch.dict(judged.FILES, {"only-old.txt": b"old", "LICENSE": b"old"}):
        return judge(tmp_path / "old", key).release()


@pytest.fixture
def new(tmp_path: Path, key: Key) -> Release:
    with patch.dict(judged.FILES, {"only-new.txt": b"new"}):
        return judge(tmp_path / "new", key).release()


def found(hub: Directory, release: Release, key: Key) -> Changes:
    return changes(hub, REPO, hub.preflight(REPO), release.manifest, key)


def names(files: object) -> set[str]:
    return {entry.name for entry in files}  # type: ignore[attr-defined]


def test_everything_is_new_where_nothing_is(hub: Directory, new: Release, key: Key) -> None:
    seen = found(hub, new, key)
    assert (seen.head, seen.new) == (NOTHING, new.manifest.entries)
    assert not seen.changed + seen.unchanged + seen.deleted + seen.foreign + seen.remarks
    require_known(seen)


def test_the_difference_to_what_is_there(
    hub: Directory, old: Release, new: Release, key: Key
) -> None:
    hub.push(old, REPO)
    seen = found(hub, new, key)
    assert names(seen.new) == {"only-new.txt"}
    assert {"LICENSE", "model.sig"} <= names(seen.changed)
    assert {"model.safetensors", "README.md"} <= names(seen.unchanged)
    assert names(seen.deleted) == {"only-old.txt"}
    assert not seen.foreign  # the release that is there vouches for it
    assert not seen.none
    hub.push(new, REPO)
    assert found(hub, new, key).none
    assert found(hub, new, key).remarks == ()


@pytest.mark.parametrize("name", ["thesis.txt", "only-old.txt"])
def test_what_no_release_put_there_takes_consent(
    hub: Directory, old: Release, new: Release, key: Key, name: str
) -> None:
    hub.push(old, REPO)
    write(hub.path / REPO, name, b"written by hand")
    seen = found(hub, new, key)
    assert names(seen.foreign) == {name}
    with pytest.raises(PushRefusedError, match=f"{name} would be deleted.*--yes") as refused:
        require_known(seen)
    assert refused.value.exit_code == 5
    assert "\n" not in str(refused.value)


def test_another_signer_vouches_for_nothing(
    hub: Directory, old: Release, new: Release, tmp_path: Path
) -> None:
    hub.push(old, REPO)
    seen = found(hub, new, fixed_key(tmp_path, 2))
    assert names(seen.foreign) == {"only-old.txt"}


def test_before_it_is_signed_signatures_are_left_out(
    hub: Directory, old: Release, key: Key
) -> None:
    hub.push(old, REPO)
    assert changes(hub, REPO, hub.preflight(REPO), old.manifest.unsigned, key).none


def test_weights_in_the_history_that_never_passed(
    hub: Directory, old: Release, new: Release, key: Key, tmp_path: Path
) -> None:
    unproven = hub.push(make_release(tmp_path / "bare"), REPO).revision
    hub.push(old, REPO)
    (remark,) = found(hub, new, key).remarks
    assert "weights without passing evidence stay in older revisions" in remark
    assert unproven[:12] in remark
    assert remark.count(" by ") == 1


def test_a_long_history_is_not_looked_through(
    hub: Directory, new: Release, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("release_guard.changes._DEPTH", 1)
    for number in range(2):
        hub.push(make_release(tmp_path / "bare", {"number.txt": bytes([number])}), REPO)
    (remark,) = found(hub, new, key).remarks
    assert "only the last 1 of 2 revisions were looked at" in remark


def test_it_is_shown_before_it_is_done(
    hub: Directory, old: Release, new: Release, key: Key, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.push(old, REPO)
    write(hub.path / REPO, "thesis.txt", b"written by hand")
    seen = found(hub, new, key)
    agreement(Terminal(), yes=True)(seen)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"{REPO}: 1 new (0.0 MB), " in shown.err
    assert "  new      only-new.txt (0.0 MB)" in shown.err
    assert "  deleted  thesis.txt (0.0 MB, put there by no signed release)" in shown.err
    with pytest.raises(PushRefusedError, match=r"thesis\.txt"):  # nobody is there to be asked
        agreement(Terminal(), yes=False)(seen)


def test_the_document_has_all_of_it(hub: Directory, new: Release, key: Key) -> None:
    document = outcome.changes_document(found(hub, new, key))["changes"]
    assert document["head"] == NOTHING
    assert {"name", "digest", "size"} == set(document["new"][0])
    assert outcome.changes_document(None) == {"changes": None}
