import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from release_guard.errors import IntegrityError, ReleaseGuardError
from release_guard.manifest import (
    DirectoryTree,
    FileEntry,
    Manifest,
    classify,
    hash_directory,
    hash_file,
    require_canonical,
    write_file,
)


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_every_file_is_listed_once_with_digest_and_size(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.bin").write_bytes(b"abc")
    (tmp_path / "empty").write_bytes(b"")
    assert hash_directory(tmp_path) == Manifest.of(
        [
            FileEntry("sub/b.bin", hashlib.sha256(b"abc").hexdigest(), 3),
            FileEntry("empty", hashlib.sha256(b"").hexdigest(), 0),
        ]
    )


def test_large_files_are_read_to_the_end(tmp_path: Path) -> None:
    content = os.urandom(3 * (1 << 20) + 17)
    (tmp_path / "big").write_bytes(content)
    assert hash_file(tmp_path / "big") == (hashlib.sha256(content).hexdigest(), len(content))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.sig", "evidence"),
        (".release-guard/policy.toml", "evidence"),
        ("sub/model.sig", "configuration"),
        ("README.md", "documentation"),
        ("LICENSE-MODEL.txt", "documentation"),
        ("LICENSE.safetensors", "weights"),
        ("NOTICE-1.BIN", "weights"),
        ("sub/plot.png", "documentation"),
        ("README.MD", "configuration"),
        ("model-00001-of-00002.safetensors", "weights"),
        ("PYTORCH_MODEL.BIN", "weights"),
        ("model.safetensors.index.json", "configuration"),
        ("modeling_custom.py", "configuration"),
        ("safetensors", "weights"),
        (".release-guard-not/x", "configuration"),
    ],
)
def test_classes(name: str, kind: str) -> None:
    assert classify(name) == kind


@pytest.mark.parametrize("name", [".git", ".github", ".gitignore", ".gitattributes"])
def test_git_files_are_ignored_at_the_top_only(tmp_path: Path, name: str) -> None:
    for place in (tmp_path / name / "a", tmp_path / "sub" / name / "a"):
        place.parent.mkdir(parents=True)
        place.write_text("x")
    assert [entry.name for entry in hash_directory(tmp_path).entries] == [f"sub/{name}/a"]


def test_the_download_cache_is_ignored_and_nothing_else_beside_it(tmp_path: Path) -> None:
    fill(tmp_path / ".cache" / "huggingface" / "download", metadata="x")
    fill(tmp_path / ".cache" / "other", file="x")
    fill(tmp_path / "sub" / ".cache" / "huggingface", file="x")
    names = [entry.name for entry in hash_directory(tmp_path).entries]
    assert names == [".cache/other/file", "sub/.cache/huggingface/file"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "a//b",
        "a/",
        "../a",
        "a/..",
        "./a",
        ".",
        "a\\b",
        "a\nb",
        "a\x00",
        "\udcff",
        "a\x7f",
        "a\x9b31m",
    ],
)
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(IntegrityError, match="not a file name"):
        require_canonical(name)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff")).write_text("x")
    with pytest.raises(IntegrityError, match="not a file name"):
        hash_directory(tmp_path)


@pytest.mark.parametrize("target", ["../outside", "inside", "nowhere"])
def test_links_are_refused(tmp_path: Path, target: str) -> None:
    fill(tmp_path, outside="x")
    folder = fill(tmp_path / "model", inside="x")
    (folder / "link").symlink_to(target)
    with pytest.raises(IntegrityError, match="holds no links"):
        hash_directory(folder)


def test_links_to_folders_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "outside", file="x")
    folder = fill(tmp_path / "model", inside="x")
    (folder / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(IntegrityError, match="holds no links"):
        hash_directory(folder)


def test_links_inside_one_hub_cache_folder_are_files(tmp_path: Path) -> None:
    cache = tmp_path / "models--acme--model"
    fill(cache / "blobs", blob="content")
    snapshot = fill(cache / "snapshots" / "abc")
    (snapshot / "config.json").symlink_to("../../blobs/blob")
    assert hash_directory(snapshot).entries == (
        FileEntry("config.json", hashlib.sha256(b"content").hexdigest(), 7),
    )
    assert DirectoryTree(snapshot).read("config.json") == b"content"
    fill(tmp_path, private="x")
    (snapshot / "stolen").symlink_to(tmp_path / "private")
    with pytest.raises(IntegrityError, match="holds no links"):
        hash_directory(snapshot)


def test_a_cache_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "models--acme--model"
    fill(cache / "blobs", blob="content")
    snapshot = fill(cache / "snapshots" / "abc")
    (snapshot / "sub").symlink_to("../../blobs")
    with pytest.raises(IntegrityError, match="not a regular file"):
        hash_directory(snapshot)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IntegrityError, match="not a regular file"):
        hash_directory(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_cannot_be_read_does_not_pass_for_empty(tmp_path: Path) -> None:
    hidden = fill(tmp_path / "hidden", file="x")
    hidden.chmod(0)
    try:
        with pytest.raises(IntegrityError, match="cannot be read"):
            hash_directory(tmp_path)
    finally:
        hidden.chmod(0o700)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="no such folder"):
        hash_directory(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../private", "/etc/passwd", "nowhere"])
def test_a_tree_reads_only_what_is_in_it(tmp_path: Path, name: str) -> None:
    fill(tmp_path, private="x")
    tree = DirectoryTree(fill(tmp_path / "model", inside="x"))
    with pytest.raises(IntegrityError):
        tree.read(name)


def test_a_manifest_has_no_doubles_and_is_sorted() -> None:
    a, b = FileEntry("a", "0" * 64, 1), FileEntry("b", "1" * 64, 1)
    assert Manifest.of([b, a]).entries == (a, b)
    for entries in ((b, a), (a, a)):
        with pytest.raises(IntegrityError, match="sorted"):
            Manifest(entries)


def test_payload_is_weights_and_configuration(tmp_path: Path) -> None:
    names = {"README.md": "d", "config.json": "{}", "model.safetensors": "w", "model.sig": "s"}
    manifest = hash_directory(fill(tmp_path, **names))
    assert [entry.name for entry in manifest.payload.entries] == [
        "config.json",
        "model.safetensors",
    ]
    assert manifest.payload.root != manifest.root
    assert manifest.without("README.md", "model.sig") == manifest.payload


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"one")
    write_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(ReleaseGuardError, match="cannot be written"):
        write_file(tmp_path / "nowhere" / "a", b"x")


@given(
    st.dictionaries(st.text("ab/.-é", min_size=1, max_size=6), st.binary(max_size=9), min_size=1)
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_on_disk_is_what_is_listed(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    folder, written = tmp_path_factory.mktemp("any"), {}
    for name, content in files.items():
        try:
            require_canonical(name)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except (IntegrityError, OSError):  # no such name, or a file where a folder would have to be
            continue
        written[name] = hashlib.sha256(content).hexdigest()
    found = {entry.name: entry.digest for entry in hash_directory(folder).entries}
    assert found == written
