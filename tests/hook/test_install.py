import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from judged import fixed_key
from pushing import FOREIGN, ROOT, Bench

NEXT = "pre-push.release-guard-next"
MANAGED = ("none", "git-lfs", "foreign", "link", "not executable", "hooks-path")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Names, modes and contents of a folder; of a link, where it leads."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(folder.iterdir()):
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes()
        found[path.name] = (stat.S_IMODE(path.lstat().st_mode), content)
    return found


def arranged(bench: Bench, setup: str) -> Path:
    """What `hook install` finds, and the folder it has to write to."""
    hooks = bench.work / ".git/hooks"
    hook = hooks / "pre-push"
    if setup == "hooks-path":
        hooks = bench.folder / "shared hooks"
        hooks.mkdir()
        hook.rename(hooks / "pre-push")
        bench.git("config", "core.hooksPath", str(hooks))
    elif setup == "none":
        hook.unlink()
    elif setup == "link":
        hook.unlink()
        (hooks / "everything.sh").write_text(FOREIGN)
        (hooks / "everything.sh").chmod(0o755)
        hook.symlink_to("everything.sh")
    elif setup != "git-lfs":
        hook.write_text(FOREIGN)
        hook.chmod(0o644 if setup == "not executable" else 0o755)
    return hooks


@pytest.mark.parametrize("setup", MANAGED)
def test_uninstall_restores_byte_for_byte(site: Bench, setup: str) -> None:
    hooks = arranged(site, setup)
    before = snapshot(hooks)
    assert site.guard("hook", "install", "--yes").returncode == 0
    installed = snapshot(hooks)
    assert installed != before
    assert site.guard("hook", "install", "--yes").returncode == 0  # twice is once
    assert snapshot(hooks) == installed
    assert site.guard("hook", "uninstall", "--yes").returncode == 0
    assert snapshot(hooks) == before


def test_the_hook_is_written_for_this_interpreter_and_runs_first(site: Bench) -> None:
    site.guard("hook", "install")
    hook = site.work / ".git/hooks/pre-push"
    text = hook.read_text()
    assert text.startswith("#!/bin/sh\n# release-guard pre-push hook, version 1\n")
    assert f"\npython={sys.executable}\n" in text
    assert "\nlfs=\n" in text  # git-lfs's own hook runs next
    assert os.access(hook, os.X_OK)
    assert b"git lfs pre-push" in (site.work / ".git/hooks" / NEXT).read_bytes()


def test_where_nothing_uploads_to_lfs_the_hook_does(site: Bench) -> None:
    arranged(site, "foreign")
    site.guard("hook", "install")
    assert "\nlfs=yes\n" in (site.work / ".git/hooks/pre-push").read_text()


def test_a_comment_about_lfs_does_not_upload(site: Bench) -> None:
    hook = site.work / ".git/hooks/pre-push"
    hook.write_text("#!/bin/sh\n# git lfs pre-push is gone\n")
    site.guard("hook", "install")
    assert "\nlfs=yes\n" in (site.work / ".git/hooks/pre-push").read_text()


def test_a_repository_without_lfs_needs_no_git_lfs(site: Bench, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    site.git("init", "-q", "--template=", str(plain), at=tmp_path)  # not even a hooks folder
    assert site.guard("hook", "install", at=plain).returncode == 0
    assert "\nlfs=\n" in (plain / ".git/hooks/pre-push").read_text()
    (plain / ".gitattributes").write_text("*.bin filter=lfs\n")
    done = site.guard("hook", "status", "--json", at=plain)
    assert (done.returncode, json.loads(done.stdout)["state"]) == (1, "outdated")
    site.guard("hook", "install", at=plain)
    assert "\nlfs=yes\n" in (plain / ".git/hooks/pre-push").read_text()


def test_shared_hooks_are_not_written_unasked(site: Bench) -> None:
    hooks = arranged(site, "hooks-path")
    before = snapshot(hooks)
    for command in ("install", "uninstall"):
        done = site.guard("hook", command)
        assert done.returncode == 2
        assert "core.hooksPath is" in done.stderr
        assert "--yes writes there" in done.stderr
    assert snapshot(hooks) == before


def test_hooks_that_cannot_be_written_are_said(site: Bench) -> None:
    site.git("config", "core.hooksPath", "/dev/null")
    done = site.guard("hook", "install", "--yes")
    assert done.returncode == 1
    assert done.stderr.startswith("error: /dev/null")
    assert len(done.stderr.splitlines()) == 1


def test_a_hook_edited_by_hand_is_seen_and_written_again(site: Bench) -> None:
    site.guard("hook", "install")
    hook = site.work / ".git/hooks/pre-push"
    good = hook.read_bytes()
    for bad in (good.replace(b"|| exit $?", b"|| true"), good.replace(b"version 1", b"version 0")):
        hook.write_bytes(bad)
        done = site.guard("hook", "status", "--json")
        assert (done.returncode, json.loads(done.stdout)["state"]) == (1, "outdated")
        assert site.guard("hook", "install").returncode == 0
        assert hook.read_bytes() == good
    hook.chmod(0o644)  # git would not run it
    assert site.guard("hook", "status").returncode == 1
    assert site.guard("hook", "install").returncode == 0
    assert site.guard("hook", "status").returncode == 0


def test_a_hook_written_over_ours_is_not_lost(site: Bench) -> None:
    site.guard("hook", "install")
    hooks = site.work / ".git/hooks"
    other = hooks / "pre-push"
    other.write_text(FOREIGN)
    other.chmod(0o755)
    before = snapshot(hooks)
    for command in ("install", "uninstall"):
        done = site.guard("hook", command)
        assert done.returncode == 1
        assert NEXT in done.stderr
        assert snapshot(hooks) == before
    other.write_bytes((hooks / NEXT).read_bytes())  # the same twice: nothing can be lost
    assert site.guard("hook", "install").returncode == 0
    assert site.guard("hook", "status").returncode == 0


def test_an_install_that_was_cut_short_is_finished(site: Bench) -> None:
    hooks = site.work / ".git/hooks"
    before = snapshot(hooks)
    (hooks / "pre-push").rename(hooks / NEXT)
    assert site.guard("hook", "install").returncode == 0
    assert site.guard("hook", "uninstall").returncode == 0
    assert snapshot(hooks) == before


def test_uninstall_where_nothing_is(site: Bench) -> None:
    hooks = arranged(site, "none")
    before = snapshot(hooks)
    done = site.guard("hook", "uninstall", "--json")
    assert (done.returncode, json.loads(done.stdout)["changed"]) == (0, False)
    assert snapshot(hooks) == before


def test_a_worktree_and_a_folder_below_find_the_same_hook(site: Bench) -> None:
    beside = site.folder / "beside"
    site.git("worktree", "add", "-q", "--detach", str(beside), "main")
    assert site.guard("hook", "install", at=beside).returncode == 0
    for place in (site.work, site.work / "sub", beside):
        done = site.guard("hook", "status", "--json", at=place)
        found = json.loads(done.stdout)
        assert (done.returncode, found["state"]) == (0, "installed"), done.stderr
        assert Path(found["hook"]) == site.work / ".git/hooks/pre-push"


def test_one_command_pins_a_key_where_no_commit_reaches(site: Bench, tmp_path: Path) -> None:
    site.git("worktree", "add", "-q", "--detach", str(tmp_path / "beside"), "main")
    site.git("config", "release-guard.identity", "somebody else")
    key = site.work / "tracked.pub"
    key.write_bytes((site.folder / "keys/1.pub").read_bytes())
    assert site.guard("hook", "install", "--key", "tracked.pub").returncode == 0
    key.write_bytes(fixed_key(tmp_path, 2).public.read_bytes())  # a pull brings another
    assert site.git("config", "release-guard.key") == ".git/release-guard.pub"
    signer = fixed_key(site.folder / "keys").identity
    for place in (site.work, tmp_path / "beside"):
        found = json.loads(site.guard("hook", "status", "--json", at=place).stdout)
        assert found["identity"] == signer


def test_a_private_key_is_not_copied(site: Bench) -> None:
    done = site.guard("hook", "install", "--key", "../keys/1.pem")
    assert done.returncode == 1
    assert "a private key; give the public one" in done.stderr
    assert not (site.work / ".git/release-guard.pub").exists()


@pytest.mark.parametrize(
    "given", [["--identity", "a"], ["--issuer", "b"], ["--key", "k", "--identity", "a"]]
)
def test_half_a_signer_is_refused(site: Bench, given: list[str]) -> None:
    before = snapshot(site.work / ".git/hooks")
    assert site.guard("hook", "install", *given).returncode == 2
    assert snapshot(site.work / ".git/hooks") == before


def test_status_says_which_remotes_are_left_alone(site: Bench) -> None:
    assert site.guard("hook", "install").returncode == 0
    site.git("remote", "add", "mirror", "https://example.org/a/b")
    done = site.guard("hook", "status")
    assert done.returncode == 0, done.stderr
    assert "watches: origin\nleaves alone: mirror\n" in done.stdout
    site.git("config", "--unset-all", "release-guard.remotes")
    done = site.guard("hook", "status")
    assert done.returncode == 1
    assert "no remote is watched (origin, mirror)" in done.stderr
    site.git("remote", "set-url", "mirror", "https://huggingface.co/a/b")
    assert "watches: mirror" in site.guard("hook", "status").stdout


def test_nobody_takes_the_place_of_who_is_trusted_by_a_slip(site: Bench) -> None:
    before = site.git("config", "release-guard.key")
    done = site.guard("hook", "install", "--identity", "me", "--issuer", "example.org")
    assert done.returncode == 2
    assert "issuer" in done.stderr
    assert site.git("config", "release-guard.key") == before
    assert not site.git("config", "release-guard.identity", check=False)


def test_status_says_what_is_missing(site: Bench) -> None:
    done = site.guard("hook", "status")
    assert done.returncode == 1
    assert "another hook is there, which need not verify anything" in done.stderr
    site.guard("hook", "install")
    site.git("config", "--unset", "release-guard.key")
    done = site.guard("hook", "status")
    assert done.returncode == 1
    assert "nobody is trusted here" in done.stderr


def test_outside_a_repository_it_is_said(site: Bench, tmp_path: Path) -> None:
    for command in ("install", "uninstall", "status"):
        done = site.guard("hook", command, at=tmp_path)
        assert done.returncode == 1
        assert "not a git repository" in done.stderr


def test_the_template_ships_with_the_package() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    assert '"hooks" = "release_guard/_hooks"' in settings
    assert (ROOT / "hooks/pre-push").is_file()


def test_pre_commit_installed_later_still_calls_ours(
    prepared: Callable[[str], Bench], tmp_path: Path
) -> None:
    bench = prepared("git-lfs").copied(tmp_path / "copy")
    hooks = bench.work / ".git/hooks"
    assert bench.python("pre_commit", "install", "-t", "pre-push").returncode == 0
    assert (hooks / "pre-push.legacy").exists()
    (bench.work / ".git/info/exclude").write_text(".pre-commit-config.yaml\n")
    (bench.work / ".pre-commit-config.yaml").write_text("repos: []\n")
    before = bench.published()
    done = bench.push("tampered:main")
    assert done.returncode == 1
    assert "weights-changed" in done.stderr + done.stdout
    assert bench.published() == before


def test_pre_commit_installed_twice_around_ours_is_untangled(
    prepared: Callable[[str], Bench], tmp_path: Path
) -> None:
    bench = prepared("pre-commit").copied(tmp_path / "copy")
    assert bench.python("pre_commit", "install", "-t", "pre-push").returncode == 0
    assert bench.guard("hook", "install").returncode == 0
    assert not (bench.work / ".git/hooks/pre-push.legacy").exists()
    assert bench.guard("hook", "status").returncode == 0
    done = bench.push("docs-only:main")
    assert done.returncode == 0, done.stderr
    assert (bench.folder / "pre-commit.log").read_text() == "ran\n"
