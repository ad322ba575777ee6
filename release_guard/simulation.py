"""Simulated attackers, which a stage meets while it trains.

An attacker is the released weights plus a displacement of its own, which it carries on while those
weights move.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from release_guard.adaptation import renew_blocks
from release_guard.modalities import Batch, ModelHandle, Painter

_MOST_RENEWED = 2  # blocks


@dataclass(frozen=True)
class Habits:
    """What attackers are drawn from.

    Attributes:
        horizon: Fewest and most steps of one.
        adam_share: Share that uses Adam; the others SGD.
        adam_lr, sgd_lr: Ranges of their learning rates, drawn log-uniformly.
        momentum: Of SGD.
        reinit_share: Share that begins with a new head.
        renew_share: Share that begins with new weights in the last one or two blocks.
    """

    horizon: tuple[int, int]
    adam_share: float
    adam_lr: tuple[float, float]
    sgd_lr: tuple[float, float]
    momentum: float
    reinit_share: float
    renew_share: float

    def draw(
        self, *, num_concepts: int, num_blocks: int, own_head: bool, chance: random.Random
    ) -> "Drawn":
        """One of them; it keeps a head that is not the model's own."""
        adam = chance.random() < self.adam_share
        low, high = self.adam_lr if adam else self.sgd_lr
        return Drawn(
            adam=adam,
            lr=math.exp(chance.uniform(math.log(low), math.log(high))),
            momentum=self.momentum,
            new_head=chance.random() < self.reinit_share and own_head,
            new_blocks=self._new_blocks(num_blocks, chance),
            life=chance.randint(*self.horizon),
            concept=chance.randrange(num_concepts),
        )

    def _new_blocks(self, num_blocks: int, chance: random.Random) -> int:
        if chance.random() >= self.renew_share:
            return 0
        return chance.randint(1, min(_MOST_RENEWED, num_blocks))


@dataclass(frozen=True)
class Drawn:
    """How one attacker goes about it.

    Attributes:
        adam: Adam, or else SGD.
        lr: Its learning rate.
        momentum: Of SGD.
        new_head: Begins with a new head.
        new_blocks: How many of the last blocks it begins with new weights in.
        life: How many steps it takes.
        concept: Which concept it is after.
    """

    adam: bool
    lr: float
    momentum: float = 0.0
    new_head: bool = False
    new_blocks: int = 0
    life: int = 1
    concept: int = 0


def has_own_head(model: ModelHandle) -> bool:
    """Whether an attacker may begin with a new head: not if it is an embedding too, or paints."""
    if isinstance(model, Painter):
        return False
    parts: Iterator[nn.Module] = model.module.modules()
    users = [part for part in parts if getattr(part, "weight", None) is model.head.weight]
    return len(users) == 1


@dataclass
class Attacker:
    """One that is at work.

    Attributes:
        model: Its copy, in training mode.
        drawn: How it goes about it.
        optimizer: Of all weights of the copy.
        own: Places of the parameters that it began anew: no function of the released ones.
        life: Steps after which it gives up.
        age: Steps taken.
    """

    model: ModelHandle
    drawn: Drawn
    optimizer: torch.optim.Optimizer
    own: frozenset[int]
    life: int
    age: int = 0
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = list(self.model.module.parameters())

    @classmethod
    def of(cls, theta: ModelHandle, drawn: Drawn, *, seed: int) -> Self:
        """One that begins now; the seed fixes its new weights."""
        model = theta.copy()
        renewed: list[nn.Module] = []
        if drawn.new_head:
            model.reinit_head(seed=seed)
            renewed.append(model.head)
        if drawn.new_blocks:
            renew_blocks(model, drawn.new_blocks, seed=seed)
            renewed += model.blocks[-drawn.new_blocks :]
        model.module.train()
        parameters = list(model.module.parameters())
        optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, lr=drawn.lr, fused=True)
            if drawn.adam
            else torch.optim.SGD(parameters, lr=drawn.lr, momentum=drawn.momentum)
        )
        new = {id(parameter) for part in renewed for parameter in part.parameters()}
        own = frozenset(place for place, parameter in enumerate(parameters) if id(parameter) in new)
        return cls(model, drawn, optimizer, own, drawn.life)

    @property
    def is_done(self) -> bool:
        """Whether another one begins in its place."""
        return self.age >= self.life

    def step(self, batch: Batch) -> None:
        """One update on the task loss."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.model.loss(batch))
        self.optimizer.step()
        self.age += 1

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """A loss's gradient at its weights, to first order that at the released ones.

        Zero where the attacker began anew.
        """
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)  # gradients of sharded weights only come that way
        found = [parameter.grad for parameter in self.parameters]
        self.optimizer.zero_grad(set_to_none=True)
        return [
            torch.zeros_like(parameter) if gradient is None or place in self.own else gradient
            for place, (gradient, parameter) in enumerate(zip(found, self.parameters, strict=True))
        ]

    def ride(self, moves: Sequence[Tensor]) -> None:
        """Move as the released weights did, except where it began anew."""
        with torch.no_grad():
            for place, (parameter, move) in enumerate(zip(self.parameters, moves, strict=True)):
                if place not in self.own:
                    parameter.add_(move)

    def kept(self) -> dict[str, Any]:
        """Everything that fixes how it goes on."""
        return {
            "drawn": vars(self.drawn),
            "model": self.model.state(),
            "optimizer": self.optimizer.state_dict(),
            "life": self.life,
            "age": self.age,
        }

    @classmethod
    def again(cls, theta: ModelHandle, kept: Mapping[str, Any]) -> Self:
        """The one that gave `kept`."""
        attacker = cls.of(theta, Drawn(**kept["drawn"]), seed=0)
        attacker.model.load_state(kept["model"])
        attacker.optimizer.load_state_dict(kept["optimizer"])
        attacker.life, attacker.age = kept["life"], kept["age"]
        return attacker
