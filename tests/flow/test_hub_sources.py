"""Private models and data on the Hub, in an attack whose own process has no token to fetch them."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pico
import pytest
from hubserver import REPO, REVISION, Answer, HubServer, Request, info, problem, resolve, tree

from release_guard.evidence import Evidence

TOKEN = "hf_private0aVx7yQ2bTz"  # noqa: S105
DATA = rf"/api/datasets/{REPO}"
DATA_ROUTES = [
    ("GET", rf"{DATA}/revision/{REVISION}", info),
    ("GET", rf"{DATA}/tree/{REVISION}", tree),
    ("GET", DATA, info),
    ("GET", rf"/datasets/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
]


class PrivateHub(HubServer):
    """Shows nothing to whoever has no token, and remembers what they asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.strangers: list[str] = []

    def admit(self, request: Request) -> Answer | None:
        if request.headers["authorization"] == f"Bearer {TOKEN}":
            return None
        self.strangers.append(request.path)
        return problem(401, "Invalid username or password.", "RepoNotFound")


@pytest.fixture
def hub(classifier_folder: Path, image_data: Path) -> Iterator[PrivateHub]:
    with PrivateHub() as server:
        server.routes += DATA_ROUTES
        for repo, files in {
            "acme/vit": [path for path in classifier_folder.iterdir() if path.is_file()],
            "acme/retained": [image_data / "retained.parquet"],
            "acme/restricted": [image_data / "restricted.parquet"],
        }.items():
            server.create(repo, private=True)
            for path in files:
                server.add(repo, path.name, path.read_bytes())
        yield server


def attack(hub: HubServer, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    policy = pico.pico_policy(
        folder / "policy",
        folder,
        retain={"dataset": "hf://datasets/acme/retained@main"},
        concepts=[
            {
                "name": "odd-angles",
                "dataset": "hf://datasets/acme/restricted@main",
                "ceiling": 0.6,
            }
        ],
        red_team={"search_examples": 60, "confirm_examples": 60},
    )
    command = ["attack", "acme/vit@main", "--policy", str(policy), "--workers", "1"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(  # noqa: S603
        [sys.executable, "-m", "release_guard", *command, "--output", str(folder / "run")],
        cwd=folder,
        env={
            **kept,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            **variables,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_only_we_may_see_is_attacked_by_who_may_not(hub: PrivateHub, tmp_path: Path) -> None:
    done = attack(hub, tmp_path, HF_TOKEN=TOKEN)
    assert done.returncode == 3, done.stderr  # nothing protects it
    assert "resists/finetune/odd-angles@fp32" in done.stderr
    evidence = Evidence.read(tmp_path / "run" / "evidence.jsonl")
    assert evidence.records
    assert not hub.strangers
    asked = [path for _, path in hub.requests]
    for repo in ("acme/vit", "datasets/acme/retained", "datasets/acme/restricted"):
        assert any(re.match(rf"/api/(models/)?{repo}/", path) for path in asked), repo
    assert TOKEN not in (tmp_path / "run" / "evidence.jsonl").read_text() + done.stderr


def test_without_a_token_it_is_said_what_cannot_be_had(hub: PrivateHub, tmp_path: Path) -> None:
    done = attack(hub, tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: acme/vit@main: the Hub does not give this model: ")
    assert hub.strangers
