"""A handle seen through a format: on the true back end, in ordinary layers, or while it trains.

`at` puts a model on bitsandbytes' own layers, which is what people run and what is attacked.
`plain` gives the same numbers in ordinary layers: what whoever dequantizes goes on with. `aware`
rounds weights in every forward pass and lets gradients straight through, so that stages need not
know. Emulators and back end agree to the bit (`formats`).
"""

import importlib
import logging
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from release_guard.artefacts import is_packed, keep_as_packed
from release_guard.errors import ModelError
from release_guard.formats import rounded
from release_guard.modalities import ModelHandle
from release_guard.policy import Format, Precision

_WHOLE_ROWS = {"nf4": 64, "fp4": 64, "q8_0": 32, "q4_0": 32}
"""Weights in a block, which rows must be whole numbers of: else the layer is left as it is.

bitsandbytes unpacks other rows with wrong scales on some processors, and llama.cpp has none.
"""
_OUTLIER = 6.0  # activations from here on are not rounded: LLM.int8, and its library's default


def at(model: ModelHandle, precision: Precision) -> ModelHandle:
    """The model as people run it at a precision; at fp32 the very same handle, else a copy.

    bf16 rounds all weights. int8 (LLM.int8, https://arxiv.org/abs/2208.07339) and nf4 (blocks of
    64, scales in fp32, https://arxiv.org/abs/2305.14314) put bitsandbytes' layers in the place of
    every linear layer but the head, as `transformers` does; for nf4 only where rows are whole
    blocks. Their weights are frozen: adapters can be trained beside them.

    Raises:
        ModelError: bitsandbytes is not installed or does not run here, or the model has no layer
            for this format.
    """
    match precision:
        case "fp32":
            return model
        case "bf16":
            return _with_all_rounded(model)
        case "int8" | "nf4":
            _require_backend(precision)
            return _packed(model, precision)
        case _:
            assert_never(precision)


def plain(model: ModelHandle) -> ModelHandle:
    """A copy in ordinary layers with weights of its own, which compute what the model's do."""
    twin = model.copy()
    for part, name, layer in _linear_layers(twin):
        if isinstance(layer, _Aware):
            with torch.no_grad():
                layer.weight.copy_(layer.seen())
            layer.forget()
        elif is_packed(layer):
            setattr(part, name, _unpacked(layer))
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(twin.module).pop(mark, None)
    return twin


def aware(model: ModelHandle) -> ModelHandle:
    """A copy whose linear layers, but the head, are seen through the format it is turned to.

    Names, shapes and order of its weights are the model's. Copies of it turn with it.
    """
    twin, dial = model.copy(), _Dial()
    for _, _, layer in _linear_layers(twin):
        _Aware.made_of(layer, dial)
    return twin


def turn(model: ModelHandle, form: Format) -> None:
    """Show an aware model, and all its copies, through a format from now on."""
    for layer in model.module.modules():
        if isinstance(layer, _Aware):
            layer.dial.form = form


def apart(model: ModelHandle, form: Format) -> ModelHandle:
    """A copy of an aware model that is seen through this format for good."""
    twin, dial = model.copy(), _Dial()
    dial.form = form
    for layer in twin.module.modules():
        if isinstance(layer, _Aware):
            layer.dial = dial
    return twin


def emulated(model: ModelHandle, form: Format) -> ModelHandle:
    """A copy in ordinary layers, linear ones but the head rounded, without any back end.

    To the bit `plain(at(...))` where the format is a precision with linear layers alone.
    """
    return plain(apart(aware(model), form))


def is_aware(model: ModelHandle) -> bool:
    """Whether it can be turned."""
    return any(isinstance(layer, _Aware) for layer in model.module.modules())


def through(weight_OI: Tensor, form: Format) -> Tensor:
    """A linear layer's weight after rounding; gradients pass as if nothing had happened.

    The straight-through estimator with scales held fixed (https://arxiv.org/abs/1308.3432): every
    weight lies within its block's range, so none is clipped. A layer that the format leaves alone
    is given back as it is.
    """
    if form == "fp32" or not _takes(weight_OI, form):
        return weight_OI
    rounding: Tensor = _Rounding.apply(weight_OI, form)  # type: ignore[no-untyped-call]
    return rounding


def seen_names(model: ModelHandle, form: Format) -> tuple[str, ...]:
    """Names of the weights that a format rounds in a model of ordinary or aware layers."""
    inside = {id(layer.weight) for _, _, layer in _linear_layers(model)}
    return tuple(
        name
        for name, weight in model.module.named_parameters()
        if id(weight) in inside and form != "fp32" and _takes(weight, form)
    )


def linear_layers(model: ModelHandle) -> tuple[nn.Linear, ...]:
    """Every linear layer but the head."""
    return tuple(layer for _, _, layer in _linear_layers(model))


def require_layers(model: ModelHandle, form: Format) -> None:
    """Refuse a format that would leave the model as it is.

    Raises:
        ModelError: It has no layer for this format.
    """
    if form not in ("fp32", "bf16") and not seen_names(model, form):
        rows = f" with rows of whole blocks of {_WHOLE_ROWS[form]}" if form in _WHOLE_ROWS else ""
        raise ModelError(
            f"{form}: the model has no linear layer{rows} but its head, so nothing would be "
            f"rounded; leave {form} out"
        )


@cache
def runnable(precision: Precision) -> str:
    """Why models cannot be run at a precision on this machine; empty if they can."""
    if precision not in ("int8", "nf4"):
        return ""
    try:
        with torch.random.fork_rng(devices=[]):
            layer = _packed_layer(nn.Linear(64, 2, bias=False), precision)
        found = layer(torch.eye(64)[:3])
    except ModelError as error:
        return str(error)
    except (RuntimeError, AttributeError, ValueError) as error:
        return f"bitsandbytes has no kernel for {precision} here ({type(error).__name__})"
    return "" if found.shape == (3, 2) and found.isfinite().all() else f"{precision} gives NaN here"


def quiet_bitsandbytes() -> None:
    """Keep it, and peft which loads it, from reporting kernels that nobody here needs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _Dial:
    """The format that a model and its copies are seen through."""

    def __init__(self) -> None:
        self.form: Format = "fp32"

    def __deepcopy__(self, _: dict[int, Any]) -> "_Dial":
        return self


class _Aware(nn.Linear):
    """A linear layer whose weight is rounded whenever it is used."""

    dial: _Dial

    @staticmethod
    def made_of(layer: nn.Linear, dial: _Dial) -> None:
        """Change an ordinary layer's class, so that its weights and their names stay."""
        if isinstance(layer, _Aware):
            layer.dial = dial
            return
        layer.__class__ = _Aware
        vars(layer)["dial"] = dial

    def seen(self) -> Tensor:
        """The weight as it is used."""
        return through(self.weight, self.dial.form)

    def forget(self) -> None:
        """Be an ordinary layer again."""
        del vars(self)["dial"]
        self.__class__ = nn.Linear  # type: ignore[assignment]  # which it was

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.seen(), self.bias)


class _Rounding(torch.autograd.Function):
    """Rounded forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, form: Format) -> Tensor:
        del ctx
        return rounded(weight_OI, form)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        del ctx
        return gradients[0], None


def _takes(weight_OI: Tensor, form: Format) -> bool:
    return weight_OI.shape[1] % _WHOLE_ROWS.get(form, 1) == 0


def _linear_layers(model: ModelHandle) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every linear layer that is not kept whole: its parent, its name there, itself.

    Other classes made of `nn.Linear` are left alone, as `transformers` leaves them: whoever wrote
    them reads their weights elsewhere.
    """
    whole = {part for root in model.kept_whole for part in root.modules()}
    for part in list(model.module.modules()):
        for name, layer in list(part.named_children()):
            if not isinstance(layer, nn.Linear) or layer in whole:
                continue
            if type(layer) in (nn.Linear, _Aware) or is_packed(layer):
                yield part, name, layer


def _with_all_rounded(model: ModelHandle) -> ModelHandle:
    twin = model.copy()
    with torch.no_grad():
        for part in twin.module.state_dict().values():  # what is saved, and nothing else
            if part.is_floating_point():
                part.copy_(part.to(torch.bfloat16))
    return twin


def _packed(model: ModelHandle, precision: Precision) -> ModelHandle:
    require_layers(model, precision)
    twin = model.copy()
    for part, name, layer in _linear_layers(twin):
        if _takes(layer.weight, precision):
            setattr(part, name, _packed_layer(layer, precision))
    # what peft looks at
    vars(twin.module)["is_loaded_in_4bit" if precision == "nf4" else "is_loaded_in_8bit"] = True
    return twin


def _packed_layer(layer: nn.Linear, precision: Precision) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # they draw weights that nobody wants
        made = _empty4bit(layer) if precision == "nf4" else _empty8bit(layer)
    made.load_state_dict(layer.state_dict())
    keep_as_packed(made)
    quantized: nn.Module = made.to(layer.weight.device)
    return quantized.train(layer.training)


def _empty4bit(layer: nn.Linear) -> Any:
    return _library("nn").Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
    )


def _empty8bit(layer: nn.Linear) -> Any:
    return _library("nn").Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=_OUTLIER,
    )


def _unpacked(layer: Any) -> nn.Linear:
    functional, weight = _library("functional"), layer.weight
    if type(layer).__name__ == "Linear4bit":
        values = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        codes, scales = _int8_codes(layer)
        values = functional.int8_vectorwise_dequant(codes, scales)
    with torch.random.fork_rng(devices=[]):
        made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made = made.to(device=values.device, dtype=torch.float32).train(layer.training)
    with torch.no_grad():
        made.weight.copy_(values)
        if layer.bias is not None:
            made.bias.copy_(layer.bias)
    return made


def _int8_codes(layer: Any) -> tuple[Tensor, Tensor]:
    """Codes and row scales; the library moves them at the first forward pass."""
    if layer.state.CB is not None:
        return layer.state.CB, layer.state.SCB
    return layer.weight.data, layer.weight.SCB


def _require_backend(precision: Precision) -> None:
    if reason := runnable(precision):
        raise ModelError(reason)


def _library(part: str) -> ModuleType:
    quiet_bitsandbytes()
    try:
        return importlib.import_module(f"bitsandbytes.{part}")
    except ImportError:
        advice = "pip install 'model-release-guard[immunize]', or leave int8 and nf4 out"
        raise ModelError(
            f"bitsandbytes cannot be imported, so nothing can be packed; {advice}"
        ) from None
