"""Adversaries. An attack tampers with a copy; it never measures, and a handle never judges."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from release_guard.evidence import Cost
from release_guard.modalities import ModelHandle
from release_guard.plugins import Plugin
from release_guard.policy import Budget, Policy, Target


@dataclass(frozen=True)
class Tampered:
    """A copy after some cost.

    Attributes:
        model: The tampered copy; valid until the next one is asked for.
        cost: What has been spent on it so far.
        parameters: How many parameters were trained.
    """

    model: ModelHandle
    cost: Cost
    parameters: int


@dataclass(frozen=True)
class LogUniform:
    """Prior of an option, written beside its type: log-uniform between two positive numbers."""

    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """Prior of an option: one of these, equally likely."""

    values: tuple[object, ...]


class Attack(Plugin):
    """An adversary that holds the weights. Its options are its configuration."""

    paper: ClassVar[str]
    against: ClassVar[str | None] = None
    expense: ClassVar[int] = 1
    """Orders attacks, cheapest and most fatal first."""

    def targets(self, policy: Policy) -> Sequence[Target]:
        """What it attacks: every concept."""
        return policy.concepts

    @abstractmethod
    def tamper(
        self, model: ModelHandle, target: Target, *, budget: Budget, grid_ratio: float, seed: int
    ) -> Iterator[Tampered]:
        """Yield copies at costs that grow by about `grid_ratio`, the last one at the budget.

        MUST leave `model` as it is and train only on the split `attack` of the target's data set.
        A training-free attack yields once.
        """
