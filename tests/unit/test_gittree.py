import hashlib
import os
from pathlib import Path

import pytest
from realgit import git

from release_guard.errors import IntegrityError, ReleaseGuardError
from release_guard.git import Repository
from release_guard.gittree import MAX_PLAIN, commit_tree, read_pointer
from release_guard.manifest import hash_directory

WEIGHTS = bytes(range(256)) * 40
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
FORGED = POINTER.format("ab" * 32, 5).encode()


@pytest.fixture(autouse=True)
def _no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "Somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.org")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder"
    git(tmp_path, "init", "-q", "-b", "main", str(folder))
    git(folder, "lfs", "install", "--local")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "sub ü").mkdir()
    (folder / "sub ü/config.json").write_text("{}\n")
    (folder / "model.sig").write_text("not really\n")
    commit(folder)
    return folder


def test_a_commit_looks_like_the_folder_it_was_made_of(work: Path) -> None:
    tree = commit_tree(work, "HEAD")
    assert tree.manifest == hash_directory(work)
    assert tree.read("sub ü/config.json") == b"{}\n"
    assert tree.read("model.sig") == b"not really\n"


def test_a_name_that_stands_there_twice_is_refused(work: Path) -> None:
    """git show takes the first, a checkout the last."""
    (work / "other").write_text("{}")
    one, two = (git(work, "hash-object", "-w", name) for name in ("model.sig", "other"))
    entries = b"".join(b"100644 config.json\0" + bytes.fromhex(oid) for oid in (one, two))
    (work / "tree").write_bytes(entries)
    tree = git(work, "hash-object", "-w", "-t", "tree", "--literally", "tree")
    commit = git(work, "commit-tree", "-m", "crafted", tree)
    with pytest.raises(IntegrityError, match=r"^'config.json': stands in the commit .* 2 times"):
        commit_tree(work, commit)


def test_weights_are_not_read(work: Path) -> None:
    for path in (work / ".git/lfs/objects").rglob("*"):
        if path.is_file():
            path.unlink()
    tree = commit_tree(work, "main")
    assert tree.manifest.get("model.safetensors").digest == hashlib.sha256(WEIGHTS).hexdigest()
    with pytest.raises(IntegrityError, match=r"^model.safetensors: not fetched yet; run git lfs"):
        tree.read("model.safetensors")


def test_what_lfs_holds_can_be_read(work: Path) -> None:
    assert commit_tree(work, "main").read("model.safetensors") == WEIGHTS
    (stored,) = (path for path in (work / ".git/lfs/objects").rglob("*") if path.is_file())
    stored.chmod(0o600)
    stored.write_bytes(WEIGHTS[:-1] + b"x")
    with pytest.raises(IntegrityError, match="damaged in LFS"):
        commit_tree(work, "main").read("model.safetensors")


def test_a_tag_a_worktree_and_a_bare_copy_show_the_same(work: Path, tmp_path: Path) -> None:
    git(work, "tag", "-a", "v1", "-m", "one")
    git(work, "worktree", "add", "-q", str(tmp_path / "beside"), "-b", "other")
    git(tmp_path, "clone", "-q", "--bare", str(work), "bare.git")
    found = commit_tree(work, "main")
    for place, revision in (("beside", "HEAD"), ("beside", "v1"), ("bare.git", found.commit)):
        other = commit_tree(tmp_path / place, revision)
        assert (other.commit, other.manifest) == (found.commit, found.manifest)
    assert commit_tree(tmp_path / "beside", "v1").read("model.safetensors") == WEIGHTS


def test_pointer_text_that_no_attribute_gives_to_lfs_is_content(work: Path) -> None:
    (work / "model.bin").write_bytes(FORGED)
    commit(work)
    entry = commit_tree(work, "HEAD").manifest.get("model.bin")
    assert entry is not None
    assert (entry.digest, entry.size) == (hashlib.sha256(FORGED).hexdigest(), len(FORGED))


@pytest.mark.parametrize("where", ["info", "global", "folder beside", "uncommitted"])
def test_attributes_from_outside_the_commit_do_not_count(
    work: Path, tmp_path: Path, where: str
) -> None:
    (work / "model.bin").write_bytes(FORGED)
    (work / "other").mkdir()
    (work / "other/.gitattributes").write_text("*.bin filter=lfs\n")
    commit(work)
    line = "*.bin filter=lfs\n"
    if where == "info":
        (work / ".git/info/attributes").write_text(line)
    elif where == "global":
        (tmp_path / "home/attributes").write_text(line)
        git(work, "config", "core.attributesFile", str(tmp_path / "home/attributes"))
    elif where == "uncommitted":
        (work / ".gitattributes").write_text(line)
        git(work, "add", ".gitattributes")
    entry = commit_tree(work, "HEAD").manifest.get("model.bin")
    assert entry.digest == hashlib.sha256(FORGED).hexdigest()


def test_attributes_outside_cannot_take_a_file_from_lfs_either(work: Path) -> None:
    (work / ".git/info/attributes").write_text("* -filter\n")
    entry = commit_tree(work, "HEAD").manifest.get("model.safetensors")
    assert entry.digest == hashlib.sha256(WEIGHTS).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text + b"\n",
        lambda text: text[:-1],
        lambda text: text.replace(b"size 5", b"size 05"),
        lambda text: text.replace(b"size 5", b"size -5"),
        lambda text: text.replace(b"ab", b"AB"),
        lambda text: text.replace(b"oid", b"ext-0-x sha256:" + b"0" * 64 + b"\noid"),
        lambda text: text.replace(b"git-lfs.github.com", b"hawser.github.com"),
        lambda text: b"\xef\xbb\xbf" + text,
    ],
)
def test_only_pointers_to_the_letter_count(change) -> None:
    assert read_pointer(FORGED) is not None
    assert read_pointer(change(FORGED)) is None


def test_links_submodules_and_large_plain_files_are_refused(work: Path) -> None:
    (work / "weights.bin").symlink_to("model.safetensors")
    commit(work)
    with pytest.raises(IntegrityError, match=r"^weights.bin: a symbolic link"):
        commit_tree(work, "HEAD")
    (work / "weights.bin").unlink()
    git(work, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},part")
    git(work, "commit", "-qm", "a submodule")
    with pytest.raises(IntegrityError, match=r"^part: a submodule"):
        commit_tree(work, "HEAD")
    git(work, "rm", "-q", "--cached", "part")
    (work / "weights.bin").write_bytes(bytes(MAX_PLAIN + 1))
    commit(work)
    with pytest.raises(IntegrityError, match=r"^weights.bin: 10,485,761 bytes outside LFS"):
        commit_tree(work, "HEAD")


@pytest.mark.parametrize("name", [b"bad\xff.bin", b"line\nbreak.bin", b"back\\slash.bin"])
def test_names_no_release_may_have_are_refused(work: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(work) + b"/" + name)).write_bytes(b"x")
    commit(work)
    with pytest.raises(IntegrityError, match=r"UTF-8|not a file name that a release may have"):
        commit_tree(work, "HEAD")


def test_replaced_objects_are_not_followed(work: Path) -> None:
    before = commit_tree(work, "HEAD").manifest
    (work / "sub ü/config.json").write_text('{"bad": 1}\n')
    commit(work)
    assert commit_tree(work, "HEAD").manifest != before
    bad = git(work, "rev-parse", "HEAD")
    git(work, "replace", bad, "HEAD~1")
    assert git(work, "show", f"{bad}:sub ü/config.json") == "{}"  # git itself is fooled
    assert commit_tree(work, bad).manifest != before


def test_the_callers_git_variables_do_not_count(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = commit_tree(work, "HEAD").manifest
    git(tmp_path, "init", "-q", "elsewhere")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere/.git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "nothing"))
    monkeypatch.setenv("GIT_OBJECT_DIRECTORY", str(tmp_path / "nothing"))
    assert commit_tree(work, "HEAD").manifest == expected
    assert commit_tree(Repository.at(work), "HEAD").manifest == expected


def test_sha256_repositories_are_read(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "--object-format=sha256", "modern")
    folder = tmp_path / "modern"
    (folder / ".gitattributes").write_text("*.bin filter=lfs\n")
    (folder / "a.bin").write_bytes(FORGED)
    commit(folder)
    assert commit_tree(folder, "HEAD").manifest.get("a.bin").digest == "ab" * 32


def test_missing_objects_and_places_are_said(work: Path, tmp_path: Path) -> None:
    blob = git(work, "rev-parse", "HEAD:sub ü/config.json")
    (work / ".git/objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(ReleaseGuardError):
        commit_tree(work, "HEAD")
    for revision in ("nobody", "-h", "HEAD:model.sig", "0" * 40, ""):
        with pytest.raises(ReleaseGuardError, match="no commit of this repository"):
            commit_tree(work, revision)
    with pytest.raises(ReleaseGuardError, match="not a git repository"):
        commit_tree(tmp_path, "HEAD")
    with pytest.raises(ReleaseGuardError, match="cannot be used"):
        commit_tree(tmp_path / "nowhere", "HEAD")


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "a change")
