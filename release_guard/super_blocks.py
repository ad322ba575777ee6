"""llama.cpp's Q4_K: ranges of 32 weights, whose steps and ends are rounded in blocks of 256.

Shapes: B blocks, each of 8 parts of 32 weights.
"""

import math
from functools import reduce

import torch
from torch import Tensor


def q4_k(blocks_BK: Tensor) -> tuple[Tensor, Tensor]:
    """What blocks of 256 weights are written as, 0 to 15, and what is read back.

    As ggml's reference does it, sums in its order. Where a machine multiplies and adds in one go,
    or two fits are equal to the last digit, a block in a thousand may get another of its ranges.
    """
    parts = blocks_BK.view(-1, 8, 32)
    step, depth = (_six_bits(each) for each in _fitted(parts))
    codes = ((parts + depth) / torch.where(step == 0, 1.0, step)).round_().clamp_(0, 15)
    codes *= step != 0
    return codes.view_as(blocks_BK), (step * codes - depth).view_as(blocks_BK)


def inverse(size: Tensor, of: float | Tensor = 1.0) -> Tensor:
    """Something divided by it, and 0 for 0."""
    return torch.where(size == 0, 0.0, of / size)


def _fitted(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Step, and depth below 0, of the best range of 22 tries; large weights count more.

    Both (B, 8, 1).
    """
    low, high = parts.amin(-1, keepdim=True).clamp_max_(0), parts.amax(-1, keepdim=True)
    weights = (_total(parts.square()) / 32).sqrt() + parts.abs()
    total, first = _total(weights), _total(weights * parts)
    flat = high == low
    codes = _codes(parts, low, inverse(high - low, 15))
    step = inverse(inverse(high - low, 15))
    least = _total(weights * (step * codes + low - parts).square())
    for most in (0.1 * torch.arange(21.0) - 1) + 15:
        # The reference, too, goes on from where the best range so far begins.
        codes = _codes(parts, low, inverse(high - low, most))
        weighted = weights * codes
        moments = (_total(each) for each in (weighted, weighted * codes, weighted * parts))
        slope, end = _line(total, first, *moments)
        error = _total(weights * (slope * codes + end - parts).square())
        better = (error < least) & ~flat
        step, low = torch.where(better, slope, step), torch.where(better, end, low)
        least = torch.where(better, error, least)
    return step, -low


def _codes(parts: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    return ((parts - low) * scale).round_().clamp_(0, 15)


def _line(
    total: Tensor, first: Tensor, codes: Tensor, squares: Tensor, products: Tensor
) -> tuple[Tensor, Tensor]:
    """Slope and end, at most 0, of weighted least squares; NaN where all codes are the same."""
    divisor = total * squares - codes.square()
    divisor = torch.where(divisor > 0, divisor, math.nan)
    slope = (total * products - first * codes) / divisor
    end = (squares * first - codes * products) / divisor
    return torch.where(end > 0, products / squares, slope), end.clamp_max(0)


def _six_bits(sizes: Tensor) -> Tensor:
    """Multiples, 0 to 63, of a step in fp16 for the eight sizes of a block."""
    largest = sizes.amax(1, keepdim=True).clamp_min(0)
    return (sizes * inverse(largest, 63)).round_().clamp_(0, 63) * (largest / 63).half().float()


def _total(terms: Tensor) -> Tensor:
    """The sum over a part, one after the other as the reference adds."""
    return reduce(torch.add, terms.unbind(-1)).unsqueeze(-1)
