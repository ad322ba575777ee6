"""What a user wrote where a model or a data set is asked for: a place here, or one on the Hub.

Of the Hub always one revision, in the Hub's own cache: what has been fetched once with our token
is found there by processes that have none.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from release_guard.errors import ModelError, brief
from release_guard.policy import HUB_PREFIX, NO_CHECKPOINT, Policy

_MODEL = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
_DATA = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DATA_PREFIX = f"{HUB_PREFIX}datasets/"
_KINDS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]
_SPARE = ["*.fp16.*", "*.non_ema.*"]  # the same weights again, which nobody would attack


def local_folder(source: str) -> Path:
    """The folder a model lies in: one that is here, or `OWNER/NAME@REVISION` in the Hub's cache.

    Raises:
        ModelError: No such folder, no revision, or the Hub does not give it.
    """
    if (folder := Path(source)).is_dir():
        return folder.resolve()
    if not (match := _MODEL.fullmatch(source)):
        advice = "give a model folder, or OWNER/NAME@REVISION for a model on the Hub"
        raise ModelError(f"{source}: no such folder; {advice}")
    return _fetch(source, "model", match, only=_KINDS, but=_SPARE)


def local_data(source: str) -> Path:
    """The file or folder of a data set; `hf://datasets/OWNER/NAME@REVISION` in the Hub's cache.

    Raises:
        ModelError: It is on the Hub, and has no revision or is not given.
    """
    if not source.startswith(HUB_PREFIX):
        return Path(source)
    if not (match := _DATA.fullmatch(source)):
        advice = "write hf://datasets/OWNER/NAME@REVISION, the revision a commit or a tag"
        raise ModelError(f"{source}: not a data set at a revision; {advice}")
    return _fetch(source, "dataset", match)


def fetch_all(policy: Policy, *models: str | None) -> None:
    """Fetch whatever these models and the policy name on the Hub; for who has a token to do so.

    Raises:
        ModelError: One of them cannot be had.
    """
    for model in filter(None, models):
        local_folder(model)
    for source in sorted(set(_on_hub(policy.model_dump()))):
        (local_data if source.startswith(_DATA_PREFIX) else local_folder)(source)


def hub_id(source: str) -> str | None:
    """`OWNER/NAME` of a source that is not a folder here."""
    if Path(source).is_dir():
        return None
    return source.removeprefix(HUB_PREFIX).partition("@")[0]


def named_in(policy: Policy) -> Iterator[tuple[str, str]]:
    """Every folder, file and Hub id of data and models that a policy names, after its key."""
    yield "retain.dataset", policy.retain.dataset
    for group, targets in (("concepts", policy.concepts), ("merge_targets", policy.merge_targets)):
        for place, target in enumerate(targets):
            for key in ("dataset", "scored_on", "donor", "base", "donor_dataset"):
                if source := getattr(target, key, None):
                    yield f"{group}[{place}].{key}", source
    if policy.red_team.never_knew not in NO_CHECKPOINT:
        yield "red_team.never_knew", policy.red_team.never_knew
    if policy.red_team.ancestor not in {None, "undefended"}:
        yield "red_team.ancestor", str(policy.red_team.ancestor)


def files_of(path: Path) -> list[Path]:
    """A file, or all files of a folder and of those below."""
    if not path.is_dir():
        return [path]
    return sorted(each for each in path.rglob("*") if each.is_file())


def identity(path: Path) -> tuple[tuple[str | int, ...], ...]:
    """What the system says of a file, or of all files of a folder; another file, another identity.

    Names and times of change stay when a file is copied over another; what the system says of an
    inode nobody can set back.
    """
    return tuple((str(file), *_inode(file.stat())) for file in files_of(path))


def _inode(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _on_hub(value: Any, key: str = "") -> Iterator[str]:
    """Sources on the Hub among the keys and options of a policy, plug-ins' own ones included."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _on_hub(part, name)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _on_hub(part, key)
    elif isinstance(value, str):
        bare = key == "teacher" and _MODEL.fullmatch(value) and not Path(value).is_dir()
        if bare or value.startswith(HUB_PREFIX):
            yield value


def _fetch(
    source: str,
    kind: Literal["model", "dataset"],
    match: re.Match[str],
    *,
    only: list[str] | None = None,
    but: list[str] | None = None,
) -> Path:
    import huggingface_hub  # noqa: PLC0415  half a second to import
    from httpx2 import HTTPError  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()
    try:
        wanted = None if _is_settled(match["revision"]) else _commit(match, kind)
        folder: str = huggingface_hub.snapshot_download(
            match["repo"],
            repo_type=kind,
            revision=match["revision"],
            allow_patterns=only,
            ignore_patterns=but,
            dry_run=False,
        )
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OSError) as error:
        what = "data set" if kind == "dataset" else "model"
        reason = brief(error)
        raise ModelError(f"{source}: the Hub does not give this {what}: {reason}") from error
    if wanted not in {None, Path(folder).name}:
        advice = f"run the same command again, or name the commit: @{wanted}"
        raise ModelError(f"{source}: has moved, or what is in the cache is older; {advice}")
    return Path(folder)


def _is_settled(revision: str) -> bool:
    """Whether nobody needs to ask the Hub what it names: a commit, or what was fetched before.

    Without an answer its client takes whatever it fetched once. Only who works offline, such as
    the process that works on models, means that.
    """
    from huggingface_hub import constants  # noqa: PLC0415

    return constants.HF_HUB_OFFLINE or bool(_COMMIT.fullmatch(revision))


def _commit(match: re.Match[str], kind: Literal["model", "dataset"]) -> str:
    from huggingface_hub import HfApi  # noqa: PLC0415

    revision = match["revision"]
    return str(HfApi().repo_info(match["repo"], repo_type=kind, revision=revision).sha)
