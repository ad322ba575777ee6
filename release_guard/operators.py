"""What a simulated attacker trains, as functions of the released weights, and losses at them.

An operator adds what was learnt (phi) to the released weights (theta); phi at its start changes
nothing. So at a fixed phi a gradient in theta is the gradient in the adapted weights.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from release_guard.modalities import Batch, ModelHandle, Painter
from release_guard.policy import Format
from release_guard.quantization import through

Weights = Mapping[str, Tensor]
Scope = Literal["cross_attention", "attention", "all"]

_SCOPES: Mapping[Scope, tuple[str, ...]] = {
    "cross_attention": (".attn2.",),
    "attention": (".attn1.", ".attn2."),
}


class Operator(ABC):
    """A way to adapt a model."""

    @abstractmethod
    def begin(self, theta: Weights, *, seed: int) -> dict[str, Tensor]:
        """What is learnt, before anything is."""

    @abstractmethod
    def adapted(self, theta: Weights, phi: Weights) -> dict[str, Tensor]:
        """The weights that it changes, as they are then; differentiable in both."""


@dataclass(frozen=True)
class Full(Operator):
    """Fine-tuning of these weights."""

    names: tuple[str, ...]

    def begin(self, theta: Weights, *, seed: int) -> dict[str, Tensor]:
        del seed
        return {name: torch.zeros_like(theta[name]) for name in self.names}

    def adapted(self, theta: Weights, phi: Weights) -> dict[str, Tensor]:
        return {name: theta[name] + phi[name] for name in self.names}


@dataclass(frozen=True)
class LowRank(Operator):
    """LoRA beside these weights: W + U D, U zero at first (arXiv 2106.09685, section 4.1)."""

    names: tuple[str, ...]
    rank: int

    def begin(self, theta: Weights, *, seed: int) -> dict[str, Tensor]:
        chance = torch.Generator().manual_seed(seed)
        phi = {}
        for name in self.names:
            outputs, inputs = theta[name].flatten(start_dim=1).shape
            down_RI = torch.rand(self.rank, inputs, generator=chance) * 2 - 1
            phi[f"{name} down"] = (down_RI / math.sqrt(inputs)).to(theta[name])
            phi[f"{name} up"] = theta[name].new_zeros(outputs, self.rank)
        return phi

    def adapted(self, theta: Weights, phi: Weights) -> dict[str, Tensor]:
        return {
            name: theta[name] + (phi[f"{name} up"] @ phi[f"{name} down"]).view_as(theta[name])
            for name in self.names
        }


@dataclass(frozen=True)
class Words(Operator):
    """Textual inversion of these words: rows of the token embedding (arXiv 2208.01618)."""

    name: str
    tokens: tuple[int, ...]

    def begin(self, theta: Weights, *, seed: int) -> dict[str, Tensor]:
        del seed
        return {self.name: theta[self.name].new_zeros(len(self.tokens), theta[self.name].shape[1])}

    def adapted(self, theta: Weights, phi: Weights) -> dict[str, Tensor]:
        rows = torch.tensor(self.tokens, device=theta[self.name].device)
        return {self.name: theta[self.name].index_add(0, rows, phi[self.name])}


def gradients_at(
    model: ModelHandle,
    loss: Callable[[Batch], Tensor],
    weights: Weights,
    batch: Batch,
    wrt: Sequence[Tensor],
    *,
    twice: bool = False,
) -> tuple[float, tuple[Tensor, ...]]:
    """A loss at other weights, and its gradients; the model stays as it is.

    Args:
        model: Whose weights are exchanged meanwhile.
        loss: Of that model, on a batch.
        weights: Instead of its own, by name; the others are its own.
        batch: On what.
        wrt: In which tensors; `weights` are functions of them.
        twice: The gradients can be differentiated once more.
    """
    others = {f"network.{name}": tensor for name, tensor in weights.items()}
    found: tuple[float, tuple[Tensor, ...]] = torch.func.functional_call(
        _At(model.module, loss), others, (batch, wrt, twice)
    )
    return found


class Attacker:
    """One who adapts the released weights and is carried on while those move.

    Attributes:
        drawn: What it was made from.
        age: Steps it has taken.
    """

    def __init__(
        self, drawn: Mapping[str, Any], operator: Operator, theta: Weights, *, seed: int
    ) -> None:
        """Begin; `drawn` holds its learning rate as `rate` (Adam)."""
        self.drawn = dict(drawn)
        self.age = 0
        self._operator = operator
        self._form: Format = "fp32"
        self._rounded: tuple[str, ...] = ()
        begun = operator.begin(theta, seed=seed)
        self._phi = {name: leaf(part) for name, part in begun.items()}
        self._optimizer = torch.optim.Adam(list(self._phi.values()), lr=drawn["rate"], fused=True)

    def have(self, form: Format, rounded: Sequence[str]) -> None:
        """Have the released weights in a format from now on; what is learnt stays exact (QLoRA).

        Args:
            form: Which.
            rounded: Names of the weights that it rounds.
        """
        self._form, self._rounded = form, tuple(rounded)

    def weights(self, theta: Weights) -> dict[str, Tensor]:
        """What it has made of the weights that it changes or has rounded.

        The model that they are put into MUST be seen in fp32.
        """
        fixed = {name: weight.detach() for name, weight in theta.items()}
        seen = {name: through(fixed[name], self._form) for name in self._rounded}
        return seen | self._operator.adapted(fixed | seen, self._phi)

    def step(self, model: ModelHandle, theta: Weights, batch: Batch) -> None:
        """One step down the task loss."""
        values = list(self._phi.values())
        _, gradients = gradients_at(model, model.loss, self.weights(theta), batch, values)
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient
        self._optimizer.step()
        self.age += 1

    def kept(self) -> dict[str, Any]:
        """Everything that `restored` needs."""
        return {
            "drawn": self.drawn,
            "age": self.age,
            "phi": {name: value.detach() for name, value in self._phi.items()},
            "optimizer": self._optimizer.state_dict(),
        }

    def restored(self, kept: Mapping[str, Any]) -> Self:
        """Itself, as it was when that was kept."""
        self.age = kept["age"]
        for name, value in kept["phi"].items():
            self._phi[name].data.copy_(value)
        self._optimizer.load_state_dict(kept["optimizer"])
        return self


@dataclass(frozen=True)
class Objective:
    """What is asked of adapted weights while they are in the model's place.

    Attributes:
        model: Whose weights are exchanged.
        base: The model as it was.
    """

    model: ModelHandle
    base: ModelHandle

    @property
    def of_nothing(self) -> float:
        """The loss of saying nothing: no noise, or every class as likely."""
        painter = isinstance(self.model, Painter)
        return 1.0 if painter else math.log(self.model.head.out_features)

    def distance(self, batch: Batch, captions_of: Batch | None = None) -> Tensor:
        """How far what the model says is from what the base says: squared error, or divergence.

        Args:
            batch: Of what.
            captions_of: The base, a painter, is asked for what these captions say instead.
        """
        if isinstance(self.model, Painter) and isinstance(self.base, Painter):
            asked = batch if captions_of is None else {**batch, "tokens": captions_of["tokens"]}
            with torch.no_grad():
                wanted = self.base.predicted(asked)
            return (self.model.predicted(batch) - wanted).square().mean()
        with torch.no_grad():
            wanted_NC, _ = self.base.logits(batch)
        logits_NC, _ = self.model.logits(batch)
        return nn.functional.kl_div(
            logits_NC.log_softmax(dim=1), wanted_NC.softmax(dim=1), reduction="batchmean"
        )


def in_scope(model: ModelHandle, scope: Scope) -> tuple[str, ...]:
    """Names of a model's weights in a scope; all of a painter is its UNet.

    Raises:
        ValueError: There are none.
    """
    prefix = "unet." if isinstance(model, Painter) else ""
    marks = _SCOPES.get(scope, ("",))
    chosen = tuple(
        name
        for name, _ in model.module.named_parameters()
        if name.startswith(prefix) and any(mark in name for mark in marks)
    )
    if not chosen:
        raise ValueError(f'the model has no layers of scope {scope!r}; set it to "all"')
    return chosen


def leaf(tensor: Tensor) -> Tensor:
    """The same numbers, where a gradient ends."""
    return tensor.detach().requires_grad_()


class _At(nn.Module):
    """A loss whose gradient is taken while other weights are in their places.

    Activations that are computed again in the backward pass would else be computed from the
    model's own.
    """

    def __init__(self, network: nn.Module, loss: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.network = network
        self._loss = loss

    def forward(
        self, batch: Batch, wrt: Sequence[Tensor], twice: bool
    ) -> tuple[float, tuple[Tensor, ...]]:
        loss = self._loss(batch)
        gradients = torch.autograd.grad(
            loss, list(wrt), create_graph=twice, allow_unused=True, materialize_grads=True
        )
        return loss.item(), gradients
