"""Hashing a release against hashlib alone, and the memory that verifying large weights takes.

python -m benchmarks hashing

`hash_directory` goes over the files once, as `verify` does. In turns with it, on as many threads,
`hashlib.file_digest` goes over the same files, and `hashlib.sha256` over as many bytes that lie in
memory already. The files are in the page cache: what a disk adds is not ours.
"""

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks._common import Time, in_turns, machine, ratios, record, spread, table
from release_guard.manifest import SIGNATURE, hash_directory
from release_guard.oms import to_statement
from release_guard.signers.key import Key, generate_key

TITLE = "Hashing, and the memory of verify"
ROUNDS = 7
OVERHEAD, MOST_MEMORY = 1.05, 300e6  # times hashlib; bytes
LAYOUTS: Mapping[str, Sequence[int]] = {  # sizes of files, in bytes; the first three are models
    "one file of 512 MiB": [512 << 20],
    "four shards of 128 MiB": [128 << 20] * 4,
    "two shards of 250 MB, twelve files of 40 kB": [250_000_000] * 2 + [40_000] * 12,
    "512 files of 1 MiB": [1 << 20] * 512,
    "4,096 files of 16 KiB": [16 << 10] * 4096,
}
MODELS = 3
SPARSE = (3_400_000_000, 3_300_000_000, 3_300_000_000)  # bytes
PROGRAM = """\
import sys
from release_guard.cli import main
def memory(name):
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name))
code = main(sys.argv[1:])
print(code, memory("VmHWM"), file=sys.stderr)
"""
CAPTION = """\
Median (range) of {rounds} rounds in turns, {cores} cores, as many threads each. The first three are
models; of the others, opening files is a growing share. One file keeps one core busy, whoever
hashes it: SHA-256 is a chain. On a shared machine CPU says more than wall clock. Target: at most
{target:.2f} times hashlib on the same files for models, by CPU; {met}. What is left against bytes
in memory is the copy out of the page cache. Mapping files would save most of it, but where a mapped
file is cut short, or its disk fails, the process is killed instead of saying so."""
MEMORY_CAPTION = """\
`release-guard verify` on {files} sparse files, {size:.1f} GB together, signed and without evidence,
in a process of its own: {most:.0f} MB at most, where Python and the libraries take {least:.0f} MB
for a file of one byte. Target: less than {target:.0f} MB; {met}."""


def main() -> None:
    about = machine("cryptography")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        result = {
            "seeds": "none, random bytes",
            "machine": about,
            "layouts": {layout: compare(home / "some", sizes) for layout, sizes in LAYOUTS.items()},
            "memory": {"sizes": SPARSE, "most": peak(home / "large", SPARSE)},
        }
        result["memory"]["least"] = peak(home / "small", (1,))
    record("hashing", result, markdown(result))


def compare(folder: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """Times of ours and of hashlib alone, over the same sizes."""
    block = os.urandom(max(sizes))
    view = memoryview(block)
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / f"{number:05}.bin").write_bytes(block[:size])
    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: hash_directory(folder),
        "files": lambda: shared_out(file_digest, sorted(folder.iterdir(), key=size_of)),
        "memory": lambda: shared_out(lambda size: hashlib.sha256(view[:size]), sorted(sizes)),
    }
    turns = {name: (lambda work=work: Time.of(work)[0]) for name, work in contestants.items()}
    times = in_turns(turns, ROUNDS)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return {"files": len(sizes), "bytes": sum(sizes), "times": times}


def shared_out(work: Callable[[Any], Any], ascending: Sequence[Any]) -> None:
    """One thread a core, long files first."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(work, ascending[::-1]))


def file_digest(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: Path) -> int:
    return path.stat().st_size


def peak(folder: Path, sizes: Sequence[int]) -> int:
    """Most bytes that a process which verifies such files held at any time."""
    folder.mkdir()
    for number, size in enumerate(sizes):
        with (folder / f"model-{number}.safetensors").open("wb") as file:
            file.truncate(size)
    private, public = generate_key(folder.with_suffix(".keys"))
    statement = to_statement(hash_directory(folder), name="large")
    (folder / SIGNATURE).write_bytes(Key(path=private).sign(statement))
    command = [sys.executable, "-c", PROGRAM, "verify", str(folder), "--key", str(public), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    if f"{len(sizes)} file" not in done.stdout or "as signed" not in done.stdout:
        raise SystemExit(f"verify did not come to what it should: {done.stdout}")
    return int(done.stderr.split()[-1]) << 10


def markdown(result: Mapping[str, Any]) -> str:
    rows, against_files = [], []
    for layout, found in result["layouts"].items():
        times = {name: [Time(*each) for each in some] for name, some in found["times"].items()}
        files, memory = (ratios(times["ours"], times[name]) for name in ("files", "memory"))
        rate = found["bytes"] / 1e9 / statistics.median(time.wall for time in times["ours"])
        by_cpu = [each.cpu for each in files]
        columns = (by_cpu, [each.wall for each in files], [each.cpu for each in memory])
        rows.append([layout, *map(spread, columns), f"{rate:.2f}"])
        against_files.append(statistics.median(by_cpu))
    header = ["files", "CPU / hashlib on files", "wall / hashlib on files"]
    header += ["CPU / hashlib in memory", "GB/s"]
    caption = CAPTION.format(
        rounds=ROUNDS,
        cores=result["machine"]["cores"],
        target=OVERHEAD,
        met=_met(max(against_files[:MODELS]) <= OVERHEAD),
    )
    return f"{table(header, rows)}\n\n{caption}\n\n{_memory(result['memory'])}"


def _memory(found: Mapping[str, Any]) -> str:
    return MEMORY_CAPTION.format(
        files=len(found["sizes"]),
        size=sum(found["sizes"]) / 1e9,
        most=found["most"] / 1e6,
        least=found["least"] / 1e6,
        target=MOST_MEMORY / 1e6,
        met=_met(found["most"] < MOST_MEMORY),
    )


def _met(reached: bool) -> str:
    return "met" if reached else "MISSED"


if __name__ == "__main__":
    main()
