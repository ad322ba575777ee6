"""What a user wrote where a model is asked for: a folder, or a revision on the Hub."""

from collections.abc import Iterator
from pathlib import Path

from release_guard.errors import ModelError
from release_guard.policy import Policy


def local_folder(source: str) -> Path:
    """The folder a model lies in; a Hub id is fetched into the Hub's own cache first."""
    if Path(source).is_dir():
        return Path(source).resolve()
    name, separator, revision = source.partition("@")
    if not separator or name.count("/") != 1:
        raise ModelError(
            f"{source}: no such folder; for a model of the Hub write OWNER/NAME@REVISION"
        )
    return _fetch(name, revision)


def _fetch(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  half a second to import

    kinds = ["*.safetensors", "*.json", "*.txt", "*.model", "*.md", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=kinds))
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{name}@{revision}: cannot be fetched from the Hub ({first})") from None


def hub_id(source: str) -> str | None:
    """`OWNER/NAME` of a source that is not a folder here."""
    return None if Path(source).is_dir() else source.partition("@")[0]


def named_in(policy: Policy) -> Iterator[tuple[str, str]]:
    """Every folder, file and Hub id of data and models that a policy names, after its key."""
    yield "retain.dataset", policy.retain.dataset
    for group, targets in (("concepts", policy.concepts), ("merge_targets", policy.merge_targets)):
        for place, target in enumerate(targets):
            for key in ("dataset", "scored_on", "donor", "base", "donor_dataset"):
                if source := getattr(target, key, None):
                    yield f"{group}[{place}].{key}", source
    if policy.red_team.never_knew not in {"fresh", "unavailable"}:
        yield "red_team.never_knew", policy.red_team.never_knew
    if policy.red_team.ancestor not in {None, "undefended"}:
        yield "red_team.ancestor", str(policy.red_team.ancestor)
