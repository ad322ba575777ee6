"""Run the benchmarks and write docs/results.md from what they measured.

python -m benchmarks [NAME...]     run all of them, or these
python -m benchmarks --only-write  write the page again from the figures in benchmarks/results

Each runs in a process of its own. If one fails, its old figures and the page stay as they were.
"""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks._common import RESULTS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
NAMES = (
    "demo",
    "demo_nf4",
    "sweep",
    "engines",
    "attack_vs_trainer",
    "merging",
    "gate_error_rates",
    "planted",
    "provenance",
    "sophon",
    "condition_number",
    "mima",
    "merge_guard",
    "concept_suppression",
    "quantizers",
    "quantization",
    "hashing",
    "hook",
)
_QUIET = 0.1  # share of the cores; above it the machine counts as shared

INTRODUCTION = """# Results

Written by `python -m benchmarks` from the files in `benchmarks/results/`; do not edit. Everything
here was measured. Where one thing is compared with another, both ran in the same process or in
turns on the same machine: read the ratios. Seconds are given only to show what was compared.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--only-write", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"{unknown[0]}: no such benchmark; there are {', '.join(NAMES)}")
    wanted = [] if options.only_write else options.names or NAMES
    if failed := [name for name in wanted if not _run(name)]:
        print(f"failed: {', '.join(failed)}; {PAGE.name} was not written", file=sys.stderr)
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """docs/results.md, from every benchmark that has figures."""
    found = [RESULTS / f"{name}.json" for name in NAMES]
    return "\n".join([INTRODUCTION, *(_section(path) for path in found if path.exists())])


def _run(name: str) -> bool:
    print(f"## {name}", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0  # noqa: S603


def _section(path: Path) -> str:
    benchmark: ModuleType = importlib.import_module(f"benchmarks.{path.stem}")
    result = json.loads(path.read_text(encoding="utf-8"))
    command = f"`python -m benchmarks {path.stem}`"
    about = f"Command: {command}. Seeds: {result['seeds']}. {_told(result['machine'])}"
    return f"## {benchmark.TITLE}\n\n{about}\n\n{benchmark.markdown(result)}\n"


def _told(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {value}" for name, value in machine.items() if name not in {"cores", "busy"}
    )
    told = f"Machine: {machine['cores']} cores, {versions}."
    if "busy" not in machine:
        return told
    shared = f" Just before it began, other work kept the cores {machine['busy']:.0%} busy"
    return f"{told}{shared}{': the machine was shared.' if machine['busy'] > _QUIET else '.'}"


if __name__ == "__main__":
    sys.exit(main())
