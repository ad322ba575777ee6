"""One push at a time, in what can go wrong around it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from judged import fixed_key
from pushing import FOREIGN, Bench


@pytest.fixture
def guarded(prepared: Callable[[str], Bench], tmp_path: Path) -> Bench:
    """Our hook over git-lfs's."""
    return prepared("git-lfs").copied(tmp_path / "copy")


def refused(bench: Bench, *refs: str, **options: Path) -> str:
    """What is said when a push is refused, and that nothing of it arrived."""
    before = bench.published()
    done = bench.push(*refs, **options)
    assert done.returncode == 1
    assert bench.published() == before
    return done.stderr


def test_where_the_tool_is_not_on_the_path_the_interpreter_is_used(guarded: Bench) -> None:
    (guarded.folder / "bin/release-guard").unlink()
    assert "weights-changed" in refused(guarded, "tampered:main")
    assert guarded.push("verified:main").returncode == 0


def test_without_tool_and_interpreter_nothing_is_pushed(guarded: Bench) -> None:
    (guarded.folder / "bin/release-guard").unlink()
    hook = guarded.work / ".git/hooks/pre-push"
    hook.write_text(hook.read_text().replace(sys.executable, "/no/such/python"))
    said = refused(guarded, "verified:main")
    assert "release-guard is gone" in said
    assert "pip install model-release-guard" in said


@pytest.mark.parametrize("code", [1, 2, 77, 126])
def test_a_tool_that_fails_in_any_way_refuses(guarded: Bench, code: int) -> None:
    (guarded.folder / "bin/release-guard").write_text(f"#!/bin/sh\nexit {code}\n")
    refused(guarded, "verified:main")


def test_a_tool_that_is_killed_refuses(guarded: Bench) -> None:
    (guarded.folder / "bin/release-guard").write_text("#!/bin/sh\nkill -9 $$\n")
    refused(guarded, "verified:main")


def test_modules_in_the_repository_are_not_imported(guarded: Bench) -> None:
    """The hook runs in the repository: a file there must not become part of it."""
    (guarded.folder / "bin/release-guard").unlink()
    for name in ("click.py", "subprocess.py", "release_guard.py"):
        (guarded.work / name).write_text("import os; os._exit(0)\n")
    assert "weights-changed" in refused(guarded, "tampered:main")


def test_what_runs_next_hears_every_line_and_can_refuse(
    prepared: Callable[[str], Bench], tmp_path: Path
) -> None:
    bench = prepared("foreign").copied(tmp_path / "copy")
    (bench.work / "foreign.code").write_text("3")
    refused(bench, "verified:main", "docs-only:refs/heads/a b".replace(" ", "-"))
    said = (bench.work / "foreign.log").read_text().splitlines()
    ids = [bench.git("rev-parse", name) for name in ("verified", "docs-only", "main")]
    assert said == [
        f"called with origin {bench.url}",
        f"refs/heads/verified {ids[0]} refs/heads/main {ids[2]}",
        f"refs/heads/docs-only {ids[1]} refs/heads/a-b {'0' * 40}",
    ]


def test_what_runs_next_does_not_run_if_git_would_not(site: Bench) -> None:
    hook = site.work / ".git/hooks/pre-push"
    hook.write_text(FOREIGN)
    hook.chmod(0o644)
    site.guard("hook", "install")
    done = site.push("verified:main")
    assert done.returncode == 0, done.stderr
    assert not (site.work / "foreign.log").exists()
    assert len(site.published()[1]) == 3  # the hook itself uploads to LFS


def test_lfs_without_git_lfs_refuses(prepared: Callable[[str], Bench], tmp_path: Path) -> None:
    bench = prepared("none").copied(tmp_path / "copy")
    for tool in ("git", "sh", "cat", "env"):
        (bench.folder / "bin" / tool).symlink_to(str(shutil.which(tool)))
    bench.environment["PATH"] = str(bench.folder / "bin")
    bench.environment["GIT_EXEC_PATH"] = bench.git("--exec-path")
    said = refused(bench, "docs-only:main")
    assert "git-lfs is not installed here" in said


def test_remotes_nobody_named_are_left_alone(guarded: Bench) -> None:
    guarded.git("config", "--unset-all", "release-guard.remotes")
    guarded.git("config", "--unset-all", "release-guard.key")
    assert guarded.push("tampered:main").returncode == 0


@pytest.mark.parametrize("pattern", ["*", "orig*", "file://*", "{url}"])
def test_remotes_can_be_named_by_name_url_and_glob(guarded: Bench, pattern: str) -> None:
    guarded.git("config", "release-guard.remotes", "nobody")
    guarded.git("config", "--add", "release-guard.remotes", pattern.format(url=guarded.url))
    guarded.git("config", "--add", "release-guard.remotes", "somebody")
    refused(guarded, "tampered:main")


def test_a_push_by_url_is_the_same_push(guarded: Bench) -> None:
    guarded.git("config", "release-guard.remotes", "*")
    before = guarded.published()
    done = guarded.call("git", "push", "-q", guarded.url, "tampered:main")
    assert done.returncode == 1
    assert guarded.published() == before


def test_another_hub_is_watched(guarded: Bench) -> None:
    guarded.git("config", "--unset-all", "release-guard.remotes")
    sha = guarded.git("rev-parse", "tampered")
    line = f"refs/heads/x {sha} refs/heads/x {'0' * 40}\n"
    for endpoint, code in (("https://hub.example.org", 4), ("https://example.org", 4), ("", 0)):
        found = run(
            guarded, line, url="https://me:hf_t0ken@hub.example.org/a/b", HF_ENDPOINT=endpoint
        )
        assert found.returncode == code
        assert "hf_t0ken" not in found.stdout + found.stderr


def test_nobody_trusted_nothing_pushed(guarded: Bench) -> None:
    guarded.git("config", "--unset-all", "release-guard.key")
    said = refused(guarded, "verified:main")
    assert said.startswith("error: nobody is trusted here, so nothing can be verified; run: ")
    assert guarded.push("--delete", "old").returncode == 0  # that publishes nothing


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"key": "../keys/none.pub"}, "cannot be read"),
        ({"key": "../keys/1.pem"}, "a private key"),
        ({"key": ""}, "nobody is trusted"),
        ({"identity": "a"}, "set either"),
        ({"identity": "a", "issuer": "b"}, "set either"),
        ({"key": "", "issuer": "b"}, "set either"),
    ],
)
def test_trust_that_is_not_one_signer_refuses(
    guarded: Bench, settings: dict[str, str], words: str
) -> None:
    for name, value in settings.items():
        guarded.git("config", f"release-guard.{name}", value)
    assert words in refused(guarded, "verified:main")


def test_another_key_refuses(guarded: Bench) -> None:
    fixed_key(guarded.folder / "keys", 2)
    guarded.git("config", "release-guard.key", "../keys/2.pub")
    assert "wrong-signer: model.sig: signed by the key" in refused(guarded, "docs-only:main")


@pytest.mark.parametrize("where", ["pushed", "checked out", "ignored by us"])
def test_a_key_that_commits_bring_along_vouches_for_nothing(guarded: Bench, where: str) -> None:
    """Whoever may commit would only have to bring a key of their own."""
    name = ".github/key.pub" if where == "ignored by us" else "key.pub"
    guarded.git("checkout", "-q", "-b", "keyed", "verified")
    (guarded.work / name).parent.mkdir(exist_ok=True)
    (guarded.work / name).write_bytes((guarded.folder / "keys/1.pub").read_bytes())
    guarded.commit()
    guarded.git("config", "release-guard.key", name)
    if where != "checked out":
        guarded.git("checkout", "-q", "verified")
        (guarded.work / name).parent.mkdir(exist_ok=True)
        (guarded.work / name).write_bytes((guarded.folder / "keys/1.pub").read_bytes())
    ref = "verified:main" if where == "checked out" else "keyed:main"
    said = refused(guarded, ref)
    assert "a commit must not bring the key that vouches for it" in said
    done = guarded.guard("hook", "install", "--key", name)
    assert done.returncode == 0, done.stderr
    assert guarded.push("verified:main").returncode == 0


@pytest.mark.parametrize("how", ["a submodule", "a link"])
def test_a_key_beyond_what_a_commit_can_move_vouches_for_nothing(guarded: Bench, how: str) -> None:
    """The commit holds no key, but says which folder the key is found in."""
    aside = guarded.folder / "aside"
    aside.mkdir()
    shutil.copy(guarded.folder / "keys/1.pub", aside / "k.pub")
    if how == "a link":
        (guarded.work / "trust").symlink_to(aside)
    else:
        guarded.git("init", "-q", at=aside)
        guarded.git("add", ".", at=aside)
        guarded.git("commit", "-qm", "key", at=aside)
        allowed = ("-c", "protocol.file.allow=always")
        guarded.git(*allowed, "submodule", "add", "-q", str(aside), "trust")
    guarded.git("add", "-A")
    guarded.git("config", "release-guard.key", "trust/k.pub")
    said = refused(guarded, "verified:main")
    assert "a commit must not bring the key that vouches for it" in said


def test_a_key_in_the_tree_that_git_does_not_know_counts(guarded: Bench) -> None:
    (guarded.work / "mine.pub").write_bytes((guarded.folder / "keys/1.pub").read_bytes())
    guarded.git("config", "release-guard.key", "mine.pub")
    assert guarded.push("verified:main").returncode == 0


def test_misspelt_settings_are_said(guarded: Bench) -> None:
    guarded.git("config", "release-guard.remote", "*")
    done = guarded.push("verified:main")
    assert done.returncode == 0
    assert "warning: git config release-guard.remote: no setting of release-guard" in done.stderr


def test_settings_of_one_push_count(guarded: Bench) -> None:
    guarded.git("config", "--unset-all", "release-guard.key")
    done = guarded.call(
        "git", "-c", "release-guard.key=../keys/1.pub", "push", "-q", "origin", "verified:main"
    )
    assert done.returncode == 0, done.stderr


def test_a_repository_that_only_variables_name(guarded: Bench) -> None:
    """Without GIT_DIR, the folder where git runs the hook belongs to no repository."""
    tree = guarded.folder / "tree elsewhere"
    tree.mkdir()
    guarded.environment["GIT_DIR"] = str(guarded.work / ".git")
    guarded.environment["GIT_WORK_TREE"] = str(tree)
    before = guarded.remote.joinpath("refs/heads/main").read_text()
    done = guarded.push("tampered:main", at=tree)
    assert done.returncode == 1
    assert "weights-changed" in done.stderr
    assert guarded.remote.joinpath("refs/heads/main").read_text() == before
    done = guarded.push("verified:main", at=tree)
    assert done.returncode == 0, done.stderr


def test_a_bare_repository_pushes_too(guarded: Bench) -> None:
    bare = guarded.folder / "bare copy.git"
    guarded.git("clone", "-q", "--bare", str(guarded.work), str(bare))
    guarded.git("remote", "set-url", "origin", guarded.url, at=bare)
    guarded.git("config", "release-guard.remotes", "*", at=bare)
    guarded.git("config", "release-guard.key", str(guarded.folder / "keys/1.pub"), at=bare)
    assert guarded.guard("hook", "install", at=bare).returncode == 0
    refused(guarded, "tampered:main", at=bare)
    assert guarded.push("docs-only:main", at=bare).returncode == 0


@pytest.mark.parametrize("kind", ["blob", "tree"])
def test_a_tag_of_something_else_is_refused(guarded: Bench, kind: str) -> None:
    name = {"blob": "verified:README.md", "tree": "verified^{tree}"}[kind]
    guarded.git("tag", "odd", guarded.git("rev-parse", name))
    assert "error: refs/tags/odd: " in refused(guarded, "odd")


def test_one_document_says_all_of_it(guarded: Bench) -> None:
    ids = {name: guarded.git("rev-parse", name) for name in ("docs-only", "tampered", "main")}
    lines = "".join(
        f"refs/heads/{name} {ids[name]} refs/heads/{name} {'0' * 40}\n"
        for name in ("docs-only", "tampered")
    )
    lines += f"(delete) {'0' * 40} refs/heads/gone {ids['main']}\n"
    done = run(guarded, lines, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 4
    assert (found["remote"], found["watched"]) == ("origin", True)
    assert [ref["states"] for ref in found["refs"]] == [
        ["documentation-changed"],
        ["weights-changed"],
        [],
    ]
    assert [ref["deleted"] for ref in found["refs"]] == [False, False, True]
    assert found["errors"][-1] == "nothing was pushed"
    good = json.loads(run(guarded, lines.splitlines(keepends=True)[0], "--json").stdout)
    assert good["refs"][0]["notes"] == ["documentation changed: README.md"]


@pytest.mark.parametrize(
    "line",
    ["x", "a b c d\n", f"refs/heads/a {'0' * 40} refs/heads/b {'0' * 40}\n", "\n", "\x00\n"],
)
def test_what_git_would_not_say_is_refused(guarded: Bench, line: str) -> None:
    done = run(guarded, line)
    assert done.returncode == 1
    assert "standard input" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_claim_that_expired_is_not_pushed_again(guarded: Bench) -> None:
    """Not even its documents: nothing says that it still resists."""
    later = datetime.now(UTC) + timedelta(days=400)
    shim = guarded.folder / "bin/release-guard"
    shim.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -P -c "\n'
        "import datetime, sys\n"
        "import release_guard.hook_run as run\n"
        "from release_guard.cli import main\n"
        f"run.now = lambda: datetime.datetime.fromisoformat('{later.isoformat()}')\n"
        'sys.exit(main())" "$@"\n'
    )
    assert "evidence-expired: the claim expired on" in refused(guarded, "docs-only:main")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("ReleaseGuardError('git: gone')", "refs/heads/main: git: gone"),
        ("RuntimeError('odd')", "unexpected RuntimeError: odd"),
        ("SystemExit(0)", "unexpected KeyError"),
    ],
)
def test_what_rides_along_and_cannot_be_asked_for_refuses(
    guarded: Bench, raised: str, said: str
) -> None:
    """It is asked for in a thread, whose errors nobody sees by themselves."""
    shim = guarded.folder / "bin/release-guard"
    shim.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -P -c "\n'
        "import sys\n"
        "from release_guard import hook\n"
        "from release_guard.cli import main\n"
        "from release_guard.errors import ReleaseGuardError\n"
        "def arrivals(*_):\n"
        f"    raise {raised}\n"
        "hook.arrivals = arrivals\n"
        'sys.exit(main())" "$@"\n'
    )
    assert said in refused(guarded, "verified:main")


def test_pushing_needs_neither_torch_nor_the_hub(guarded: Bench) -> None:
    sha = guarded.git("rev-parse", "verified")
    line = f"refs/heads/x {sha} refs/heads/x {'0' * 40}\n"
    code = (
        "import sys; from release_guard.cli import main\n"
        "code = main(['hook', 'run', 'pre-push', 'origin', 'file:///x'])\n"
        "heavy = {'click', 'pydantic', 'torch', 'huggingface_hub', 'rich', 'sigstore', 'httpx'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "sys.exit(f'{code} {loaded}' if code or loaded else 0)"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-P", "-c", code],
        cwd=guarded.work,
        env=guarded.environment,
        input=line,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def run(
    bench: Bench, lines: str, *options: str, url: str = "file:///x", **variables: str
) -> subprocess.CompletedProcess[str]:
    """`hook run` as git would call it."""
    command = [sys.executable, "-P", "-m", "release_guard", "hook", "run", "pre-push"]
    return subprocess.run(  # noqa: S603
        [*command, *options, "origin", url],
        cwd=bench.work,
        env={**bench.environment, **variables},
        input=lines,
        capture_output=True,
        text=True,
        check=False,
    )
