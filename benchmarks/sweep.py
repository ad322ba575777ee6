"""The red team: two workers against one process, the time to refuse, what the ledger saves.

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

import psutil
import torch

from benchmarks._common import (
    WORKERS,
    Time,
    demo_model,
    demo_policy,
    in_turns,
    machine,
    ratios,
    record,
    session,
    spread,
    table,
)
from release_guard.engines import Job, run_trial
from release_guard.engines.local import Local
from release_guard.evidence import Evidence, Outcome
from release_guard.modalities import Modality
from release_guard.policy import Budget, Policy
from release_guard.publish import Order, assess
from release_guard.redteam import MIDPOINT, Ground
from release_guard.search import listed

TITLE = "Red team"
STEPS, ROUNDS, REFUSALS = 48, 3, 3
_REFUSED = 3
SWEEP_CAPTION = """\
The demo's smoke sweep on its unprotected model, no trial ended early, the closed-form probe
included; median (range) of {rounds} rounds in turns, one thread a process, every score the same to
the last digit. Start-up: two new processes import torch, load model and data and run one step. The
best ratio of wall times is 0.50, on two idle cores. Where other work holds the cores, wall times
say what was left of the machine, not what the workers do; the CPU seconds of the busier worker
against those of one process say what the ratio of wall times would be on two free cores."""
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
            "sweep": sweep(model, policy),
            "refusals": [refusal(folder, f"go-{number}") for number in range(REFUSALS)],
            "whole": rerun_of_all(folder, model, policy),
        }
    record("sweep", result, markdown(result))


def markdown(result: Mapping[str, Any]) -> str:
    return "\n\n".join(
        [
            "### Two workers against one process",
            _sweep_markdown(result["sweep"]),
            "### Refusing the unprotected model",
            _refusal_markdown(result["refusals"]),
            "### What the ledger saves",
            _ledger_markdown([*result["refusals"], result["whole"]]),
        ]
    )


def sweep(model: Path, policy: Policy) -> dict[str, Any]:
    """The same trials in this process, one after another, and by two workers."""
    jobs, warming = sweep_jobs(model, policy, STEPS), sweep_jobs(model, policy, 1)[:WORKERS]
    pools: list[dict[str, float]] = []
    scores: list[Any] = []

    def alone() -> Time:
        taken, outcomes = Time.of(lambda: [run_trial(job) for job in jobs])
        scores.append(_scores(outcomes))
        return taken

    def together() -> Time:
        taken, (pool, outcomes) = Time.of(lambda: _by_workers(jobs, warming))
        scores.append(_scores(outcomes))
        pools.append(pool)
        return taken

    times = in_turns({"one process": alone, "two workers": together}, ROUNDS)
    if any(found != scores[0] for found in scores):
        raise SystemExit("the same trials came to different scores")
    return {"steps": STEPS, "trials": len(jobs), "times": times, "pools": pools[-ROUNDS:]}


def sweep_jobs(model: Path, policy: Policy, steps: int) -> list[Job]:
    """The demo's attacks on the undefended arm; nothing ends them early."""
    budget = Budget(unit="steps", limit=steps)
    policy = policy.model_copy(
        update={"red_team": policy.red_team.model_copy(update={"budget": budget})}
    )
    (concept,) = policy.concepts
    base = Modality.build(policy.modality).load(str(model))
    trials = Ground.of(base, model, None, policy).trials(
        MIDPOINT, "undefended", concept, listed(policy, concept), policy.precisions, 1.0
    )
    return [Job(trial, str(model), policy) for trial in trials]


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


def _by_workers(
    jobs: Sequence[Job], warming: Sequence[Job]
) -> tuple[dict[str, float], list[Outcome]]:
    """Start, one tiny trial a worker, then the work; seconds of both parts, outcomes in order."""
    with Local(workers=WORKERS) as engine:
        start, _ = Time.of(lambda: list(engine.run(warming)))
        before = _cpu_of_workers()
        work, found = Time.of(lambda: list(engine.run(jobs)))
        spent = [after - cpu for after, cpu in zip(_cpu_of_workers(), before, strict=True)]
    pool = {"start": start.wall, "work": work.wall, "cpu": sum(spent), "busiest": max(spent)}
    outcomes = {job.trial.key: outcome for job, outcome in found}
    return pool, [outcomes[job.trial.key] for job in jobs]


def _cpu_of_workers() -> list[float]:
    children = sorted(psutil.Process().children(), key=lambda child: child.pid)
    return [child.cpu_times().user + child.cpu_times().system for child in children]


def _scores(outcomes: Sequence[Outcome]) -> list[list[float]]:
    if failed := [outcome.note for outcome in outcomes if outcome.ending != "survived"]:
        raise SystemExit(f"a trial did not run whole: {failed[0]}")
    return [[point.score for point in outcome.curve] for outcome in outcomes]


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


def _sweep_markdown(found: Mapping[str, Any]) -> str:
    alone, together = ([Time(*taken) for taken in some] for some in found["times"].values())
    pools = found["pools"]
    work = [Time(pool["work"], pool["cpu"]) for pool in pools]
    busiest = [Time(pool["work"], pool["busiest"]) for pool in pools]
    rows = [
        ["one process, one after another", _walls(alone), _cpus(alone), "1", "1"],
        ["two workers, start-up left out", *_against(work, alone)],
        ["the busier worker of the two", "-", _cpus(busiest), "-", _cpus(ratios(busiest, alone))],
        ["two workers, start-up included", *_against(together, alone)],
        ["start-up alone", spread([pool["start"] for pool in pools]), "-", "-", "-"],
    ]
    header = [f"{found['trials']} trials of {found['steps']} steps", "wall s", "CPU s"]
    header += ["ratio wall", "ratio CPU"]
    return f"{table(header, rows)}\n\n{SWEEP_CAPTION.format(rounds=len(alone))}"


def _against(ours: Sequence[Time], theirs: Sequence[Time]) -> list[str]:
    found = ratios(ours, theirs)
    return [_walls(ours), _cpus(ours), _walls(found), _cpus(found)]


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
