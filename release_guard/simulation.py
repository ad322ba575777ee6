"""Simulated attackers, which a stage meets while it trains.

An attacker is the released weights plus a displacement of its own, which it carries on while those
weights move. One who has them rounded either trains what comes out of dequantizing, or adapters
beside the rounded weights (QLoRA, https://arxiv.org/abs/2305.14314), whose rounding follows them.

Shapes: O outputs and I inputs of a layer, R the rank of an adapter.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from release_guard.adaptation import renew_blocks
from release_guard.modalities import Batch, ModelHandle, Painter
from release_guard.policy import Format
from release_guard.quantization import apart, is_aware, linear_layers, plain

_MOST_RENEWED = 2  # blocks
_PACKED = ("int8", "nf4", "fp4")  # formats beside which adapters are trained
_RANK = 8  # of these adapters
_PLAIN: Mapping[Format, float] = {"fp32": 1.0}


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
        formats: What they have the released weights in, with weights.
        packed_share: Share of those with int8 or four bits that train adapters beside them.
    """

    horizon: tuple[int, int]
    adam_share: float
    adam_lr: tuple[float, float]
    sgd_lr: tuple[float, float]
    momentum: float
    reinit_share: float
    renew_share: float
    formats: Mapping[Format, float] = field(default_factory=lambda: _PLAIN)
    packed_share: float = 0.0

    def draw(
        self, *, num_concepts: int, num_blocks: int, own_head: bool, chance: random.Random
    ) -> "Drawn":
        """One of them; it keeps a head that is not the model's own."""
        adam = chance.random() < self.adam_share
        low, high = self.adam_lr if adam else self.sgd_lr
        drawn = Drawn(
            adam=adam,
            lr=math.exp(chance.uniform(math.log(low), math.log(high))),
            momentum=self.momentum,
            new_head=chance.random() < self.reinit_share and own_head,
            new_blocks=self._new_blocks(num_blocks, chance),
            life=chance.randint(*self.horizon),
            concept=chance.randrange(num_concepts),
        )
        return drawn.having(self.formats, self.packed_share, chance)

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
        form: What it has the released weights in when it begins.
        rank: Of the adapters that it trains beside them; 0: it trains the weights themselves.
    """

    adam: bool
    lr: float
    momentum: float = 0.0
    new_head: bool = False
    new_blocks: int = 0
    life: int = 1
    concept: int = 0
    form: Format = "fp32"
    rank: int = 0

    def having(
        self, formats: Mapping[Format, float], packed_share: float, chance: random.Random
    ) -> "Drawn":
        """The same, with the weights in one of these formats; nothing is drawn if there is one.

        Whoever trains adapters begins with no new blocks, which would not be packed.
        """
        if len(formats) == 1:
            return replace(self, form=next(iter(formats)))
        form = chance.choices(list(formats), list(formats.values()))[0]
        packed = form in _PACKED and chance.random() < packed_share
        if packed:
            return replace(self, form=form, rank=_RANK, new_blocks=0)
        return replace(self, form=form)


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
        optimizer: Of what it trains.
        own: Places of the parameters that it began anew: no function of the released ones.
        life: Steps after which it gives up.
        adapters: Beside the weights of its copy, where it leaves these as they are.
        age: Steps taken.
        parameters: Of its copy, in the order of the released ones.
    """

    model: ModelHandle
    drawn: Drawn
    optimizer: torch.optim.Optimizer
    own: frozenset[int]
    life: int
    adapters: Sequence[Tensor] = ()
    age: int = 0
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = list(self.model.module.parameters())

    @classmethod
    def of(cls, theta: ModelHandle, drawn: Drawn, *, seed: int) -> Self:
        """One that begins now; the seed fixes its new weights."""
        model = _copy_for(theta, drawn)
        renewed: list[nn.Module] = []
        if drawn.new_head:
            model.reinit_head(seed=seed)
            renewed.append(model.head)
        if drawn.new_blocks:
            renew_blocks(model, drawn.new_blocks, seed=seed)
            renewed += model.blocks[-drawn.new_blocks :]
        model.module.train()
        adapters = _insert_adapters(model, drawn.rank, seed=seed) if drawn.rank else ()
        parameters = list(model.module.parameters())
        trained = [*adapters, *_own_head(model)] if adapters else parameters
        optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(trained, lr=drawn.lr, fused=True)
            if drawn.adam
            else torch.optim.SGD(trained, lr=drawn.lr, momentum=drawn.momentum)
        )
        new = {id(parameter) for part in renewed for parameter in part.parameters()}
        own = frozenset(place for place, parameter in enumerate(parameters) if id(parameter) in new)
        return cls(model, drawn, optimizer, own, drawn.life, adapters)

    @property
    def is_done(self) -> bool:
        """Whether another one begins in its place."""
        return self.age >= self.life

    def step(self, batch: Batch) -> None:
        """One update on the task loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._frozen():
            torch.autograd.backward(self.model.loss(batch))
        self.optimizer.step()
        self.age += 1

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """A loss's gradient at its weights, to first order that at the released ones.

        Zero where the attacker began anew.
        """
        self._forget_gradients()
        torch.autograd.backward(loss)  # gradients of sharded weights only come that way
        found = [parameter.grad for parameter in self.parameters]
        self._forget_gradients()
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
            "adapters": [adapter.detach() for adapter in self.adapters],
            "optimizer": self.optimizer.state_dict(),
            "life": self.life,
            "age": self.age,
        }

    @classmethod
    def again(cls, theta: ModelHandle, kept: Mapping[str, Any]) -> Self:
        """The one that gave `kept`."""
        attacker = cls.of(theta, Drawn(**kept["drawn"]), seed=0)
        attacker.model.load_state(kept["model"])
        with torch.no_grad():
            for adapter, value in zip(attacker.adapters, kept["adapters"], strict=True):
                adapter.copy_(value)
        attacker.optimizer.load_state_dict(kept["optimizer"])
        attacker.life, attacker.age = kept["life"], kept["age"]
        return attacker

    def _forget_gradients(self) -> None:
        """Of all weights, trained or not; of a sharded model those of the shards."""
        for one in (*self.parameters, *self.adapters):
            one.grad = None

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """No gradients for what it does not train."""
        trained = {id(one) for group in self.optimizer.param_groups for one in group["params"]}
        frozen = [one for one in self.parameters if one.requires_grad and id(one) not in trained]
        for one in frozen:
            one.requires_grad_(False)
        try:
            yield
        finally:
            for one in frozen:
                one.requires_grad_(True)


@contextmanager
def riding(released: Sequence[nn.Parameter], attackers: Sequence[Attacker]) -> Iterator[None]:
    """All who are at work at the end move as the released weights do while inside.

    Args:
        released: Those that an optimizer changes: of a sharded model, the shards.
        attackers: Who may begin meanwhile.
    """
    before = [parameter.detach().clone() for parameter in released]
    yield
    moves = [now.detach() - old for now, old in zip(released, before, strict=True)]
    for attacker in attackers:
        attacker.ride(moves)


def _copy_for(theta: ModelHandle, drawn: Drawn) -> ModelHandle:
    """The released weights as the attacker has them."""
    if not is_aware(theta):
        return theta.copy()
    mine = apart(theta, drawn.form)
    return mine if drawn.rank else plain(mine)


def _insert_adapters(model: ModelHandle, rank: int, *, seed: int) -> list[Tensor]:
    """LoRA beside every linear layer but the head: x D^T U^T, U zero at first (arXiv 2106.09685).

    They act through hooks, so that the weights of the copy stay those of the released model.
    """
    chance, adapters = torch.Generator().manual_seed(seed), []
    for layer in linear_layers(model):
        outputs, inputs = layer.weight.shape
        down_RI = (torch.rand(rank, inputs, generator=chance) * 2 - 1) / math.sqrt(inputs)
        pair = (down_RI.to(layer.weight), layer.weight.new_zeros(outputs, rank))
        down, up = (part.detach().requires_grad_() for part in pair)
        layer.register_forward_hook(_Beside(down, up))
        adapters += [down, up]
    return adapters


@dataclass(frozen=True, eq=False)
class _Beside:
    """What an adapter adds to a layer's output: its matrices are (R, I) and (O, R)."""

    down: Tensor
    up: Tensor

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + inputs[0] @ self.down.T @ self.up.T


def _own_head(model: ModelHandle) -> list[nn.Parameter]:
    """The head's parameters, which whoever trains adapters trains along if it is no embedding."""
    return list(model.head.parameters()) if has_own_head(model) else []
