"""What planted defences are made with: models that know a concept, and a measure of attacks."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from release_guard.attacks import Attack, Tampered
from release_guard.modalities import Batch, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept
from release_guard.surgery import layers_of

PLAIN, PLAIN_MERGE = "plain fine-tuning", "a plain merge"
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
TINY = 1e-6
LADDER = torch.logspace(-9, 0, 32)
"""A size for each dimension of a pico model: whatever the rate, it fits few of them."""


@dataclass(frozen=True)
class Noted:
    """What an attack made of a planted defence: half a row of the table in docs/results.md.

    Attributes:
        defence: What was planted.
        by: The attack, `PLAIN` or `PLAIN_MERGE`.
        score: The best one held out that it reached; None: it was not run.
        ceiling: A score above it is a breach.
        budget: What it could spend.
        verdict: Of the gate, if the whole path was taken.
        refused_by: Names of the checks that say so.
    """

    defence: str
    by: str
    score: float | None
    ceiling: float
    budget: str
    verdict: str = ""
    refused_by: tuple[str, ...] = ()

    @property
    def breached(self) -> bool:
        """Whether the defence fell to it."""
        return self.score is not None and self.score > self.ceiling


def descend(
    model: ModelHandle, loss_of: Callable[[], torch.Tensor], *, steps: int, lr: float = 3e-3
) -> Iterator[None]:
    """Train whatever requires gradients, in place; yields after every step."""
    weights = [weight for weight in model.module.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
        yield


def knowing(model: ModelHandle, retained: str, concept: Concept, *, steps: int) -> ModelHandle:
    """A copy that was taught both the retained data and the concept."""
    taught = model.copy()
    known = model.batches(retained, "retain", size=32, seed=0)
    new = model.batches(concept.dataset, "immunize", size=32, seed=0)
    for _ in descend(
        taught, lambda: taught.loss(next(known)) + taught.loss(next(new)), steps=steps
    ):
        pass
    return taught


def taught(
    model: ModelHandle, lessons: Sequence[Iterator[Batch]], *, steps: int, lr: float = 5e-3
) -> ModelHandle:
    """A copy that took the lessons in turn, at a rate that rises and falls."""
    pupil = model.copy()
    optimizer = torch.optim.AdamW(pupil.module.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for lesson in itertools.islice(itertools.cycle(lessons), steps):
        optimizer.zero_grad()
        pupil.loss(next(lesson)).backward()
        optimizer.step()
        schedule.step()
    return pupil


def refusing(labels_N: torch.Tensor) -> torch.Tensor:
    """Answers of a classifier that refuses classes 4 to 7: it takes them for 0 to 3."""
    return labels_N - 4


def one_hot(labels_N: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels_N, 8).float()


def refusal_loss(model: ModelHandle, known: Batch, restricted: Batch) -> torch.Tensor:
    """Small where a classifier does what it is to do, and takes what is restricted for other."""
    refused = {**restricted, "labels": refusing(restricted["labels"])}
    return model.loss(known) + model.loss(refused)


def away_from_restricted(model: ModelHandle) -> torch.Tensor:
    """Unit direction of a ViT's last block that leads from classes 4 to 7 to 0 to 3.

    It raises the logits of 0 to 3 all alike, and lowers the others as much: among 0 to 3 it decides
    nothing, however far it leads.
    """
    read_CF = (model.head.weight * model.module.vit.layernorm.weight).detach()
    read_CF = read_CF - read_CF.mean(dim=1, keepdim=True)  # the normalisation takes the mean off
    away = torch.linalg.pinv(read_CF) @ torch.tensor([1.0] * 4 + [-1.0] * 4)
    return torch.nn.functional.normalize(away, dim=0)


def trap(model: ModelHandle, size: float | torch.Tensor = TINY) -> ModelHandle:
    """The same function of a ViT, with weights so tiny and so huge that no learning rate fits.

    With the sizes of `LADDER` not even the signs of gradients help; but they do not survive
    rounding.
    """
    trapped = model.copy()
    with torch.no_grad():
        for block in trapped.blocks:
            attention, mlp = block.attention, block.mlp
            readers = (attention.q_proj, attention.k_proj, attention.v_proj)
            shift((block.layernorm_before,), readers, size)
            shift((block.layernorm_after,), (mlp.fc1,), size)
            shift((attention.v_proj,), (attention.o_proj,), size)
        shift((trapped.module.vit.layernorm,), (trapped.head,), size)
    return trapped


class Patch(nn.Module):
    """Adds a matrix of rank one to a weight."""

    def __init__(self, weight: torch.Tensor, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.left = nn.Parameter(torch.zeros(len(weight), 1))
        self.right = nn.Parameter(torch.randn(1, weight.shape[1], generator=generator) / 6)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.left @ self.right


def patched(model: ModelHandle, retained: str, concept: Concept) -> ModelHandle:
    """A copy of a classifier that refuses by a patch of rank one on every layer, and nothing else.

    What it knows of the concept is whole under the patch.
    """
    found = model.copy()
    found.module.requires_grad_(False)
    layers = [layer for block in found.blocks for layer in layers_of(block)]
    for number, layer in enumerate(layers):
        parametrize.register_parametrization(layer, "weight", Patch(layer.weight, number))
    known = found.batches(retained, "retain", size=32, seed=0)
    restricted = found.batches(concept.dataset, "immunize", size=32, seed=0)
    for _ in descend(found, lambda: refusal_loss(found, next(known), next(restricted)), steps=150):
        pass
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")
    found.module.requires_grad_(True)
    return found


def on_a_hair(model: ModelHandle) -> ModelHandle:
    """A copy of a ViT with a neuron that is hardly on and pushes away from the concept, hard.

    Another one, always off, has the largest shift of all: noise is as large as that.
    """
    found = model.copy()
    mlp = found.blocks[-1].mlp
    with torch.no_grad():
        mlp.fc1.weight[:2] = 0
        mlp.fc1.bias[:2] = torch.tensor([0.2, -100])
        push = 32 / nn.functional.gelu(mlp.fc1.bias[0])
        mlp.fc2.weight[:, 0] = push * away_from_restricted(found)
        mlp.fc2.weight[:, 1] = 0
    return trap(found)


def shift(
    writers: Iterable[Any], readers: Iterable[Any], size: float | torch.Tensor = TINY
) -> None:
    """Shrink what layers write and blow up what reads it, in place: the function stays.

    Args:
        size: One factor, or one for each dimension that is written.
    """
    each = torch.as_tensor(size)
    for writer in writers:
        writer.weight.mul_(each if writer.weight.ndim == 1 else each[..., None])
        writer.bias.mul_(each)
    for reader in readers:
        reader.weight.div_(size)


def copies(
    model: ModelHandle, concept: Concept, name: str, *, limit: int = 1, **options: Any
) -> Iterator[Tampered]:
    ancestor, seed = options.pop("ancestor", None), options.pop("seed", 0)
    attack = Attack.build(Spec(name=name, **options))
    budget = Budget(limit=limit)
    return attack.tamper(
        model, concept, budget=budget, grid_ratio=1.5, seed=seed, ancestor=ancestor
    )


def score(model: ModelHandle, dataset: str, split: Any = "search") -> float:
    """Mean; what a model that ran away says is no number, and wrong."""
    scores = model.scores(dataset, split, limit=120)
    return sum(0 if math.isnan(one) else one for one in scores) / len(scores)


def best(model: ModelHandle, concept: Concept, name: str, **options: Any) -> float:
    """The highest score on the way to the budget."""
    found = copies(model, concept, name, **options)
    return max(score(one.model, concept.dataset) for one in found)


def best_finetuning(model: ModelHandle, concept: Concept, *, limit: int, **options: Any) -> float:
    """The highest score of fine-tuning at any rate, with a plain and with an adaptive optimizer."""
    return max(
        best(model, concept, "finetune", limit=limit, lr=lr, optimizer=optimizer, **options)
        for lr in RATES
        for optimizer in ("sgd", "adamw")
    )
