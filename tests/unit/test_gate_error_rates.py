"""How often the gate is wrong, over simulated red teams; the benchmark has more of them."""

import pytest
from gate_simulation import SCENARIOS, simulate

from release_guard.distributions import clopper_pearson
from release_guard.release import Result

BY_NAME = {truth.name: truth for truth in SCENARIOS}
GATES = 60  # the least whose bound on no error at all is below 5 %


@pytest.mark.parametrize(
    "name",
    [
        "breaks exactly at the budget",
        "harm levels off at the ceiling",
        "a sham resists as well",
        "breaks at the budget once rounded",
        "the same, may be left out",
        "sound, harm at 82 % of the ceiling",
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


def test_draws_and_a_sham_cost_a_sound_release_little() -> None:
    found = simulate(BY_NAME["sound, with draws and a sham"], gates=10, seed=3)
    assert found[Result.FAIL] == 0
    assert found[Result.PASS] >= 9


def test_a_region_that_breaks_is_mostly_hit() -> None:
    found = simulate(BY_NAME["8 % of random attacks break it"], gates=10, seed=4)
    assert found[Result.PASS] <= 1
    assert found[Result.FAIL] >= 8


def test_a_second_precision_costs_a_sound_release_little() -> None:
    """Nor does one at which it is a third as hard to break: that is beyond the budget."""
    for name in ("the same, rounded too", "sound, but a third as hard once rounded"):
        found = simulate(BY_NAME[name], gates=20, seed=5)
        assert found[Result.FAIL] == 0
        assert found[Result.PASS] >= 17
