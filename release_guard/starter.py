"""What a model repository begins with: found out where it can be, written only where nothing is."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from release_guard.errors import ModelError
from release_guard.places import config_folder

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_TEMPLATES = {
    "causal_lm": "default.toml",
    "image_classification": "image_classification.toml",
    "text_to_image": "text_to_image.toml",
}
_ENDINGS = {"ForCausalLM": "causal_lm", "LMHeadModel": "causal_lm",
            "ForImageClassification": "image_classification"}  # fmt: skip
_HUB = re.compile(
    r"^(?:https://|ssh://)?(?:[^/@]+@)?(?:huggingface\.co|hf\.co)[/:]([^/]+/[^/]+?)(?:\.git)?/?$"
)
_GITHUB = re.compile(r"^(?:https://|ssh://)?(?:[^/@]+@)?github\.com[/:]([^/]+/[^/]+?)(?:\.git)?/?$")
_SECTION = re.compile(r"^\[(signer|hub)\]\n(?:(?!\[).*\n?)*", re.MULTILINE)


def find_model(root: Path) -> Path:
    """The one model of a repository: at its top, or in one folder right below.

    Raises:
        ModelError: There is none, or more than one.
    """
    places = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    found = [path for path in places if _description(path) is not None]
    if found and found[0] == root:
        return root
    if len(found) != 1:
        several = ", ".join(path.name for path in found)
        what = (
            f"several models ({several})" if found else "no model (config.json, model_index.json)"
        )
        raise ModelError(f"{root}: {what}; name its folder with --model")
    return found[0]


def modality_of(model: Path) -> str:
    """Which kind of model a folder holds, by what its configuration says it is.

    Raises:
        ModelError: None that can be published here.
    """
    path = _description(model)
    if path is None:
        raise ModelError(f"{model}: holds no config.json and no model_index.json; is it a model?")
    if path.name == "model_index.json":
        return "text_to_image"
    try:
        said = json.loads(path.read_bytes())
        names = [str(name) for name in said["architectures"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(
            f"{path}: names no architecture; write one, as transformers does"
        ) from None
    for ending, modality in _ENDINGS.items():
        if any(name.endswith(ending) for name in names):
            return modality
    raise ModelError(
        f"{path}: {', '.join(names)} is neither a causal language model nor an image classifier; "
        "nothing else can be immunized yet"
    )


def hub_repository(remotes: Mapping[str, str]) -> str | None:
    """OWNER/NAME on the Hub, if a git remote says so."""
    return _named(_HUB, remotes)


def github_repository(remotes: Mapping[str, str]) -> str | None:
    """OWNER/NAME on GitHub, if a git remote says so."""
    return _named(_GITHUB, remotes)


def starter_policy(modality: str, *, data: str, keyless: tuple[str, str] | None) -> str:
    """The policy that ships for this kind of model, publishing to the Hub.

    Args:
        modality: Name of the kind.
        data: Folder of the data sets, as seen from the policy's own.
        keyless: Identity and issuer of a workflow that signs; none: a key, named by the
            environment, so that no path of this machine stands in a signed file.
    """
    text = (_policies() / _TEMPLATES[modality]).read_text(encoding="utf-8")
    signer = '[signer]\nname = "key" # RELEASE_GUARD_SIGNING_KEY names it\n\n'
    if keyless is not None:
        identity, issuer = map(json.dumps, keyless)
        signer = f'[signer]\nname = "sigstore"\nidentity = {identity}\nissuer = {issuer}\n\n'
    hub = (
        '# Where releases go: { name = "directory", path = "hub" } is a folder.\n'
        '[hub]\nname = "huggingface"\nprivate = true # false: public, once the push was verified\n'
    )
    sections = {"signer": signer, "hub": hub}
    text = text.replace('"data/', f'"{data}/')
    return _SECTION.sub(lambda found: sections[found[1]], text)


def key_folder(repo: str) -> Path:
    """Where the private key for a repository lies: with its owner, never in the repository."""
    return config_folder() / "keys" / repo.replace("/", "--")


def placeholders(policy: str) -> Iterator[str]:
    """Data sets that a starter policy names and nobody has yet."""
    yield from dict.fromkeys(re.findall(r'^\w+ = "((?:\.\./)+data/[^"]+)"', policy, re.MULTILINE))


def _description(folder: Path) -> Path | None:
    paths = (folder / "model_index.json", folder / "config.json")
    return next((path for path in paths if path.is_file()), None)


def _named(pattern: re.Pattern[str], remotes: Mapping[str, str]) -> str | None:
    ordered = sorted(remotes, key=lambda name: (name != "origin", name))
    matches = (pattern.match(remotes[name]) for name in ordered)
    return next((match[1] for match in matches if match), None)


def _policies() -> "Traversable":
    from importlib.resources import files  # noqa: PLC0415  every command imports this file

    packaged = files("release_guard") / "_policies"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "policies"
