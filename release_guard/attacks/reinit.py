"""Reinit: the adversary throws away the layers in which a defence may sit."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from release_guard.adaptation import last_blocks, renew_blocks
from release_guard.attacks import Choice, Transform
from release_guard.modalities import ModelHandle
from release_guard.policy import Target
from release_guard.surgery import normalizations


class Reinit(Transform):
    """New weights for a part of the model, as a fresh model of its configuration has them.

    Most layers of a trained network can be drawn anew at little cost; training afterwards (`chain`)
    pays it, and starts where the defender did not look.
    """

    paper = "https://arxiv.org/abs/1902.01996"

    part: Annotated[
        Literal["head", "last_k", "norms", "one_block"],
        Choice(("head", "last_k", "norms", "one_block")),
    ] = "head"
    """What becomes new; norms: gains and shifts of all normalisations, but not their running
    statistics; one_block: a block that the seed draws."""
    last_k: Annotated[int, Field(ge=1), Choice((1, 2, 4))] = 1
    """How many of the last blocks."""

    def transform(
        self, model: ModelHandle, target: Target, *, seed: int, ancestor: ModelHandle | None
    ) -> ModelHandle:
        del target, ancestor
        changed = model.copy()
        match self.part:
            case "head":
                changed.reinit_head(seed=seed)
            case "last_k":
                renew_blocks(changed, len(last_blocks(changed, self.last_k)), seed=seed)
            case "norms":
                _renew_norms(changed, seed)
            case "one_block":
                _renew_one_block(changed, seed)
        return changed


def _renew_norms(model: ModelHandle, seed: int) -> None:
    fresh = normalizations(model.fresh(seed=seed).module)
    for old, new in zip(normalizations(model.module), fresh, strict=True):
        old.load_state_dict(dict(new.named_parameters()), strict=False)


def _renew_one_block(model: ModelHandle, seed: int) -> None:
    draw = torch.randint(len(model.blocks), (), generator=torch.Generator().manual_seed(seed))
    fresh = model.fresh(seed=seed).blocks[int(draw)]
    model.blocks[int(draw)].load_state_dict(fresh.state_dict())
