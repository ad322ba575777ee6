"""Distillation: the adversary teaches a fresh model what the release computes, then trains that.

Shapes: N predictions, C classes or vocabulary entries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from release_guard.adaptation import (
    Meter,
    OptimizerName,
    Randomness,
    Recipe,
    count_trainable,
    descend,
    flops_per_unit,
    make_optimizer,
    num_examples,
    scheduled_lr,
)
from release_guard.attacks import Attack, Choice, LogUniform, Tampered
from release_guard.evidence import Cost
from release_guard.modalities import Batch, ModelHandle, evaluating
from release_guard.policy import Budget, Target

_NO_VARIANCE = 1e-12


class Distill(Attack):
    """A student of the same configuration, taught logits and hidden states, then fine-tuned.

    A defence that lies in the shape of the weights, not in what they compute, does not reach the
    student. It sees the attack's examples and, every other step, blends of them: pictures mixed,
    tokens of two texts interleaved. The teacher's answers serve as labels there. Hidden states:
    https://arxiv.org/abs/1412.6550.
    """

    paper = "https://arxiv.org/abs/1503.02531"
    expense = 4
    modalities = ("image_classification", "causal_lm")

    share: Annotated[float, Field(gt=0, lt=1), Choice((0.25, 0.5, 0.75))] = 0.5
    """Part of the budget spent on teaching; the rest is for fine-tuning the student."""
    temperature: Annotated[float, Field(gt=0), Choice((1.0, 2.0, 4.0))] = 2.0
    """Of both models' logits, which the loss compares (section 2)."""
    hidden: Annotated[float, Field(ge=0), Choice((0.0, 1.0, 10.0))] = 10.0
    """Weight of the squared difference behind each block, relative to the teacher's variance."""
    optimizer: Annotated[OptimizerName, Choice(("sgd", "nesterov", "adam", "adamw"))] = "adamw"
    lr: Annotated[float, Field(gt=0), LogUniform(1e-4, 1e-1)] = 5e-3
    """Highest learning rate; constant after the warm-up."""
    warmup: Annotated[int, Field(ge=0), Choice((0, 10, 100))] = 10
    """Steps over which the learning rate rises to its highest."""
    clip: Annotated[Annotated[float, Field(gt=0)] | None, Choice((None, 0.1, 1.0))] = 1.0
    """Largest norm of the gradient; none: any."""
    batch: Annotated[int, Field(ge=1), Choice((16, 32, 64, 128))] = 64
    """Examples a step."""

    def tamper(
        self,
        model: ModelHandle,
        target: Target,
        *,
        budget: Budget,
        grid_ratio: float,
        seed: int,
        ancestor: ModelHandle | None = None,
    ) -> Iterator[Tampered]:
        del ancestor
        batches = model.batches(target.dataset, "attack", size=self.batch, seed=seed)
        student = model.fresh(seed=seed)
        student.module.requires_grad_(True)
        optimizer = make_optimizer(list(student.module.parameters()), self._recipe)
        meter, randomness = Meter(budget, grid_ratio), Randomness(seed, model.device)
        student.module.train()
        while meter.affords(price := self._price(student, batch := next(batches), meter)):
            for group in optimizer.param_groups:
                group["lr"] = scheduled_lr(self._recipe, meter.spent.steps, meter.progress)
            with randomness.used():
                loss = self._loss(student, model, batch, meter)
                descend(optimizer, loss, clip=self.clip)
            meter.pay(price)
            if meter.due:
                student.module.eval()
                yield Tampered(student, meter.shown(), count_trainable(student.module))
                student.module.train()
                meter.resume()
        student.module.eval()
        if meter.unshown:
            yield Tampered(student, meter.shown(), count_trainable(student.module))

    @property
    def _recipe(self) -> Recipe:
        return Recipe(lr=self.lr, optimizer=self.optimizer, warmup=self.warmup)

    def _price(self, student: ModelHandle, batch: Batch, meter: Meter) -> Cost:
        """A step; a lesson takes a forward pass of the teacher, which is as large, besides."""
        flops_a_unit = flops_per_unit(student.module)
        if self._teaches(meter):
            flops_a_unit += 2 * count_trainable(student.module)
        flops = float(flops_a_unit * student.units(batch))
        return Cost(steps=1, samples=num_examples(batch), flops=flops, seconds=0)

    def _teaches(self, meter: Meter) -> bool:
        return meter.progress < self.share

    def _loss(
        self, student: ModelHandle, teacher: ModelHandle, batch: Batch, meter: Meter
    ) -> Tensor:
        if not self._teaches(meter):
            return student.loss(batch)
        is_blend = meter.spent.steps % 2 == 1
        return self._lesson(student, teacher, blended(batch) if is_blend else batch)

    def _lesson(self, student: ModelHandle, teacher: ModelHandle, batch: Batch) -> Tensor:
        """How far the student is from its teacher on a batch, differentiable."""
        with evaluating(teacher.module), _hidden(teacher) as wanted:
            answers_NC, _ = teacher.logits(batch)
        with _hidden(student) as found:
            guesses_NC, _ = student.logits(batch)
        loss = divergence(answers_NC, guesses_NC, temperature=self.temperature)
        for mine, theirs in zip(found, wanted, strict=True):
            distance = (mine - theirs).square().mean() / theirs.var().clamp_min(_NO_VARIANCE)
            loss = loss + self.hidden / len(wanted) * distance
        return loss


def divergence(answers_NC: Tensor, guesses_NC: Tensor, *, temperature: float) -> Tensor:
    """Mean Kullback-Leibler divergence of guesses from answers, both softened, scaled by T^2."""
    log_answers_NC, log_guesses_NC = (
        (logits_NC / temperature).log_softmax(dim=1) for logits_NC in (answers_NC, guesses_NC)
    )
    loss = nn.functional.kl_div(
        log_guesses_NC, log_answers_NC, reduction="batchmean", log_target=True
    )
    return loss * temperature**2


def blended(batch: Batch) -> Batch:
    """The same batch with inputs between two examples; where they count stays as it is.

    Numbers are mixed in a proportion drawn for each example, tokens place by place.
    """
    name, *_ = batch  # inputs come first
    inputs = batch[name]
    others = inputs[torch.randperm(len(inputs), device=inputs.device)]
    if inputs.is_floating_point():
        each = (len(inputs), *[1] * (inputs.dim() - 1))
        mixed = others.lerp(inputs, torch.rand(each, device=inputs.device))
    else:
        mixed = torch.where(torch.rand(inputs.shape, device=inputs.device) < 1 / 2, inputs, others)
    return {**batch, name: mixed}


@contextmanager
def _hidden(model: ModelHandle) -> Iterator[list[Tensor]]:
    """What stands behind each block after a forward pass."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
