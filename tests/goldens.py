"""Bytes that must not change by accident. UPDATE_GOLDEN=1 writes them anew; then read the diff."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def same_as_golden(name: str, content: bytes) -> None:
    """Compare with a file of tests/golden."""
    path = FOLDER / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_bytes(content)
    assert content == path.read_bytes(), f"{name} changed; if it should, set UPDATE_GOLDEN=1"
