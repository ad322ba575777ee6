"""Fine-tuning: the adversary trains the weights themselves."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from release_guard.adaptation import (
    OptimizerName,
    Recipe,
    ScheduleName,
    Scope,
    adapt,
    renew_blocks,
    select,
)
from release_guard.attacks import Attack, Choice, LogUniform, Tampered
from release_guard.modalities import ModelHandle
from release_guard.policy import Budget, Target


class Finetune(Attack):
    """Trains all weights, the head, or the last blocks, with any usual optimizer.

    The sweep SOPHON was tested against: five optimizers, several learning rates and batch sizes,
    with the head as it is or new, all layers or some.
    """

    paper = "https://arxiv.org/abs/2404.12699"
    expense = 2

    scope: Annotated[Scope, Choice(("all", "head", "last_k"))] = "all"
    """What is trained; last_k: the last blocks, the final normalisation and the head."""
    last_k: Annotated[int, Field(ge=1), Choice((1, 2, 4))] = 1
    """How many blocks that are."""
    head: Annotated[Literal["kept", "new"], Choice(("kept", "new"))] = "kept"
    """Start from the head's weights, or from new ones (Xavier uniform)."""
    new_blocks: Annotated[int, Field(ge=0), Choice((0, 1, 2))] = 0
    """How many of the last blocks start from new weights: a defence must not hide in a few."""
    optimizer: Annotated[
        OptimizerName, Choice(("sgd", "nesterov", "adam", "adamw", "adagrad", "adadelta"))
    ] = "adamw"
    lr: Annotated[float, Field(gt=0), LogUniform(1e-6, 1e-1)] = 1e-3
    """Highest learning rate of the schedule."""
    momentum: Annotated[float, Field(ge=0, lt=1), Choice((0.0, 0.9))] = 0.9
    """Of sgd and nesterov."""
    weight_decay: Annotated[float, Field(ge=0), Choice((0.0, 0.01, 0.1))] = 0.0
    schedule: Annotated[ScheduleName, Choice(("constant", "linear", "cosine", "one_cycle"))] = (
        "constant"
    )
    schedule_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps the schedule is laid over; none: the whole budget."""
    warmup: Annotated[int, Field(ge=0), Choice((0, 10, 100))] = 0
    """Steps over which the learning rate rises to its highest."""
    clip: Annotated[Annotated[float, Field(gt=0)] | None, Choice((None, 0.1, 1.0))] = None
    """Largest norm of the gradient; none: any."""
    batch: Annotated[int, Field(ge=1), Choice((16, 32, 64, 128))] = 32
    """Examples a step."""

    @field_validator("momentum")
    @classmethod
    def _nesterov_needs_it(cls, momentum: float, info: ValidationInfo) -> float:
        if momentum == 0 and info.data.get("optimizer") == "nesterov":
            raise ValueError("nesterov needs momentum above 0")
        return momentum

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
        tampered = model.copy()
        if self.head == "new":
            tampered.reinit_head(seed=seed)
        if self.new_blocks:
            renew_blocks(tampered, self.new_blocks, seed=seed)
        parameters = select(tampered, self.scope, last_k=self.last_k)
        costs = adapt(
            tampered, batches, self.recipe, budget=budget, grid_ratio=grid_ratio, seed=seed
        )
        for cost in costs:
            yield Tampered(tampered, cost, parameters)

    @property
    def recipe(self) -> Recipe:
        """How it trains."""
        return Recipe(
            lr=self.lr,
            optimizer=self.optimizer,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup=self.warmup,
            schedule_steps=self.schedule_steps,
            clip=self.clip,
        )
