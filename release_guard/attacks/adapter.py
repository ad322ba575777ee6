"""Adapters other than LoRA: few new weights in a frozen model, in four shapes.

Shapes: B sequences, T positions, F features, P virtual positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, assert_never

import torch
from pydantic import Field
from torch import Tensor, nn

from release_guard.adaptation import OptimizerName, Randomness, Recipe, adapt, count_trainable
from release_guard.attacks import Attack, Choice, LogUniform, Tampered
from release_guard.modalities import ModelHandle
from release_guard.policy import Budget, Target
from release_guard.quantization import quiet_bitsandbytes

_COMMON = 0.02  # deviation of new weights, as in BERT and most models since


class Adapter(Attack):
    """Trains adapters of one method, and no weight of the model itself.

    - ia3: a factor for each output of every linear layer (Liu et al., section 3.3).
    - bottleneck: behind every block, features go through a narrow layer and back
      (https://arxiv.org/abs/1902.00751, figure 2, one for each block).
    - adalora: P diag(lambda) Q beside every linear layer (https://arxiv.org/abs/2303.10512,
      equation 3). Its rank stays: the method's pruning saves weights, which no attacker has to.
    - prompt: virtual tokens before every text (https://arxiv.org/abs/2104.08691).
    """

    paper = "https://arxiv.org/abs/2205.05638"
    expense = 3
    modalities = ("causal_lm",)

    method: Annotated[
        Literal["ia3", "bottleneck", "adalora", "prompt"],
        Choice(("ia3", "bottleneck", "adalora", "prompt")),
    ] = "ia3"
    size: Annotated[int, Field(ge=1), Choice((4, 8, 16, 64))] = 16
    """Width of a bottleneck, rank of adalora, number of virtual tokens; ia3 has none."""
    optimizer: Annotated[OptimizerName, Choice(("sgd", "nesterov", "adam", "adamw"))] = "adamw"
    lr: Annotated[float, Field(gt=0), LogUniform(1e-4, 1.0)] = 0.1
    """Highest learning rate; for adalora and bottleneck about a tenth of the others'."""
    warmup: Annotated[int, Field(ge=0), Choice((0, 10, 100))] = 0
    """Steps over which the learning rate rises to its highest."""
    clip: Annotated[Annotated[float, Field(gt=0)] | None, Choice((None, 0.1, 1.0))] = None
    """Largest norm of the gradient; none: any."""
    batch: Annotated[int, Field(ge=1), Choice((16, 32, 64, 128))] = 32
    """Examples a step."""

    @property
    def beside_packed(self) -> bool:
        return True

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
        tampered.module.requires_grad_(False)
        with Randomness(seed, model.device).used():
            self._insert(tampered)
        parameters = count_trainable(tampered.module)
        recipe = Recipe(lr=self.lr, optimizer=self.optimizer, warmup=self.warmup, clip=self.clip)
        costs = adapt(tampered, batches, recipe, budget=budget, grid_ratio=grid_ratio, seed=seed)
        for cost in costs:
            yield Tampered(tampered, cost, parameters)

    def _insert(self, model: ModelHandle) -> None:
        match self.method:
            case "bottleneck":
                for block in model.blocks:
                    narrow = _Bottleneck(model.head.in_features, self.size).to(model.device)
                    block.add_module("bottleneck", narrow)
                    block.register_forward_hook(narrow)
            case "adalora" | "ia3":
                quiet_bitsandbytes()
                import peft  # noqa: PLC0415  takes seconds

                peft.inject_adapter_in_model(self._config(model), model.module)
            case "prompt":
                _precede(model, self.size)
            case _:
                assert_never(self.method)

    def _config(self, model: ModelHandle) -> Any:
        import peft  # noqa: PLC0415  takes seconds

        inside = {part for block in model.blocks for part in block.modules()}
        names = [
            name
            for name, part in model.module.named_modules()
            if part in inside and isinstance(part, nn.Linear)
        ]
        if self.method == "ia3":
            return peft.IA3Config(target_modules=names, feedforward_modules=[])
        return peft.AdaLoraConfig(
            init_r=self.size,
            target_r=self.size,
            lora_alpha=2 * self.size,
            total_step=1,
            target_modules=names,
        )


class _Bottleneck(nn.Module):
    """A forward hook: down, GELU, up, added to what a block gives; at first it adds nothing.

    Hooks here are modules, or hold nothing: a copy of the model then has hooks of its own.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)
        nn.init.normal_(self.down.weight, std=_COMMON)
        for part in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(part)

    def forward(self, block: nn.Module, inputs: Any, output: Any) -> Any:
        del block, inputs
        if isinstance(output, tuple):
            return (self._adapted(output[0]), *output[1:])
        return self._adapted(output)

    def _adapted(self, hidden_BTF: Tensor) -> Tensor:
        added_BTF: Tensor = self.up(nn.functional.gelu(self.down(hidden_BTF)))
        return hidden_BTF + added_BTF


class _VirtualTokens(nn.Module):
    """A forward hook before the model: embeddings that no token has come before those of a text."""

    def __init__(self, weight_PF: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_PF)

    def forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = dict(kwargs)
        text_BTF = module.get_input_embeddings()(kwargs.pop("input_ids"))
        mask_BT = kwargs.pop("attention_mask")
        virtual_BPF = self.weight.expand(len(text_BTF), -1, -1)
        seen_BP = mask_BT.new_ones(virtual_BPF.shape[:2])
        embeddings = torch.cat([virtual_BPF, text_BTF], dim=1)
        mask = torch.cat([seen_BP, mask_BT], dim=1)
        return args, {**kwargs, "inputs_embeds": embeddings, "attention_mask": mask}


@dataclass(frozen=True)
class _Without:
    """A forward hook before the head: virtual positions foretell nothing."""

    num_virtual: int

    def __call__(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        del head
        return (inputs[0][:, self.num_virtual :],)


def _precede(model: ModelHandle, num_virtual: int) -> None:
    """Virtual tokens that start as embeddings of some tokens, drawn at random (section 2.2)."""
    module: Any = model.module
    embedding = module.get_input_embeddings()
    drawn = torch.randint(len(embedding.weight), (num_virtual,))
    virtual = _VirtualTokens(embedding.weight.detach()[drawn].clone())
    embedding.add_module("virtual", virtual)
    module.register_forward_pre_hook(virtual, with_kwargs=True)
    model.head.register_forward_pre_hook(_Without(num_virtual))
