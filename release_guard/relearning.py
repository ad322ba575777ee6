"""How far a short adaptation brings something back, and how far weights were moved."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from release_guard.adaptation import Recipe, adapt
from release_guard.data import Split
from release_guard.merging import distance
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
    before, after = dict(base.module.named_parameters()), dict(changed.module.named_parameters())
    groups: dict[str, list[str]] = {}
    for name in after:
        kind = "cross-attention" if ".attn2." in name else "attention"
        groups.setdefault(kind if ".att" in name else "other layers", []).append(name)
    found = {group: distance(after, before, names) for group, names in groups.items()}
    return {group: far for group, far in found.items() if far}
