"""What rides along below the newest state of a branch."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pushing import Bench, release

ALONG = "which no verified release holds"


@pytest.fixture
def guarded(prepared: Callable[[str], Bench], tmp_path: Path) -> Bench:
    """Our hook over git-lfs's; checked out is a branch of its own, where main is."""
    bench = prepared("git-lfs").copied(tmp_path / "copy")
    bench.git("checkout", "-q", "-b", "long", "main")
    return bench


def refused(bench: Bench, *refs: str) -> str:
    before = bench.published()
    done = bench.push(*refs)
    assert done.returncode == 1
    assert bench.published() == before
    return done.stderr


def passing_through(bench: Bench, name: str, content: bytes) -> None:
    """A file that is there for one commit."""
    path = bench.work / name
    before = path.read_bytes() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    bench.commit()
    if before is None:
        path.unlink()
    else:
        path.write_bytes(before)
    bench.commit()


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "undefended.bin", "sub/deep.gguf", "LICENSE.safetensors", "x y\n.pt"],
)
def test_weights_of_one_commit_are_not_published(guarded: Bench, name: str) -> None:
    passing_through(guarded, name, b"undefended")
    assert ALONG in refused(guarded, "long:main")


@pytest.mark.parametrize("name", ["weights.dat", ".github/weights", "README.md", "card.png"])
def test_weights_by_another_name_are_not_uploaded_to_lfs(guarded: Bench, name: str) -> None:
    """git-lfs uploads what a pointer names, whatever the file is called and the attributes say."""
    weights = guarded.work / "undefended.safetensors"
    weights.write_bytes(b"undefended")
    guarded.git("add", "-A")
    pointer = guarded.git("show", ":undefended.safetensors")
    guarded.git("rm", "-q", "--cached", "undefended.safetensors")
    weights.unlink()
    passing_through(guarded, name, pointer.replace("size 10", "size 99999999").encode())
    assert ALONG in refused(guarded, "long:main")
    loose = "\n" + pointer.replace("git-lfs.github.com", "hawser.github.com") + "\n\n"
    guarded.git("reset", "-q", "--hard", "main")
    passing_through(guarded, name, loose.replace("size 10", "size 99999999").encode())
    assert ALONG in refused(guarded, "long:main")


def test_pictures_in_lfs_are_let_through(guarded: Bench) -> None:
    (guarded.work / ".gitattributes").write_text("*.safetensors filter=lfs\n*.png filter=lfs\n")
    (guarded.work / "card.png").write_bytes(b"a picture")
    guarded.commit()
    done = guarded.push("long:main")
    assert done.returncode == 0, done.stderr
    assert "documentation added: card.png" in done.stderr


def test_a_large_plain_file_is_refused_wherever_it_was(guarded: Bench) -> None:
    passing_through(guarded, "notes.md", bytes((10 << 20) + 1))
    assert ALONG in refused(guarded, "long:main")


def test_releases_on_the_way_vouch_for_themselves(guarded: Bench) -> None:
    for name in ("3", "4", "5"):
        release(guarded, name)
    done = guarded.push("long:main")
    assert done.returncode == 0, done.stderr
    assert len(guarded.published()[1]) == 5


def test_weights_may_come_a_commit_before_their_proof(guarded: Bench) -> None:
    release(guarded, "3")
    guarded.git("reset", "-q", "--soft", "main")
    guarded.git("reset", "-q")
    guarded.git("add", "part.safetensors")
    guarded.git("commit", "-qm", "weights")
    guarded.commit("proof")
    assert guarded.push("long:main").returncode == 0


def test_a_bad_release_on_the_way_does_not_vouch(guarded: Bench) -> None:
    release(guarded, "3")
    (guarded.work / "config.json").write_text("{}")
    guarded.git("commit", "-q", "-a", "--amend", "--no-edit")  # its signature no longer fits
    release(guarded, "4")
    shutil.copy(guarded.work / ".git/HEAD", guarded.folder / "HEAD")
    assert ALONG in refused(guarded, "long:main")


def test_merges_bring_what_both_sides_bring(guarded: Bench) -> None:
    guarded.git("checkout", "-q", "-b", "side", "main")
    passing_through(guarded, "undefended.bin", b"undefended")
    guarded.git("checkout", "-q", "long")
    (guarded.work / "README.md").write_text("# Elsewhere\n")
    guarded.commit()
    guarded.git("merge", "-q", "-m", "both", "side")
    assert ALONG in refused(guarded, "long:main")


def test_a_merge_can_bring_what_no_side_has(guarded: Bench) -> None:
    guarded.git("checkout", "-q", "-b", "side", "main")
    (guarded.work / "NOTICE.md").write_text("x\n")
    guarded.commit()
    guarded.git("checkout", "-q", "long")
    guarded.git("merge", "-q", "--no-ff", "--no-commit", "side")
    (guarded.work / "undefended.bin").write_bytes(b"undefended")
    guarded.commit("an evil merge")
    guarded.git("rm", "-q", "undefended.bin")
    guarded.commit()
    assert ALONG in refused(guarded, "long:main")


def test_merging_what_the_remote_has_brings_nothing(guarded: Bench) -> None:
    guarded.git("push", "-q", "--no-verify", "origin", "bad-ancestor:main")
    (guarded.work / "README.md").write_text("# Elsewhere\n")
    guarded.commit()
    guarded.git("merge", "-q", "-m", "both", "origin/main")
    done = guarded.push("long:main")
    assert done.returncode == 0, done.stderr


def test_what_the_remote_has_anyway_is_not_asked_again(guarded: Bench) -> None:
    """Its history cannot be undone by refusing a new branch, nor a tag, on it."""
    guarded.git("push", "-q", "--no-verify", "origin", "bad-ancestor:main")
    assert guarded.push("bad-ancestor:refs/heads/again", "tag-bad-ancestor").returncode == 0


def test_what_the_remote_once_had_is_not_what_it_has(guarded: Bench) -> None:
    """The tracking ref of a branch that was deleted over there stays here."""
    guarded.git("push", "-q", "--no-verify", "origin", "bad-ancestor:refs/heads/raw")
    guarded.git("update-ref", "-d", "refs/heads/raw", at=guarded.remote)
    assert guarded.git("rev-parse", "refs/remotes/origin/raw")
    assert ALONG in refused(guarded, "bad-ancestor:main")


def test_a_remote_that_cannot_be_asked_has_nothing(guarded: Bench) -> None:
    guarded.git("push", "-q", "--no-verify", "origin", "bad-ancestor:refs/heads/raw")
    line = f"refs/heads/x {guarded.git('rev-parse', 'bad-ancestor')} refs/heads/x {'0' * 40}\n"
    guarded.git("config", "--add", "release-guard.remotes", "*")
    for url, code in ((guarded.url, 0), (f"file://{guarded.folder}/gone.git", 1)):
        command = [sys.executable, "-P", "-m", "release_guard", "hook", "run", "pre-push", "o", url]
        done = subprocess.run(  # noqa: S603
            command,
            cwd=guarded.work,
            env=guarded.environment,
            input=line,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
    assert "does not say whether it has them already" in done.stderr


@pytest.mark.parametrize(
    "name", [".release-guard/raw.safetensors", "raw.pkl", ".github/raw.tar.gz"]
)
def test_weights_are_weights_wherever_they_lie_and_however_packed(
    guarded: Bench, name: str
) -> None:
    passing_through(guarded, name, b"undefended")
    assert ALONG in refused(guarded, "long:main")


@pytest.mark.parametrize("how", ["pushurl", "two urls", "by url", "no tracking refs"])
def test_tracking_refs_of_another_place_say_nothing(guarded: Bench, how: str) -> None:
    """Where one fetches here and pushes there, there may be less of it there."""
    other = guarded.folder / "other.git"
    guarded.git("clone", "-q", "--bare", str(guarded.remote), str(other))
    guarded.git("push", "-q", "--no-verify", "origin", "bad-ancestor:main")
    guarded.git("config", "release-guard.remotes", "*")
    target, url = "origin", f"file://{other}"
    if how == "pushurl":
        guarded.git("config", "remote.origin.pushurl", url)
    elif how == "two urls":
        guarded.git("config", "--add", "remote.origin.url", url)
    elif how == "by url":
        target = url
    else:
        guarded.git("remote", "add", "fresh", url)
        target = "fresh"
    done = guarded.call("git", "push", "-q", target, "bad-ancestor:refs/heads/new")
    assert done.returncode == 1
    assert ALONG in done.stderr
    assert not (other / "refs/heads/new").exists()
    assert not (other / "lfs").exists()


def test_a_history_that_joins_the_first_time_is_asked_whole(guarded: Bench) -> None:
    guarded.git("checkout", "-q", "--orphan", "own")
    guarded.git("rm", "-q", "-r", "--cached", ".")
    (guarded.work / "undefended.bin").write_bytes(b"undefended")
    guarded.commit("root")
    guarded.git("rm", "-q", "undefended.bin")
    guarded.commit()
    assert ALONG in refused(guarded, "own:refs/heads/own")


def test_many_files_make_few_lines(guarded: Bench) -> None:
    for number in range(5):
        (guarded.work / f"{number}.bin").write_bytes(b"undefended %d" % number)
    guarded.commit()
    guarded.git("rm", "-q", *(f"{number}.bin" for number in range(5)))
    guarded.commit()
    said = refused(guarded, "long:main")
    assert said.count(ALONG) == 3
    assert "and 2 more files like this" in said
