"""Training that immunizes: seeded, counted, kept, guarded, and taken up again after a kill.

A step is one update of the weights to be released, with all that a stage does for it.
"""

import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from release_guard.adaptation import Randomness
from release_guard.data import Split
from release_guard.errors import ImmunizationError
from release_guard.evidence import Cost
from release_guard.modalities import Batch, ModelHandle, State
from release_guard.policy import Format, Policy
from release_guard.quantization import aware, is_aware, require_layers, turn
from release_guard.sharding import forms
from release_guard.shards import agree, are_finite, leads, parted, portable, world

_CAN_RECOMPUTE = ("supports_gradient_checkpointing", "_supports_gradient_checkpointing")
_PASS = 6  # floating-point operations a weight and position: forward 2, backward 4


@dataclass(frozen=True)
class Pace:
    """How a training goes.

    Attributes:
        steps: In all.
        probe_every: Steps between looks at the retained score.
        keep_every: Steps between checkpoints.
        probed: Examples of the split `guard` that are scored at a look.
        autocast: Forward passes in bfloat16, weights and their updates in full precision.
        checkpointing: Activations are computed again in the backward pass instead of being held.
    """

    steps: int
    probe_every: int = 50
    keep_every: int = 100
    probed: int = 2_000
    autocast: bool = False
    checkpointing: bool = False


class Training(ABC):
    """All that changes while a stage runs, so that it can be kept and taken up again.

    Every random choice MUST come from `seed` or `batch`: then a resumed run equals one that was
    never interrupted.

    Where the policy speaks of other formats than fp32, `theta` is seen through one of them at each
    step, drawn with the policy's weights: its weights are rounded whenever they are used, and
    gradients go straight through. Its copies turn with it.

    Attributes:
        theta: The weights to be released, in training mode.
        base: A copy of the model as it was, in evaluation mode.
        step: How many steps are done.
    """

    def __init__(self, stage: str, about: str, base: ModelHandle, policy: Policy) -> None:
        """Begin.

        Args:
            stage: Its name.
            about: Everything else that fixes the outcome, so that no other training's checkpoint is
                taken up.
            base: The model as it is.
            policy: Its data, seed and retained margin.
        """
        self.stage = stage
        self.policy = policy
        self.base = base.copy()
        self.base.module.eval()
        self.theta = _seen_in(policy.seen_in, base)
        self.theta.module.train()
        self.step = 0
        parts = "parted " if world() > 1 else ""  # the same to rounding only
        self._about = f"{policy.digest} {parts}{about}"
        self._good: State | None = None
        self._spent = Cost(steps=0, samples=0, flops=0, seconds=0.0)

    @abstractmethod
    def advance(self) -> Mapping[str, float]:
        """One step; its losses by name."""

    def form(self, purpose: str) -> Format:
        """A format drawn for this step and purpose, with the policy's weights."""
        formats = self.policy.seen_in
        if len(formats) == 1:
            return next(iter(formats))
        chance = random.Random(self.seed(f"format/{purpose}"))  # noqa: S311
        return chance.choices(list(formats), list(formats.values()))[0]

    @abstractmethod
    def changing(self) -> dict[str, Any]:
        """Everything that changes beside `theta` and `step`: tensors, numbers, lists, dicts."""

    @abstractmethod
    def restore(self, kept: Mapping[str, Any]) -> None:
        """Put back what `changing` gave, on the right device."""

    def seed(self, purpose: str) -> int:
        """A number that depends on the policy's seed, this step and what it is for."""
        return random.Random(f"{self.policy.seed}/{self.step}/{purpose}").getrandbits(31)  # noqa: S311

    def batch(
        self, dataset: str, split: Split, *, size: int, purpose: str, passes: float = 1
    ) -> Batch:
        """A batch drawn for this step and purpose, and paid for.

        Args:
            dataset: Whose examples.
            split: `immunize` of a concept, `retain` of the retained data.
            size: How many.
            purpose: What for; another purpose draws others.
            passes: Forward and backward passes it is used for.
        """
        seed = self.seed(purpose)
        drawn = next(self.theta.batches(dataset, split, size=size, seed=seed))
        self.pay(drawn, passes=passes)
        return drawn

    def pay(self, batch: Batch, *, passes: float = 1) -> None:
        """Count forward and backward passes over a batch."""
        weights = sum(weight.numel() for weight in self.theta.module.parameters())
        self._spent += Cost(
            steps=0,
            samples=round(passes * len(next(iter(batch.values())))),
            flops=passes * _PASS * weights * self.theta.units(batch),
            seconds=0,
        )

    def complete(
        self,
        pace: Pace,
        directory: Path,
        progress: Callable[[int, int, str], None],
        spend: Callable[[Cost], None],
    ) -> ModelHandle:
        """Train from the last checkpoint on; the last state that kept the retained score.

        Raises:
            ImmunizationError: A loss or a weight is not finite any more (the last checkpoint was
                before), or no state kept the retained score.
        """
        if pace.checkpointing:
            for module in forms(self.theta):
                recompute_activations(module)
        start_scores = self._scores(_seen_in(self.policy.seen_in, self.base), pace.probed)
        self._resume(directory)
        while self.step < pace.steps:
            started = time.perf_counter()
            line = self._advance(autocast=pace.autocast)
            if self.step % pace.probe_every == 0 or self.step == pace.steps:
                scores = self._scores(self.theta, pace.probed)
                lost = [start - now for start, now in zip(start_scores, scores, strict=True)]
                if max(lost) <= self.policy.retain.margin:
                    self._good = self.theta.state()
            self._spent += Cost(steps=1, samples=0, flops=0, seconds=time.perf_counter() - started)
            if self.step % pace.keep_every == 0:
                self._keep(directory)
            progress(self.step, pace.steps, line)
        spend(self._spent)
        if self._good is None:
            raise ImmunizationError(
                f"{self.stage}: at no look was the retained score within retain.margin; weaken the "
                "stage, or raise the margin"
            )
        immunized = self.base.copy()
        immunized.load_state(self._good)
        return immunized

    def _advance(self, *, autocast: bool) -> str:
        device = self.theta.device
        turn(self.theta, self.form("step"))
        lower = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
        with Randomness(self.seed("noise"), device).used(), lower:  # what dropout draws
            losses = self.advance()
        strange = sorted(name for name, loss in losses.items() if not math.isfinite(loss))
        if strange or not are_finite(self.theta.module):
            what = f"{strange[0]} is not finite" if strange else "the weights are not finite"
            raise ImmunizationError(
                f"{self.stage}: {what} at step {self.step + 1}; lower the learning rates; the "
                "checkpoint before it is kept"
            )
        self.step += 1
        return ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())

    def _keep(self, directory: Path) -> None:
        """Write everything that changes, whole or not at all."""
        state = {
            "about": self._about,
            "step": self.step,
            "theta": self.theta.state(),
            "good": self._good,
            "spent": self._spent.model_dump(),
            "changing": self.changing(),
        }
        state = portable(state)
        if not leads():
            return
        partial = directory / f"{self.stage}.partial"
        torch.save(state, partial)
        partial.replace(directory / f"{self.stage}.pt")

    def _resume(self, directory: Path) -> None:
        """Go on from a checkpoint of exactly this stage and policy, if there is one."""
        path = directory / f"{self.stage}.pt"
        if path.exists():
            state = torch.load(path, weights_only=True, map_location=self.theta.device)
            if state["about"] == self._about:
                state = parted(state)
                self.step, self._good = state["step"], state["good"]
                self._spent = Cost(**state["spent"])
                self.theta.load_state(state["theta"])
                self.restore(state["changing"])
        if not agree(self.step):
            raise ImmunizationError(
                f"{self.stage}: the processes see different checkpoints; {directory} has to be a "
                "folder that all of them share"
            )

    def _scores(self, model: ModelHandle, limit: int) -> Sequence[float]:
        """The retained score in each format that stages see and that is published."""
        training = model.module.training
        model.module.eval()
        means = []
        for form in self.policy.precisions if is_aware(model) else ("fp32",):
            turn(model, form)
            scores = model.scores(self.policy.retain.dataset, "guard", limit=limit)
            means.append(sum(scores) / len(scores))
        model.module.train(training)
        return means


def _seen_in(formats: Iterable[Format], model: ModelHandle) -> ModelHandle:
    """A copy that can be turned to these formats; an ordinary one if there is none to turn to."""
    if set(formats) == {"fp32"}:
        return model.copy()
    for form in formats:
        require_layers(model, form)
    return aware(model)


def update(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One update at this learning rate; the gradients are gone afterwards."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def divided(batch: Batch, size: int) -> tuple[Batch, Batch]:
    """The first `size` examples of a batch, and the others."""
    first = {name: value[:size] for name, value in batch.items()}
    return first, {name: value[size:] for name, value in batch.items()}


def recompute_activations(module: nn.Module) -> None:
    """Have every part that can do so compute its activations again in the backward pass.

    Raises:
        ImmunizationError: There is none.
    """
    parts: Iterator[Any] = module.modules()
    able = [part for part in parts if any(getattr(part, name, False) for name in _CAN_RECOMPUTE)]
    for part in able:
        if hasattr(part, "activation_checkpointing_enable"):  # transformers
            part.activation_checkpointing_enable({"use_reentrant": False})
        else:  # diffusers
            part.enable_gradient_checkpointing()
    if not able:
        raise ImmunizationError(
            f"checkpointing: {type(module).__name__} cannot compute its activations again; leave "
            "the option out"
        )
