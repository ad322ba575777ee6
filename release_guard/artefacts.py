"""Published precisions as folders: which layers they hold, how that is said, and whether it is so.

int8 and nf4 are those of bitsandbytes, with its settings in config.json, so that anybody loads them
with plain `from_pretrained`. Whatever a file says of its format is compared with what was loaded.
"""

import importlib
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from release_guard.errors import ModelError
from release_guard.policy import Precision

PACKED: Mapping[Precision, str] = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}
"""The layers of bitsandbytes that hold a precision, by the names of their classes."""

_DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BLOCK = 64
_SETTINGS: Mapping[Precision, Mapping[str, Any]] = {
    "int8": {"load_in_8bit": True, "llm_int8_has_fp16_weight": False},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",  # bitsandbytes makes fp4 if it is not told
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
    },
}
_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "is_4bit_serializable")


def packed_names(
    source: str, module: nn.Module, kept: Sequence[nn.Module], precision: Precision
) -> tuple[str, ...]:
    """Names of the linear layers that an artefact holds in int8 or nf4, packed already or not yet.

    All but those inside of what is kept; at nf4 only those whose rows are whole blocks of 64: the
    library unpacks others with the wrong scales on some processors.

    Raises:
        ModelError: There is none.
    """
    whole = {part for root in kept for part in root.modules()}
    names = tuple(
        name
        for name, layer in module.named_modules()
        if (type(layer) is nn.Linear or is_packed(layer))
        and layer not in whole
        and (precision != "nf4" or layer.in_features % _BLOCK == 0)
    )
    if not names:
        rows = f" with rows of whole blocks of {_BLOCK}" if precision == "nf4" else ""
        raise ModelError(
            f"{source}: no linear layer{rows} but its head, so nothing would be rounded; "
            f"leave {precision} out"
        )
    return names


def settings(library: Any, part: nn.Module, names: Collection[str], precision: Precision) -> Any:
    """What to give to `from_pretrained` so that it packs the layers named, and no other.

    Args:
        library: transformers or diffusers: each has a class of its own for it.
        part: The model.
        names: Its layers that are packed.
        precision: int8 or nf4.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    require_library(precision)
    others = [
        name
        for name, layer in part.named_modules()
        if name not in names and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
    ]
    return library.BitsAndBytesConfig(**_SETTINGS[precision], llm_int8_skip_modules=others)


def unpacked_dtype(precision: Precision) -> torch.dtype:
    """The type of the numbers in an artefact that packs nothing."""
    return _DTYPES[precision]


def check_config(source: str, config: Mapping[str, Any], precision: Precision | None) -> None:
    """Compare what config.json says of the format with what is asked for.

    Args:
        source: What the user wrote, for messages.
        config: The content of config.json.
        precision: Of the artefact; None: weights in full precision, as stages want them.

    Raises:
        ModelError: It is another format, or bitsandbytes is needed and not installed.
    """
    found = config.get("quantization_config")
    if precision is None or precision not in PACKED:
        if found is not None:
            raise ModelError(f"{source}: quantized already; give the weights in full precision")
        return
    if not isinstance(found, Mapping):
        raise ModelError(f"{source}: not quantized, and {precision} was asked for; publish again")
    for key, wanted in {"quant_method": "bitsandbytes", **_SETTINGS[precision]}.items():
        if (value := found.get(key)) != wanted:
            reason = f"config.json says {key} = {value!r}, and {precision} needs {wanted!r}"
            raise ModelError(f"{source}: {reason}; publish again")
    require_library(precision)


def check_numbers(source: str, folder: Path, precision: Precision | None) -> None:
    """Compare the types of the numbers in a folder's files with bf16, where that is asked for.

    Raises:
        ModelError: Something else is in one of them.
    """
    if precision != "bf16":
        return
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        if strange := sorted(kind for kind in kinds if kind.startswith("F")):
            raise ModelError(f"{source}: {path.name} holds {strange[0]}, and bf16 was asked for")


def settle(source: str, module: nn.Module, kept: Sequence[nn.Module], precision: Precision) -> None:
    """Compare the layers that were loaded with what is asked for, and see that they stay so.

    Raises:
        ModelError: A layer that should be packed is not, or the other way round, or it holds
            another format (8-bit layers: int8; 4-bit ones: nf4, blocks of 64, scales in fp32).
    """
    wanted = packed_names(source, module, kept, precision)
    for name, layer in module.named_modules():
        kind = type(layer).__name__
        if name in wanted and kind != PACKED[precision]:
            raise ModelError(f"{source}: {name} is {kind}, and {precision} was asked for")
        if name not in wanted and is_packed(layer):
            raise ModelError(f"{source}: {name} is {kind}, and {precision} leaves it as it is")
        if name in wanted:
            _settle_layer(source, name, layer)
        for mark in _MARKS:  # they forbid to move the model, or to copy it whole
            vars(layer).pop(mark, None)
    vars(module)["is_loaded_in_4bit" if precision == "nf4" else "is_loaded_in_8bit"] = True


def require_library(precision: Precision) -> None:
    """Raises: ModelError: bitsandbytes is needed, and not there."""
    if precision not in PACKED:
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that nobody needs
    try:
        importlib.import_module("bitsandbytes.nn")
    except ImportError:
        advice = f"pip install 'model-release-guard[immunize]', or leave {precision} out"
        raise ModelError(f"{precision}: bitsandbytes cannot be imported; {advice}") from None


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes'."""
    return type(layer).__name__ in PACKED.values()


def keep_as_packed(layer: Any) -> None:
    """Have a 4-bit layer stay as it is.

    Otherwise the first evaluation on a CPU with AVX512_BF16 packs it once more, in place, for a
    kernel that has no backward: all gradients through it would be cut, silently.
    """
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False


def _settle_layer(source: str, name: str, layer: Any) -> None:
    weight = layer.weight
    if type(layer).__name__ == "Linear8bitLt":
        if weight.dtype != torch.int8:
            raise ModelError(f"{source}: {name} holds {weight.dtype}, and int8 was asked for")
        weight.SCB = weight.SCB.clone()  # memory of its own, as for all other weights
        return
    state = weight.quant_state
    if state is None:
        raise ModelError(f"{source}: {name} was never quantized, and nf4 was asked for")
    found = (state.quant_type, state.blocksize, state.nested)
    levels = importlib.import_module("bitsandbytes.functional").get_4bit_type("nf4", device="cpu")
    if found != ("nf4", _BLOCK, False) or not torch.equal(state.code.cpu(), levels):
        nested = ", scales quantized again" if state.nested else ""
        what = f"{state.quant_type} in blocks of {state.blocksize}{nested}"
        raise ModelError(f"{source}: {name} holds {what}; nf4 in blocks of {_BLOCK} was asked for")
    state.absmax = state.absmax.clone()
    keep_as_packed(layer)
