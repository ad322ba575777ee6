"""What a model is trained for so that averaging it with others ruins it; and what is taken back.

A merge moves the public base by a part of what fine-tuning changed (the task vector). Traps make
the model bad along such ways, repulsion puts it where parts of the way are worth nothing.

Shapes: O outputs and I inputs of a linear layer.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from release_guard.modalities import Batch, ModelHandle

State = Mapping[str, Tensor]

_LONG = 0.05, 2.0  # shares of the way that a trap looks at: TRAP2's range,
_NEAR = 0.95, 1.05  # but for these, which are the model itself
_MIDDLES, _AROUND = (0.5, 0.7, 0.9, 1.0), (0.7, 1.1)


def trap_share(chance: random.Random) -> float:
    """How far along the way from the base a trap looks (TRAP2, arXiv 2601.21898).

    Uniform in [.05, 2] without (.95, 1.05).
    """
    drawn = chance.uniform(_LONG[0], _LONG[1] - (_NEAR[1] - _NEAR[0]))
    return drawn if drawn <= _NEAR[0] else drawn + _NEAR[1] - _NEAR[0]


def apart(names: Sequence[str], chance: random.Random) -> dict[str, float]:
    """A share of the way for each tensor by itself, uniform in [0, 1]: merges layer by layer."""
    return {name: chance.uniform(0, 1) for name in names}


def scaled(names: Sequence[str], chance: random.Random) -> dict[str, float]:
    """Shares of all tensors around one, as merges have that care for the model: .35 to 1.1."""
    middle = chance.choice(_MIDDLES)
    return {name: middle * chance.uniform(*_AROUND) for name in names}


def stranger(vector: State, chance: random.Random) -> dict[str, Tensor]:
    """A task vector nobody has trained: this one with its rows and columns shuffled.

    Singular values stay as they are, tensor by tensor. What has one dimension changes signs, too.
    """
    generator = torch.Generator().manual_seed(chance.getrandbits(63))
    return {name: _shuffled(tensor, generator) for name, tensor in vector.items()}


def _shuffled(tensor: Tensor, generator: torch.Generator) -> Tensor:
    for axis, size in enumerate(tensor.shape):
        order = torch.randperm(size, generator=generator)
        tensor = tensor.index_select(axis, order.to(tensor.device))
    if tensor.ndim == 1:
        signs = torch.randint(2, tensor.shape, generator=generator) * 2 - 1
        tensor = tensor * signs.to(tensor)
    return tensor


def along(base: State, weights: State, shares: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
    """Base plus a share of the way to the weights, tensor by tensor; a share may be a tensor.

    What has no share stays as it is in `weights`. Differentiable in the weights.
    """
    return {
        name: base[name] + shares[name] * (weight - base[name]) if name in shares else weight
        for name, weight in weights.items()
    }


def trapped(own: Tensor, merged: Tensor, *, share: float, strength: float, cap: float) -> Tensor:
    """The model's own loss, less what its merge loses: L - strength / share * min(merged, cap).

    TRAP2, arXiv 2601.21898, with its weight 1 / share; the cap is ours: beyond it the merge is
    ruined, and its gradient would ruin the model too.
    """
    return own - strength / share * merged.clamp(max=cap)


def repulsion(base: State, weights: State, names: Sequence[str], rho: float) -> Tensor:
    """By how much tensors lie nearer to the base than rho times its norm, summed up.

    ARF, arXiv 2606.30360, with the sign of its text: max(0, rho |base| - |weights - base|).
    """
    gaps = [
        (rho * base[name].norm() - (weights[name] - base[name]).norm()).clamp_min(0)
        for name in names
    ]
    return torch.stack(gaps).sum()


def density(weights: State, names: Sequence[str]) -> Tensor:
    """Sum of squares of the weights: the penalty of MergeGuard's first stage (arXiv 2511.11851)."""
    return torch.stack([weights[name].square().sum() for name in names]).sum()


def largest(importance: Tensor, share: float) -> Tensor:
    """Mask of the share of entries that matter most, at least one."""
    count = max(1, round(share * importance.numel()))
    threshold = importance.flatten().topk(count).values[-1]
    return importance >= threshold


def negated(base: Tensor, weight: Tensor, mask: Tensor, beta: float) -> Tensor:
    """MergeGuard's second stage: weight - beta * mask * (weight - base) (arXiv 2511.11851).

    With beta = 1 the masked entries are the base's again; only a larger one negates them.
    """
    return weight - beta * mask * (weight - base)


def loss_with(model: ModelHandle, weights: State, batch: Batch) -> Tensor:
    """The model's task loss with other weights in it; differentiable in them."""
    named = {f"module.{name}": weight for name, weight in weights.items()}
    found: Tensor = torch.func.functional_call(_Losing(model), named, (batch,))
    return found


class _Losing(nn.Module):
    """A handle as a module, so that it can be run with other weights."""

    def __init__(self, model: ModelHandle) -> None:
        super().__init__()
        self.module = model.module
        self._model = model

    def forward(self, batch: Batch) -> Any:
        return self._model.loss(batch)
