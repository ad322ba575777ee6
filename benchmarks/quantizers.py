"""Quantizers: rounding a weight as training does on every step, against the formats' own libraries.

python -m benchmarks quantizers

Each contestant rounds and reads back the same matrix, in turns in one process on one thread.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from benchmarks._common import Time, in_turns, machine, median, ratios, record, spread, table
from release_guard import formats
from release_guard.quantization import quiet_bitsandbytes

TITLE = "Quantizers"
SHAPES = ((64, 64), (64, 256), (576, 576), (1536, 576), (4096, 1024))
AIMED_AT, LEAST = (1536, 576), 5.0
ROUNDS, WORK = 9, 2**21  # weights rounded in a turn, so that it takes long enough to be timed
OURS, COMPILED = "ours", "compiled"
LIBRARIES = {
    **dict.fromkeys(("nf4", "fp4", "nf4_double", "int8"), "bitsandbytes"),
    **dict.fromkeys(("q8_0", "q4_0"), "gguf"),
}
CAPTION = """\
CPU microseconds, on one thread, to round a matrix and read it back: by `formats.rounded`, and by
the format's own library (bitsandbytes quantizes with torch and reads back with its own code; `gguf`
is numpy); and how many times as fast ours is, median (range) of {rounds} rounds in turns. All
results are the same to the last bit. Target: nf4 of {rows}x{columns} at least {least:g} times as
fast as bitsandbytes; {met}."""
COMPILED_CAPTION = """\
The same against `torch.compile` of fifteen comparisons a weight, compiled once for all shapes; it
needs a C++ compiler. Look-ups without one take {least:.0%} to {most:.0%} of its time, so the
package compiles nothing."""

Turn = Callable[[], Any]


def main() -> None:
    about = machine("torch", "bitsandbytes", "gguf")
    torch.set_num_threads(1)
    quiet_bitsandbytes()
    rows = [measured(form, shape) for form in LIBRARIES for shape in SHAPES if suits(form, shape)]
    against = [against_compiled(shape) for shape in SHAPES]
    result = {"seeds": [0], "machine": about, "rows": rows, "compiled": against}
    record("quantizers", result, markdown(result))


def suits(form: str, shape: tuple[int, int]) -> bool:
    """All shapes for what training rounds to most, one for the rest."""
    return form in {"nf4", "int8"} or shape == AIMED_AT


def measured(form: str, shape: tuple[int, int]) -> dict[str, Any]:
    weight = drawn(shape)
    turns = {OURS: lambda: formats.rounded(weight, form), LIBRARIES[form]: library(form, weight)}
    if not torch.equal(*(turn() for turn in turns.values())):
        raise AssertionError(f"{form} of {shape} is not what {LIBRARIES[form]} makes of it")
    return {"format": form, "library": LIBRARIES[form], **timed(shape, turns)}


def against_compiled(shape: tuple[int, int]) -> dict[str, Any]:
    weight = drawn(shape)
    turns = {OURS: lambda: formats.rounded(weight, "nf4"), COMPILED: lambda: _COMPARED(weight)}
    same = torch.equal(*(turn() for turn in turns.values()))
    return {"same": same, **timed(shape, turns)}


def drawn(shape: tuple[int, int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / 50


def timed(shape: tuple[int, int], turns: Mapping[str, Turn]) -> dict[str, Any]:
    """Microseconds a call of each, and ours against the other, round by round."""
    calls = max(1, WORK // (shape[0] * shape[1]))
    times = in_turns({name: repeated(turn, calls) for name, turn in turns.items()}, ROUNDS)
    (other,) = set(turns) - {OURS}
    return {
        "shape": list(shape),
        "microseconds": {name: 1e6 * median(times[name]).cpu / calls for name in turns},
        "times_as_fast": [ratio.cpu for ratio in ratios(times[other], times[OURS])],
    }


def repeated(turn: Turn, calls: int) -> Callable[[], Time]:
    return lambda: Time.of(lambda: [turn() for _ in range(calls)])[0]


def library(form: str, weight: Tensor) -> Turn:
    if LIBRARIES[form] == "gguf":
        kind, array = GGMLQuantizationType[form.upper()], weight.numpy()
        return lambda: torch.from_numpy(quants.dequantize(quants.quantize(array, kind), kind))
    from bitsandbytes import functional  # noqa: PLC0415  it speaks while it is imported

    if form == "int8":
        return lambda: functional.int8_vectorwise_dequant(
            *functional.int8_vectorwise_quant(weight.half())[:2]
        )
    return lambda: functional.dequantize_4bit(
        *functional.quantize_4bit(
            weight,
            blocksize=64,
            compress_statistics=form.endswith("_double"),
            quant_type=form[:3],
        )
    )


_LEVELS = torch.tensor(formats.NF4)
_MIDDLES = ((_LEVELS[1:] + _LEVELS[:-1]) / 2).tolist()


def _compared(weight: Tensor) -> Tensor:
    blocks_BK = weight.view(-1, 64)
    largest_B1 = blocks_BK.abs().amax(dim=1, keepdim=True)
    share_BK = blocks_BK * (1 / largest_B1.clamp_min(1e-38))
    found_BK = torch.full_like(share_BK, formats.NF4[0])
    for middle, above in zip(_MIDDLES, formats.NF4[1:], strict=True):
        found_BK = torch.where(share_BK > middle, above, found_BK)
    return (found_BK * largest_B1).view_as(weight)


_COMPARED = torch.compile(_compared, dynamic=True)


def markdown(result: Mapping[str, Any]) -> str:
    rows, compiled = result["rows"], result["compiled"]
    (aimed,) = (row for row in rows if (row["format"], row["shape"]) == ("nf4", list(AIMED_AT)))
    caption = CAPTION.format(
        rounds=ROUNDS,
        rows=AIMED_AT[0],
        columns=AIMED_AT[1],
        least=LEAST,
        met="met" if median_of(aimed) >= LEAST else "missed",
    )
    shares = [1 / median_of(row) for row in compiled]
    return "\n\n".join(
        [
            caption,
            table(
                ["format", "matrix", "library", "its time", "ours", "times as fast"],
                [
                    [row["format"], size(row), row["library"], *cells(row, row["library"])]
                    for row in rows
                ],
            ),
            COMPILED_CAPTION.format(least=min(shares), most=max(shares)),
            table(
                ["matrix", "compiled", "ours", "times as fast", "same to the last bit"],
                [
                    [size(row), *cells(row, COMPILED), "yes" if row["same"] else "no"]
                    for row in compiled
                ],
            ),
        ]
    )


def median_of(row: Mapping[str, Any]) -> float:
    times: list[float] = sorted(row["times_as_fast"])
    return times[len(times) // 2]


def size(row: Mapping[str, Any]) -> str:
    return "x".join(map(str, row["shape"]))


def cells(row: Mapping[str, Any], other: str) -> list[str]:
    times = row["microseconds"]
    return [f"{times[other]:,.0f}", f"{times[OURS]:,.0f}", spread(row["times_as_fast"], 1)]


if __name__ == "__main__":
    main()
