"""Numeric formats in pure torch: what a weight is after it was quantized and dequantized.

Bit for bit what bitsandbytes and llama.cpp's `gguf` make of it, without either of them.
Shapes: R rows of I inputs, B blocks of K weights.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from release_guard.errors import ModelError

_NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
_FP4 = torch.tensor([-12.0, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12
_INT8_STEP = 7.874015718698502e-3  # bitsandbytes' 1 / 127
_SMALLEST = 1e-38
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def rounded(weight: Tensor, form: str) -> Tensor:
    """The weight as it comes back from a format: detached, same shape, dtype and device."""
    if form not in _ROUNDINGS:
        raise ModelError(f"{form!r} is no format; there are {', '.join(_ROUNDINGS)}")
    if weight.dtype not in _DTYPES:
        raise ModelError(f"cannot round {weight.dtype} to {form}: only 16 and 32 bits can be")
    if form == "fp32" or not weight.numel():
        return weight.detach().clone()
    return _ROUNDINGS[form](weight.detach()).view(weight.shape).to(weight.dtype)


def bf16(weight: Tensor) -> Tensor:
    """The nearest bf16."""
    return weight.to(torch.bfloat16)


def int8(weight: Tensor) -> Tensor:
    """LLM.int8: whole multiples of 1/127 of the largest of the row, from weights in fp16."""
    weight_RI = weight.reshape(len(weight), -1).half()
    largest_R1 = weight_RI.abs().amax(dim=1, keepdim=True).float()
    codes_RI = torch.round(weight_RI * (127.0 / largest_R1)).to(torch.int8)
    return codes_RI * largest_R1 * _INT8_STEP


def nf4(weight: Tensor) -> Tensor:
    """The nearest of sixteen quantiles, times the largest of the block of 64."""
    return _four_bits(weight, _NF4)


def fp4(weight: Tensor) -> Tensor:
    """The nearest of fifteen sizes, times the largest of the block of 64."""
    return _four_bits(weight, _FP4)


def q8_0(weight: Tensor) -> Tensor:
    """Whole multiples, up to 127, of a step in fp16 for 32 weights."""
    blocks_BK = _row_blocks(weight, 32)
    step_B1 = blocks_BK.abs().amax(dim=1, keepdim=True) / 127
    half_B1 = step_B1.half().float()
    scaled_BK = blocks_BK * torch.where(half_B1 == 0, 0.0, 1 / step_B1)
    size_BK = scaled_BK.abs()
    floor_BK = size_BK.floor()
    codes_BK = (floor_BK + (2 * (size_BK - floor_BK)).floor()) * scaled_BK.sign()
    return _unblocked_rows(codes_BK * half_B1, weight)


def q4_0(weight: Tensor) -> Tensor:
    """Sixteen multiples of a step in fp16 for 32 weights."""
    blocks_BK = _row_blocks(weight, 32)
    at_B1 = blocks_BK.abs().argmax(dim=1, keepdim=True)
    step_B1 = blocks_BK.gather(1, at_B1) / -8
    half_B1 = step_B1.half().float()
    codes_BK = blocks_BK * torch.where(half_B1 == 0, 0.0, 1 / step_B1) + 8.5
    return _unblocked_rows((codes_BK.trunc().clamp(0, 15) - 8) * half_B1, weight)


def _four_bits(weight: Tensor, levels: Tensor) -> Tensor:
    levels = levels.to(weight.device)
    flat = weight.reshape(-1).float()
    blocks_BK = nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    largest_B1 = blocks_BK.abs().amax(dim=1, keepdim=True)
    scaled_BK = blocks_BK * (1.0 / largest_B1.clamp_min(_SMALLEST))
    codes_BK = torch.bucketize(scaled_BK, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes_BK] * largest_B1).flatten()[: weight.numel()]


def _row_blocks(weight: Tensor, size: int) -> Tensor:
    weight_RI = weight.reshape(len(weight), -1).float()
    return nn.functional.pad(weight_RI, (0, -weight_RI.shape[1] % size)).reshape(-1, size)


def _unblocked_rows(blocks_BK: Tensor, weight: Tensor) -> Tensor:
    return blocks_BK.view(len(weight), -1)[:, : weight[0].numel()].reshape(weight.shape)


_ROUNDINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "fp32": torch.clone,
    "bf16": bf16,
    "int8": int8,
    "nf4": nf4,
    "fp4": fp4,
    "q8_0": q8_0,
    "q4_0": q4_0,
}
