"""A model repository set up with one command: what is found out, what is written, what is kept."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from realgit import git

from release_guard.cli import main
from release_guard.policy import Policy
from release_guard.starter import (
    github_repository,
    hub_repository,
    modality_of,
    placeholders,
    starter_policy,
)

HUB, GITHUB = "https://huggingface.co/acme/vit", "git@github.com:acme/vit-release.git"
POLICY = ".github/release-guard.toml"
Made = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A git repository with a model in it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("RELEASE_GUARD_KEY_PASSWORD", raising=False)

    def make(architecture: str = "ViTForImageClassification", **remotes: str) -> Path:
        folder = tmp_path / "repository"
        folder.mkdir()
        git(folder, "init", "-q")
        for name, url in remotes.items():
            git(folder, "remote", "add", name, url)
        (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        return folder

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_repository_of_the_hub_gets_a_policy_a_key_and_the_hook(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(origin=HUB)
    assert main(["init", str(folder), "--yes", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["repo"], said["modality"]) == ("acme/vit", "image_classification")
    policy = Policy.parse((folder / POLICY).read_bytes(), name="policy")
    assert (policy.signer.name, policy.hub.name) == ("key", "huggingface")
    key = tmp_path / "config" / "release-guard" / "keys" / "acme--vit" / "key.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    assert not key.is_relative_to(folder)
    hook = folder / ".git" / "hooks" / "pre-push"
    assert hook.stat().st_mode & 0o111
    assert main(["hook", "status", "-C", str(folder)]) == 0
    assert not (folder / ".github" / "workflows").exists()
    assert {str(key), str(hook), str(folder / POLICY)} <= set(said["wrote"])


def test_again_it_touches_nothing(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(origin=HUB, upstream=GITHUB)
    (folder / POLICY).parent.mkdir()
    (folder / POLICY).write_text("# mine\n")
    assert main(["init", str(folder), "--yes", "--key"]) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert main(["init", str(folder), "--yes", "--key", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert contents(tmp_path) == before
    assert (folder / POLICY).read_text() == "# mine\n"
    assert said["wrote"] == []
    assert len(said["kept"]) == 3  # policy, key, hook: a key signs, so there is no workflow


def test_a_repository_on_github_signs_by_its_workflow(made: Made) -> None:
    folder = made("LlamaForCausalLM", origin=GITHUB)
    assert main(["init", str(folder), "--yes", "--repo", "acme/llama"]) == 0
    policy = Policy.parse((folder / POLICY).read_bytes(), name="policy")
    assert policy.signer.name == "sigstore"
    assert policy.signer.options["identity"].startswith(
        "https://github.com/acme/vit-release/.github/workflows/release-guard.yml@"
    )
    workflow = yaml.safe_load((folder / ".github/workflows/release-guard.yml").read_text())
    assert workflow["env"] == {"MODEL": ".", "POLICY": POLICY, "REPO": "acme/llama"}
    identity = git(folder, "config", "release-guard.identity").strip()
    assert identity == policy.signer.options["identity"]


def test_a_pipeline_in_a_folder_is_found(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(origin=HUB)
    (folder / "config.json").unlink()
    (folder / "painter").mkdir()
    (folder / "painter" / "model_index.json").write_text("{}")
    assert main(["init", str(folder), "--yes", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["modality"], Path(said["model"]).name) == ("text_to_image", "painter")


def test_without_git_there_is_no_hook_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert main(["init", str(folder), "--yes", "--repo", "acme/gpt2"]) == 0
    assert "not a git repository, so there is no hook" in capsys.readouterr().err
    assert (folder / POLICY).is_file()


@pytest.mark.parametrize(
    ("architecture", "arguments", "says", "code"),
    [
        ("ViTForImageClassification", [], "give --yes", 2),
        ("ViTForImageClassification", ["--yes", "--keyless"], "no git remote is on GitHub", 2),
        ("ViTForImageClassification", ["--yes", "--repo", "x"], "not a repository id", 2),
        ("BertForMaskedLM", ["--yes"], "neither a causal language model nor", 1),
    ],
)
def test_what_cannot_be_known_or_done_is_said_and_nothing_is_written(
    made: Made,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    arguments: list[str],
    says: str,
    code: int,
) -> None:
    folder = made(architecture, origin=HUB)
    before = contents(folder)
    assert main(["init", str(folder), *arguments]) == code
    assert says in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"architectures": 3}', "\ud800", "\0"])
def test_a_configuration_that_says_nothing(tmp_path: Path, content: str) -> None:
    from release_guard.errors import ModelError  # noqa: PLC0415

    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ModelError, match=r"config\.json"):
        modality_of(tmp_path)


@pytest.mark.parametrize(
    ("url", "hub", "github"),
    [
        (HUB, "acme/vit", None),
        ("git@hf.co:acme/vit", "acme/vit", None),
        ("https://alice:hf_secret@huggingface.co/acme/vit.git", "acme/vit", None),
        ("https://huggingface.co/datasets/acme/images", None, None),
        ("https://evil.example/huggingface.co/acme/vit", None, None),
        (GITHUB, None, "acme/vit-release"),
        ("https://github.com/acme/vit.js.git", None, "acme/vit.js"),
        ("/srv/git/model.git", None, None),
    ],
)
def test_where_a_remote_is(url: str, hub: str | None, github: str | None) -> None:
    assert hub_repository({"origin": url}) == hub
    assert github_repository({"origin": url}) == github


@pytest.mark.parametrize("modality", ["causal_lm", "image_classification", "text_to_image"])
def test_a_starter_policy_is_whole_and_names_no_place_of_this_machine(modality: str) -> None:
    text = starter_policy(modality, data="../../data", keyless=None)
    policy = Policy.parse(text.encode(), name="policy")
    assert policy.modality.name == modality
    assert policy.signer.options == {}
    assert all(name.startswith("../../data/") for name in placeholders(text))
    assert len(list(placeholders(text))) >= 2
