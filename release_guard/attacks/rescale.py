"""Rescale: the adversary writes the same function with better conditioned weights.

Shapes: N rows (images or scored tokens), F features, C classes or vocabulary entries.
"""

import itertools
import math
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from release_guard.attacks import Choice, Transform
from release_guard.errors import ModelError
from release_guard.modalities import Batch, ModelHandle, evaluating
from release_guard.policy import Target
from release_guard.surgery import norm_moves, pair_moves, settle, whitening

_READ_TOGETHER = 32
_SAME = 1e-4  # relative error of logits: far above rounding, far below a layer that was left out


class Rescale(Transform):
    """Moves scales between layers, and whitens the features, without changing what is computed.

    A network has many weights for one function (Dinh and others), and gradients differ among them.
    Immunization that rests on badly scaled weights or features is undone here, so that fine-tuning
    in a `chain` finds what it would find in any model.
    """

    paper = "https://arxiv.org/abs/1703.04933"
    modalities = ("image_classification", "causal_lm")

    norms: Annotated[bool, Choice((False, True))] = True
    """Set the gains of normalisations to one; the layers that read them take them over."""
    pairs: Annotated[bool, Choice((False, True))] = True
    """Make layers that stand behind each other equally large, where the function allows it."""
    whiten: Annotated[bool, Choice((False, True))] = False
    """Give the head whitened features, and weights that undo it."""
    examples: Annotated[int, Field(ge=1)] = 1024
    """About how many examples are read for whitening: more than there are features."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not (self.norms or self.pairs or self.whiten):
            raise ValueError("rescale needs one of norms, pairs, whiten")
        return self

    @property
    def wants(self) -> int:
        return _READ_TOGETHER

    def transform(
        self, model: ModelHandle, target: Target, *, seed: int, ancestor: ModelHandle | None
    ) -> ModelHandle:
        del ancestor
        changed = model.copy()
        # A parameter of its own: a head may share its weights with the input embedding.
        changed.head.weight = nn.Parameter(changed.head.weight.detach().clone())
        batches = model.batches(target.dataset, "attack", size=_READ_TOGETHER, seed=seed)
        batch = next(batches)
        wanted_NC = _logits(model, batch)

        def is_same() -> bool:
            error = (_logits(changed, batch) - wanted_NC).norm()
            return bool(error <= _SAME * wanted_NC.norm())

        for name, moves_of in (("norms", norm_moves), ("pairs", pair_moves)):
            if getattr(self, name) and not settle(moves_of(changed, batch), is_same):
                kind = type(changed.module).__name__
                raise ModelError(
                    f"rescale.{name}: found no layers of {kind} to rescale; leave it out"
                )
        if self.whiten:
            batches = itertools.chain([batch], batches)
            count = math.ceil(self.examples / _READ_TOGETHER)
            _whiten(changed, list(itertools.islice(batches, count)))
        return changed


class Whitened:
    """A hook that gives a layer centred and whitened inputs, in double precision inside.

    Ill-conditioned features differ by more orders of magnitude than fp32 has.
    """

    def __init__(self, mean_F: Tensor, whitening_FF: Tensor) -> None:
        self._mean_F = mean_F
        self._whitening_FF = whitening_FF

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (features,) = inputs
        return (((features.double() - self._mean_F) @ self._whitening_FF).to(features),)


def _whiten(model: ModelHandle, batches: list[Batch]) -> None:
    """Whiten what the head reads; its weights take the inverse, its bias the mean."""
    head = model.head
    with evaluating(model.module):
        rows_NF = torch.cat([model.features(batch)[0] for batch in batches]).double()
    # Without a bias nothing can take the mean.
    mean_F = rows_NF.mean(dim=0) * (head.bias is not None)
    centred_NF = rows_NF - mean_F
    whitening_FF, inverse_FF = whitening(centred_NF.T @ centred_NF / len(rows_NF))
    with torch.no_grad():
        weight_CF = head.weight.double()
        head.weight.copy_(weight_CF @ inverse_FF.T)
        if head.bias is not None:
            head.bias.add_(weight_CF @ mean_F)
    head.register_forward_pre_hook(Whitened(mean_F, whitening_FF))


def _logits(model: ModelHandle, batch: Batch) -> Tensor:
    with evaluating(model.module):
        return model.logits(batch)[0]
