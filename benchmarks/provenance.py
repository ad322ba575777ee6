"""Hashing, signing and verifying against hashlib and model-signing, interleaved in one run.

python benchmarks/provenance.py [--megabytes 300] [--repeats 5]

The same random bytes lie in one file and in six, so that it shows what several files gain. Every
round runs each side once, in turns; a figure is the median over rounds, a ratio the median of the
rounds' ratios. Wall and CPU seconds: other work on the machine moves the first, hardly the second.
The files are in the page cache before the first round. Our verification also reads three
attestations, judges the evidence again and compares the policy; model-signing's compares files.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import model_signing
from judged import fixed_key, judge, write

from release_guard.manifest import SIGNATURE, DirectoryTree, hash_directory
from release_guard.oms import to_statement
from release_guard.signers.key import Key
from release_guard.verify import Trust, require_intact, verify

RESULTS = Path(__file__).parent / "results" / "provenance.json"
PARTS = 6


class Time(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


class Row(NamedTuple):
    """One line of the table: ours against theirs on the same files."""

    what: str
    ours: Time
    other: str
    theirs: Time
    ratio: Time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.megabytes, options.repeats)
    print(table(rows, options.megabytes))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document(rows, vars(options)), indent=1) + "\n")


def measure(folder: Path, megabytes: int, repeats: int) -> list[Row]:
    signer = fixed_key(folder / "keys")
    one = release(folder / "one", signer, megabytes, parts=1)
    six = release(folder / "six", signer, megabytes, parts=PARTS)
    rows = [
        compare(
            f"hash, {name}",
            lambda: hash_directory(place),  # noqa: B023  called before the next turn
            "hashlib, one after another",
            lambda: hash_plainly(place),  # noqa: B023
            repeats,
        )
        for name, place in (("1 file", one), (f"{PARTS} files", six))
    ]
    rows.append(
        compare(
            "sign",
            lambda: sign(six, signer),
            "model-signing",
            lambda: theirs_signs(six, signer),
            repeats,
        )
    )
    sign(six, signer)
    rows.append(
        compare(
            "verify",
            lambda: check(six, signer),
            "model-signing",
            lambda: theirs_checks(six, signer),
            repeats,
        )
    )
    ours = command("-m", "release_guard", "verify", str(six), "--key", str(signer.public))
    theirs = command(
        *("-m", "model_signing", "verify", "key", str(six)),
        *("--signature", str(six / SIGNATURE), "--public_key", str(signer.public)),
    )
    rows += [
        compare("verify, whole command", ours, "model-signing", theirs, repeats),
        compare(
            "import of verify",
            command("-c", "import release_guard.verify"),
            "bare interpreter",
            command("-c", "pass"),
            repeats,
        ),
    ]
    return rows


def release(folder: Path, signer: Key, megabytes: int, parts: int) -> Path:
    """A judged and signed release with that much weight."""
    for part in range(parts):
        write(folder, f"model-{part}.safetensors", os.urandom(megabytes * 10**6 // parts))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    judge(folder, signer, started_at=now, finished_at=now).release()
    return folder


def compare(
    what: str, ours: Callable[[], Any], other: str, theirs: Callable[[], Any], repeats: int
) -> Row:
    """Run both in turns; who begins alternates."""
    ours(), theirs()
    rounds: list[dict[str, Time]] = []
    for number in range(repeats):
        turns: Mapping[str, Callable[[], Any]] = {"ours": ours, "theirs": theirs}
        order = list(turns) if number % 2 else list(turns)[::-1]
        rounds.append({name: timed(turns[name]) for name in order})
    mine = [turn["ours"] for turn in rounds]
    yours = [turn["theirs"] for turn in rounds]
    ratios = [Time(a.wall / b.wall, a.cpu / b.cpu) for a, b in zip(mine, yours, strict=True)]
    return Row(what, median(mine), other, median(yours), median(ratios))


def timed(work: Callable[[], Any]) -> Time:
    """Wall and CPU seconds, those of finished child processes included."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    return Time(time.perf_counter() - wall, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def median(times: list[Time]) -> Time:
    return Time(*(statistics.median(values) for values in zip(*times, strict=True)))


def hash_plainly(folder: Path) -> None:
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


def table(rows: list[Row], megabytes: int) -> str:
    lines = [
        f"| {megabytes} MB | ours, s | against | theirs, s | ratio wall | ratio CPU |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.what} | {row.ours.wall:.3f} | {row.other} | {row.theirs.wall:.3f} "
        f"| {row.ratio.wall:.2f} | {row.ratio.cpu:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def document(rows: list[Row], options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "command": "python benchmarks/provenance.py",
        "options": options,
        "cores": os.cpu_count(),
        "model_signing": model_signing.__version__,
        "rows": [
            {
                "what": row.what,
                "against": row.other,
                "ours": row.ours._asdict(),
                "theirs": row.theirs._asdict(),
                "ratio": row.ratio._asdict(),
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    main()
