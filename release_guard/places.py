"""Where things of the user's own lie, and what the policy is called."""

import os
from pathlib import Path

POLICY_NAME = "release-guard.toml"


def config_folder() -> Path:
    """`release-guard` where configuration lies; a relative XDG_CONFIG_HOME counts as none.

    It would be another folder for each that one works in, a repository among them.
    """
    base = Path(os.environ.get("XDG_CONFIG_HOME") or "")
    return (base if base.is_absolute() else Path("~/.config").expanduser()) / "release-guard"
