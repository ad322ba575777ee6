"""Plans: the very trials a red team runs, never fewer, less what the ledger holds."""

import dataclasses
from itertools import product

import pytest
from evidence_builder import example_policy

from release_guard.evidence import Trial, cost_grid
from release_guard.phases import CONFIRM, DRAW, MIDPOINT, SEARCH, Ground
from release_guard.plan import Pace, Paces, disk, parts, rows
from release_guard.plugins import Spec
from release_guard.policy import Policy

PACE = Pace(
    steps_per_unit=1, seconds_per_step=0.01, seconds_per_example=0.001, seconds_per_trial=0.5
)
FAMILIES = ("finetune", "lora", "linear_probe")


def ground(policy: Policy) -> Ground:
    roots = {"undefended": "1" * 64, "defended": "2" * 64, "never_knew": "3" * 64, "sham": "5" * 64}
    data = {concept.name: "4" * 64 for concept in policy.concepts}
    return Ground(policy, roots, data, artefacts={}, files={})


def paces(policy: Policy, **changes: float) -> Paces:
    pace = dataclasses.replace(PACE, **changes)
    return dict.fromkeys(product(FAMILIES, policy.precisions), pace)


def searched(policy: Policy) -> list[Trial]:
    concept = policy.concepts[0]
    return ground(policy).trials(
        SEARCH, "defended", concept, policy.attacks, policy.precisions, 0.5
    )


def test_every_phase_is_planned_in_order() -> None:
    policy = example_policy()
    found = rows(parts(policy, {}), ground(policy), paces(policy), [])

    # 4 attacks of 3 families, 2 of them full fine-tuning; 1 search seed; 3 confirm, 5 refute
    assert [(row.phase, row.arm, row.trials) for row in found] == [
        ("attack the release", "defended", 4),
        ("confirm a finding", "defended", 20),
        ("attack the controls", "undefended", 4),
        ("confirm the controls", "undefended", 9),
        ("attack the controls", "never_knew", 2),
        ("tune the never-knew arm", "never_knew", 3),
        ("confirm the controls", "never_knew", 3),
        ("long run", "defended", 9),
    ]


DRAWN = tuple(Spec(name="finetune", lr=0.001 * place) for place in range(1, 11))


def test_what_is_drawn_and_searched_is_planned() -> None:
    policy = example_policy(
        ("drawn = 0\nsearched = 0", "drawn = 4\ndrawn_pool = 10\nsearched = 6"),
        ("sham = false", "sham = true"),
    )
    found = rows(parts(policy, {"footwear": DRAWN}), ground(policy), paces(policy), [])

    assert [(row.phase, row.arm, row.trials) for row in found][2:10] == [
        ("draw attacks at random", "undefended", 10),
        ("draw attacks at random", "defended", 10),  # 7 more may come with the last batch
        ("confirm a finding", "defended", 50),
        ("search for attacks", "defended", 6),
        ("confirm a finding", "defended", 30),
        ("attack the controls", "undefended", 4),
        ("confirm the controls", "undefended", 9),
        ("attack the controls", "sham", 7),  # with the best of each family of the undefended
    ]


def test_draws_that_the_ledger_holds_are_taken_off() -> None:
    policy = example_policy(("drawn = 0", "drawn = 4"))
    place = ground(policy)
    held = place.trials(DRAW, "undefended", policy.concepts[0], DRAWN[:8], ["fp32"], 0.5)
    found = rows(parts(policy, {"footwear": DRAWN}), place, paces(policy), held)

    assert [(row.trials, row.held) for row in found if row.phase == DRAW.name] == [(10, 8), (10, 0)]


def test_steps_are_those_of_trials_that_nothing_ends() -> None:
    policy = example_policy()
    steps = {
        (row.phase, row.arm): row.steps / row.trials
        for row in rows(parts(policy, {}), ground(policy), paces(policy), [])
    }

    assert steps["attack the release", "defended"] == 400
    assert steps["attack the controls", "undefended"] == 1600  # long_run = 4


def test_precisions_and_seeds_multiply() -> None:
    small = example_policy()
    large = example_policy(
        ('precisions = ["fp32"]', 'precisions = ["fp32", "int8"]'),
        ("long_run = 4.0", "long_run = 4.0\nsearch_seeds = 3"),
    )
    first, *_ = rows(parts(small, {}), ground(small), paces(small), [])
    second, *_ = rows(parts(large, {}), ground(large), paces(large), [])

    assert second.trials == 6 * first.trials


def test_midpoint_costs_trials_of_its_own() -> None:
    policy = example_policy(("ceiling = 0.5", 'ceiling = "midpoint"'))

    assert [(part.phase, part.arm) for part in parts(policy, {})][:3] == [
        (MIDPOINT, "undefended"),
        (MIDPOINT, "never_knew"),
        (SEARCH, "defended"),
    ]


def test_no_trials_of_an_arm_that_is_not_there() -> None:
    policy = example_policy(("long_run = 4.0", 'never_knew = "unavailable"'))

    assert {part.arm for part in parts(policy, {})} == {"undefended", "defended"}


def test_what_the_ledger_holds_is_taken_off() -> None:
    policy = example_policy()
    whole, *others = rows(parts(policy, {}), ground(policy), paces(policy), [])
    less, *same = rows(parts(policy, {}), ground(policy), paces(policy), searched(policy)[:3])

    assert (less.trials, less.held) == (4, 3)
    assert less.steps == whole.steps / 4
    assert less.seconds == pytest.approx(whole.seconds / 4)
    assert same == others


def test_a_trial_that_two_parts_may_choose_is_held_once() -> None:
    policy = example_policy(("drawn = 0\nsearched = 0", "drawn = 0\nsearched = 6"))
    concept = policy.concepts[0]
    held = ground(policy).trials(
        CONFIRM, "defended", concept, policy.attacks[:1], policy.precisions, 0.5
    )
    found = rows(parts(policy, {}), ground(policy), paces(policy), held)

    assert sum(row.held for row in found) == len(held)


def test_a_ceiling_found_later_does_not_matter_but_weights_do() -> None:
    policy = example_policy()
    other_ceiling = [trial.model_copy(update={"ceiling": 0.7}) for trial in searched(policy)]
    runs_through = [trial.model_copy(update={"ceiling": None}) for trial in searched(policy)]
    other_weights = [trial.model_copy(update={"weights": "9" * 64}) for trial in searched(policy)]

    def held(trials: list[Trial]) -> int:
        return sum(
            row.held for row in rows(parts(policy, {}), ground(policy), paces(policy), trials)
        )

    assert [held(other_ceiling), held(runs_through), held(other_weights)] == [4, 0, 0]


def test_best_attacks_are_taken_to_be_the_slowest() -> None:
    policy = example_policy()
    slow = {**paces(policy), ("lora", "fp32"): dataclasses.replace(PACE, seconds_per_step=1.0)}
    (long_run,) = [
        row for row in rows(parts(policy, {}), ground(policy), slow, []) if row.phase == "long run"
    ]

    assert long_run.seconds > 3 * 1600 * 1.0


def test_seconds_of_a_trial() -> None:
    trial = searched(example_policy())[0]
    scored = len(cost_grid(400, trial.grid_ratio)) * trial.examples

    assert PACE.seconds(trial) == pytest.approx(0.5 + 400 * 0.01 + scored * 0.001)
    closed_form = dataclasses.replace(PACE, grows=False)
    assert closed_form.seconds(trial) == pytest.approx(0.5 + trial.examples * 0.001)
    assert closed_form.steps(trial) == 0


def test_other_units_are_turned_into_steps() -> None:
    policy = example_policy(('unit = "steps", limit = 400', 'unit = "samples", limit = 6400'))
    (trial, *_) = searched(policy)

    assert dataclasses.replace(PACE, steps_per_unit=1 / 32).steps(trial) == 200


def test_disk_grows_with_stages_and_a_hub_that_is_a_folder() -> None:
    policy = example_policy()
    size = {"payload": 10**9, "num_trials": 100}
    elsewhere = example_policy(('{ name = "directory", path = "hub" }', '{ name = "huggingface" }'))

    assert disk(policy, **size, immunizes=True) > 20 * 10**9
    assert 2 * 10**9 < disk(policy, **size, immunizes=False) < 2.1 * 10**9
    assert disk(elsewhere, **size, immunizes=False) < 10**7
