"""Merge: the adversary adds or averages weights, and trains nothing."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from release_guard import merging
from release_guard.attacks import Choice, Transform
from release_guard.ingredients import Alignment, Ingredients, Swap, merged_targets
from release_guard.modalities import ModelHandle
from release_guard.policy import Policy, Target

MergeMethod = Literal["linear", "slerp", "task_arithmetic", "ties", "dare", "dare_ties"]
_TENTHS = tuple(number / 10 for number in range(1, 16))


class Merge(Transform):
    """Merges the release with a donor, or a concept's release with the public ancestor.

    Neither data nor training. A defence that keeps the function (permuted neurons, mixed heads, a
    rotated residual stream) stops plain merges, and is undone by realigning to the ancestor first.
    A donor that weighs too little gets back the release itself: whoever lists weights should see
    to it that the donor's own task survives the merge.
    """

    paper = "https://arxiv.org/abs/2306.01708"
    needs_ancestor = True

    method: Annotated[
        MergeMethod,
        Choice(("linear", "slerp", "task_arithmetic", "ties", "dare", "dare_ties")),
    ] = "task_arithmetic"
    """linear: weighted mean. slerp: along the arc between both. The others work on differences from
    the common ancestor. task_arithmetic: added. ties: trimmed, then the mean of those that agree in
    sign. dare: dropped at random, the others scaled up, then added; dare_ties: then as ties."""
    weight: Annotated[float, Field(gt=0, le=2), Choice(_TENTHS)] = 0.5
    """Of the release; a mean divides it by the sum of both."""
    donor_weight: Annotated[float, Field(ge=0, le=2), Choice(_TENTHS)] = 0.5
    """Of the donor."""
    density: Annotated[float, Field(gt=0, le=1), Choice((0.1, 0.2, 0.3, 0.5, 0.9))] = 0.5
    """Share of the differences that ties keeps of each tensor, the largest, and dare at random."""
    scale: Annotated[float, Field(gt=0, le=2), Choice((0.5, 0.8, 1.0, 1.2, 1.5))] = 1.0
    """Factor of what ties and dare_ties add to the ancestor (their lambda)."""
    realign: Annotated[Alignment, Choice(("none", "anchored", "joint", "rotated"))] = "joint"
    """Before that, bring the release near the ancestor. anchored: least squares for each head.
    joint: exact on the function; heads and neurons. rotated: the residual stream as well."""
    swap: Annotated[Swap, Choice(("none", "attention", "mlp"))] = "none"
    """Take all attention, or all neurons, from the ancestor instead of the release."""
    head: Annotated[Literal["kept", "merged"], Choice(("kept", "merged"))] = "kept"
    """The last layer: the release's own, as each task has its own, or merged like the others."""

    def targets(self, policy: Policy) -> Sequence[Target]:
        """Merge targets, and concepts if there is a public ancestor."""
        return merged_targets(policy)

    def transform(
        self, model: ModelHandle, target: Target, *, seed: int, ancestor: ModelHandle | None
    ) -> ModelHandle:
        with torch.no_grad():
            parts = Ingredients.of(model, target, ancestor)
            parts = parts.realigned(model, self.realign, self.swap)
            merged = self._merged(parts, seed)
            return parts.into(model, merged, keep_head=self.head == "kept")

    def _merged(self, parts: Ingredients, seed: int) -> merging.State:
        both, weights = [parts.release, parts.donor], [self.weight, self.donor_weight]
        if self.method == "linear":
            return merging.linear(both, weights)
        if self.method == "slerp":
            return merging.slerp(parts.release, parts.donor, self.donor_weight / sum(weights))
        base, density = parts.need_base(self.method), self.density
        if self.method.startswith("dare"):
            both = [
                merging.dare(base, state, density=density, seed=2 * seed + number)
                for number, state in enumerate(both)
            ]
            density = 1.0  # it is thin already
        if self.method.endswith("ties"):
            return merging.ties(base, both, weights, density=density, scale=self.scale)
        return merging.task_arithmetic(base, both, weights)
