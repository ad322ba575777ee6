"""The hook as pre-commit runs it: what it can refuse, and what it is known to miss."""

from pathlib import Path

import pytest
import yaml
from pushing import ROOT, Bench

MANIFEST = ROOT / ".pre-commit-hooks.yaml"


@pytest.fixture
def convenient(site: Bench) -> Bench:
    """pre-commit installed over git-lfs's hook, with ours as its only one."""
    (hook,) = yaml.safe_load(MANIFEST.read_text())
    local = {**hook, "language": "system"}  # no network: the tool that is on the path
    del local["minimum_pre_commit_version"]
    config = {"repos": [{"repo": "local", "hooks": [local]}]}
    (site.work / ".git/info/exclude").write_text(".pre-commit-config.yaml\n")
    (site.work / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    assert site.python("pre_commit", "install", "-t", "pre-push").returncode == 0
    return site


def test_the_manifest_is_one(site: Bench) -> None:
    done = site.python("pre_commit", "validate-manifest", str(MANIFEST))
    assert done.returncode == 0, done.stdout
    (hook,) = yaml.safe_load(MANIFEST.read_text())
    assert hook["stages"] == ["pre-push"]
    assert (hook["always_run"], hook["pass_filenames"]) == (True, False)


@pytest.mark.parametrize("ref", ["main", "refs/heads/new"])
def test_the_first_ref_is_verified(convenient: Bench, ref: str) -> None:
    refs, _ = convenient.published()
    done = convenient.push(f"tampered:{ref}")
    assert done.returncode == 1
    assert "weights-changed" in done.stdout
    assert convenient.published()[0] == refs
    assert convenient.push(f"verified:{ref}").returncode == 0


def test_a_first_push_of_everything_is_verified(convenient: Bench, tmp_path: Path) -> None:
    empty = tmp_path / "empty.git"
    convenient.git("init", "-q", "--bare", str(empty))
    convenient.git("config", "remote.origin.url", f"file://{empty}")
    for ref in convenient.git("for-each-ref", "--format=%(refname)", "refs/remotes").splitlines():
        convenient.git("update-ref", "-d", ref)
    assert convenient.push("tampered").returncode == 1
    done = convenient.push("main")
    assert done.returncode == 0, done.stdout


def test_what_it_misses_is_what_the_documents_say(convenient: Bench) -> None:
    """Should one of these fail, pre-commit has learnt something: change docs/hook.md."""
    _, objects = convenient.published()
    assert convenient.push("tampered:main").returncode == 1
    assert len(convenient.published()[1]) == len(objects) + 1  # git-lfs ran before the refusal
    assert convenient.push("docs-only:refs/heads/a", "tampered:refs/heads/b").returncode == 0


def test_outside_a_push_it_refuses(convenient: Bench) -> None:
    done = convenient.guard("hook", "run", "pre-commit")
    assert done.returncode == 2
    assert "pre-commit does not say what is pushed" in done.stderr
