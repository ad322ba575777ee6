"""A candidate as the job that judges hands it over: judged just now, without any training."""

from datetime import UTC, datetime
from pathlib import Path

from evidence_builder import example_policy
from judged import Judged, judge, write

from release_guard.signers import Signer

_HUB = 'hub = { name = "directory", path = "hub" }'


def pack(folder: Path, signer: Signer, options: str = 'hub = "huggingface"') -> Judged:
    """With these lines of the policy for hub and signer, and a card that names the signer."""
    now = datetime.now(UTC).isoformat()
    policy = example_policy((_HUB, options))
    packed = judge(folder, signer, policy=policy, started_at=now, finished_at=now)
    write(folder, "README.md", f"# Signed by {signer.identity}\n".encode())
    return packed
