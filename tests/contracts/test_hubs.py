from collections.abc import Iterator
from pathlib import Path

import pytest
from hubserver import HubServer
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from releases import CHANGED, FILES, make_release

from release_guard.errors import HubError, IntegrityError, PolicyError, PushRefusedError
from release_guard.hubs import NOTHING, Hub, require_repo_id, require_tag
from release_guard.plugins import Spec

# huggingface_hub itself, when it uploads over LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "acme/model"
NO_IDS = ["model", "acme/", "/model", "a/b/c", "acme/../x", ".acme/x", "acme/x.git", "acme/mö", ""]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Where hubs may keep things in this test: a hub takes the options that it has."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with HubServer() as server:
        yield {"path": tmp_path / "hub", "endpoint": server.url}
        close_session()


@pytest.fixture(params=Hub.available())
def hub(request: pytest.FixtureRequest, environment: dict[str, object]) -> Hub:
    fields = type(Hub.build(Spec(name=request.param))).model_fields
    options = {name: value for name, value in environment.items() if name in fields}
    return Hub.build(Spec(name=request.param, **options))


def test_what_was_pushed_is_there(hub: Hub, tmp_path: Path) -> None:
    release = make_release(tmp_path / "first")
    receipt = hub.push(release, REPO)
    for revision in ("main", receipt.revision):
        tree = hub.tree(REPO, revision)
        assert tree.manifest == release.manifest
        assert {name: tree.read(name) for name in FILES} == FILES
        with pytest.raises(IntegrityError):
            tree.read("missing.json")


def test_preflight_names_the_head_and_writes_nothing(hub: Hub, tmp_path: Path) -> None:
    assert hub.preflight(REPO) == NOTHING
    with pytest.raises(HubError):
        hub.tree(REPO)
    receipt = hub.push(make_release(tmp_path / "first"), REPO)
    assert hub.preflight(REPO) == receipt.revision


def test_a_changed_file_is_seen(hub: Hub, tmp_path: Path) -> None:
    hub.push(make_release(tmp_path / "first"), REPO)
    changed = {**FILES, "model.safetensors": FILES["model.safetensors"][:-1] + b"\0"}
    second = make_release(tmp_path / "second", changed)
    hub.push(second, REPO)
    assert hub.tree(REPO).manifest == second.manifest


def test_files_not_in_the_release_are_removed(hub: Hub, tmp_path: Path) -> None:
    hub.push(make_release(tmp_path / "first"), REPO)
    second = make_release(tmp_path / "second", CHANGED)
    hub.push(second, REPO)
    assert hub.tree(REPO).manifest == second.manifest
    assert hub.tree(REPO).manifest.get("empty.txt") is None


def test_an_equal_head_keeps_its_revision(hub: Hub, tmp_path: Path) -> None:
    first = hub.push(make_release(tmp_path / "first"), REPO)
    again = hub.push(make_release(tmp_path / "copy"), REPO)
    assert again == first


def test_older_revisions_stay(hub: Hub, tmp_path: Path) -> None:
    first = make_release(tmp_path / "first")
    revision = hub.push(first, REPO).revision
    hub.push(make_release(tmp_path / "second", CHANGED), REPO)
    assert hub.tree(REPO, revision).manifest == first.manifest


def test_a_head_that_moved_is_not_overwritten(hub: Hub, tmp_path: Path) -> None:
    planned = hub.push(make_release(tmp_path / "first"), REPO).revision
    newest = hub.push(make_release(tmp_path / "second", CHANGED), REPO).revision
    late = make_release(tmp_path / "late", {**FILES, "late.txt": b"late"}, previous=planned)
    with pytest.raises(PushRefusedError, match="acme/model moved since this push began") as error:
        hub.push(late, REPO)
    assert "\n" not in str(error.value)
    assert hub.preflight(REPO) == newest


def test_the_history_is_told_newest_first(hub: Hub, tmp_path: Path) -> None:
    first = hub.push(make_release(tmp_path / "first"), REPO).revision
    second = hub.push(make_release(tmp_path / "second", CHANGED), REPO).revision
    revisions = hub.history(REPO)
    assert [revision.name for revision in revisions[:2]] == [second, first]
    assert all(revision.authors and revision.title for revision in revisions)


def test_the_weights_of_a_revision(hub: Hub, tmp_path: Path) -> None:
    release = make_release(tmp_path / "first")
    revision = hub.push(release, REPO).revision
    expected = [entry for entry in release.manifest.entries if entry.kind == "weights"]
    assert list(hub.weights(REPO, revision).entries) == expected


def test_a_tag_stays_where_it_is(hub: Hub, tmp_path: Path) -> None:
    release = make_release(tmp_path / "first")
    first = hub.push(release, REPO).revision
    assert hub.tags(REPO) == {}
    for _ in range(2):
        hub.tag(REPO, "v1.0", first)
        assert hub.tags(REPO) == {"v1.0": first}
    second = hub.push(make_release(tmp_path / "second", CHANGED), REPO).revision
    with pytest.raises(PushRefusedError, match=f"the tag v1.0 is on {first} already") as refused:
        hub.tag(REPO, "v1.0", second)
    assert refused.value.exit_code == 5
    assert hub.tags(REPO) == {"v1.0": first}
    assert hub.tree(REPO, "v1.0").manifest == release.manifest


def test_remarks_and_opening_change_no_revision(hub: Hub, tmp_path: Path) -> None:
    assert all("\n" not in remark for remark in hub.remarks(REPO))
    assert hub.preflight(REPO) == NOTHING
    revision = hub.push(make_release(tmp_path / "first"), REPO).revision
    hub.show(REPO)
    assert hub.preflight(REPO) == revision


def test_what_changed_since_signing_does_not_land(hub: Hub, tmp_path: Path) -> None:
    release = make_release(tmp_path / "first")
    before = hub.push(release, REPO).revision
    second = make_release(tmp_path / "second", CHANGED)
    (tmp_path / "second" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        hub.push(second, REPO)
    assert hub.preflight(REPO) == before
    assert hub.tree(REPO).manifest == release.manifest


@pytest.mark.parametrize("repo", NO_IDS)
def test_only_owner_and_name_are_taken(hub: Hub, tmp_path: Path, repo: str) -> None:
    release = make_release(tmp_path / "first")
    for use in (
        lambda: hub.push(release, repo),
        lambda: hub.tree(repo),
        lambda: hub.preflight(repo),
    ):
        with pytest.raises(PolicyError, match="not a repository id; write owner/name") as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("repo", ["acme/model", "a/b", "Acme-1/vit_base.v2", "0x/a-b"])
def test_repository_ids(repo: str) -> None:
    require_repo_id(repo)


@pytest.mark.parametrize("name", ["v1.0", "1", "release_2-b"])
def test_tags(name: str) -> None:
    require_tag(name)


@pytest.mark.parametrize(
    "name", ["", "main", "a/b", "../x", "v1..2", "v1.lock", ".v1", "v 1", "f" * 40, "-v", "v1\n"]
)
def test_no_tags(name: str) -> None:
    with pytest.raises(PolicyError, match="is not a tag"):
        require_tag(name)
