"""DreamBooth: the adversary personalises the UNet with a handful of pictures."""

from collections.abc import Iterator
from typing import Annotated, Literal, assert_never

import torch
from pydantic import Field
from torch import nn

from release_guard.adaptation import OptimizerName, Randomness, Recipe, adapt, count_trainable
from release_guard.attacks import Attack, Choice, LogUniform, Tampered
from release_guard.modalities import Batch, ModelHandle, Painter, painter
from release_guard.policy import Budget, Target
from release_guard.quantization import quiet_bitsandbytes

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_KEYS_AND_VALUES = ("attn2.to_k.weight", "attn2.to_v.weight")


class Dreambooth(Attack):
    """Trains the UNet, adapters in its attention, or its cross-attention's keys and values only.

    Full weights as in DreamBooth, adapters as is usual since, keys and values as in Custom
    Diffusion (Kumari et al. 2022, section 3.2, arXiv 2212.04488). What the model painted before is
    held by prior preservation (Ruiz et al. 2022, equation 2), unless its weight is 0.
    """

    paper = "https://arxiv.org/abs/2208.12242"
    expense = 2
    modalities = ("text_to_image",)

    trained: Annotated[
        Literal["unet", "unet_and_text", "lora", "cross_kv"],
        Choice(("unet", "unet_and_text", "lora", "cross_kv")),
    ] = "unet"
    """What of the model; cross_kv is Custom Diffusion."""
    words: Annotated[Literal["captions", "new"], Choice(("captions", "new"))] = "new"
    """Train on the captions, or on a new word a class in their place: a defence may listen to the
    name. New words are trained along, but for `unet` and `lora`."""
    template: Annotated[str, Field(min_length=2)] = "a photo of {}"
    """The prompt with a new word, {} standing for it."""
    rank: Annotated[int, Field(ge=1), Choice((1, 4, 16, 64))] = 4
    """Of the adapters; their alpha is the same."""
    prior_weight: Annotated[float, Field(ge=0), Choice((0.0, 1.0))] = 0.0
    """Weight of prior preservation."""
    prior_prompt: str = "a photo"
    """What the model paints before the attack, to go on painting it."""
    prior_pictures: Annotated[int, Field(ge=1)] = 64
    """How many such pictures."""
    optimizer: Annotated[OptimizerName, Choice(("adamw", "adam", "sgd"))] = "adamw"
    lr: Annotated[float, Field(gt=0), LogUniform(5e-7, 3e-2)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0), Choice((0.0, 0.01))] = 0.0
    clip: Annotated[Annotated[float, Field(gt=0)] | None, Choice((None, 1.0))] = None
    """Largest norm of the gradient; none: any."""
    batch: Annotated[int, Field(ge=1), Choice((4, 16, 64))] = 16
    """Pictures a step, and as many of the prior."""

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
        released = painter(model)
        tampered = self._named(released, target, seed)
        self._choose(tampered, seed)
        parameters = count_trainable(tampered.module)
        batches = tampered.batches(target.dataset, "attack", size=self.batch, seed=seed)
        if self.prior_weight:
            batches = self._preserving(batches, released, seed)
        for cost in adapt(
            tampered, batches, self._recipe, budget=budget, grid_ratio=grid_ratio, seed=seed
        ):
            yield Tampered(tampered, cost, parameters)

    @property
    def _recipe(self) -> Recipe:
        return Recipe(
            lr=self.lr,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )

    def _named(self, model: Painter, target: Target, seed: int) -> Painter:
        if self.words == "captions":
            return model.copy()
        return model.renamed(target.dataset, template=self.template, length=1, seed=seed)

    def _choose(self, model: Painter, seed: int) -> None:
        """Make trainable what is to be trained, and nothing else."""
        model.module.requires_grad_(False)
        match self.trained:
            case "unet":
                model.unet.requires_grad_(True)
            case "unet_and_text":
                model.unet.requires_grad_(True)
                model.text_encoder.requires_grad_(True)
            case "lora":
                self._adapt(model, seed)
            case "cross_kv":
                for part in (*_keys_and_values(model.unet), *model.new_words):
                    part.requires_grad_(True)
            case _:
                assert_never(self.trained)

    def _adapt(self, model: Painter, seed: int) -> None:
        quiet_bitsandbytes()
        import peft  # noqa: PLC0415  takes seconds

        config = peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=_ATTENTION)
        with Randomness(seed, model.device).used():
            peft.inject_adapter_in_model(config, model.unet)

    def _preserving(
        self, batches: Iterator[Batch], released: Painter, seed: int
    ) -> Iterator[Batch]:
        prior = released.painted(
            self.prior_prompt, count=self.prior_pictures, size=self.batch, seed=seed
        )
        for mine, theirs in zip(batches, prior, strict=False):  # both are endless
            yield together(mine, theirs, weight=self.prior_weight)


def together(mine: Batch, prior: Batch, *, weight: float) -> Batch:
    """One batch of two: its mean loss is that of `mine` plus `weight` times that of `prior`."""
    total = len(mine["weights"]) + len(prior["weights"])
    shares = (1 / len(mine["weights"]), weight / len(prior["weights"]))
    both = {name: torch.cat([mine[name], prior[name]]) for name in mine}
    scaled = [
        part["weights"] * share * total for part, share in zip((mine, prior), shares, strict=True)
    ]
    return {**both, "weights": torch.cat(scaled)}


def _keys_and_values(unet: nn.Module) -> list[nn.Parameter]:
    return [part for name, part in unet.named_parameters() if name.endswith(_KEYS_AND_VALUES)]
