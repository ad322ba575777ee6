"""Defences that rewrite weights before release."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from release_guard.modalities import ModelHandle
from release_guard.plugins import Plugin
from release_guard.policy import Policy


@dataclass(frozen=True)
class Workspace:
    """What a long stage is given beside the model.

    Attributes:
        directory: A folder of its own; what it writes there survives a kill and is offered again.
        progress: Called with steps done, steps in all, and a line of the stage's own losses.
        workers: How many threads of its own it may keep busy.
    """

    directory: Path
    progress: Callable[[int, int, str], None]
    workers: int = 1


class Stage(Plugin):
    """A defence. Options are fields."""

    paper: ClassVar[str]

    @abstractmethod
    def immunize(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> ModelHandle:
        """An immunized copy.

        MUST leave `model` bit-identical, use only the splits `immunize` of the policy's data sets,
        be deterministic given `policy.seed`, and resume from the workspace after a kill.

        Raises:
            ImmunizationError: It diverged, or nothing is left within the retained margin.
        """

    @abstractmethod
    def measure(
        self, base: ModelHandle, immunized: ModelHandle, policy: Policy
    ) -> Mapping[str, float]:
        """The paper's own figures; reported, never judged."""
