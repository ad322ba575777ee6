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
from release_guard.phases import SEARCH, Folders, Ground
from release_guard.plan import Pace, Paces, Plan, disk, parts, rows
from release_guard.policy import Budget, Concept, MergeTarget, Policy, Precision, Target
from release_guard.preflight import (
    Order,
    check_attacks,
    check_data,
    check_donors,
    check_order,
    check_relatives,
    check_stage_kinds,
    check_stages,
    public_ancestor,
)
from release_guard.priors import fitting
from release_guard.quantization import at
from release_guard.run import Run
from release_guard.search import best_of_each_family, listed, pool
from release_guard.session import Session
from release_guard.sources import local_folder

if TYPE_CHECKING:
    from release_guard.modalities import ModelHandle

_STEPS = 8
_EXAMPLES = 64
_SCORINGS = 4  # of a merge: its own task, and the donor's by two of its last layers and the donor


def survey(order: Order, output: Path, session: Session) -> Plan:
    """What this order would take, here; runs a few steps of every attack family, writes nothing.

    Raises:
        ModelError: A model or its data cannot be used, or an attack fails at once.
        PolicyError: What is ordered contradicts itself, or what the policy lists.
    """
    check_order(order, output)
    policy = order.policy
    source = local_folder(order.source)
    undefended = local_folder(order.base) if order.base else source
    immunizes = bool(policy.stages) and not order.as_is
    if immunizes:
        check_stage_kinds(policy)
    base = Modality.build(policy.modality).load(str(undefended))
    check_attacks(policy)
    check_donors(policy, source, undefended)
    check_data(base, policy)
    run = Run(output)
    if immunizes:
        check_stages(base, policy)
    defended = run.immunized if immunizes else source
    ancestor = public_ancestor(policy, source, undefended)
    check_relatives(base, policy, ancestor)
    folders = Folders(
        undefended,
        defended if defended.is_dir() else None,
        run.sham if run.sham.is_dir() else None,
        ancestor,
        {each: path for each in policy.precisions if (path := run.artefacts / each).is_dir()},
    )
    ground = Ground.of(base, folders, policy)
    pools = {each.name: pool(policy, each, fitting(base, each)) for each in policy.targets}
    ledger = Ledger(run.ledger, lambda line: session.progress("ledger", 0, 0, line))
    paces = _calibrate(base, folders, ground, session)
    planned = rows(parts(policy, pools), ground, paces, list(ledger))
    payload = sum(entry.size for entry in hash_directory(undefended).payload.entries)
    num_trials = sum(row.trials for row in planned)
    return Plan(
        stages=tuple(spec.name for spec in policy.stages) if immunizes else (),
        rows=planned,
        workers=session.workers,
        disk_bytes=disk(policy, payload=payload, num_trials=num_trials, immunizes=immunizes),
        free_bytes=shutil.disk_usage(_existing(output)).free,
    )


def _calibrate(base: "ModelHandle", folders: Folders, ground: Ground, session: Session) -> Paces:
    """One short trial of every attack family at every precision, on the undefended model."""
    policy, ancestor = ground.policy, str(folders.ancestor or "")
    jobs = [
        (target, Job(trial, str(folders.undefended), policy, ancestor))
        for target, trial in _short_trials(ground)
    ]
    timed(jobs[0][1])  # the first one loads and warms up
    asked = {(target, job.trial.precision) for target, job in jobs}
    per_example = {(each, precision): _scoring(base, each, precision) for each, precision in asked}
    paces: dict[tuple[str, Precision], Pace] = {}
    for done, (target, job) in enumerate(jobs, start=1):
        trial = job.trial
        outcome, seconds = timed(job)
        pace = _pace(outcome, seconds, per_example[target, trial.precision], policy)
        paces[trial.attack.family, trial.precision] = pace
        line = f"{trial.attack.family}@{trial.precision}: {pace.seconds_per_step:.3g} s a step"
        session.progress("calibrate", done, len(jobs), line)
    return paces


def _short_trials(ground: Ground) -> list[tuple[Target, Trial]]:
    """A few steps of the first of each family, against the first target it is aimed at.

    Merge targets come first: their trials are scored on the donor's task too.
    """
    policy, short = ground.policy, Budget(unit="steps", limit=_STEPS)
    changes = {"budget": short, "ceiling": None, "examples": 1, "seed": policy.seed}
    found: dict[tuple[str, Precision], tuple[Target, Trial]] = {}
    for target in sorted(policy.targets, key=lambda target: isinstance(target, Concept)):
        families = best_of_each_family(listed(policy, target))
        for trial in ground.trials(SEARCH, "undefended", target, families, policy.precisions, 0.0):
            key = trial.attack.family, trial.precision
            found.setdefault(key, (target, trial.model_copy(update=changes)))
    return list(found.values())


def _scoring(base: "ModelHandle", target: Target, precision: Precision) -> float:
    dataset, split = scored(target, "search")
    model = at(base, precision)
    model.scores(dataset, split, limit=1)
    start = time.perf_counter()
    scores = model.scores(dataset, split, limit=_EXAMPLES)
    per_example = (time.perf_counter() - start) / len(scores)
    return per_example * (_SCORINGS if isinstance(target, MergeTarget) else 1)


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
