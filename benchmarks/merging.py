"""Our merges against mergekit's, in memory, in turns.

python -m benchmarks merging

The same three checkpoints of a Llama of random weights (width 384, 6 layers), the second and third
moved from the first by 1 % noise; one thread. The first call of mergekit in a process takes seconds
and does not count. Needs mergekit, which is no dependency; without it nothing is measured and the
old figures stay.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._common import Time, in_turns, machine, median, ratios, record, spread, table
from release_guard import merging
from release_guard.merging import State

TITLE = "Merges against mergekit"
SEED, ROUNDS, MOVED, CLOSE, TARGET = 0, 5, 0.01, 1e-6, 1.0
WEIGHTS, DENSITY, SHARE = (0.6, 0.4), 0.3, 0.4
OURS, THEIRS = "ours", "mergekit"
MISSING = "skipped: mergekit is not installed; pip install -c constraints.txt mergekit==0.1.5"

Merge = Callable[[], State]


def main() -> None:
    if importlib.util.find_spec(THEIRS) is None:
        print(MISSING)
        return
    about = machine("torch", "mergekit")
    torch.set_num_threads(1)
    states = checkpoints()
    with torch.no_grad():
        rows = [compare(name, *pair) for name, pair in methods(*states).items()]
    parameters = sum(part.numel() for part in states[0].values())
    result = {"seeds": [SEED], "machine": about, "parameters": parameters, "rows": rows}
    record("merging", result, markdown(result))


def markdown(result: Mapping[str, Any]) -> str:
    rows, found = [], []
    for row in result["rows"]:
        times = {name: [Time(*taken) for taken in row["times"][name]] for name in (OURS, THEIRS)}
        ratio = ratios(times[OURS], times[THEIRS])
        found.append(median(ratio))
        seconds = [f"{median(times[name]).cpu:.3f}" for name in (OURS, THEIRS)]
        spreads = [spread(values) for values in zip(*ratio, strict=True)]
        rows.append([row["method"], *seconds, *spreads, f"{row['apart']:.1e}"])
    header = [
        f"{result['parameters'] / 1e6:.1f} million weights",
        "ours, CPU s",
        "mergekit, CPU s",
        "ratio wall",
        "ratio CPU",
        "largest difference",
    ]
    slower = [
        row[0] for row, ratio in zip(rows, found, strict=True) if round(ratio.cpu, 2) > TARGET
    ]
    return (
        f"{table(header, rows)}\n\nMedian (range) of {ROUNDS} rounds in turns, one thread. "
        f"Target: equal to {CLOSE:.0e} and not slower by CPU time; slower: "
        f"{', '.join(slower) or 'none'}."
    )


def checkpoints() -> list[State]:
    """A base and two models that came from it."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        vocab_size=2048,
    )
    base = {name: part.clone() for name, part in LlamaForCausalLM(config).state_dict().items()}
    return [base, *(moved(base) for _ in range(2))]


def moved(base: State) -> State:
    return {name: part + MOVED * torch.randn_like(part) for name, part in base.items()}


def methods(base: State, one: State, other: State) -> dict[str, tuple[Merge, Merge]]:
    """Ours and theirs, by method."""
    import mergekit.merge_methods as mergekit  # noqa: PLC0415  optional, and seconds to import

    both = [one, other]
    weight = {"one": WEIGHTS[0], "other": WEIGHTS[1]}

    def theirs(method: str, *, base: str | None = "base", **options: Any) -> Merge:
        named = {"base": states[0], "one": one, "other": other}
        chosen = named if base == "base" else {name: named[name] for name in ("one", "other")}
        return lambda: mergekit.merge_state_dicts(chosen, method, parameters=options, base=base)

    states = (base, one, other)
    return {
        "linear": (
            lambda: merging.linear(both, WEIGHTS),
            theirs("linear", base=None, weight=weight),
        ),
        "task arithmetic": (
            lambda: merging.task_arithmetic(base, both, WEIGHTS),
            theirs("task_arithmetic", weight=weight),
        ),
        "TIES": (
            lambda: merging.ties(base, both, WEIGHTS, density=DENSITY),
            theirs("ties", weight=weight, density=DENSITY),
        ),
        "SLERP": (
            lambda: merging.slerp(one, other, SHARE),
            theirs("slerp", base="one", t=SHARE),
        ),
    }


def compare(method: str, ours: Merge, theirs: Merge) -> dict[str, Any]:
    """One line of the table; both must do the same."""
    mine, other = ours(), theirs()
    apart = max((mine[name] - part).abs().max().item() for name, part in other.items())
    if apart > CLOSE or mine.keys() != other.keys():
        raise SystemExit(f"{method}: {apart:.1e} apart")
    contestants = {OURS: lambda: Time.of(ours)[0], THEIRS: lambda: Time.of(theirs)[0]}
    return {"method": method, "apart": apart, "times": in_turns(contestants, ROUNDS)}


if __name__ == "__main__":
    main()
