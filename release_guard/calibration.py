"""Measure how fast attacks go on this machine, in seconds, and draw up a plan from that."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from release_guard.data import scored
from release_guard.engines import Job, timed
from release_guard.errors import ModelError
from release_guard.evidence import Outcome, Trial
from release_guard.ledger import Ledger
from release_guard.manifest import hash_directory
from release_guard.modalities import Modality
from release_guard.plan import Pace, Paces, Plan, disk, parts, rows
from release_guard.policy import Budget, Concept, Policy, Precision
from release_guard.publish import Order, check_data, local_folder
from release_guard.quantization import at
from release_guard.redteam import SEARCH, Ground, Session
from release_guard.run import Run
from release_guard.search import best_of_each_family, listed

if TYPE_CHECKING:
    from release_guard.modalities import ModelHandle

_STEPS = 8
_EXAMPLES = 64


def survey(order: Order, output: Path, session: Session) -> Plan:
    """What this order would take, here; runs a few steps of every attack family, writes nothing.

    Raises:
        ModelError: A model or its data cannot be used, or an attack fails at once.
    """
    policy = order.policy
    source = local_folder(order.source)
    undefended = local_folder(order.base) if order.base else source
    base = Modality.build(policy.modality).load(str(undefended))
    check_data(base, policy)
    run = Run(output)
    immunizes = bool(policy.stages) and not order.as_is
    defended = run.immunized if immunizes else source
    ground = Ground.of(base, undefended, defended if defended.is_dir() else None, policy)
    ledger = Ledger(run.ledger, lambda line: session.progress("ledger", 0, 0, line))
    paces = _calibrate(base, undefended, ground, session)
    planned = rows(parts(policy), ground, paces, list(ledger))
    payload = sum(entry.size for entry in hash_directory(undefended).payload.entries)
    num_trials = sum(row.trials for row in planned)
    return Plan(
        stages=tuple(spec.name for spec in policy.stages) if immunizes else (),
        rows=planned,
        workers=session.workers,
        disk_bytes=disk(policy, payload=payload, num_trials=num_trials, immunizes=immunizes),
        free_bytes=shutil.disk_usage(_existing(output)).free,
    )


def _calibrate(base: "ModelHandle", source: Path, ground: Ground, session: Session) -> Paces:
    """One short trial of every attack family at every precision, on the undefended model."""
    policy = ground.policy
    concept = policy.concepts[0]
    jobs = [(trial, Job(trial, str(source), policy)) for trial in _short_trials(ground, concept)]
    timed(jobs[0][1])  # the first one loads and warms up
    per_example = {p: _scoring(base, concept, p) for p in policy.precisions}
    paces: dict[tuple[str, Precision], Pace] = {}
    for done, (trial, job) in enumerate(jobs, start=1):
        outcome, seconds = timed(job)
        pace = _pace(outcome, seconds, per_example[trial.precision], policy)
        paces[trial.attack.name, trial.precision] = pace
        line = f"{trial.attack.name}@{trial.precision}: {pace.seconds_per_step:.3g} s a step"
        session.progress("calibrate", done, len(jobs), line)
    return paces


def _short_trials(ground: Ground, concept: Concept) -> list[Trial]:
    policy = ground.policy
    families = best_of_each_family(listed(policy, concept))
    trials = ground.trials(SEARCH, "undefended", concept, families, policy.precisions, 0.0)
    short = {"budget": Budget(unit="steps", limit=_STEPS), "ceiling": None, "examples": 1}
    return [trial.model_copy(update=short) for trial in trials if trial.seed == policy.seed]


def _scoring(base: "ModelHandle", concept: Concept, precision: Precision) -> float:
    dataset, split = scored(concept, "search")
    model = at(base, precision)
    model.scores(dataset, split, limit=1)
    start = time.perf_counter()
    scores = model.scores(dataset, split, limit=_EXAMPLES)
    return (time.perf_counter() - start) / len(scores)


def _pace(outcome: Outcome, seconds: float, per_example: float, policy: Policy) -> Pace:
    if outcome.ending == "failed" or not outcome.curve:
        raise ModelError(f"an attack fails at once: {outcome.note}")
    cost = outcome.curve[-1].cost
    units = cost.of(policy.red_team.budget.unit)
    return Pace(
        steps_per_unit=cost.steps / units if units else 1.0,
        seconds_per_step=cost.seconds / max(1, cost.steps),
        seconds_per_example=per_example,
        seconds_per_trial=max(0.0, seconds - cost.seconds - len(outcome.curve) * per_example),
        grows=len(outcome.curve) > 1,
    )


def _existing(folder: Path) -> Path:
    return next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir()
    )
