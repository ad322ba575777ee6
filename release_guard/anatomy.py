"""Where a transformer's interchangeable parts are: heads, neurons, the residual stream.

For models of `transformers` whose attention is called q_proj, k_proj, v_proj, o_proj, with a plain
MLP (fc1, fc2) or a gated one (gate_proj, up_proj, down_proj); the stream of ViT and of Llama.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from release_guard.errors import ModelError

Scaling = Literal["none", "positive", "signed"]


@dataclass(frozen=True)
class Attention:
    """One layer's attention.

    Attributes:
        query, key, value, output: Names of its linear layers.
        heads: Number of query heads.
        groups: Number of key and value heads, each shared by `heads / groups` query heads.
        mixing: Which matrices of a head leave the scores as they are: any that is invertible, a
            scaled rotation of each rotary pair, or (with norms on queries and keys) none.
    """

    query: str
    key: str
    value: str
    output: str
    heads: int
    groups: int
    mixing: Literal["any", "rotary", "none"]

    @property
    def layers(self) -> tuple[str, ...]:
        """All of its linear layers."""
        return (self.query, self.key, self.value, self.output)


@dataclass(frozen=True)
class Mlp:
    """One layer's neurons.

    Attributes:
        gate: The linear layer whose rows go through the activation: gate_proj or fc1.
        up: The linear layer whose rows are multiplied with that; empty: there is none.
        down: The linear layer whose columns are the neurons' outputs.
        scaling: By what a row of `up`, or of `gate` where there is none, may be multiplied.
    """

    gate: str
    up: str
    down: str
    scaling: Scaling

    @property
    def readers(self) -> tuple[str, ...]:
        """The linear layers whose rows are the neurons."""
        return (self.gate, self.up) if self.up else (self.gate,)

    @property
    def layers(self) -> tuple[str, ...]:
        """All of its linear layers."""
        return (*self.readers, self.down)


@dataclass(frozen=True)
class Stream:
    """The residual stream.

    Attributes:
        norms: Each normalisation with the linear layers that read it.
        inputs: Embeddings, each with its axis along the stream.
        outputs: Linear layers that add to the stream.
        centred: The mean over the stream is taken off (LayerNorm).
    """

    norms: tuple[tuple[str, tuple[str, ...]], ...]
    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[str, ...]
    centred: bool


@dataclass(frozen=True)
class Anatomy:
    """All of it; no stream where it is not known how to turn it."""

    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    stream: Stream | None


def anatomy(module: nn.Module) -> Anatomy:
    """Find the parts of a model.

    Raises:
        ModelError: It is none of those named above.
    """
    attentions, mlps = [], []
    for name, part in module.named_modules():
        if all(hasattr(part, f"{letter}_proj") for letter in "qkvo"):
            attentions.append(_attention(name, part, module))
        elif hasattr(part, "fc1") or hasattr(part, "gate_proj"):
            mlps.append(_mlp(name, part, module))
    if not attentions or len(attentions) != len(mlps):
        kind = type(module).__name__
        reason = "its layers are not those of a ViT or a Llama"
        raise ModelError(f"{kind}: {reason}, so it cannot be realigned; merge it without")
    return Anatomy(tuple(attentions), tuple(mlps), _stream(module, attentions, mlps))


def _attention(name: str, part: Any, module: Any) -> Attention:
    heads = module.config.num_attention_heads
    normed = any(hasattr(part, norm) for norm in ("q_norm", "k_norm"))
    rotary = any("Rotary" in type(other).__name__ for other in module.modules())
    return Attention(
        query=f"{name}.q_proj",
        key=f"{name}.k_proj",
        value=f"{name}.v_proj",
        output=f"{name}.o_proj",
        heads=heads,
        groups=getattr(module.config, "num_key_value_heads", None) or heads,
        mixing="none" if normed else "rotary" if rotary else "any",
    )


def _mlp(name: str, part: Any, module: Any) -> Mlp:
    if hasattr(part, "gate_proj"):
        return Mlp(f"{name}.gate_proj", f"{name}.up_proj", f"{name}.down_proj", "signed")
    is_relu = getattr(getattr(module, "config", None), "hidden_act", "") == "relu"
    return Mlp(f"{name}.fc1", "", f"{name}.fc2", "positive" if is_relu else "none")


@dataclass(frozen=True)
class _Family:
    layers: str
    norms: tuple[str, str]
    last: str
    head: str
    inputs: tuple[tuple[str, int], ...]


_FAMILIES = (
    _Family(
        layers="vit.layers",
        norms=("layernorm_before", "layernorm_after"),
        last="vit.layernorm",
        head="classifier",
        inputs=(
            ("vit.embeddings.cls_token", 2),
            ("vit.embeddings.position_embeddings", 2),
            ("vit.embeddings.patch_embeddings.projection.weight", 0),
            ("vit.embeddings.patch_embeddings.projection.bias", 0),
        ),
    ),
    _Family(
        layers="model.layers",
        norms=("input_layernorm", "post_attention_layernorm"),
        last="model.norm",
        head="lm_head",
        inputs=(("model.embed_tokens.weight", 1),),
    ),
)


def _stream(module: Any, attentions: Sequence[Attention], mlps: Sequence[Mlp]) -> Stream | None:
    """The stream of a model that has nothing but plain normalisations before its layers."""
    parts = dict(module.named_modules())
    family = next(
        (family for family in _FAMILIES if {family.layers, family.head} <= parts.keys()), None
    )
    if family is None:
        return None
    pairs: list[tuple[str, tuple[str, ...]]] = [(family.last, (family.head,))]
    for number, (attention, mlp) in enumerate(zip(attentions, mlps, strict=True)):
        layer = f"{family.layers}.{number}"
        before, after = (f"{layer}.{norm}" for norm in family.norms)
        pairs += [
            (before, (attention.query, attention.key, attention.value)),
            (after, mlp.readers),
        ]
    norms = {name for name, part in parts.items() if type(part).__name__.endswith("Norm")}
    if norms != {name for name, _ in pairs} or not all(_is_plain(parts[name]) for name in norms):
        return None
    return Stream(
        norms=tuple(pairs),
        inputs=family.inputs,
        outputs=tuple(
            part
            for pair in zip(attentions, mlps, strict=True)
            for part in (pair[0].output, pair[1].down)
        ),
        centred=isinstance(parts[family.last], nn.LayerNorm),
    )


def _is_plain(norm: Any) -> bool:
    """Whether it multiplies with its weights: some multiply with 1 + weights."""
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        twin.weight.zero_()
        rows_1D = torch.arange(len(twin.weight), dtype=twin.weight.dtype).to(twin.weight)[None]
        return bool((twin(rows_1D) == getattr(twin, "bias", 0)).all())
