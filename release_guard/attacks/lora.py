"""LoRA: the adversary trains low-rank adapters beside frozen weights."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from release_guard.adaptation import (
    OptimizerName,
    Randomness,
    Recipe,
    ScheduleName,
    adapt,
    count_trainable,
    last_blocks,
)
from release_guard.attacks import Attack, Choice, LogUniform, Tampered
from release_guard.errors import PolicyError
from release_guard.evidence import Cost
from release_guard.modalities import ModelHandle
from release_guard.plugins import advise
from release_guard.policy import Budget, Target
from release_guard.quantization import at, plain, quiet_bitsandbytes


class Lora(Attack):
    """Adapters in the blocks' linear and convolution layers, with the head or without.

    They know nothing of any adapter that the defender trained: a defence tested on its own adapter
    only is not tested. At int8 and nf4 this is QLoRA (https://arxiv.org/abs/2305.14314).
    """

    paper = "https://arxiv.org/abs/2106.09685"
    expense = 3

    rank: Annotated[int, Field(ge=1), Choice((1, 4, 8, 16, 64))] = 8
    alpha: Annotated[float, Field(gt=0), Choice((4, 8, 16, 32))] = 16
    """Updates are scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1), Choice((0.0, 0.1))] = 0.0
    layers: tuple[str, ...] = ()
    """Last names of the layers that get an adapter, such as q_proj; none: every one in scope."""
    scope: Annotated[Literal["all", "last_k"], Choice(("all", "last_k"))] = "all"
    """Blocks that get adapters."""
    last_k: Annotated[int, Field(ge=1), Choice((1, 2, 4))] = 1
    """How many blocks that are, from the end."""
    head: Annotated[Literal["kept", "new", "frozen"], Choice(("kept", "new", "frozen"))] = "kept"
    """Train the head along, from its weights or from new ones, or not. One that is tied to the
    input embedding is never trained: that would train the embedding."""
    start: Annotated[Literal["fresh", "merged"], Choice(("fresh", "merged"))] = "fresh"
    """fresh: one adapter. merged: half of the budget goes into an adapter that is merged into the
    weights, the rest into another one beside them, with a new optimizer and schedule."""
    packed: bool = False
    """Round to bitsandbytes' nf4 first, whatever the precision; train beside that, score on it."""
    optimizer: Annotated[
        OptimizerName, Choice(("sgd", "nesterov", "adam", "adamw", "adagrad", "adadelta"))
    ] = "adamw"
    lr: Annotated[float, Field(gt=0), LogUniform(1e-5, 1e-1)] = 3e-3
    """Highest learning rate of the schedule."""
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

    @property
    def beside_packed(self) -> bool:
        return self.start == "fresh"  # what is merged into packed weights is rounded away

    @model_validator(mode="after")
    def _packed_weights_stay(self) -> Self:
        if self.packed and self.start == "merged":
            raise ValueError("nothing can be merged into packed weights without rounding it away")
        return self

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
        tampered = at(plain(model), "nf4") if self.packed else model.copy()
        if self.head == "new":
            tampered.reinit_head(seed=seed)
        spent = Cost(steps=0, samples=0, flops=0, seconds=0)
        num_adapters = 2 if self.start == "merged" else 1
        for number in range(num_adapters):
            left = (budget.limit - spent.of(budget.unit)) / (num_adapters - number)
            share = Budget(unit=budget.unit, limit=left)
            self._insert(tampered, seed + number)
            parameters, before = count_trainable(tampered.module), spent
            costs = adapt(
                tampered, batches, self.recipe, budget=share, grid_ratio=grid_ratio, seed=seed
            )
            for cost in costs:
                spent = before + cost
                yield Tampered(tampered, spent, parameters)

    @property
    def recipe(self) -> Recipe:
        """How it trains."""
        return Recipe(
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup=self.warmup,
            schedule_steps=self.schedule_steps,
            clip=self.clip,
        )

    def _insert(self, model: ModelHandle, seed: int) -> None:
        """Adapters inside the module itself, so that it stays what its handle takes it for."""
        quiet_bitsandbytes()
        import peft  # noqa: PLC0415  takes seconds

        _merge(model.module)
        head = model.head
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self._chosen(model),
        )
        with Randomness(seed, model.device).used():
            peft.inject_adapter_in_model(config, model.module)
        if self.head != "frozen" and not _is_tied(head, model.module):
            head.requires_grad_(True)

    def _chosen(self, model: ModelHandle) -> list[str]:
        """Full names of the layers that get an adapter."""
        blocks = model.blocks if self.scope == "all" else last_blocks(model, self.last_k)
        inside = {part for block in blocks for part in block.modules() if _takes_adapter(part)}
        names = [name for name, part in model.module.named_modules() if part in inside]
        known = {_last_name(name) for name in names}
        for wanted in self.layers:
            if wanted not in known:
                raise PolicyError(f"lora.layers: no layer {wanted!r}; {advise(wanted, known)}")
        return [name for name in names if not self.layers or _last_name(name) in self.layers]


def _merge(module: nn.Module) -> None:
    """Add the adapters that are there to the weights beside them, and take them away."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415  takes seconds

    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, BaseTunerLayer):
                adapted: Any = child
                adapted.merge()
                setattr(part, name, adapted.get_base_layer())
    vars(module).pop("peft_config", None)


def _last_name(name: str) -> str:
    return name.rpartition(".")[2]


def _takes_adapter(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1)


def _is_tied(head: nn.Linear, module: nn.Module) -> bool:
    others = (part for part in module.modules() if part is not head)
    return any(getattr(part, "weight", None) is head.weight for part in others)
