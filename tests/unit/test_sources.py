"""What the Hub gives once is there for whoever has no token; always the revision that was asked."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from evidence_builder import example_policy
from huggingface_hub.constants import HF_HUB_CACHE

from release_guard.data import Table
from release_guard.errors import ModelError
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.sources import fetch_all, hub_id, local_data, local_folder


def cached_data(repo: str, **revisions: str) -> None:
    """Texts of a data set in the Hub's cache, laid out as its client does: links to blobs."""
    cache = Path(HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"
    shutil.rmtree(cache, ignore_errors=True)
    for number, (revision, text) in enumerate(revisions.items()):
        commit = f"{number}" * 40
        for folder in ("refs", "blobs", f"snapshots/{commit}"):
            (cache / folder).mkdir(parents=True, exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
        (cache / "blobs" / commit).write_text(f"text\n{text}\n")
        (cache / "snapshots" / commit / "train.csv").symlink_to(f"../../blobs/{commit}")


@pytest.fixture
def policy() -> Policy:
    """One that names sources everywhere it can."""
    policy = example_policy()
    retain = policy.retain.model_copy(update={"dataset": "hf://datasets/acme/retained@v1"})
    concept = policy.concepts[0].model_copy(
        update={"dataset": "hf://datasets/acme/restricted@v1", "scored_on": "local.parquet"}
    )
    red_team = policy.red_team.model_copy(update={"ancestor": "hf://acme/ancestor@main"})
    inner = {"name": "ablate", "neutral": "hf://datasets/acme/neutral@v2"}
    attacks = (Spec(name="chain", steps=[inner]),)
    stages = (Spec(name="concept_suppression", teacher="acme/teacher@main", anchor="a cat"),)
    modality = Spec(name="text_to_image", judge="hf://acme/judge@0a1b")
    changes = {"retain": retain, "concepts": (concept,), "red_team": red_team}
    return policy.model_copy(
        update={**changes, "attacks": attacks, "stages": stages, "modality": modality}
    )


def test_all_that_is_on_the_hub_is_fetched_before_tokens_are_out_of_reach(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, str, str]] = []

    def give(repo: str, *, repo_type: str, revision: str, **_: Any) -> str:
        asked.append((repo_type, repo, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    fetch_all(policy, "acme/model@main", str(tmp_path), None)
    assert sorted(asked) == [
        ("dataset", "acme/neutral", "v2"),
        ("dataset", "acme/restricted", "v1"),
        ("dataset", "acme/retained", "v1"),
        ("model", "acme/ancestor", "main"),
        ("model", "acme/judge", "0a1b"),
        ("model", "acme/model", "main"),
        ("model", "acme/teacher", "main"),
    ]


def test_one_that_cannot_be_had_is_named(policy: Policy) -> None:
    with pytest.raises(ModelError, match="acme/teacher@main: the Hub does not give this model"):
        fetch_all(policy)


@pytest.mark.parametrize("revision", ["old", "new"])
def test_data_are_of_the_revision_that_was_asked_for(revision: str) -> None:
    """`datasets` would take the one it saw last, whichever that was."""
    cached_data("acme/texts", old="first", new="second")
    rows = Table.read(f"hf://datasets/acme/texts@{revision}").column("text", option="column")
    assert rows == [{"old": "first", "new": "second"}[revision]]


def test_data_of_another_revision_are_no_substitute() -> None:
    cached_data("acme/texts", old="first")
    assert Table.read("hf://datasets/acme/texts@old").columns == ("text",)
    with pytest.raises(ModelError, match="the Hub does not give this data set"):
        Table.read("hf://datasets/acme/texts@new")


def test_a_branch_is_asked_for_and_a_commit_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the Hub does not answer, its client takes what it fetched once, without a word."""
    cached_data("acme/texts", old="first")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert local_data(f"hf://datasets/acme/texts@{'0' * 40}").name == "0" * 40
    with pytest.raises(ModelError, match="the Hub does not give this data set"):
        local_data("hf://datasets/acme/texts@old")


def test_a_branch_that_moves_is_not_taken_for_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cached_data("acme/texts", old="first")
    monkeypatch.setattr("release_guard.sources._is_settled", lambda _: False)
    monkeypatch.setattr("release_guard.sources._commit", lambda *_: "a" * 40)
    with pytest.raises(ModelError, match="has moved, or what is in the cache is older"):
        local_data("hf://datasets/acme/texts@old")


def test_what_is_here_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    assert local_folder("model") == tmp_path / "model"
    assert local_data("texts.csv") == Path("texts.csv")
    assert hub_id("model") is None
    assert hub_id("acme/model@main") == hub_id("hf://acme/model@main") == "acme/model"
