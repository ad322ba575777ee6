"""What the benchmarks share: timing in turns, Markdown, the record of a run, the demo's model."""

import json
import os
import platform
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from release_guard.demo import example_folder, train
from release_guard.policy import Policy
from release_guard.session import Session
from release_guard.signers.key import generate_key

RESULTS = Path(__file__).parent / "results"
WORKERS = 2
_WATCHED = 2.0  # seconds the machine is watched before a benchmark
_SHOWN = 100  # of the steps of a long phase, one in so many is shown


class Time(NamedTuple):
    """Seconds: wall, and CPU of this process and its finished children."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, work: Callable[[], Any]) -> tuple["Time", Any]:
        wall, cpu = time.perf_counter(), _cpu_seconds()
        result = work()
        return cls(time.perf_counter() - wall, _cpu_seconds() - cpu), result


def in_turns(contestants: Mapping[str, Callable[[], Time]], rounds: int) -> dict[str, list[Time]]:
    """Times of each; the first round warms up and does not count, who begins alternates."""
    times: dict[str, list[Time]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            taken = contestants[name]()
            if number:
                times[name].append(taken)
    return times


def ratios(ours: Iterable[Time], theirs: Iterable[Time]) -> list[Time]:
    """Round by round."""
    pairs = zip(ours, theirs, strict=True)
    return [Time(one.wall / other.wall, one.cpu / other.cpu) for one, other in pairs]


def median(times: Iterable[Time]) -> Time:
    return Time(*(statistics.median(values) for values in zip(*times, strict=True)))


def spread(values: Sequence[float], digits: int = 2) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(*libraries: str) -> dict[str, Any]:
    """Cores, versions, and how busy other work kept the cores just before."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "busy": psutil.cpu_percent(_WATCHED) / 100,
    }


def record(name: str, result: Mapping[str, Any], markdown: str) -> None:
    """Print the tables and keep what they were made of."""
    print(markdown)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def demo_policy(folder: Path, name: str = "policy") -> Policy:
    """One of the demo's policies, its data and keys, put into a folder as the demo does."""
    example = example_folder()
    (folder / "data").mkdir(exist_ok=True)
    for data in example.glob("*.parquet"):
        shutil.copyfile(data, folder / "data" / data.name)
    shutil.copyfile(example / f"{name}.toml", folder / "policy.toml")
    if not (folder / "key.pem").exists():
        generate_key(folder, password=None)
    return Policy.load(folder / "policy.toml")


def demo_model(folder: Path) -> Path:
    """The demo's unprotected model, trained as there; the folder holds the policy."""
    train(folder, session()).save(folder / "model")
    return folder / "model"


def session() -> Session:
    return Session(WORKERS, _show, _now)


def _now() -> datetime:
    return datetime.now(UTC)


def _show(phase: str, done: int, total: int, line: str) -> None:
    if total < _SHOWN or done % _SHOWN == 0:
        print(f"{phase} {done}/{total} {line}", file=sys.stderr)


def _cpu_seconds() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
