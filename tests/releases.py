"""Small releases to push, and what a hub test asks of any hub."""

from collections.abc import Mapping
from pathlib import Path

from release_guard.manifest import hash_directory
from release_guard.release import Check, Release, Result, Verdict

FILES = {
    "README.md": b"# A model\n",
    "config.json": b"{}\n",
    "generation_config.json": b"{}\n",
    "model.safetensors": bytes(range(256)) * 40,
    "empty.txt": b"",
    "nf4/config.json": b'{"quantization_config": {}}\n',
    "nf4/model.safetensors": bytes(range(128)) * 40,
    "int8/model.safetensors": bytes(range(64)) * 40,
    ".release-guard/policy.toml": b"seed = 1\n",
    "model.sig": b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json"}',
}
CHANGED = {
    **{name: FILES[name] for name in FILES if name not in {"empty.txt", "int8/model.safetensors"}},
    "config.json": b'{"hidden_size": 8}\n',
    "model.safetensors": bytes(reversed(range(256))) * 40,
    "nf4/model.safetensors": bytes(reversed(range(128))) * 40,
    "umlaut-ä.txt": b"new",
}


def make_release(
    folder: Path, files: Mapping[str, bytes] = FILES, *, previous: str | None = None
) -> Release:
    """A release with these files, as if it had been judged and signed."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest = hash_directory(folder)
    return Release(
        directory=folder,
        verdict=Verdict([Check("resists/finetune/footwear@fp32", Result.PASS, "no breach found")]),
        payload=manifest.payload,
        manifest=manifest,
        previous=previous,
    )
