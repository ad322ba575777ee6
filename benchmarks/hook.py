"""The pre-push check of a commit with 300 MB of weights in LFS, against what it cannot do without.

python -m benchmarks hook

Every contestant is a process of its own, as git would start it. The release is signed and its
evidence synthetic; the weights are as many zeros as it takes, since nobody reads them.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from pushing import Bench, empty, release

from benchmarks._common import Time, in_turns, machine, ratios, record, spread, table
from release_guard.git import Repository
from release_guard.gittree import tree_of

TITLE = "The pre-push hook"
ROUNDS = 15
SIZES = {"300 MB": 300_000_000, "300 bytes": 300}
TARGET = 0.1  # seconds
HOOK, DRY = "`hook run pre-push`", "`git push --dry-run --no-verify`"
PYTHON, LIBRARY = "Python, doing nothing", "Python with cryptography"
CAPTION = """\
Median (range) of {rounds} rounds in turns, one process each. Nothing of the check depends on the
size of the weights: looking at the commit (every name and digest of it, by four processes of git)
takes {tree:.0f} ms with {large} and {small:.0f} ms with {tiny}. Python and the library that
verifies a signature take {share:.0%} of the check's CPU before the first line of ours runs. Target:
at most {target:.0f} ms with {large}; {met}, fastest round {fastest:.0f} ms by wall clock. On a
shared machine CPU says more."""


def main() -> None:
    about = machine("cryptography")
    with tempfile.TemporaryDirectory() as name:
        found = {size: compare(Path(name) / str(size), size) for size in SIZES.values()}
    result = {"seeds": "none", "machine": about, "sizes": found}
    record("hook", result, markdown(result))


def markdown(result: Mapping[str, Any]) -> str:
    large, small = result["sizes"].values()
    times = {name: [Time(*taken) for taken in some] for name, some in large["times"].items()}
    rows = [
        [
            name,
            spread([1000 * time.wall for time in some], 0),
            spread([1000 * time.cpu for time in some], 0),
            spread([ratio.cpu for ratio in ratios(some, times[PYTHON])]),
        ]
        for name, some in times.items()
    ]
    header = [f"commit with {next(iter(SIZES))} in LFS", "wall ms", "CPU ms", "CPU, times Python"]
    return f"{table(header, rows)}\n\n{_caption(large, small, times)}"


def compare(folder: Path, size: int) -> dict[str, Any]:
    """Times of the check and of the rest, for a release with weights of this size."""
    bench = empty(folder)
    with (bench.work / "large.safetensors").open("wb") as file:
        file.truncate(size)
    release(bench, "1")
    head = bench.git("rev-parse", "HEAD")
    line = f"refs/heads/main {head} refs/heads/main {'0' * 40}\n"
    guard = [sys.executable, "-P", "-m", "release_guard", "hook", "run", "pre-push"]
    imports = "import cryptography.hazmat.primitives.serialization"
    contestants = {
        HOOK: process(bench, [*guard, "origin", bench.url], line),
        DRY: process(bench, ["git", "push", "-q", "--dry-run", "--no-verify", "origin", "main"]),
        LIBRARY: process(bench, [sys.executable, "-c", imports]),
        PYTHON: process(bench, [sys.executable, "-c", "pass"]),
    }
    return {"times": in_turns(contestants, ROUNDS), "tree": look(bench, head)}


def process(bench: Bench, command: Sequence[str], given: str = "") -> Callable[[], Time]:
    def work() -> Time:
        taken, done = Time.of(
            lambda: subprocess.run(  # noqa: S603
                command,
                cwd=bench.work,
                env=bench.environment,
                input=given.encode(),
                capture_output=True,
                check=False,
            )
        )
        if done.returncode:
            raise SystemExit(done.stderr.decode())
        return taken

    return work


def look(bench: Bench, head: str) -> list[float]:
    """Seconds that it takes to see a commit as a release, in this process."""
    repository = Repository.at(bench.work)
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        tree_of(repository, head)
        found.append(time.perf_counter() - began)
    return found


def _caption(
    large: Mapping[str, Any], small: Mapping[str, Any], times: Mapping[str, Sequence[Time]]
) -> str:
    names = list(SIZES)
    middle = statistics.median(time.wall for time in times[HOOK])
    return CAPTION.format(
        rounds=ROUNDS,
        tree=1000 * statistics.median(large["tree"]),
        small=1000 * statistics.median(small["tree"]),
        large=names[0],
        tiny=names[1],
        share=statistics.median(one.cpu for one in ratios(times[LIBRARY], times[HOOK])),
        target=1000 * TARGET,
        met="met" if middle <= TARGET else f"MISSED ({1000 * middle:.0f} ms)",
        fastest=1000 * min(time.wall for time in times[HOOK]),
    )


if __name__ == "__main__":
    main()
