"""Chain: the adversary changes the weights first, then attacks what comes of it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Self, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator

from release_guard.attacks import Attack, Tampered, Transform
from release_guard.errors import PolicyError
from release_guard.modalities import ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Budget, Policy, Target


class Chain(Attack):
    """Attacks in order on one copy: transforms, any attack, and transforms of what comes of it.

    What holds against each of two attacks often falls to one after the other. A chain is what its
    steps make of it: surgical if they all are, as expensive as the last, and so on. It costs what
    its last step costs: transforms take no step, and their seconds are on the house.
    """

    paper = "https://arxiv.org/abs/2002.08347"

    steps: Annotated[tuple[Spec, ...], Field(min_length=1)]
    """Attacks with their options, in order; all but the last must be transforms."""
    after: tuple[Spec, ...] = ()
    """Transforms, in order, of a copy of what the steps have made whenever it is scored: rounded
    again, say, as it would be before anybody runs it."""
    stage: str | None = None
    """The immunization stage it was put together to break, if any."""

    @field_validator("steps", "after")
    @classmethod
    def _fit_together(cls, specs: tuple[Spec, ...], info: ValidationInfo) -> tuple[Spec, ...]:
        try:
            attacks = _built(specs)
        except PolicyError as error:
            raise ValueError(str(error)) from None
        around = attacks[:-1] if info.field_name == "steps" else attacks
        if trains := [one.name for one in around if not isinstance(one, Transform)]:
            raise ValueError(f"{trains[0]} is no transform, so it can only be the last step")
        if _shared_modalities([*_built(info.data.get("steps", ())), *attacks]) is None:
            raise ValueError("no kind of model takes all of these steps")
        return specs

    @model_validator(mode="after")
    def _is_more_than_one(self) -> Self:
        if len(self.steps) + len(self.after) == 1:
            raise ValueError("one step is no chain; list the attack itself, or give `after`")
        return self

    @property
    def against(self) -> str | None:  # type: ignore[override]
        return self.stage

    @property
    def surgical(self) -> bool:  # type: ignore[override]  # a class says it, but for chains
        return all(attack.surgical for attack in self._attacks)

    @property
    def needs_ancestor(self) -> bool:  # type: ignore[override]
        return any(attack.needs_ancestor for attack in self._attacks)

    @property
    def expense(self) -> int:  # type: ignore[override]
        return self._steps[-1].expense

    @property
    def modalities(self) -> tuple[str, ...]:  # type: ignore[override]
        return _shared_modalities(self._attacks) or ()

    @property
    def wants(self) -> int:
        return max(attack.wants for attack in self._attacks)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(source for attack in self._attacks for source in attack.sources)

    def located(self, policy: Policy) -> Self:
        located = {
            key: tuple(
                Spec(name=attack.name, **attack.located(policy).model_dump()) for attack in attacks
            )
            for key, attacks in {"steps": self._steps, "after": self._after}.items()
        }
        return self.model_copy(update=located)

    def targets(self, policy: Policy) -> Sequence[Target]:
        return self._steps[-1].targets(policy)

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
        *first, last = self._steps
        changed = _through(first, model, target, seed=seed, ancestor=ancestor)
        for one in last.tamper(
            changed, target, budget=budget, grid_ratio=grid_ratio, seed=seed, ancestor=ancestor
        ):
            finished = _through(self._after, one.model, target, seed=seed, ancestor=ancestor)
            yield replace(one, model=finished)

    @property
    def _attacks(self) -> list[Attack]:
        return [*self._steps, *self._after]

    @property
    def _steps(self) -> list[Attack]:
        return _built(self.steps)

    @property
    def _after(self) -> list[Attack]:
        return _built(self.after)


def _built(specs: Sequence[Spec]) -> list[Attack]:
    return [Attack.build(spec) for spec in specs]


def _through(
    attacks: Sequence[Attack],
    model: ModelHandle,
    target: Target,
    *,
    seed: int,
    ancestor: ModelHandle | None,
) -> ModelHandle:
    """What transforms make of a model, one after the other."""
    changed = model
    for attack in cast("Sequence[Transform]", attacks):
        changed = attack.transform(changed, target, seed=seed, ancestor=ancestor)
    return changed


def _shared_modalities(attacks: Sequence[Attack]) -> tuple[str, ...] | None:
    """Kinds of models that all attacks work on; none: all kinds. None: no kind."""
    kinds = [set(attack.modalities) for attack in attacks if attack.modalities]
    if not kinds:
        return ()
    return tuple(sorted(set.intersection(*kinds))) or None
