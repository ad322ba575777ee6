"""Prune: the adversary removes weights or neurons, in the hope that a defence lives in them.

Shapes: O outputs, I inputs of a layer, K places of a convolution's kernel (a linear layer has one),
N rows.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from release_guard.attacks import Choice, Transform
from release_guard.modalities import ModelHandle, evaluating
from release_guard.policy import Target
from release_guard.surgery import Layer, layers_of, smallest

_READ_TOGETHER = 32


class Prune(Transform):
    """Sets a share of the blocks' weights, or of what their layers read, to zero.

    What refuses is often a few weights or neurons that nothing else needs, whereas a capability is
    spread wide. Nothing is trained afterwards; `chain` can do so.
    """

    paper = "https://arxiv.org/abs/2402.05162"

    by: Annotated[
        Literal["layer", "model", "wanda", "neurons"],
        Choice(("layer", "model", "wanda", "neurons")),
    ] = "layer"
    """layer, model: the smallest weights of each layer, or of all of them. wanda: in each row the
    smallest products of a weight's size and its input's norm on the attacker's examples (Sun and
    others, https://arxiv.org/abs/2306.11695). neurons: those inputs of each layer that push its
    outputs most the same way on all these examples, less those that most tell the examples apart:
    a set difference that needs no second data set."""
    share: Annotated[float, Field(gt=0, lt=1), Choice((0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5))] = 0.3
    """How much of it."""
    examples: Annotated[int, Field(ge=1)] = 256
    """About how many examples are read, for wanda and neurons."""

    @property
    def wants(self) -> int:
        return _READ_TOGETHER if self.by in {"wanda", "neurons"} else 0

    def transform(
        self, model: ModelHandle, target: Target, *, seed: int, ancestor: ModelHandle | None
    ) -> ModelHandle:
        del ancestor
        changed = model.copy()
        layers = [layer for block in changed.blocks for layer in layers_of(block)]
        with torch.no_grad():
            masks = self._masks(changed, layers, target, seed)
            for layer, mask in zip(layers, masks, strict=True):
                layer.weight.masked_fill_(mask.view_as(layer.weight), 0)
        return changed

    def _masks(
        self, model: ModelHandle, layers: Sequence[Layer], target: Target, seed: int
    ) -> list[Tensor]:
        """What becomes zero."""
        sizes = [layer.weight.abs().flatten() for layer in layers]
        match self.by:
            case "layer":
                return [smallest(size, self.share) for size in sizes]
            case "model":
                mask = smallest(torch.cat(sizes), self.share)
                return list(torch.split(mask, [*map(len, sizes)]))
            case "wanda" | "neurons":
                choose = wanda if self.by == "wanda" else pushing
                seen = self._seen(model, layers, target, seed)
                return [
                    choose(layer.weight.view(*layer.weight.shape[:2], -1), *seen[layer], self.share)
                    for layer in layers
                ]

    def _seen(
        self, model: ModelHandle, layers: Sequence[Layer], target: Target, seed: int
    ) -> Mapping[Layer, tuple[Tensor, Tensor]]:
        """Mean and mean square (I) of what each layer reads."""
        sums = {layer: torch.zeros(2, layer.weight.shape[1]).double() for layer in layers}
        rows = dict.fromkeys(layers, 0)

        def add(layer: Layer, inputs: tuple[Tensor, ...]) -> None:
            at = 1 if isinstance(layer, nn.Conv2d) else -1
            rows_NI = inputs[0].movedim(at, -1).flatten(0, -2).double()
            sums[layer] += torch.stack([rows_NI.sum(dim=0), rows_NI.square().sum(dim=0)]).cpu()
            rows[layer] += len(rows_NI)

        batches = model.batches(target.dataset, "attack", size=_READ_TOGETHER, seed=seed)
        hooks = [layer.register_forward_pre_hook(add) for layer in layers]
        with evaluating(model.module):
            for batch in itertools.islice(batches, math.ceil(self.examples / _READ_TOGETHER)):
                model.loss(batch)  # not its logits: a painter has none
        for hook in hooks:
            hook.remove()
        means = {layer: (sums[layer] / rows[layer]).to(layer.weight) for layer in layers}
        return {layer: (mean_I, square_I) for layer, (mean_I, square_I) in means.items()}


def wanda(weight_OIK: Tensor, mean_I: Tensor, square_I: Tensor, share: float) -> Tensor:
    """Mask of the smallest |weight| x norm of its input, the same share of every row."""
    del mean_I
    score_OIK = weight_OIK.abs() * square_I.sqrt().unsqueeze(1)
    return smallest(score_OIK.flatten(1), share)


def pushing(weight_OIK: Tensor, mean_I: Tensor, square_I: Tensor, share: float) -> Tensor:
    """Mask of the inputs whose mean says most to the outputs, less those whose spread does."""
    norm_I = weight_OIK.norm(dim=(0, 2))
    spread_I = (square_I - mean_I.square()).clamp_min(0).sqrt()
    removed_I = _largest(norm_I * mean_I.abs(), share) & ~_largest(norm_I * spread_I, share)
    return removed_I.view(1, -1, 1).expand_as(weight_OIK)


def _largest(score: Tensor, share: float) -> Tensor:
    return smallest(-score, share)
