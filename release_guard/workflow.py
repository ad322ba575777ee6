"""The workflow that `init` puts into a repository: judge in one job, publish in another."""

import json
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from release_guard import __version__
from release_guard.errors import PolicyError

NAME = "release-guard.yml"  # below .github/workflows; what a trusted publisher is told
_NO_PIN = f"OWNER/model-release-guard@{'0' * 40} # v0.0.0"
_PIN = "action"  # beside the template in a package: OWNER/NAME@COMMIT it was built from


def release_workflow(*, model: str, policy: str, repo: str, action: str | None = None) -> str:
    """The template, filled in.

    Args:
        model: A folder of the repository that will hold the workflow, or OWNER/NAME@REVISION.
        policy: Its policy file.
        repo: OWNER/NAME on the Hub.
        action: OWNER/NAME@COMMIT of ours; the commit this package was built from if None, and if
            that is not known a placeholder stays, which GitHub refuses to run.

    Raises:
        PolicyError: A value would be an expression to GitHub.
    """
    values = {"MODEL": model, "POLICY": policy, "REPO": repo}
    for value in values.values():
        if "${{" in value:
            raise PolicyError(f"{value}: GitHub would take it for an expression; rename it")
    text = (_folder() / NAME).read_text(encoding="utf-8")
    # What JSON quotes, YAML understands.
    text = re.sub(
        r"__([A-Z]+)__", lambda name: json.dumps(values[name[1]], ensure_ascii=False), text
    )
    pin = action or pinned_action()
    return text if pin is None else text.replace(_NO_PIN, f"{pin} # v{__version__}")


def pinned_action() -> str | None:
    """OWNER/NAME@COMMIT of the repository this package was built from; None in a checkout."""
    pin = _folder() / _PIN
    return pin.read_text(encoding="utf-8").strip() if pin.is_file() else None


def _folder() -> Traversable:
    packaged = files("release_guard") / "_workflows"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "workflows"
