"""Chain: the adversary changes the weights first, then attacks what comes of it."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Self

from pydantic import Field, field_validator

from release_guard.attacks import Attack, Tampered, Transform
from release_guard.errors import PolicyError
from release_guard.modalities import ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Budget, Policy, Target


class Chain(Attack):
    """Attacks in order on one copy: transforms, then any attack.

    What holds against each of two attacks often falls to one after the other. A chain is what its
    steps make of it: surgical if they all are, as expensive as the last, and so on. It costs what
    its last step costs: transforms take no step, and their seconds are on the house.
    """

    paper = "https://arxiv.org/abs/2002.08347"

    steps: Annotated[tuple[Spec, ...], Field(min_length=2)]
    """Attacks with their options, in order; all but the last must be transforms."""
    stage: str | None = None
    """The immunization stage it was put together to break, if any."""

    @field_validator("steps")
    @classmethod
    def _transforms_come_first(cls, steps: tuple[Spec, ...]) -> tuple[Spec, ...]:
        try:
            attacks = [Attack.build(step) for step in steps]
        except PolicyError as error:
            raise ValueError(str(error)) from None
        if trains := [one.name for one in attacks[:-1] if not isinstance(one, Transform)]:
            raise ValueError(f"{trains[0]} is no transform, so it can only be the last step")
        if _shared_modalities(attacks) is None:
            raise ValueError("no kind of model takes all of these steps")
        return steps

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
        return self._attacks[-1].expense

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
        steps = [attack.located(policy) for attack in self._attacks]
        specs = tuple(Spec(name=step.name, **step.model_dump()) for step in steps)
        return self.model_copy(update={"steps": specs})

    def targets(self, policy: Policy) -> Sequence[Target]:
        return self._attacks[-1].targets(policy)

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
        *transforms, last = self._attacks
        changed = model
        for attack in transforms:
            (only,) = attack.tamper(
                changed, target, budget=budget, grid_ratio=grid_ratio, seed=seed, ancestor=ancestor
            )
            changed = only.model
        yield from last.tamper(
            changed, target, budget=budget, grid_ratio=grid_ratio, seed=seed, ancestor=ancestor
        )

    @property
    def _attacks(self) -> list[Attack]:
        return [Attack.build(step) for step in self.steps]


def _shared_modalities(attacks: Sequence[Attack]) -> tuple[str, ...] | None:
    """Kinds of models that all attacks work on; none: all kinds. None: no kind."""
    kinds = [set(attack.modalities) for attack in attacks if attack.modalities]
    if not kinds:
        return ()
    return tuple(sorted(set.intersection(*kinds))) or None
