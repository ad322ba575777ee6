"""Hashing, signing and verifying against hashlib and model-signing, in turns.

python -m benchmarks provenance

The same random bytes lie in one file and in six, so that it shows what several files gain. The
release is judged, attested and signed by the package's own functions. The files are in the page
cache before the first round. Our verification also reads three attestations, judges the evidence
again and compares the policy; model-signing's compares files.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import model_signing
from judged import fixed_key, judge, write

from benchmarks._common import Time, in_turns, machine, median, ratios, record, table
from release_guard.manifest import SIGNATURE, DirectoryTree, hash_directory
from release_guard.oms import to_statement
from release_guard.signers.key import Key
from release_guard.verify import Trust, require_intact, verify

TITLE = "Hashing, signing, verifying"
MEGABYTES, PARTS, ROUNDS = 300, 6, 5


def main() -> None:
    about = machine("cryptography", "model-signing")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    result = {
        "seeds": "none, random bytes",
        "machine": about,
        "megabytes": MEGABYTES,
        "rounds": ROUNDS,
        "rows": rows,
    }
    record("provenance", result, markdown(result))


def markdown(result: Mapping[str, Any]) -> str:
    size = result["megabytes"]
    header = [f"{size} MB", "ours, s", "MB/s", "against", "theirs, s", "ratio wall", "ratio CPU"]
    cells = [
        [
            row["what"],
            f"{row['ours']:.3f}",
            f"{size / row['ours']:.0f}" if row["reads"] else "-",
            row["against"],
            f"{row['theirs']:.3f}",
            f"{row['wall']:.2f}",
            f"{row['cpu']:.2f}",
        ]
        for row in result["rows"]
    ]
    slower = [
        f"{row['what']} ({row['wall']:.2f})"
        for row in result["rows"]
        if row["reads"] and round(row["wall"], 2) > 1
    ]
    return (
        f"{table(header, cells)}\n\nWall seconds, median of {result['rounds']} rounds in turns, "
        "files in the page cache; a ratio is the median of the rounds' ratios. `verify, command` "
        "is the command line in a new process, imports included. Ours also reads three "
        "attestations, judges the evidence again and compares the policy. Slower by the wall "
        f"clock than what it is compared with: {'; '.join(slower) or 'none'}."
    )


def measure(folder: Path) -> list[dict[str, Any]]:
    signer = fixed_key(folder / "keys")
    one = release(folder / "one", signer, parts=1)
    six = release(folder / "six", signer, parts=PARTS)
    hashlibs = "hashlib, file after file"
    theirs = "model-signing"
    rows = [
        compare("hash, 1 file", lambda: hash_directory(one), hashlibs, lambda: plain(one)),
        compare(f"hash, {PARTS} files", lambda: hash_directory(six), hashlibs, lambda: plain(six)),
        compare("sign", lambda: sign(six, signer), theirs, lambda: theirs_signs(six, signer)),
    ]
    sign(six, signer)
    rows.append(
        compare("verify", lambda: check(six, signer), theirs, lambda: theirs_checks(six, signer))
    )
    ours = command("-m", "release_guard", "verify", str(six), "--key", str(signer.public))
    other = command(
        *("-m", "model_signing", "verify", "key", str(six)),
        *("--signature", str(six / SIGNATURE), "--public_key", str(signer.public)),
    )
    imports = command("-c", "import release_guard.verify")
    bare = command("-c", "pass")
    rows += [
        compare("verify, command", ours, theirs, other),
        {**compare("import of verify", imports, "bare interpreter", bare), "reads": False},
    ]
    return rows


def compare(
    what: str, ours: Callable[[], Any], other: str, theirs: Callable[[], Any]
) -> dict[str, Any]:
    """One line of the table: ours against theirs on the same files."""
    contestants = {"ours": lambda: Time.of(ours)[0], "theirs": lambda: Time.of(theirs)[0]}
    times = in_turns(contestants, ROUNDS)
    ratio = median(ratios(times["ours"], times["theirs"]))
    return {
        "what": what,
        "reads": True,
        "against": other,
        "ours": median(times["ours"]).wall,
        "theirs": median(times["theirs"]).wall,
        **ratio._asdict(),
    }


def release(folder: Path, signer: Key, parts: int) -> Path:
    """A judged and signed release with that much weight."""
    for part in range(parts):
        write(folder, f"model-{part}.safetensors", os.urandom(MEGABYTES * 10**6 // parts))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    judge(folder, signer, started_at=now, finished_at=now).release()
    return folder


def plain(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")


def sign(folder: Path, signer: Key) -> None:
    manifest = hash_directory(folder).without(SIGNATURE)
    write(folder, SIGNATURE, signer.sign(to_statement(manifest, name=folder.name)))


def theirs_signs(folder: Path, signer: Key) -> None:
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=signer.path)
    config.set_hashing_config(hashing).sign(folder, folder / SIGNATURE)


def check(folder: Path, signer: Key) -> None:
    trust = Trust(Key(public=signer.public))
    require_intact(verify(DirectoryTree(folder), trust, now=datetime.now(UTC)))


def theirs_checks(folder: Path, signer: Key) -> None:
    config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=signer.public)
    config.verify(folder, folder / SIGNATURE)


def command(*arguments: str) -> Callable[[], None]:
    def run() -> None:
        subprocess.run(  # noqa: S603
            [sys.executable, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    return run


if __name__ == "__main__":
    main()
