"""Adversaries. An attack tampers with a copy; it never measures, and a handle never judges."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

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
    """The stage it was written to break, if any."""
    expense: ClassVar[int] = 1
    """Orders attacks, cheapest and most fatal first."""
    surgical: ClassVar[bool] = False
    """Brings back what is hidden, and teaches nothing: a breach counts by itself. It is not asked
    to breach the undefended model first, and never says what that costs (no kappa)."""
    needs_ancestor: ClassVar[bool] = False
    """Whether it uses the public ancestor that the policy names."""
    modalities: ClassVar[tuple[str, ...]] = ()
    """Kinds of models it works on; none: all of them."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Options that name data sets beside the target's; local ones are seen from the policy file."""

    @property
    def beside_packed(self) -> bool:
        """Whether it leaves linear layers as they are, and so takes them as they are run.

        Others are given int8 and nf4 dequantized, in ordinary layers.
        """
        return False

    @property
    def wants(self) -> int:
        """Examples of the split `attack` that it reads at once; with fewer it cannot work."""
        return int(getattr(self, "batch", 0))

    @property
    def sources(self) -> tuple[str, ...]:
        """Those data sets, as far as they are named: what they hold is part of a trial's key."""
        return tuple(source for name in self.reads if (source := getattr(self, name)))

    def located(self, policy: Policy) -> Self:
        """The same, with its data sets where they lie."""
        named = {name: getattr(self, name) for name in self.reads}
        return self.model_copy(
            update={name: policy.located(source) for name, source in named.items() if source}
        )

    def targets(self, policy: Policy) -> Sequence[Target]:
        """What it attacks: every concept."""
        return policy.concepts

    @abstractmethod
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
        """Yield copies at costs that grow by about `grid_ratio`, the last one at the budget.

        MUST leave `model` and `ancestor` as they are and train only on the split `attack` of the
        target's data set. A training-free attack yields once.
        """


class Transform(Attack):
    """An attack without training: one changed copy, at no step. `chain` puts it before others."""

    expense = 0
    surgical = True

    @abstractmethod
    def transform(
        self, model: ModelHandle, target: Target, *, seed: int, ancestor: ModelHandle | None
    ) -> ModelHandle:
        """The changed copy; MUST leave `model` and `ancestor` as they are.

        Args:
            model: The released model.
            target: What is to come back; only its split `attack` may be read.
            seed: Fixes every random choice.
            ancestor: The public ancestor, for those that need it.
        """

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
        del budget, grid_ratio  # it takes no step
        started = time.perf_counter()
        changed = self.transform(model, target, seed=seed, ancestor=ancestor)
        seconds = time.perf_counter() - started
        yield Tampered(changed, Cost(steps=0, samples=0, flops=0, seconds=seconds), parameters=0)
