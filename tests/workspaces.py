"""A workspace for a stage under test, and a kill in the middle of its work."""

from dataclasses import replace
from pathlib import Path

import pytest

from release_guard.modalities import ModelHandle
from release_guard.policy import Policy
from release_guard.stages import Stage, Workspace


def quiet(directory: Path, *, workers: int = 1) -> Workspace:
    """One that tells nobody anything."""
    private = directory / "private"
    private.mkdir(parents=True, exist_ok=True)
    return Workspace(directory, private, lambda *_: None, lambda _: None, workers)


def resumed_after_a_kill(
    stage: Stage, model: ModelHandle, policy: Policy, workspace: Workspace, *, at: int
) -> tuple[ModelHandle, list[int]]:
    """What a stage that was killed at a step makes when it goes on, and the steps it then takes."""

    class Killed(Exception):  # noqa: N818
        pass

    def kill(done: int, steps: int, line: str) -> None:
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        stage.immunize(model, policy, replace(workspace, progress=kill))
    taken: list[int] = []
    goes_on = replace(workspace, progress=lambda done, steps, line: taken.append(done))
    return stage.immunize(model, policy, goes_on), taken
