"""What a command line may name as a release."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import constants
from judged import NOW, Judged, released, write
from realgit import git
from releases import make_release

from release_guard.errors import HubError, IntegrityError, PolicyError, ReleaseGuardError
from release_guard.hubs.directory import Directory
from release_guard.manifest import hash_directory
from release_guard.signers.key import Key
from release_guard.targets import Target, find
from release_guard.verify import State, Trust, Verification, verify

LFS = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return released(tmp_path_factory.mktemp("release"))


@pytest.fixture
def folder(judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(judged.candidate.directory, tmp_path / "model"))


@pytest.fixture
def checkout(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The release in a git repository, its weights in git-lfs."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    (folder / ".gitattributes").write_text(LFS)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "lfs", "install", "--local")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=A", "-c", "user.email=a@b.c", "commit", "-qm", "Release")
    return folder


def snapshot(folder: Path, cache: Path, *, without: str = "") -> Path:
    """The release as the Hub's client leaves it: blobs, and a snapshot of links to them."""
    model = cache / "models--acme--classifier"
    made = model / "snapshots" / ("0123456789" * 4)
    for entry in hash_directory(folder).entries:
        if entry.name == without:
            continue
        blob = write(model, f"blobs/{entry.digest}", (folder / entry.name).read_bytes())
        link = made / entry.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    write(model, "refs/main", made.name.encode())
    return made


def check(target: Target, judged: Judged, *, partial: bool = False) -> Verification:
    trust = Trust(Key(public=judged.signer.public))
    return verify(target, trust, now=NOW, partial=partial)


def test_a_folder(folder: Path, judged: Judged) -> None:
    found = find("model")
    assert (found.place, found.shown) == (str(folder), "model")
    assert found.manifest == hash_directory(folder)
    assert check(found, judged).states == (State.INTACT,)
    assert find("model/../model/").place == str(folder)


def test_it_is_hashed_once(folder: Path, judged: Judged) -> None:
    found = find("model")
    first = found.manifest
    write(folder, "more.bin", b"x")
    assert found.manifest is first
    assert found.read("config.json") == (folder / "config.json").read_bytes()


def test_a_snapshot_in_the_cache_of_the_hub(folder: Path, judged: Judged) -> None:
    found = find(str(snapshot(folder, folder.parent / "hub")))
    assert check(found, judged).states == (State.INTACT,)
    assert found.place == "hf://acme/classifier"


def test_a_snapshot_with_some_of_the_files(folder: Path, judged: Judged) -> None:
    found = find(str(snapshot(folder, folder.parent / "hub", without="model.safetensors")))
    assert check(found, judged).states == (State.WEIGHTS_CHANGED,)
    seen = check(found, judged, partial=True)
    assert (seen.states, seen.absent) == ((State.INTACT,), ("model.safetensors",))


def test_a_blob_that_was_changed(folder: Path, judged: Judged) -> None:
    made = snapshot(folder, folder.parent / "hub")
    (made / "model.safetensors").resolve().write_bytes(b"other")
    assert check(find(str(made)), judged).states == (State.WEIGHTS_CHANGED,)


def test_a_link_to_another_models_blob_is_refused(folder: Path, judged: Judged) -> None:
    made = snapshot(folder, folder.parent / "hub")
    other = write(folder.parent / "hub/models--acme--other", "blobs/x", b"x")
    (made / "config.json").unlink()
    (made / "config.json").symlink_to(other)
    with pytest.raises(IntegrityError, match="holds no links"):
        check(find(str(made)), judged)


@pytest.mark.parametrize("above", ["hub", "hub/models--acme--classifier"])
def test_a_cache_is_not_a_snapshot(folder: Path, above: str) -> None:
    made = snapshot(folder, folder.parent / "hub")
    with pytest.raises(PolicyError, match="give one of its snapshots, such as") as error:
        find(above)
    assert str(error.value).endswith(str(made.relative_to(folder.parent)))


def test_an_old_cache_of_a_model_without_an_owner(folder: Path) -> None:
    model = folder.rename(folder.parent / "0")
    made = folder.parent / "models--gpt2/snapshots/0"
    made.parent.mkdir(parents=True)
    model.rename(made)
    assert find(str(made)).place == str(made)


def test_a_git_checkout(checkout: Path, judged: Judged) -> None:
    found = find("model")
    assert check(found, judged).states == (State.INTACT,)
    write(checkout, "config.json", b"{}")
    assert check(find("model"), judged).states == (State.CONFIG_CHANGED,)


def test_a_worktree_of_it(checkout: Path, judged: Judged) -> None:
    git(checkout, "worktree", "add", "-q", "../elsewhere")
    assert check(find("elsewhere"), judged).states == (State.INTACT,)
    assert find("git:elsewhere").place == find("git:model").place == str(checkout)


def test_a_clone_without_its_weights(checkout: Path, judged: Judged) -> None:
    """As `GIT_LFS_SKIP_SMUDGE=1 git clone` leaves it: nobody changed the weights, they are away."""
    clone = checkout.parent / "clone"
    subprocess.run(  # noqa: S603
        ["git", "clone", "-q", str(checkout), str(clone)],  # noqa: S607
        env={**os.environ, "GIT_LFS_SKIP_SMUDGE": "1"},
        check=True,
    )
    (finding,) = check(find("clone"), judged).findings
    assert finding.state is State.WEIGHTS_CHANGED
    assert finding.message == "not pulled from Git LFS: model.safetensors"
    seen = check(find("clone"), judged, partial=True)
    assert (seen.states, seen.absent) == ((State.INTACT,), ("model.safetensors",))


def test_a_pointer_to_other_weights_is_no_excuse(checkout: Path, judged: Judged) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 9\n"
    write(checkout, "model.safetensors", text.encode())
    for partial in (False, True):
        found = check(find("model"), judged, partial=partial)
        assert found.states == (State.WEIGHTS_CHANGED,)
        assert found.findings[0].message == "changed: model.safetensors"


def test_proof_that_was_not_pulled_is_missing(checkout: Path, judged: Judged) -> None:
    path = checkout / ".release-guard/evidence.jsonl"
    digest = hash_directory(checkout).get(".release-guard/evidence.jsonl")
    assert digest is not None
    path.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest.digest}\nsize 9\n"
    )
    for partial in (False, True):
        found = check(find("model"), judged, partial=partial)
        assert found.states == (State.EVIDENCE_MISSING,)


def test_a_commit_whatever_lies_in_the_folder(checkout: Path, judged: Judged) -> None:
    write(checkout, "config.json", b"changed, and not committed")
    head = git(checkout, "rev-parse", "HEAD")
    for spelt in ("git:model", "git:model@main", f"git:model@{head[:9]}", f"git:{checkout}@HEAD"):
        found = find(spelt)
        assert check(found, judged).states == (State.INTACT,)
        assert found.place == str(checkout)
        assert found.shown.endswith(f"@{head}")


def test_a_commit_of_a_folder_with_an_at(checkout: Path, judged: Judged) -> None:
    checkout.rename(checkout.parent / "a@b")
    assert check(find("git:a@b"), judged).states == (State.INTACT,)
    assert check(find("git:a@b@main"), judged).states == (State.INTACT,)
    assert check(find("a@b"), judged).states == (State.INTACT,)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("git:model@nowhere", "no commit"),
        ("git:nothing@main", "cannot be used"),
        ("git:model@--help", "no commit"),
        ("git:model@", "no commit"),
    ],
)
def test_a_commit_that_is_not_there(checkout: Path, target: str, told: str) -> None:
    with pytest.raises(ReleaseGuardError, match=told) as error:
        find(target)
    assert "\n" not in str(error.value)


def test_a_revision_of_a_directory_hub(folder: Path, judged: Judged) -> None:
    release = judged.release()
    first = Directory(path=Path("hub")).push(release, "acme/pico").revision
    other = make_release(folder.parent / "other", {"config.json": b"{}", "model.sig": b"x"})
    Directory(path=Path("hub")).push(other, "acme/pico")
    found = find(f"hub/acme/pico@{first}")
    assert check(found, judged).states == (State.INTACT,)
    assert found.place == find("hub/acme/pico").place == find("hub/acme/pico@main").place
    assert check(find("hub/acme/pico@main"), judged).states == (State.WRONG_SIGNER,)


@pytest.mark.parametrize(
    ("target", "kind", "told"),
    [
        ("nowhere", ReleaseGuardError, "no such folder; for a model of the Hub write hf://"),
        ("", PolicyError, "names no folder"),
        ("git:", PolicyError, "names no folder"),
        ("git:@main", PolicyError, "names no folder"),
        ("hub/acme/pico@main", HubError, "nothing has been pushed"),
        ("acme/pico@main", ReleaseGuardError, "for the Hub write hf://acme/pico@main"),
        ("hf://", PolicyError, "is not a repository id"),
        ("hf://acme", PolicyError, "is not a repository id"),
        ("hf://../x@main", PolicyError, "is not a repository id"),
        ("@", PolicyError, "is not a repository id"),
        ("a@b", PolicyError, "is not a repository id"),
    ],
)
def test_what_is_no_release(
    target: str, kind: type[Exception], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=told):
        find(target).manifest  # noqa: B018


def test_a_file_is_no_release(folder: Path) -> None:
    with pytest.raises(ReleaseGuardError, match="a file; name the folder"):
        find("model/config.json")


@pytest.mark.parametrize("endpoint", ["http://hub.example.org", "http://10.0.0.1:8080"])
def test_a_hub_that_is_not_https_is_not_asked(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(PolicyError, match="is not https"):
        find("hf://acme/classifier")


def test_a_key_that_came_with_the_release_is_refused(
    checkout: Path, judged: Judged, tmp_path: Path
) -> None:
    carried = Path(".release-guard/key.pub")
    key = Path(str(judged.signer.public)).read_bytes()
    made = snapshot(checkout, tmp_path / "hub")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "link.pub").symlink_to(checkout / carried)
    for target, path in (
        ("model", Path("model") / carried),
        ("model", Path("model/../model") / carried),
        ("model", Path("link") / carried),
        ("model", Path("link.pub")),
        ("model", write(checkout, ".github/key.pub", key)),
        ("link", checkout / carried),
        ("git:model", checkout / carried),
        (str(made), made / carried),
    ):
        with pytest.raises(PolicyError, match="came with the release"):
            find(target).require_foreign(path)
    for path in (write(tmp_path, "key.pub", key), write(checkout, ".git/key.pub", key)):
        find("model").require_foreign(path)
        find("git:model@main").require_foreign(path)
