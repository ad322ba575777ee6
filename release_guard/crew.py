"""Simulated attackers who take turns: at a step of a stage, one of them takes one of its own."""

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from release_guard.modalities import ModelHandle
from release_guard.policy import Format
from release_guard.simulation import Attacker, Drawn, riding


@dataclass
class Crew:
    """They relearn concepts with Adam, all weights free, and ride on the released ones.

    Attributes:
        size: How many; 0: none.
        horizon: Fewest and most steps after which one begins anew.
        lr: Range of their learning rates, drawn log-uniformly.
        num_concepts: How many concepts there are to be after.
        formats: What they have the released weights in, with weights.
        packed_share: Share of those with int8 or four bits that train adapters beside them.
        at_work: Those who have begun.
    """

    size: int
    horizon: tuple[int, int]
    lr: tuple[float, float]
    num_concepts: int
    formats: Mapping[Format, float]
    packed_share: float
    at_work: list[Attacker] = field(default_factory=list)

    def next(self, theta: ModelHandle, turn: int, *, seed: int) -> Attacker:
        """Whose turn it is; in place of one who is done, another who begins at `theta`.

        Args:
            theta: The released weights.
            turn: How many turns were taken before, from 0 on without a gap.
            seed: Fixes who begins.
        """
        place = turn % self.size
        if place == len(self.at_work) or self.at_work[place].is_done:
            self.at_work[place : place + 1] = [Attacker.of(_free(theta), self._draw(seed), seed=0)]
        return self.at_work[place]

    def riding(self, theta: ModelHandle) -> AbstractContextManager[None]:
        """They move as the released weights do while inside."""
        return riding(list(theta.module.parameters()), self.at_work) if self.size else nullcontext()

    def kept(self) -> list[dict[str, Any]]:
        """Everything that fixes how they go on."""
        return [attacker.kept() for attacker in self.at_work]

    def restore(self, theta: ModelHandle, kept: Sequence[Mapping[str, Any]]) -> None:
        """Put back what `kept` gave."""
        self.at_work = [Attacker.again(_free(theta), one) for one in kept]

    def _draw(self, seed: int) -> Drawn:
        chance = random.Random(seed)  # noqa: S311
        low, high = map(math.log, self.lr)
        drawn = Drawn(
            adam=True,
            lr=math.exp(chance.uniform(low, high)),
            life=chance.randint(*self.horizon),
            concept=chance.randrange(self.num_concepts),
        )
        return drawn.having(self.formats, self.packed_share, chance)


def _free(theta: ModelHandle) -> ModelHandle:
    """A copy as an attacker has it: what the stage holds still can be trained as well."""
    free = theta.copy()
    free.module.requires_grad_(True)
    return free
