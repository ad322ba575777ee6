"""Quantize: the adversary rounds the weights, to formats the publisher may not have thought of."""

from typing import Annotated, Literal, get_args

import torch
from torch import Tensor, nn

from release_guard.attacks import Choice, Transform
from release_guard.errors import ModelError
from release_guard.formats import rounded
from release_guard.modalities import ModelHandle
from release_guard.policy import Target
from release_guard.surgery import layers_of

Format = Literal[
    "nf4", "nf4_double", "int8", "fp4", "int4", "q8_0", "q4_0", "q4_k", "q3", "q2", "mixed"
]

_OF_LINEAR_LAYERS = ("nf4", "nf4_double", "int8")
_MIXED = ("bf16", "int8", "q8_0", "nf4", "q4_k", "q3")


class Quantize(Transform):
    """Rounds every layer but the head, and goes on in fp32 as after dequantizing.

    Small edits that hide a capability may not survive rounding: four bits brought back most of
    what models had been made to forget. No format needs calibration.
    """

    paper = "https://arxiv.org/abs/2410.16454"

    format: Annotated[Format, Choice(get_args(Format))] = "nf4"
    """nf4, int8: as a policy's precisions of these names; linear layers only. nf4_double: nf4 whose
    scales are rounded to 8 bits. fp4: the other four bits of bitsandbytes. q8_0, q4_0, q4_k:
    llama.cpp's, the last with scales of scales. int4: multiples, up to 7, of one step for each
    output. q3, q2: three and two bits in blocks of 16, like llama.cpp's Q3_K and Q2_K, but the
    blocks' own scales are not rounded. mixed: the seed draws a format for each layer."""

    def transform(
        self, model: ModelHandle, target: Target, *, seed: int, ancestor: ModelHandle | None
    ) -> ModelHandle:
        del target, ancestor
        changed = model.copy()
        layers = [layer for layer in layers_of(changed.module) if layer is not changed.head]
        if self.format in _OF_LINEAR_LAYERS:
            layers = [layer for layer in layers if isinstance(layer, nn.Linear)]
        if not layers:
            what = f"nothing to round to {self.format}, which is for linear layers"
            raise ModelError(f"quantize: {what}; take fp4 or q8_0")
        drawn = torch.randint(len(_MIXED), (len(layers),), generator=_seeded(seed)).tolist()
        with torch.no_grad():
            for layer, number in zip(layers, drawn, strict=True):
                form = _MIXED[number] if self.format == "mixed" else self.format
                layer.weight.copy_(_finite(layer.weight, form))
        return changed


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _finite(weight: Tensor, form: str) -> Tensor:
    # What is not finite scores nothing: it would count as an attack that was resisted.
    found = rounded(weight, form)
    if not found.isfinite().all():
        raise ModelError(f"quantize: {form} cannot hold a weight of {tuple(weight.shape)}")
    return found
