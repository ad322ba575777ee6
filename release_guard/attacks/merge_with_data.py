"""Merge with data: the adversary has some examples, and lets them say how weights are merged."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from release_guard import merging
from release_guard.adaptation import num_examples
from release_guard.attacks import Choice, LogUniform, Transform
from release_guard.ingredients import Alignment, Ingredients, Swap, head_names, merged_targets
from release_guard.merging import State
from release_guard.modalities import Batch, ModelHandle, evaluating
from release_guard.policy import MergeTarget, Policy, Target

DataMethod = Literal["regmean", "fisher", "adamerging", "coefficients"]


class MergeWithData(Transform):
    """Merges the release with a donor, or with the public ancestor, by what examples say.

    A defence against averages need not stop a merge that solves for the same answers (RegMean), or
    that weighs every tensor on its own. Of each model's task a few batches are read; a concept's
    examples stand for both.
    """

    paper = "https://arxiv.org/abs/2212.09849"
    needs_ancestor = True
    modalities = ("image_classification", "causal_lm")

    method: Annotated[DataMethod, Choice(("regmean", "fisher", "adamerging", "coefficients"))] = (
        "regmean"
    )
    """regmean: linear layers that answer on each task as that task's model. fisher: each weight by
    how much each model needs it (https://arxiv.org/abs/2111.09832). adamerging: a weight for each
    tensor and model, so that answers become sure (https://arxiv.org/abs/2310.02575). coefficients:
    the same, so that answers become right; the only one that reads labels."""
    weight: Annotated[float, Field(gt=0), Choice((0.25, 0.5, 1.0, 2.0, 4.0))] = 1.0
    """Of the release beside the donor's 1, for regmean and fisher."""
    keep: Annotated[float, Field(ge=0, le=1), Choice((0.1, 0.5, 0.9, 0.95, 1.0))] = 0.9
    """Share of the products of different inputs that regmean heeds."""
    floor: Annotated[float, Field(gt=0), LogUniform(1e-6, 1e-1)] = 1e-3
    """What fisher adds to every weight's need, whose mean is 1."""
    start: Annotated[float, Field(ge=0, le=1), Choice((0.3, 0.5))] = 0.5
    """First weight of every tensor, for adamerging and coefficients."""
    lr: Annotated[float, Field(gt=0), LogUniform(1e-3, 1e-1)] = 2e-2
    """Learning rate of those weights (Adam)."""
    iterations: Annotated[int, Field(ge=1), Choice((50, 150, 500))] = 150
    """How often they are adjusted."""
    batch: Annotated[int, Field(ge=1), Choice((16, 32, 64))] = 32
    """Examples of each task that are read together."""
    examples: Annotated[int, Field(ge=1), Choice((100, 300, 1000))] = 300
    """About how many of each task are read; adjusting goes through them again and again."""
    realign: Annotated[Alignment, Choice(("none", "anchored", "joint", "rotated"))] = "joint"
    """As in `merge`."""
    swap: Annotated[Swap, Choice(("none", "attention", "mlp"))] = "none"
    """As in `merge`."""
    head: Annotated[Literal["kept", "merged"], Choice(("kept", "merged"))] = "kept"
    """As in `merge`."""

    def targets(self, policy: Policy) -> Sequence[Target]:
        """Merge targets, and concepts if there is a public ancestor."""
        return merged_targets(policy)

    def transform(
        self, model: ModelHandle, target: Target, *, seed: int, ancestor: ModelHandle | None
    ) -> ModelHandle:
        parts = Ingredients.of(model, target, ancestor)
        with torch.no_grad():
            parts = parts.realigned(model, self.realign, self.swap)
        students = self._with_examples(model, target, parts, seed)
        if self.method in {"regmean", "fisher"}:
            merged = self._in_closed_form(students, seed)
        else:
            merged = self._adjusted(parts.need_base(self.method), students)
        return parts.into(model, merged, keep_head=self.head == "kept")

    def _with_examples(
        self, model: ModelHandle, target: Target, parts: Ingredients, seed: int
    ) -> "list[_Student]":
        theirs = target.donor_dataset if isinstance(target, MergeTarget) else target.dataset
        students = []
        for state, source in ((parts.release, target.dataset), (parts.donor, theirs)):
            one = model.copy()
            one.load_state(state)
            batches = model.batches(source, "attack", size=self.batch, seed=seed)
            few = itertools.islice(batches, math.ceil(self.examples / self.batch))
            students.append(_Student(one, tuple(few)))
        return students

    def _in_closed_form(self, students: "Sequence[_Student]", seed: int) -> State:
        states, weights = [one.model.state() for one in students], (self.weight, 1.0)
        if self.method == "regmean":
            read = [one.grams() for one in students]
            return merging.regmean(states, read, weights, keep=self.keep)
        needs = [one.information(seed=seed) for one in students]
        return merging.fisher(states, needs, weights, floor=self.floor)

    def _adjusted(self, base: State, students: "Sequence[_Student]") -> State:
        """Merge with a weight for each tensor and model, adjusted on one batch after another."""
        states = [one.model.state() for one in students]
        own = head_names(students[0].model) if self.head == "kept" else ()
        names = [name for name, _ in students[0].model.module.named_parameters()]
        shares_PM = torch.full((len(names), len(states)), self.start, requires_grad=True)
        optimizer = torch.optim.Adam([shares_PM], lr=self.lr)
        loss = entropy if self.method == "adamerging" else nn.functional.cross_entropy

        def merged() -> State:
            return merging.layerwise(base, states, dict(zip(names, shares_PM, strict=True)))

        for number in range(self.iterations):
            state = merged()
            weights = {name: state[name] for name in names}
            losses = [
                loss(*one.answers(weights | {name: alone[name] for name in own}, number))
                for one, alone in zip(students, states, strict=True)
            ]
            optimizer.zero_grad()
            torch.autograd.backward(torch.stack(losses).sum())
            optimizer.step()
            with torch.no_grad():
                shares_PM.clamp_(0, 1)
        return merging.linear(states, (1, 1)) | {name: merged()[name] for name in names}


@dataclass(frozen=True)
class _Student:
    """A model that is merged, and examples of its task."""

    model: ModelHandle
    batches: tuple[Batch, ...]

    def grams(self) -> dict[str, Tensor]:
        """Mean product (I, I) of each linear layer's inputs, with a last one of 1 for the bias."""
        sums: dict[str, Tensor] = {}
        rows: dict[str, int] = {}
        heeded: list[Tensor] = []  # positions of the batch that are no padding

        def reader(name: str) -> Callable[[nn.Linear, tuple[Tensor, ...]], None]:
            def read(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
                is_padded = heeded and inputs[0].shape[:2] == heeded[-1].shape
                rows_NI = inputs[0][heeded[-1]] if is_padded else inputs[0].flatten(0, -2)
                if layer.bias is not None:
                    rows_NI = nn.functional.pad(rows_NI, (0, 1), value=1)
                rows_NI = rows_NI.double()
                sums[name] = sums.get(name, 0) + rows_NI.T @ rows_NI
                rows[name] = rows.get(name, 0) + len(rows_NI)

            return read

        skipped = None if head_names(self.model) else self.model.head
        hooks = [
            layer.register_forward_pre_hook(reader(name))
            for name, layer in self.model.module.named_modules()
            if isinstance(layer, nn.Linear) and layer is not skipped
        ]
        with evaluating(self.model.module):
            for batch in self.batches:
                heeded += [batch["attention_mask"].bool()] if "attention_mask" in batch else []
                self.model.logits(batch)
        for hook in hooks:
            hook.remove()
        return {name: total / rows[name] for name, total in sums.items()}

    def information(self, *, seed: int) -> dict[str, Tensor]:
        """Diagonal of the Fisher information: squared gradients at labels that the model draws."""
        named = dict(self.model.module.named_parameters())
        sums = {name: torch.zeros_like(weight) for name, weight in named.items()}
        random = torch.Generator(self.model.device).manual_seed(seed)
        for example in self._examples():
            logits_NC, _ = self.model.logits(example)
            drawn_N = logits_NC.detach().softmax(dim=1).multinomial(1, generator=random)[:, 0]
            loss = nn.functional.cross_entropy(logits_NC, drawn_N, reduction="sum")
            slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for name, slope in zip(named, slopes, strict=True):
                if slope is not None:
                    sums[name] += slope.square()
        return sums

    def answers(self, weights: Mapping[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
        """Logits and labels of one of the batches, with other weights; differentiable in them."""
        batch = self.batches[number % len(self.batches)]
        named = {f"module.{name}": weight for name, weight in weights.items()}
        found: tuple[Tensor, Tensor] = functional_call(_Answering(self.model), named, (batch,))
        return found

    def _examples(self) -> Iterator[Batch]:
        for batch in self.batches:
            for row in range(num_examples(batch)):
                yield {name: values[row : row + 1] for name, values in batch.items()}


class _Answering(nn.Module):
    """A handle as a module, so that it can be run with other weights."""

    def __init__(self, model: ModelHandle) -> None:
        super().__init__()
        self.module = model.module
        self._model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._model.logits(batch)


def entropy(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Mean entropy of the predictions; the labels are not looked at."""
    del labels_N
    chances_NC = logits_NC.softmax(dim=1)
    return -(chances_NC * logits_NC.log_softmax(dim=1)).sum(dim=1).mean()
