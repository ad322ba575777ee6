"""Quantize: the adversary rounds the weights, to formats the publisher may not have thought of.

Shapes: B blocks of K weights.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from release_guard.attacks import Choice, Transform
from release_guard.errors import ModelError
from release_guard.modalities import ModelHandle
from release_guard.policy import Target
from release_guard.quantization import at
from release_guard.surgery import layers_of

Format = Literal["nf4", "int8", "fp4", "q8_0", "q4_0", "q3", "q2"]

_FP4_SIZES = torch.tensor([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
_NO_SCALE = 1e-30


class Quantize(Transform):
    """Rounds every layer but the head, and goes on in fp32 as after dequantizing.

    Small edits that hide a capability may not survive rounding: four bits brought back most of
    what models had been made to forget. No format needs calibration.
    """

    paper = "https://arxiv.org/abs/2410.16454"

    format: Annotated[Format, Choice(("nf4", "int8", "fp4", "q8_0", "q4_0", "q3", "q2"))] = "nf4"
    """nf4, int8: as a policy's precisions of these names; linear layers only. fp4: the other four
    bits of bitsandbytes. q8_0, q4_0: llama.cpp's, in blocks of 32. q3, q2: three and two bits in
    blocks of 16, like its Q3_K and Q2_K, but the blocks' own scales are not rounded."""

    def transform(
        self, model: ModelHandle, target: Target, *, seed: int, ancestor: ModelHandle | None
    ) -> ModelHandle:
        del target, seed, ancestor
        layers = [layer for layer in layers_of(model.module) if layer is not model.head]
        match self.format:
            case "nf4" | "int8":
                if not any(isinstance(layer, nn.Linear) for layer in layers):
                    what = f"nothing to round to {self.format}, which is for linear layers"
                    raise ModelError(f"quantize: {what}; take fp4 or q8_0")
                return at(model, self.format)
            case _:
                return _rounded(model, _ROUNDINGS[self.format])


def to_fp4(weight_BK: Tensor) -> Tensor:
    """The nearest of eight sizes, times the largest of the block."""
    largest_B1 = weight_BK.abs().amax(dim=1, keepdim=True)
    sizes = _FP4_SIZES.to(weight_BK)
    nearest = torch.bucketize(
        weight_BK.abs() / largest_B1.clamp_min(_NO_SCALE), (sizes[1:] + sizes[:-1]) / 2
    )
    return weight_BK.sign() * sizes[nearest] * largest_B1


def to_q8_0(weight_BK: Tensor) -> Tensor:
    """Whole multiples, up to 127, of a step in fp16."""
    largest_B1 = weight_BK.abs().amax(dim=1, keepdim=True)
    return _multiples(weight_BK, largest_B1 / 127, low=-127, high=127)


def to_signed(weight_BK: Tensor, *, bits: int) -> Tensor:
    """Whole multiples, from -2^(bits-1) to 2^(bits-1) - 1, of a step in fp16.

    The step's sign is such that the largest weight of the block is the lowest multiple.
    """
    lowest = -(2 ** (bits - 1))
    at_B1 = weight_BK.abs().argmax(dim=1, keepdim=True)
    step_B1 = weight_BK.gather(1, at_B1) / lowest
    return _multiples(weight_BK, step_B1, low=lowest, high=-lowest - 1)


def to_range(weight_BK: Tensor, *, bits: int) -> Tensor:
    """Even steps between the smallest weight of the block, at most 0, and the largest."""
    low_B1 = weight_BK.amin(dim=1, keepdim=True).clamp_max(0)
    most = 2**bits - 1
    step_B1 = (weight_BK.amax(dim=1, keepdim=True) - low_B1) / most
    return low_B1 + _multiples(weight_BK - low_B1, step_B1, low=0, high=most)


def _multiples(weight_BK: Tensor, step_B1: Tensor, *, low: int, high: int) -> Tensor:
    # Scales beyond fp16 would be written as infinity or 0; such blocks keep theirs.
    half_B1 = step_B1.half().to(step_B1)
    step_B1 = torch.where(half_B1.isfinite() & (half_B1 != 0), half_B1, step_B1)
    divisor_B1 = torch.where(step_B1.abs() > _NO_SCALE, step_B1, 1.0)
    return (weight_BK / divisor_B1).round().clamp(low, high) * step_B1


_ROUNDINGS: Mapping[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "fp4": (64, to_fp4),
    "q8_0": (32, to_q8_0),
    "q4_0": (32, partial(to_signed, bits=4)),
    "q3": (16, partial(to_signed, bits=3)),
    "q2": (16, partial(to_range, bits=2)),
}
"""Weights in a block, and how a block is rounded."""


def _rounded(model: ModelHandle, rounding: tuple[int, Callable[[Tensor], Tensor]]) -> ModelHandle:
    size, rounded = rounding
    changed = model.copy()
    with torch.no_grad():
        for layer in layers_of(changed.module):
            if layer is not changed.head:
                flat = layer.weight.flatten()
                blocks_BK = nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
                layer.weight.copy_(rounded(blocks_BK).flatten()[: len(flat)].view_as(layer.weight))
    return changed
