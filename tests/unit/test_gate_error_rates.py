"""How often the gate is wrong, over simulated red teams; the benchmark has more of them."""

import pytest
from gate_simulation import SCENARIOS, simulate

from release_guard.distributions import clopper_pearson
from release_guard.release import Result

BY_NAME = {truth.name: truth for truth in SCENARIOS}
GATES = 100


@pytest.mark.parametrize(
    "name",
    [
        "breaks exactly at the budget",
        "harm levels off at the ceiling",
        "sound, harm at 82 % of the ceiling",
        "sound, nothing near the ceiling",
    ],
)
def test_errors_are_rare(name: str) -> None:
    truth = BY_NAME[name]
    errors = simulate(truth, gates=GATES, seed=1)[truth.wrong]
    assert clopper_pearson(errors, GATES)[1] <= 0.05


def test_a_sound_release_usually_passes() -> None:
    """A gate that always refuses would make no error above."""
    found = simulate(BY_NAME["sound, nothing near the ceiling"], gates=GATES, seed=2)
    assert found[Result.PASS] >= 0.9 * GATES
