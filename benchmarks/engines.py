"""Engines: two local workers and two Ray workers against one process; trials held by a ledger.

python -m benchmarks engines

The first two on the demo's model and data, on those of its attacks that take batches of 64, long
enough that a trial takes five seconds or more. The last needs no model: an engine that answers at
once fills a ledger, and the same red team goes through it again.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import psutil
import torch
from pydantic import PrivateAttr

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
from release_guard.engines import Engine, Job, run_trial
from release_guard.evidence import Cost, Outcome, Point
from release_guard.ledger import Ledger
from release_guard.modalities import Modality
from release_guard.phases import MIDPOINT, Folders, Ground
from release_guard.plugins import Spec
from release_guard.policy import Budget, Policy
from release_guard.redteam import red_team
from release_guard.search import listed
from release_guard.session import Session
from release_guard.subject import Subject

TITLE = "Engines"
STEPS, ROUNDS, BATCH = 200, 3, 64
SEARCH_SEEDS = (80, 320)
LEAST_SECONDS, SPEED_UP, OVERHEAD, HELD_SECONDS = 5.0, 1.8, 1.10, 1.0
ALONE, LOCAL, RAY = "one process, one after another", "local", "ray"
ENGINES_CAPTION = """\
{trials} of the demo's attacks on its unprotected model, no trial ended early; a trial takes
{least:.1f} seconds or more in one process. Median (range) of {rounds} rounds in turns, one thread a
process, every score the same to the last digit. Start-up is left out: new processes import torch,
load model and data and run one step; with Ray, a cluster of this machine starts too. CPU seconds
are those of all processes of the engine; the busiest process's against those of one process say
what the speed-up would be on free cores. Targets: two local workers at least {speed_up:g} times as
fast as one process, {faster}; Ray at most {overhead:.0%} of the local engine's time, {cheaper}."""
HELD_CAPTION = """\
The demo's red team with many search seeds, twice with one ledger; no trial is run in the second
go. It reads the ledger, asks it for every trial, scores the retained data and makes the evidence;
judging and the report are left out. Target: below {target:g} s for 1,000 more trials; {met}."""


def main() -> None:
    about = machine("torch", "transformers", "peft", "ray")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = demo_policy(folder)
        model = demo_model(folder)
        result = {
            "seeds": [policy.seed],
            "machine": about,
            "engines": compare(model, policy),
            "held": [held(folder, model, policy, seeds) for seeds in SEARCH_SEEDS],
        }
    record("engines", result, markdown(result))


def markdown(result: Mapping[str, Any]) -> str:
    return "\n\n".join(
        [
            "### Two workers",
            _engines_markdown(result["engines"]),
            "### Trials that a ledger holds",
            _held_markdown(result["held"]),
        ]
    )


def compare(model: Path, policy: Policy) -> dict[str, Any]:
    """The same trials in this process, one after another, and by two workers of each engine."""
    jobs, warming = sweep_jobs(model, policy, STEPS), sweep_jobs(model, policy, 1)[:WORKERS]
    found: list[Sequence[Outcome]] = []
    starts: dict[str, list[float]] = {LOCAL: [], RAY: []}
    busiest: dict[str, list[float]] = {LOCAL: [], RAY: []}

    def alone() -> Time:
        taken, outcomes = Time.of(lambda: [run_trial(job) for job in jobs])
        found.append(outcomes)
        return taken

    def by(name: str) -> Callable[[], Time]:
        def work() -> Time:
            with Engine.build(Spec(name=name, workers=WORKERS)) as engine:
                start, _ = Time.of(lambda: list(engine.run(warming)))
                before = cpu_of_children()
                taken, ended = Time.of(lambda: list(engine.run(jobs)))
                spent = [now - before.get(pid, 0) for pid, now in cpu_of_children().items()]
            outcomes = {job.trial.key: outcome for job, outcome in ended}
            found.append([outcomes[job.trial.key] for job in jobs])
            starts[name].append(start.wall)
            busiest[name].append(max(spent))
            return Time(taken.wall, sum(spent))

        return work

    times = in_turns({ALONE: alone, LOCAL: by(LOCAL), RAY: by(RAY)}, ROUNDS)
    if any(scores(outcomes) != scores(found[0]) for outcomes in found):
        raise SystemExit("the same trials came to different scores")
    return {
        "steps": STEPS,
        "trials": len(jobs),
        "least_seconds": min(outcome.curve[-1].cost.seconds for outcome in found[0]),
        "times": times,
        "starts": {name: some[-ROUNDS:] for name, some in starts.items()},
        "busiest": {name: some[-ROUNDS:] for name, some in busiest.items()},
    }


def sweep_jobs(model: Path, policy: Policy, steps: int) -> list[Job]:
    """The demo's attacks of one length on the undefended arm; nothing ends them early."""
    policy = changed(policy, budget=Budget(unit="steps", limit=steps))
    (concept,) = policy.concepts
    attacks = [spec for spec in listed(policy, concept) if spec.options.get("batch") == BATCH]
    base = Modality.build(policy.modality).load(str(model))
    trials = Ground.of(base, Folders(model), policy).trials(
        MIDPOINT, "undefended", concept, attacks, policy.precisions, 1.0
    )
    return [Job(trial, str(model), policy) for trial in trials]


def changed(policy: Policy, **red_team: Any) -> Policy:
    """The policy with other numbers for its red team."""
    return policy.model_copy(update={"red_team": policy.red_team.model_copy(update=red_team)})


def cpu_of_children() -> dict[int, float]:
    """CPU seconds of every process below this one."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        found[child.pid] = times.user + times.system
    return found


def scores(outcomes: Sequence[Outcome]) -> list[list[float]]:
    if failed := [outcome.note for outcome in outcomes if outcome.ending != "survived"]:
        raise SystemExit(f"a trial did not run whole: {failed[0]}")
    return [[point.score for point in outcome.curve] for outcome in outcomes]


class Answering(Engine):
    """Ends every trial at once, with a curve of ten points that never breaches."""

    _running: list[Job] = PrivateAttr(default_factory=list)
    _curve: tuple[Point, ...] = tuple(
        Point(cost=Cost(steps=steps, samples=steps, flops=1e9, seconds=0.1), score=0.1)
        for steps in range(1, 11)
    )

    @property
    def running(self) -> Collection[Job]:
        return self._running

    def start(self, job: Job) -> None:
        self._running.append(job)

    def ended(self) -> Iterable[tuple[Job, Outcome]]:
        outcome = Outcome(ending="survived", curve=self._curve, examples=200, parameters=1)
        return [(self._running.pop(), outcome)]

    def close(self) -> None:
        self._running.clear()


class AnsweringSession(Session):
    def build_engine(self) -> Engine:
        return Answering(workers=self.workers)


def held(folder: Path, model: Path, policy: Policy, search_seeds: int) -> dict[str, Any]:
    """One red team twice; seconds of the second go, which runs nothing."""
    policy = changed(policy, search_seeds=search_seeds, confirm_examples=50)
    load = Modality.build(policy.modality).load
    subject = Subject(model, model, load(str(model)), load(str(model)))
    about = AnsweringSession(WORKERS, lambda *_: None, session().now)
    ledger = folder / f"trials-{search_seeds}.jsonl"

    def go() -> int:
        return len(red_team(subject, policy, Ledger(ledger, print), about).records)

    trials = go()
    lines = ledger.read_bytes().count(b"\n")
    taken, again = Time.of(go)
    if (again, ledger.read_bytes().count(b"\n")) != (trials, lines):
        raise SystemExit("a trial that the ledger holds was run again")
    return {"trials": trials, "time": taken}


def _engines_markdown(found: Mapping[str, Any]) -> str:
    times = {name: [Time(*taken) for taken in some] for name, some in found["times"].items()}
    alone = times[ALONE]
    rows = [[ALONE, *_spreads(alone), "-", "1", "-"]]
    for name in (LOCAL, RAY):
        ups = [one.wall / taken.wall for one, taken in zip(alone, times[name], strict=True)]
        busiest = [one.cpu / cpu for one, cpu in zip(alone, found["busiest"][name], strict=True)]
        rows.append(
            [
                f"{name}, {WORKERS} workers",
                *_spreads(times[name]),
                spread(found["starts"][name]),
                spread(ups),
                spread(busiest),
            ]
        )
    header = [f"{found['trials']} trials of {found['steps']} steps", "wall s", "CPU s"]
    header += ["start-up s", "speed-up", "speed-up by CPU"]
    return f"{table(header, rows)}\n\n{_engines_caption(found, times)}"


def _engines_caption(found: Mapping[str, Any], times: Mapping[str, Sequence[Time]]) -> str:
    faster = 1 / statistics.median(one.wall for one in ratios(times[LOCAL], times[ALONE]))
    dearer = statistics.median(one.wall for one in ratios(times[RAY], times[LOCAL]))
    return ENGINES_CAPTION.format(
        trials=found["trials"],
        least=found["least_seconds"],
        rounds=len(times[ALONE]),
        speed_up=SPEED_UP,
        faster=f"{_met(faster >= SPEED_UP)} ({faster:.2f})",
        overhead=OVERHEAD,
        cheaper=f"{_met(dearer <= OVERHEAD)} ({dearer:.0%})",
    )


def _held_markdown(found: Sequence[Mapping[str, Any]]) -> str:
    times = [Time(*one["time"]) for one in found]
    few, many = found[0]["trials"], found[-1]["trials"]
    pairs = zip(times[0], times[-1], strict=True)
    more = Time(*(1000 * (later - sooner) / (many - few) for sooner, later in pairs))
    names = [*(str(one["trials"]) for one in found), "1,000 more"]
    rows = [
        [name, f"{time.wall:.2f}", f"{time.cpu:.2f}"]
        for name, time in zip(names, [*times, more], strict=True)
    ]
    caption = HELD_CAPTION.format(target=HELD_SECONDS, met=_met(more.wall < HELD_SECONDS))
    return f"{table(['trials held', 'wall s', 'CPU s'], rows)}\n\n{caption}"


def _met(reached: bool) -> str:
    return "met" if reached else "MISSED"


def _spreads(times: Sequence[Time]) -> list[str]:
    return [spread(values) for values in zip(*times, strict=True)]


if __name__ == "__main__":
    main()
