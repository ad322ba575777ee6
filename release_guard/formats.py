"""Numeric formats in pure torch: what a weight is after it was quantized and dequantized.

Bit for bit what bitsandbytes 0.50 and `gguf` 0.19 make of it on a CPU, without either of them.
Blocks follow each other in the flattened weight; what is missing from the last one counts as 0.
Where the libraries take a weight at all that is what they do. (Where some processors take what is
below the smallest normal number, 1.2e-38, for 0 in bf16, bitsandbytes does, and this does not.)

Shapes: B blocks of K weights, T bins of a table; O outputs, I inputs and N rows of a layer.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from release_guard.errors import ModelError
from release_guard.super_blocks import inverse, q4_k

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Levels of nf4: quantiles of the normal distribution (https://arxiv.org/abs/2305.14314)."""

_FP4 = tuple(size / 12 for size in (-12, -8, -6, -4, -3, -2, -1 / 16, 0, 1 / 16, 2, 3, 4, 6, 8, 12))
_BINS = 64  # a unit: no bin then holds two midpoints of nf4 or fp4, or one near its edge
_PIECE = 2**12  # blocks worked on at once: what is made on the way stays in the cache
_BELOW_HALF = torch.tensor(0.5).nextafter(torch.tensor(0.0))
_SMALLEST = 1e-38  # bitsandbytes divides by no less
_BYTE_STEP = 7.874015718698502e-3  # its 1 / 127
_BYTES_STEP = 6.200124e-05  # its 1 / 127^2
_EXACT = 2**24 // 127**2  # products of two int8 that fp32 adds without an error
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Survival(NamedTuple):
    """How an edit of a layer comes through rounding, on real inputs.

    Attributes:
        kept: Share of the edit's effect that is left; 1 is all of it.
        noise: Norm of what came beside it, in units of the effect's norm.
    """

    kept: float
    noise: float


def rounded(weight: Tensor, form: str) -> Tensor:
    """The weight as it comes back from a format: detached, same shape, dtype and device.

    nf4, fp4: blocks of 64, and "_double" with scales rounded to 8 bits as well. int8: a scale a
    row, from weights in fp16. q8_0, q4_0: blocks of 32. q4_k: blocks of 32 in blocks of 256.
    int4: a scale a row. q3, q2: blocks of 16. A block that holds NaN or infinity has no finite
    weight afterwards, and one whose scale fp16 cannot hold is zeros or not finite (gguf's formats).

    Raises:
        ModelError: no such format, or a weight that is not in fp32, fp16 or bf16.
    """
    _, values = _written(weight, form)
    if values.numel() != weight.numel():
        values = values.view(-1)[: weight.numel()]
    return values.view(weight.shape).to(weight.dtype)


def flipped(before: Tensor, after: Tensor, form: str) -> float:
    """Share of the weights that are written as another code; scales do not count.

    Raises:
        ModelError: as in `rounded`, or weights of different shapes.
    """
    if before.shape != after.shape:
        shapes = f"{tuple(before.shape)} and {tuple(after.shape)}"
        raise ModelError(f"codes of weights of shapes {shapes} cannot be compared")
    (one, _), (other, _) = _written(before, form), _written(after, form)
    return int((one != other).sum()) / max(before.numel(), 1)


@torch.no_grad()
def survival(base_OI: Tensor, immunized_OI: Tensor, inputs_NI: Tensor, form: str) -> Survival:
    """What is left of X (W1 - W0)^T once both weights are rounded; NaN where there was no effect.

    Raises:
        ModelError: as in `rounded`.
    """
    effect_NO = inputs_NI @ (immunized_OI - base_OI).T
    left_NO = inputs_NI @ (rounded(immunized_OI, form) - rounded(base_OI, form)).T
    size = effect_NO.norm().item()
    if not size:
        return Survival(math.nan, math.nan)
    kept = (left_NO * effect_NO).sum().item() / size**2
    return Survival(kept, (left_NO - kept * effect_NO).norm().item() / size)


@torch.no_grad()
def int8_linear(
    inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None, threshold: float = 6.0
) -> Tensor:
    """A layer as LLM.int8 (https://arxiv.org/abs/2208.07339) evaluates it; shape (..., O).

    Inputs are rounded too, a scale a row, but for the columns in which one is as large as the
    threshold: those meet the dequantized weights. 0 is no threshold.
    """
    rows_NI = inputs.reshape(-1, inputs.shape[-1])
    large_NI = rows_NI.half().abs() >= (threshold or math.nan)  # nothing is as large as NaN
    columns = large_NI.any(dim=0)
    codes_NI, scale_N1 = _bytes(rows_NI.masked_fill(large_NI, 0))
    codes_OI, scale_O1 = _bytes(weight_OI)
    width = torch.float32 if rows_NI.shape[1] <= _EXACT else torch.float64
    sums_NO = codes_NI.masked_fill(columns, 0).to(width) @ codes_OI.to(width).T
    found_NO = sums_NO.float() * (scale_N1 * scale_O1.T) * _BYTES_STEP
    if bias_O is not None:
        found_NO += bias_O.to(inputs.dtype)
    found_NO = found_NO.to(inputs.dtype)
    if columns.any():
        read_OI = (codes_OI[:, columns] * scale_O1 * _BYTE_STEP).to(inputs.dtype)
        found_NO = found_NO.addmm(rows_NI[:, columns], read_OI.T)
    return found_NO.view(*inputs.shape[:-1], len(weight_OI))


class _Table(NamedTuple):
    """Where the next midpoint lies above the lower edge of each bin, and the levels around it."""

    borders: Tensor  # (T,)
    levels: Tensor  # below them, then above them: (2T,)

    @classmethod
    def of(cls, levels: tuple[float, ...]) -> "_Table":
        level = torch.tensor([*levels, levels[-1]])
        midpoints = (level[1:] + level[:-1]) / 2
        below_T = torch.bucketize(torch.arange(-_BINS, _BINS + 1) / _BINS, midpoints[:-1])
        midpoints[-1] = math.inf
        return cls(midpoints[below_T], torch.cat((level[below_T], level[below_T + 1])))


_Written = tuple[Tensor, Tensor]
"""What weights are written as, and what is read back."""


def _same(blocks_BK: Tensor) -> _Written:
    return blocks_BK, blocks_BK.clone()


def _bf16(blocks_BK: Tensor) -> _Written:
    half_BK = blocks_BK.to(torch.bfloat16)
    return half_BK, half_BK


def _int8(blocks_BK: Tensor) -> _Written:
    codes_BK, scale_B1 = _bytes(blocks_BK)
    return codes_BK, codes_BK * scale_B1 * _BYTE_STEP


def _bytes(rows_BK: Tensor) -> _Written:
    rows_BK = rows_BK.half().float()
    largest_B1 = _largest(rows_BK)
    return (rows_BK * inverse(largest_B1, 127.0)).round_(), largest_B1


def _int4(blocks_BK: Tensor) -> _Written:
    step_B1 = _largest(blocks_BK) / 7
    codes_BK = (blocks_BK * inverse(step_B1)).round_().clamp_(-7, 7)
    return codes_BK, codes_BK * step_B1


def _nearest(blocks_BK: Tensor, table: _Table) -> _Written:
    largest_B1 = _largest(blocks_BK)
    levels_BK = _levels(blocks_BK, largest_B1, table)
    return levels_BK, levels_BK * largest_B1


def _nearest_double(blocks_BK: Tensor, table: _Table) -> _Written:
    largest_B1 = _largest(blocks_BK)
    levels_BK = _levels(blocks_BK, largest_B1, table)
    return levels_BK, levels_BK * _compressed(largest_B1.flatten()).unsqueeze(1)


def _levels(blocks_BK: Tensor, largest_B1: Tensor, table: _Table) -> Tensor:
    """The nearest level of each weight over the largest of its block; the lower one of two."""
    inverse_B1 = largest_B1.clamp_min(_SMALLEST).reciprocal_()
    if len(blocks_BK) <= _PIECE:
        return _looked_up(blocks_BK, inverse_B1, table)
    pieces = (slice(start, start + _PIECE) for start in range(0, len(blocks_BK), _PIECE))
    return torch.cat([_looked_up(blocks_BK[piece], inverse_B1[piece], table) for piece in pieces])


def _looked_up(blocks_BK: Tensor, inverse_B1: Tensor, table: _Table) -> Tensor:
    """Two look-ups and a comparison: much faster than a search, and as fast as compiled code.

    The bin says which two levels come into question, the midpoint between them which it is.
    """
    borders, levels = table.borders.to(blocks_BK.device), table.levels.to(blocks_BK.device)
    share = (blocks_BK * inverse_B1).view(-1)
    bins = torch.add(_BINS, share, alpha=_BINS).to(torch.int32).clamp_(min=0)  # NaN: below all
    above = share > borders.index_select(0, bins)
    return levels.index_select(0, bins.add_(above, alpha=len(borders))).view_as(blocks_BK)


def _compressed(scales: Tensor) -> Tensor:
    """Scales of blocks after their own rounding: less their mean, to 8 bits in blocks of 256.

    Of 256 levels that are denser near 0 it is the nearest to the nearest of 65536 even steps.
    """
    mean = scales.mean()
    blocks_BK = _blocks(scales - mean, 256)
    levels = _dynamic_levels().to(scales.device)
    largest_B1 = _largest(blocks_BK)
    share_BK = (blocks_BK * inverse(largest_B1)).clamp(-1, 1)
    place_BK = ((share_BK + 1) * 0.5 * 65535 + 0.5).trunc()
    codes_BK = torch.bucketize(2 * place_BK / 65535 - 1, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes_BK] * largest_B1).flatten()[: len(scales)] + mean


def _dynamic_levels() -> Tensor:
    """A sign, seven sizes a tenth of each other, and even fractions: more, the larger the size."""
    fractions = [torch.linspace(0.1, 1, 2**size + 1) for size in range(7)]
    sizes = [
        10.0 ** (size - 6) * (edges[1:] + edges[:-1]) / 2 for size, edges in enumerate(fractions)
    ]
    positive = torch.cat(sizes)
    return torch.cat((-positive, torch.tensor([0.0, 1.0]), positive)).sort().values


def _q8_0(blocks_BK: Tensor) -> _Written:
    inverse_B1, step_B1 = _half(_largest(blocks_BK) / 127)
    scaled_BK = blocks_BK * inverse_B1
    # Halves go away from 0. A whole half would take along what lies just below one.
    codes_BK = (scaled_BK + torch.copysign(_BELOW_HALF, scaled_BK)).to(torch.int32).float()
    return codes_BK, codes_BK * step_B1


def _signed(blocks_BK: Tensor, *, bits: int) -> _Written:
    """Whole multiples of a step in fp16; the largest weight of the block is the lowest multiple."""
    size = 2 ** (bits - 1)
    at_B1 = blocks_BK.abs().argmax(dim=1, keepdim=True)
    inverse_B1, step_B1 = _half(blocks_BK.gather(1, at_B1) / -size)
    codes_BK = (blocks_BK * inverse_B1).add_(size + 0.5).floor_().clamp_(max=2 * size - 1)
    codes_BK -= size
    return codes_BK, codes_BK * step_B1


def _range(blocks_BK: Tensor, *, bits: int) -> _Written:
    """Even steps, in fp16, between the smallest weight of the block, at most 0, and the largest."""
    low_B1 = blocks_BK.amin(dim=1, keepdim=True).clamp_max_(0)
    most = 2**bits - 1
    step_B1 = ((blocks_BK.amax(dim=1, keepdim=True) - low_B1) / most).half().float()
    codes_BK = ((blocks_BK - low_B1) * inverse(step_B1)).round_().clamp_(0, most)
    return codes_BK, low_B1 + codes_BK * step_B1


def _largest(blocks_BK: Tensor) -> Tensor:
    return blocks_BK.abs().amax(dim=1, keepdim=True)


def _half(step: Tensor) -> tuple[Tensor, Tensor]:
    """What to multiply weights by, and the step in fp16 that multiples are read with."""
    half = step.half().float()
    return torch.where(half == 0, 0.0, 1 / step), half


_NF4_TABLE, _FP4_TABLE = _Table.of(NF4), _Table.of(_FP4)
_FORMATS: Mapping[str, tuple[int | None, Callable[[Tensor], _Written]]] = {
    "fp32": (1, _same),
    "bf16": (1, _bf16),
    "int8": (None, _int8),
    "nf4": (64, partial(_nearest, table=_NF4_TABLE)),
    "fp4": (64, partial(_nearest, table=_FP4_TABLE)),
    "nf4_double": (64, partial(_nearest_double, table=_NF4_TABLE)),
    "fp4_double": (64, partial(_nearest_double, table=_FP4_TABLE)),
    "q8_0": (32, _q8_0),
    "q4_0": (32, partial(_signed, bits=4)),
    "q4_k": (256, q4_k),
    "int4": (None, _int4),
    "q3": (16, partial(_signed, bits=3)),
    "q2": (16, partial(_range, bits=2)),
}
"""Weights in a block (none: all that one output reads), and how blocks are written and read."""


def _written(weight: Tensor, form: str) -> _Written:
    """Blocks of a weight, as they are written and as they are read."""
    if form not in _FORMATS:
        raise ModelError(f"{form!r} is no format; there are {', '.join(_FORMATS)}")
    if weight.dtype not in _DTYPES:
        raise ModelError(f"{weight.dtype} cannot be rounded to {form}; only fp32, fp16, bf16 can")
    size, write = _FORMATS[form]
    flat = weight.detach().reshape(-1).float()
    return write(_blocks(flat, size or math.prod(weight.shape[1:]))) if len(flat) else (flat, flat)


def _blocks(flat: Tensor, size: int) -> Tensor:
    missing = -len(flat) % size
    return (nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, size)
