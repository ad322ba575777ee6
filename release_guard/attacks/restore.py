"""Restore: the adversary has the public ancestor, and undoes what was done to it."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from release_guard.attacks import Choice, Transform
from release_guard.checkpoints import check_same_shape
from release_guard.errors import PolicyError
from release_guard.modalities import ModelHandle
from release_guard.policy import Target
from release_guard.surgery import low_rank, normalizations

Part = Literal["all", "attention", "mlp", "norms", "head", "first_half", "last_half"]


class Restore(Transform):
    """Takes back a part of the difference between the release and its ancestor.

    A defence added to known weights is known itself: its difference. What refuses is often of low
    rank (strip), what was learnt beside it may be (keep), and between both models lies a line
    along which harm may come back before use is lost (interpolate), or beyond (shares below 0).
    """

    paper = "https://arxiv.org/abs/2212.04089"
    needs_ancestor = True

    how: Annotated[
        Literal["strip", "keep", "interpolate"], Choice(("strip", "keep", "interpolate"))
    ] = "strip"
    """strip: remove the largest singular directions of each tensor's difference. keep: remove all
    others. interpolate: scale the difference. A vector has one direction."""
    rank: Annotated[int, Field(ge=1), Choice((1, 2, 4, 8, 16, 32, 64, 128))] = 1
    """How many singular directions, for strip and keep."""
    share: Annotated[
        float, Field(ge=-1, le=1.5), Choice(tuple(number / 8 for number in range(-8, 13)))
    ] = 0.5
    """How much of the difference stays, for interpolate: 0 is the ancestor, 1 the release."""
    part: Annotated[
        Part, Choice(("all", "attention", "mlp", "norms", "head", "first_half", "last_half"))
    ] = "all"
    """Where; the halves are of the blocks, mlp is what else the blocks hold."""

    def transform(
        self, model: ModelHandle, target: Target, *, seed: int, ancestor: ModelHandle | None
    ) -> ModelHandle:
        del target, seed
        if ancestor is None:
            raise PolicyError("restore: needs a public ancestor; name it, or leave restore out")
        check_same_shape("restore: the ancestor", model.module, ancestor.module)
        changed = model.copy()
        chosen = _chosen(changed, self.part)
        if not chosen:
            raise PolicyError(f"restore.part: the model has no {self.part}; choose another part")
        origins = dict(_tensors([ancestor.module]))
        with torch.no_grad():
            for name, tensor in _tensors([changed.module]):
                if id(tensor) in chosen:
                    origin = origins[name]
                    tensor.copy_(
                        origin + self._kept(tensor - origin, isinstance(tensor, nn.Parameter))
                    )
        return changed

    def _kept(self, difference: Tensor, is_weight: bool) -> Tensor:
        """What stays of a tensor's difference."""
        match self.how:
            case "strip":
                return difference - low_rank(difference, self.rank)
            case "keep":
                return low_rank(difference, self.rank)
            case "interpolate":
                # Statistics are not extrapolated: a variance must not become negative.
                return difference * (self.share if is_weight else min(1, max(0, self.share)))


def _tensors(parts: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Weights and statistics."""
    for part in parts:
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            if tensor.is_floating_point():
                yield name, tensor


def _chosen(model: ModelHandle, part: Part) -> set[int]:
    """Identities of the tensors in a part."""
    half = len(model.blocks) // 2
    norms = _inside(normalizations(model.module))
    attention = _inside(
        layer for layer in model.module.modules() if "Attention" in type(layer).__name__
    )
    return {
        "all": _inside([model.module]),
        "attention": attention,
        "mlp": _inside(model.blocks) - attention - norms,
        "norms": norms,
        "head": _inside([model.head]),
        "first_half": _inside(model.blocks[:half]),
        "last_half": _inside(model.blocks[half:]),
    }[part]


def _inside(parts: Iterable[nn.Module]) -> set[int]:
    return {id(tensor) for _, tensor in _tensors(parts)}
