"""A Hub that trusts one publisher, and a runner whose jobs may ask for that identity."""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_runner import Runner
from judged import Judged, fixed_key
from oidcserver import TrustedHub
from packed import pack

ROOT = Path(__file__).parents[2]
REPO = "acme/model"
# What `pip install` would leave behind, from what is installed here; a network is not to be had.
INSTALL = f"""
"{sys.executable}" -m venv --without-pip "$RUNNER_TEMP/release-guard"
cd "$RUNNER_TEMP/release-guard"
printf '%s\\n' "{ROOT}" "{sysconfig.get_path("purelib")}" > "$(echo lib/*/site-packages)/here.pth"
cat > bin/release-guard <<END
#!$PWD/bin/python
import os, sys
from release_guard.cli import main
if __name__ == "__main__":
    if "SIGSTORE_ON_LOOPBACK" in os.environ:
        import sigstore.models
        sigstore.models.DEFAULT_TUF_URL = os.environ["SIGSTORE_ON_LOOPBACK"]
    sys.exit(main())
END
chmod +x bin/release-guard
"""


@pytest.fixture
def hub() -> Iterator[TrustedHub]:
    with TrustedHub(trusts=REPO) as server:
        server.create(REPO, private=True)
        yield server


@pytest.fixture
def runner(tmp_path: Path, hub: TrustedHub) -> Runner:
    """The jobs find a key to sign with, where those of the workflow have none; the Hub's token is
    in nobody's environment.
    """
    fixed_key(tmp_path / "keys")
    return Runner(
        tmp_path / "runner",
        actions={"acme/model-release-guard": ROOT},
        variables={
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "RELEASE_GUARD_SIGNING_KEY": str(tmp_path / "keys" / "1.pem"),
        },
        identity=hub.identity,
        replaced={"install": INSTALL},
        github={
            "repository": "acme/training",
            "sha": "0" * 40,
            "server_url": "https://github.com",
            "workflow_ref": "acme/training/.github/workflows/release-guard.yml@refs/heads/main",
        },
    )


@pytest.fixture
def judged(tmp_path: Path) -> Judged:
    """What the job `judge` would hand over."""
    return pack(tmp_path / "packed", fixed_key(tmp_path / "keys"))
