"""A handle seen at a precision. Rounding is done by the formats' own library, bitsandbytes.

Weights are rounded, then kept in fp32: what somebody gets who downloads the model, quantizes it,
and adapts the dequantized weights. `packed` is for adapters beside the packed weights (QLoRA).
"""

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import assert_never

import torch
from torch import Tensor, nn

from release_guard.errors import ModelError
from release_guard.modalities import ModelHandle
from release_guard.policy import Precision

_NF4_BLOCK = 64


def at(model: ModelHandle, precision: Precision) -> ModelHandle:
    """The model as it is at a precision; at fp32 the very same handle, else a copy.

    bf16 rounds all weights. int8 (a scale a row, from weights in fp16) and nf4 (a scale for each
    block of 64, not quantized again) round every linear layer but the head, as `transformers` does.
    Rounding what is rounded already changes nothing.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    match precision:
        case "fp32":
            return model
        case "bf16":
            return _with_all_rounded(model)
        case "int8":
            return _with_layers_rounded(model, _int8)
        case "nf4":
            return _with_layers_rounded(model, _nf4)
        case _:
            assert_never(precision)


def packed(model: ModelHandle) -> ModelHandle:
    """A copy on bitsandbytes' own packed nf4 weights, for QLoRA (https://arxiv.org/abs/2305.14314).

    Every linear layer but the head becomes a `Linear4bit`. Layers whose rows are not whole blocks
    are rounded only, which is the same numbers: the library unpacks those with the wrong scales.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    twin = at(model, "nf4")
    head = twin.head
    for part in list(twin.module.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head and _is_whole_blocks(layer):
                setattr(part, name, _linear4bit(layer))
    vars(twin.module)["is_loaded_in_4bit"] = True  # what peft looks at
    return twin


def quiet_bitsandbytes() -> None:
    """Keep it, and peft which loads it, from reporting kernels that nobody here needs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _with_all_rounded(model: ModelHandle) -> ModelHandle:
    rounded = model.copy()
    with torch.no_grad():
        for part in (*rounded.module.parameters(), *rounded.module.buffers()):
            if part.is_floating_point():
                part.copy_(part.to(torch.bfloat16))
    return rounded


def _with_layers_rounded(model: ModelHandle, rounding: Callable[[Tensor], Tensor]) -> ModelHandle:
    rounded = model.copy()
    head = rounded.head
    with torch.no_grad():
        for part in rounded.module.modules():
            if isinstance(part, nn.Linear) and part is not head:
                part.weight.copy_(rounding(part.weight))
    return rounded


def _int8(weight: Tensor) -> Tensor:
    functional = _library("functional")
    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    rounded: Tensor = functional.int8_vectorwise_dequant(codes, scales)
    return rounded


def _nf4(weight: Tensor) -> Tensor:
    functional = _library("functional")
    # One row of whole blocks: on CPUs with AVX-512, bitsandbytes 0.50 takes the wrong scales for a
    # matrix whose rows are not whole blocks, and odd sizes would need a compiler.
    blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % _NF4_BLOCK))
    codes, state = functional.quantize_4bit(
        blocks, blocksize=_NF4_BLOCK, compress_statistics=False, quant_type="nf4"
    )
    rounded: Tensor = functional.dequantize_4bit(codes, state).flatten()
    return rounded[: weight.numel()].view_as(weight)


def _is_whole_blocks(layer: nn.Linear) -> bool:
    return layer.in_features % _NF4_BLOCK == 0


def _linear4bit(layer: nn.Linear) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # it draws weights that nobody wants
        made = _library("nn").Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            compress_statistics=False,
            quant_type="nf4",
        )
    made.load_state_dict(layer.state_dict())
    # Otherwise the first evaluation on a CPU with AVX512_BF16 packs the weights once more, for a
    # kernel that has no backward: all gradients through this layer would be cut, silently.
    made.support_avx512bf16_for_cpu = False
    quantized: nn.Module = made.to(layer.weight.device)
    return quantized


def _library(part: str) -> ModuleType:
    quiet_bitsandbytes()
    try:
        return importlib.import_module(f"bitsandbytes.{part}")
    except ImportError:
        advice = "pip install 'model-release-guard[immunize]', or leave int8 and nf4 out"
        raise ModelError(
            f"bitsandbytes cannot be imported, so nothing is rounded; {advice}"
        ) from None
