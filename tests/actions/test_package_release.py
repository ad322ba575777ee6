"""Our own release: the shell of its workflow, in a copy of what a checkout would have."""

import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from fake_runner import Runner
from judged import write

from release_guard import __version__

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
PARTS = (".ci", "release_guard", "policies", "hooks", "workflows", "pyproject.toml", "README.md",
         "LICENSE", "CHANGELOG.md")  # fmt: skip
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def releasing(runner: Runner, tmp_path: Path) -> Runner:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, checkout / name, ignore=ignore)
        elif source.exists():
            shutil.copy(source, checkout)
    return replace(
        runner,
        checkout=checkout,
        variables={},
        replaced={"install": "true"},
        github={"repository": "acme/guard", "sha": COMMIT, "ref_name": f"v{__version__}"},
    )


def test_packages_are_built_run_and_handed_over(releasing: Runner, tmp_path: Path) -> None:
    jobs = releasing.run((WORKFLOWS / "release.yml").read_text())

    assert jobs["build"].outcome == "success", jobs["build"].log
    assert f"release-guard {__version__}" in jobs["build"].log
    built = sorted((jobs["publish"].workspace / "dist").iterdir())
    assert [path.name.partition("-")[0] for path in built] == ["model_release_guard"] * 2
    source, wheel = built[1], built[0]
    with zipfile.ZipFile(wheel) as archive:
        pin = archive.read("release_guard/_workflows/action").decode()
        names = archive.namelist()
    assert pin == f"acme/guard@{COMMIT}\n"
    assert "release_guard/_workflows/release-guard.yml" in names
    assert "release_guard/_policies/default.toml" in names
    with tarfile.open(source) as archive:
        assert any(name.endswith("/workflows/action") for name in archive.getnames())


def test_a_tag_of_another_version_builds_nothing(releasing: Runner) -> None:
    other = replace(releasing, github={**releasing.github, "ref_name": "v99"})
    jobs = other.run((WORKFLOWS / "release.yml").read_text())

    assert jobs["build"].outcome == "failure"
    assert "the tag is v99" in jobs["build"].log
    assert jobs["publish"].outcome == "skipped"
    assert not (jobs["build"].workspace / "dist").exists()


def test_the_tests_are_run_as_a_contributor_runs_them(runner: Runner, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    write(checkout, ".ci/run", (ROOT / ".ci" / "run").read_bytes())
    write(checkout, "Makefile", b"test lint:\n\t@echo ran $@\n")
    jobs = replace(runner, checkout=checkout).run((WORKFLOWS / "test.yml").read_text())

    assert jobs["test"].outcome == "success", jobs["test"].log
    assert jobs["test"].log == "ran test\nran lint\n"
