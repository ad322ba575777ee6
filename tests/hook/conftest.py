from collections.abc import Callable
from pathlib import Path

import pytest
from pushing import FOREIGN, Bench, stock

PRE_COMMIT = """\
repos:
- repo: local
  hooks:
  - id: note
    name: note
    entry: sh -c 'echo ran >>../pre-commit.log'
    language: system
    stages: [pre-push]
    always_run: true
    pass_filenames: false
"""


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Never push from it; copy it."""
    return stock(tmp_path_factory.mktemp("stock") / "every state")


@pytest.fixture(scope="session")
def prepared(original: Bench, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    """The same with the hook installed over what a setup has there before; made once each."""
    made: dict[str, Bench] = {}

    def of(setup: str) -> Bench:
        if setup not in made:
            made[setup] = original.copied(tmp_path_factory.mktemp("setups") / setup)
            set_up(made[setup], setup)
            done = made[setup].guard("hook", "install", "--yes")
            assert done.returncode == 0, done.stderr
        return made[setup]

    return of


@pytest.fixture
def site(original: Bench, tmp_path: Path) -> Bench:
    """A copy to work on; git-lfs's own hook is there, ours is not."""
    return original.copied(tmp_path / "copy")


def set_up(bench: Bench, setup: str) -> None:
    """Bring a repository, fresh from `git lfs install`, to where `hook install` finds it."""
    hook = bench.work / ".git/hooks/pre-push"
    if setup in {"none", "foreign", "pre-commit"}:
        hook.unlink()
    if setup == "foreign":
        hook.write_text(FOREIGN)
        hook.chmod(0o755)
    if setup == "hooks-path":
        (bench.folder / "shared hooks").mkdir()
        hook.rename(bench.folder / "shared hooks/pre-push")
        bench.git("config", "core.hooksPath", "../shared hooks")
    if setup == "pre-commit":
        (bench.work / ".git/info/exclude").write_text(".pre-commit-config.yaml\n")
        (bench.work / ".pre-commit-config.yaml").write_text(PRE_COMMIT)
        done = bench.python("pre_commit", "install", "-t", "pre-push")
        assert done.returncode == 0, done.stderr
