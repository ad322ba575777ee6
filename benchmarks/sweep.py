"""The red team: the time to refuse, what the ledger saves.

python -m benchmarks sweep

All of it on the demo's model, data, policy and smoke sweep.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import (
    WORKERS,
    Time,
    demo_model,
    demo_policy,
    machine,
    record,
    session,
    spread,
    table,
)
from release_guard.evidence import Evidence
from release_guard.judging import assess
from release_guard.policy import Budget, Policy
from release_guard.preflight import Order

TITLE = "Red team"
REFUSALS, _REFUSED = 3, 3
REFUSAL_CAPTION = """\
`release-guard publish --as-is` with the demo's policy, new process, empty ledger, two workers;
median (range) of {rounds}. The first breach that fresh seeds and examples confirm ends it, so few
of the sweep's trials run. Imports and the workers' start-up are included."""
LEDGER_CAPTION = """\
The same command with a new run folder and the ledger of the first go. Target: 100 % saved;
{target}. What the second go still takes is imports, loading, the scoring of retained data, and the
report."""


def main() -> None:
    about = machine("torch", "transformers", "peft")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = demo_policy(folder)
        model = demo_model(folder)
        result = {
            "seeds": [policy.seed],
            "machine": about,
            "refusals": [refusal(folder, f"go-{number}") for number in range(REFUSALS)],
            "whole": rerun_of_all(folder, model, policy),
        }
    record("sweep", result, markdown(result))


def markdown(result: Mapping[str, Any]) -> str:
    return "\n\n".join(
        [
            "### Refusing the unprotected model",
            _refusal_markdown(result["refusals"]),
            "### What the ledger saves",
            _ledger_markdown([*result["refusals"], result["whole"]]),
        ]
    )


def refusal(folder: Path, go: str) -> dict[str, Any]:
    """Publish the unprotected model by the command line, twice, with one ledger."""
    first, again = (_publish(folder, folder / go / name) for name in ("first", "again"))
    return {
        "what": f"the demo's refusal, {go}",
        "time": first["time"],
        "again": again["time"],
        "verdict": first["verdict"],
        "pushed": first["pushed"] or again["pushed"],
        "trials": first["trials"],
        "run": first["run"],
        "run_again": again["run"] - first["run"],
    }


def rerun_of_all(folder: Path, model: Path, policy: Policy) -> dict[str, Any]:
    """A red team that no breach ends, hence every phase of it, twice with one ledger."""
    (concept,) = policy.concepts
    changes = {"budget": Budget(unit="steps", limit=4), "long_run": 2.0}
    sizes = {"search_examples": 200, "confirm_examples": 200}
    policy = policy.model_copy(
        update={
            "concepts": (concept.model_copy(update={"ceiling": 0.999}),),
            "red_team": policy.red_team.model_copy(update=changes | sizes),
        }
    )
    order = Order(str(model), "atelier/benchmark", policy, as_is=True)
    place, found, taken = folder / "whole", [], []
    for name in ("first", "again"):
        time, assessed = Time.of(lambda: assess(order, place / name, session()))  # noqa: B023
        taken.append(time)
        found.append((len(assessed.evidence.records), _ledger_lines(place)))
    (trials, run), (_, run_in_all) = found
    return {
        "what": "all phases, ceiling out of reach, 4 steps",
        "time": taken[0],
        "again": taken[1],
        "trials": trials,
        "run": run,
        "run_again": run_in_all - run,
    }


def _publish(folder: Path, output: Path) -> dict[str, Any]:
    arguments = [str(folder / "model"), "--policy", str(folder / "policy.toml")]
    arguments += ["--repo", "atelier/benchmark", "--output", str(output), "--as-is", "--json"]
    command = [sys.executable, "-m", "release_guard", "publish", *arguments]
    command += ["--workers", str(WORKERS), "--quiet"]
    time, done = Time.of(
        lambda: subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    )
    if done.returncode != _REFUSED:
        raise SystemExit(f"exit code {done.returncode}, not {_REFUSED}: {done.stderr[-1000:]}")
    return {
        "time": time,
        "verdict": json.loads(done.stdout)["verdict"],
        "pushed": (folder / "hub").exists(),
        "trials": len(Evidence.read(output / "evidence.jsonl").records),
        "run": _ledger_lines(output.parent),
    }


def _ledger_lines(runs: Path) -> int:
    return len((runs / "trials.jsonl").read_bytes().splitlines())


def _refusal_markdown(refusals: Sequence[Mapping[str, Any]]) -> str:
    times = [Time(*refusal["time"]) for refusal in refusals]
    row = [
        ", ".join(sorted({refusal["verdict"].upper() for refusal in refusals})),
        _walls(times),
        _cpus(times),
        ", ".join(str(refusal["trials"]) for refusal in refusals),
        f"{sum(refusal['pushed'] for refusal in refusals)} of {len(refusals)}",
    ]
    shown = table(["verdict", "wall s", "CPU s", "trials", "pushed"], [row])
    return f"{shown}\n\n{REFUSAL_CAPTION.format(rounds=len(times))}"


def _ledger_markdown(reruns: Sequence[Mapping[str, Any]]) -> str:
    header = ["run", "trials", "run at first", "run again", "saved", "wall s", "wall s again"]
    rows = [
        [
            rerun["what"],
            *(str(rerun[key]) for key in ("trials", "run", "run_again")),
            f"{1 - rerun['run_again'] / rerun['run']:.0%}",
            *(f"{Time(*rerun[key]).wall:.1f}" for key in ("time", "again")),
        ]
        for rerun in reruns
    ]
    wasted = sum(rerun["run_again"] for rerun in reruns)
    target = f"MISSED by {wasted} trials" if wasted else "met"
    return f"{table(header, rows)}\n\n{LEDGER_CAPTION.format(target=target)}"


def _walls(times: Sequence[Time]) -> str:
    return spread([time.wall for time in times])


def _cpus(times: Sequence[Time]) -> str:
    return spread([time.cpu for time in times])


if __name__ == "__main__":
    main()
