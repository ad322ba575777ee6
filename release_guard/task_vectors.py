"""What fine-tuning changed, seen from the public base: where it lies and what it merges to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from release_guard.anatomy import anatomy
from release_guard.errors import ImmunizationError, ModelError
from release_guard.ingredients import head_names
from release_guard.modalities import Batch, ModelHandle, State
from release_guard.policy import Policy
from release_guard.realign import absorbed, can_be_turned, realign
from release_guard.trapping import along, largest, loss_with, negated

Importance = Literal["tau", "taylor", "theta"]
Masked = Literal["base", "zero"]

_SHARES = 0.3, 0.6  # of the way from the base, at which merges are looked at


def public_base(model: ModelHandle, policy: Policy) -> ModelHandle:
    """What the model was made from, with the model's data.

    Raises:
        ImmunizationError: There is none, several, or it is the model itself.
        ModelError: It cannot be loaded, or has other shapes.
    """
    named = {target.base or policy.red_team.ancestor for target in policy.merge_targets}
    if len(named) > 1:
        raise ImmunizationError("all merge targets must have the same base")
    (source,) = named
    if source is None or source == "undefended":
        advice = "name the public model it was made from as merge_targets.base"
        raise ImmunizationError(f"it is not known what the model came from; {advice}")
    return model.peer(source)


def merged_names(model: ModelHandle) -> list[str]:
    """Weights that are merged: all but the last layer's, of which each task keeps its own."""
    heads = head_names(model)
    return [name for name, _ in model.module.named_parameters() if name not in heads]


def by_family(model: ModelHandle) -> dict[str, list[str]]:
    """Weight matrices of attention and of MLPs; all layers together where those are not known."""
    try:
        body = anatomy(model.module)
    except ModelError:
        named = model.module.named_modules()
        layers = [name for name, part in named if isinstance(part, nn.Linear | nn.Conv2d)]
        heads = head_names(model)
        return {
            "all layers": [f"{name}.weight" for name in layers if f"{name}.weight" not in heads]
        }
    return {
        family: [f"{layer}.weight" for part in parts for layer in part.layers]
        for family, parts in (("attention", body.attentions), ("MLP", body.mlps))
    }


def matrix_names(model: ModelHandle) -> list[str]:
    """All of them."""
    return [name for names in by_family(model).values() for name in names]


def cosine(one: State, other: State, anchor: State, names: Sequence[str]) -> float:
    """Cosine of two task vectors."""
    deltas = [
        torch.cat([(state[name] - anchor[name]).double().flatten() for name in names])
        for state in (one, other)
    ]
    return float(nn.functional.cosine_similarity(deltas[0], deltas[1], dim=0))


def share_unmoved(state: State, anchor: State, names: Sequence[str]) -> float:
    """Share of the entries that are the base's: a mask that was taken back shows here."""
    same = sum(int((state[name] == anchor[name]).sum()) for name in names)
    return same / sum(anchor[name].numel() for name in names)


def near_base(model: ModelHandle, anchor: State) -> tuple[State, State]:
    """The model's weights and the base's, as whoever merges compares them: realigned.

    Rotated too where it is known how; as they are where nobody knows the parts.
    """
    state = model.state()
    try:
        body = anatomy(model.module)
    except ModelError:
        return state, anchor
    if not head_names(model) or not can_be_turned(body, state):
        return realign(state, anchor, body, "joint"), anchor
    plain = absorbed(anchor, body)
    return realign(state, plain, body, "rotated"), plain


def merged_loss(
    model: ModelHandle, state: Mapping[str, Tensor], anchor: State, batch: Batch
) -> float:
    """Mean loss of the task after .3 and .6 of the way from the base, in nats."""
    weights = {name: state[name] for name, _ in model.module.named_parameters()}
    with torch.no_grad():
        losses = [
            loss_with(model, along(anchor, weights, dict.fromkeys(merged_names(model), s)), batch)
            for s in _SHARES
        ]
    return torch.stack(losses).mean().item()


@dataclass(frozen=True)
class Taken:
    """MergeGuard's second stage: parts of a task that are given back to the base, untrained.

    Attributes:
        beta: How much of each entry; 1: all of it, more negates it.
        share: Of the entries of each matrix, those that matter most.
        critical: Share of the matrices that stay as they are: those whose loss costs most.
        importance: By what an entry matters: by what the task changed, by that times the gradient,
            or by its size.
        masked_by: How a matrix is taken away to see what it costs: the base's, or zero.
    """

    beta: float
    share: float
    critical: float
    importance: Importance
    masked_by: Masked

    def back(self, model: ModelHandle, anchor: State, batch: Batch) -> ModelHandle:
        """A copy without those parts.

        Args:
            model: The fine-tune.
            anchor: The base's weights.
            batch: Examples of the task.
        """
        names, state = matrix_names(model), model.state()
        costs = {name: self._cost(model, anchor, name, batch) for name in names}
        spared = sorted(names, key=lambda name: -costs[name])[: round(self.critical * len(names))]
        matters = self._importance(model, anchor, names, batch)
        for name in names:
            if name not in spared:
                mask = largest(matters[name], self.share)
                state[name] = negated(anchor[name], state[name], mask, self.beta)
        less = model.copy()
        less.load_state(state)
        return less

    def _cost(self, model: ModelHandle, anchor: State, name: str, batch: Batch) -> float:
        """Loss of the task without one matrix."""
        other = torch.zeros_like(anchor[name]) if self.masked_by == "zero" else anchor[name]
        with torch.no_grad():
            return float(loss_with(model, {name: other}, batch))

    def _importance(
        self, model: ModelHandle, anchor: State, names: Sequence[str], batch: Batch
    ) -> dict[str, Tensor]:
        weights = dict(model.module.named_parameters())
        if self.importance == "theta":
            return {name: weights[name].detach().abs() for name in names}
        changes = {name: (weights[name].detach() - anchor[name]).abs() for name in names}
        if self.importance == "tau":
            return changes
        slopes = torch.autograd.grad(model.loss(batch), [weights[name] for name in names])
        return {name: changes[name] * one.abs() for name, one in zip(names, slopes, strict=True)}
