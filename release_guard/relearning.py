"""How far a short adaptation brings something back, and how far weights were moved."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from release_guard.adaptation import Recipe, adapt
from release_guard.data import Split
from release_guard.modalities import ModelHandle
from release_guard.policy import Budget

_LOOKS = 4  # batches a loss is taken on
_UNSEEN = 1  # seed of those batches


@dataclass(frozen=True)
class Relearning:
    """A short adaptation, the same for every model.

    Attributes:
        names: The weights that it trains, with Adam.
        lr: Learning rate.
        steps: How many.
        batch: Examples a step, and of each batch that a loss is taken on.
        seed: Fixes what it draws.
    """

    names: Sequence[str]
    lr: float
    steps: int
    batch: int
    seed: int

    def adapted(self, model: ModelHandle, dataset: str) -> ModelHandle:
        """A copy that has learnt from the split `immunize` of a data set."""
        twin = model.copy()
        chosen = set(self.names)
        for name, parameter in twin.module.named_parameters():
            parameter.requires_grad_(name in chosen)
        batches = twin.batches(dataset, "immunize", size=self.batch, seed=self.seed)
        recipe = Recipe(lr=self.lr, optimizer="adam")
        budget = Budget(unit="steps", limit=self.steps)
        for _ in adapt(twin, batches, recipe, budget=budget, grid_ratio=2.0, seed=self.seed):
            pass
        return twin

    def loss(self, model: ModelHandle, dataset: str, split: Split) -> float:
        """Task loss on examples that are the same for every model."""
        twin = model.copy()
        twin.module.eval()
        batches = twin.batches(dataset, split, size=self.batch, seed=_UNSEEN)
        with torch.no_grad():
            found = [twin.loss(batch).item() for batch in itertools.islice(batches, _LOOKS)]
        return sum(found) / len(found)


def distances(base: ModelHandle, changed: ModelHandle) -> dict[str, float]:
    """Relative L2 distance of each group of layers that moved."""
    before = dict(base.module.named_parameters())
    moved: dict[str, float] = {}
    size: dict[str, float] = {}
    for name, parameter in changed.module.named_parameters():
        kind = "cross-attention" if ".attn2." in name else "attention"
        group = kind if ".att" in name else "other layers"
        difference = (parameter - before[name]).detach().double()
        moved[group] = moved.get(group, 0.0) + difference.square().sum().item()
        size[group] = size.get(group, 0.0) + before[name].detach().double().square().sum().item()
    return {group: math.sqrt(moved[group] / size[group]) for group in moved if moved[group]}
