"""Defences that rewrite weights before release."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from release_guard.errors import ImmunizationError
from release_guard.evidence import Cost
from release_guard.immunization import Pace, Training
from release_guard.modalities import ModelHandle
from release_guard.plugins import Plugin
from release_guard.policy import Policy


@dataclass(frozen=True)
class Workspace:
    """What a long stage is given beside the model.

    Attributes:
        directory: A folder of its own; what it writes there survives a kill and is offered again.
        private: A folder for what its owner must keep and never publish; shared by the stages.
        progress: Called with steps done, steps in all, and a line of the stage's own losses.
        spend: Told once what all of it cost, a part before a kill included.
        workers: How many threads of its own it may keep busy.
    """

    directory: Path
    private: Path
    progress: Callable[[int, int, str], None]
    spend: Callable[[Cost], None]
    workers: int = 1


class Stage(Plugin):
    """A defence. Options are fields."""

    paper: ClassVar[str]
    modalities: ClassVar[tuple[str, ...]] = ()
    """Kinds of models that it works on; none named: all."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By name: the options that a variant sets where they are not given."""
    variant_option: ClassVar[str] = "variant"
    """The option that names one."""
    shardable: ClassVar[bool] = False
    """Whether it works on models that lie in parts in several processes: batches reach the network
    only through the handle's `logits`, `features` and `loss`, gradients come by `backward`."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_variant(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and cls.variants:
            usual = cls.model_fields[cls.variant_option].default
            chosen = values.get(cls.variant_option, usual)
            # It may be anything yet; if no variant's name, that alone is complained of.
            return {**cls.variants.get(str(chosen), cls.variants[usual]), **values}
        return values

    @abstractmethod
    def immunize(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> ModelHandle:
        """An immunized copy.

        MUST leave `model` bit-identical, use only the splits `immunize` of the policy's concepts
        and merge targets and `retain` and `guard` of the retained data, be deterministic given
        `policy.seed` (and what it keeps in `workspace.private`), and resume from the workspace
        after a kill.

        Raises:
            ImmunizationError: It diverged, or nothing is left within the retained margin.
        """

    @abstractmethod
    def measure(
        self, base: ModelHandle, immunized: ModelHandle, policy: Policy
    ) -> Mapping[str, float]:
        """The paper's own figures; reported, never judged."""

    @abstractmethod
    def effect(self, base: ModelHandle, immunized: ModelHandle, policy: Policy) -> float:
        """How much of what this stage is for is in a model: 0 in `base`, more is more.

        The pipeline asks after every later stage: what is no longer there was undone by it.

        Args:
            base: What the stage was given.
            immunized: What it made of it, perhaps changed by later stages.
            policy: As for `immunize`.
        """

    def check(self, model: ModelHandle, policy: Policy) -> None:
        """Whether the stage can work at all, before anything is spent.

        Raises:
            ImmunizationError: It cannot; says what to change.
        """

    def caveats(self, model: ModelHandle, policy: Policy) -> Sequence[str]:
        """What it leaves out on this model, one sentence each, for the card."""
        return ()


class TrainedStage(Stage):
    """A stage that trains."""

    probe_every: int = Field(50, ge=1)
    """Steps between looks at the retained score; what is released is the last state at which it
    was within the policy's margin."""
    probed: int = Field(2_000, ge=1)
    """Examples scored at such a look, at most."""
    keep_every: int = Field(100, ge=1)
    """Steps between checkpoints."""
    autocast: bool = False
    """Forward passes in bfloat16."""
    checkpointing: bool = False
    """Activations are computed again in the backward pass: less memory, a third more work."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """How many steps it trains."""

    @abstractmethod
    def training(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> Training:
        """Everything that changes while it trains, at its beginning."""

    def immunize(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> ModelHandle:
        pace = Pace(
            steps=self.steps,
            probe_every=self.probe_every,
            keep_every=self.keep_every,
            probed=self.probed,
            autocast=self.autocast,
            checkpointing=self.checkpointing,
        )
        training = self.training(model, policy, workspace)
        return training.complete(pace, workspace.directory, workspace.progress, workspace.spend)


def need_concepts(stage: Stage, policy: Policy) -> None:
    """Refuse a policy that gives a stage nothing to do.

    Raises:
        ImmunizationError: It names no concept.
    """
    if not policy.concepts:
        raise ImmunizationError(
            f"{stage.name}: the policy names no concept; add one, or leave it out"
        )


def misplaced(policy: Policy) -> Iterator[str]:
    """One line for each of a policy's stages that is for other kinds of models."""
    kind = policy.modality.name
    for place, spec in enumerate(policy.stages):
        stage = Stage.build(spec, where=f"stages[{place}]")
        if stage.modalities and kind not in stage.modalities:
            others = ", ".join(stage.modalities)
            yield f"stages[{place}]: {spec.name} is for {others}, not for {kind}; remove it"
