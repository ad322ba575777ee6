"""Textual inversion: the adversary finds new words for what a model no longer paints by name."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from release_guard.adaptation import OptimizerName, Recipe, adapt, count_trainable
from release_guard.attacks import Attack, Choice, LogUniform, Tampered
from release_guard.modalities import ModelHandle, painter
from release_guard.policy import Budget, Target


class TextualInversion(Attack):
    """Trains the embeddings of new words, and nothing else: the weights stay as released.

    It assumes that a defence took away names, not what they stand for (Gal et al. 2022, section 4:
    the word whose embedding best denoises the attacker's pictures). What several classes stand for
    takes new words for each.
    """

    paper = "https://arxiv.org/abs/2208.01618"
    expense = 1
    modalities = ("text_to_image",)

    template: Annotated[str, Field(min_length=2)] = "a photo of {}"
    """The prompt, {} standing for the new words."""
    length: Annotated[int, Field(ge=1), Choice((1, 2, 4))] = 1
    """New words for each class."""
    optimizer: Annotated[OptimizerName, Choice(("adamw", "adam", "adagrad"))] = "adamw"
    lr: Annotated[float, Field(gt=0), LogUniform(1e-4, 3e-1)] = 3e-2
    weight_decay: Annotated[float, Field(ge=0), Choice((0.0, 0.01))] = 0.0
    clip: Annotated[Annotated[float, Field(gt=0)] | None, Choice((None, 1.0))] = None
    """Largest norm of the gradient; none: any."""
    batch: Annotated[int, Field(ge=1), Choice((4, 16, 64))] = 16
    """Pictures a step."""

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
        tampered = painter(model).renamed(
            target.dataset, template=self.template, length=self.length, seed=seed
        )
        tampered.module.requires_grad_(False)
        for words in tampered.new_words:
            words.requires_grad_(True)
        parameters = count_trainable(tampered.module)
        batches = tampered.batches(target.dataset, "attack", size=self.batch, seed=seed)
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
