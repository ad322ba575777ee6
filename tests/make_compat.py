"""Make the release that tests/compat keeps of today's formats; run once for every new schema.

PYTHONPATH=. python tests/make_compat.py

It has all that changes how a release is read: two precisions, each in its folder, a name that is
not ASCII, the signer's public key. Its key is no secret (`judged.fixed_key`), its evidence made up,
its signatures deterministic, so the same code writes the same bytes. What lies there already is
never written again: it has to verify for ever as it is.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from evidence_builder import example_policy
from judged import fixed_key, judge

from release_guard.evidence import SCHEMA

FOLDER = Path(__file__).parent / "compat"
PRECISIONS = ('precisions = ["fp32"]', 'precisions = ["fp32", "nf4"]')


def make(folder: Path) -> Path:
    """Write `schema-N` and `schema-N.pub` into a folder; the release's own path."""
    release = folder / f"schema-{SCHEMA}"
    with tempfile.TemporaryDirectory() as keys:
        signer = fixed_key(Path(keys), SCHEMA)
        judge(release, signer, policy=example_policy(PRECISIONS)).release()
        shutil.copy(str(signer.public), release.with_suffix(".pub"))
    return release


def main() -> int:
    if (FOLDER / f"schema-{SCHEMA}").exists():
        sys.stderr.write(f"schema-{SCHEMA} is there, and stays as it is\n")
        return 1
    make(FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
