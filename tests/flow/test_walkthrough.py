"""docs/walkthrough.md, command by command."""

import doctest
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_publish import make_policy

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "walkthrough.md"
MARK = "---- it ended with "
ANYTHING = "...\n"  # or nothing: git-lfs tells of its progress when it feels like it


@dataclass(frozen=True)
class Step:
    """A command, and what the page says that it prints and ends with."""

    command: str
    says: str
    code: int


def steps(page: str) -> Iterator[Step]:
    for block in re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, said = part.partition("\n")
            code = re.search(r"^\[exit code (\d+)\]\n\Z", said, re.MULTILINE)
            yield Step(command, said[: code.start()] if code else said, int(code[1]) if code else 0)


def script(found: list[Step]) -> str:
    """All of it in one shell, as a reader has it; after each command a line with its exit code."""
    return "".join(f"{step.command}\necho '{MARK}'$?\n" for step in found)


@pytest.fixture
def desk(tmp_path: Path, image_data: Path, classifier_folder: Path) -> Path:
    """What `make demo` leaves, of a pico model; the tool and git with nobody's settings."""
    demo = tmp_path / "demo"
    demo.mkdir()
    make_policy(demo, image_data)
    text = (demo / "policy.toml").read_text()
    assert str(demo) not in text
    shutil.copytree(classifier_folder, demo / "model")
    tools = tmp_path / "bin"
    tools.mkdir()
    tool = tools / "release-guard"
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m release_guard "$@"\n')
    tool.chmod(0o755)
    return tmp_path


@pytest.mark.timeout(1200)  # a whole release is made, in processes of its own
def test_every_command_does_what_the_page_says(desk: Path) -> None:
    found = list(steps(PAGE.read_text(encoding="utf-8")))
    environment = {
        "PATH": f"{desk / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(desk / "home"),
        "XDG_CONFIG_HOME": str(desk / "config"),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "Alice", "GIT_AUTHOR_EMAIL": "alice@example.org",
        "GIT_COMMITTER_NAME": "Alice", "GIT_COMMITTER_EMAIL": "alice@example.org",
        "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    done = subprocess.run(
        ["bash"],  # noqa: S607
        input=script(found),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=desk,
        env=environment,
        check=False,
    )
    said = re.split(rf"^{MARK}(\d+)\n", done.stdout, flags=re.MULTILINE)
    checker = doctest.OutputChecker()
    assert len(said) == 2 * len(found) + 1, done.stdout
    wrong = [
        f"$ {step.command}\n{text}[exit code {code}]\nbut the page says\n{step.says}"
        for step, text, code in zip(found, said[::2], said[1::2], strict=False)
        if int(code) != step.code
        or not (step.says == ANYTHING or checker.check_output(step.says, text, doctest.ELLIPSIS))
    ]
    assert not wrong, "\n".join(wrong)


def test_steps_are_read_as_they_stand() -> None:
    page = "```console\n$ false\nno\n[exit code 1]\n$ true\n```\n```sh\nignored\n```\n"
    assert list(steps(page)) == [Step("false", "no\n", 1), Step("true", "", 0)]
