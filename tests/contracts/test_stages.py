"""What every stage must do, whichever ship."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from workspaces import quiet

from release_guard.errors import PolicyError
from release_guard.modalities import Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.quantization import emulated, seen_names
from release_guard.stages import Stage

QUICK = {
    "condition_number": {"updates": 2},
    "sophon": {"outer_steps": 3, "batch": 16, "query": 16, "ntr_batch": 16, "tail_steps": 2},
    "mima": {"outer_steps": 2, "batch": 8, "prior_batch": 8, "measured_steps": 2, "probed": 50},
    "merge_guard": {"train_steps": 2, "start": "undefended", "batch": 8},
    "concept_suppression": {"total_steps": 2, "batch": 8, "upper_batch": 8, "pool": 8},
}


def merge_target(examples: Path, relative: Path) -> dict[str, Any]:
    """A task of the model, its base and a donor; nobody merges here."""
    return {
        "name": "task",
        "dataset": str(examples / "retained.parquet"),
        "ceiling": 0.9,
        "donor": str(relative),
        "base": str(relative),
        "donor_dataset": str(examples / "restricted.parquet"),
    }


Ground = Callable[[Stage], tuple[Policy, ModelHandle]]


def quick(name: str) -> Stage:
    return Stage.build(Spec(name=name, **QUICK.get(name, {})))


@pytest.fixture
def ground(tmp_path: Path, request: pytest.FixtureRequest) -> Ground:
    """A policy and a pico model of a kind that a stage works on."""

    def make(stage: Stage) -> tuple[Policy, ModelHandle]:
        kind, data, folder = "image_classification", "image_data", "classifier_folder"
        if stage.modalities and kind not in stage.modalities:
            kind, data, folder = "text_to_image", "picture_data", "pipeline_folder"
        source, examples = (request.getfixturevalue(name) for name in (folder, data))
        model = Modality.build(Spec(name=kind)).load(str(source))
        model.fresh(seed=1).save(tmp_path / "relative")
        path = pico.pico_policy(
            tmp_path,
            examples,
            retain={"margin": 0.9},
            modality={"name": kind},
            merge_targets=[merge_target(examples, tmp_path / "relative")],
        )
        return Policy.load(path), model

    return make


@pytest.mark.parametrize("name", Stage.available())
def test_a_stage_leaves_its_input_and_gives_finite_weights_of_the_same_shapes(
    name: str, tmp_path: Path, ground: Ground
) -> None:
    stage = quick(name)
    policy, model = ground(stage)
    before = model.state()
    assert stage.paper.startswith("https://")
    immunized = stage.immunize(model, policy, quiet(tmp_path))
    after, changed = model.state(), immunized.state()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {key: value.shape for key, value in changed.items()} == {
        key: value.shape for key, value in before.items()
    }
    assert all(value.isfinite().all() for value in changed.values() if value.is_floating_point())
    assert any(not torch.equal(before[key], changed[key]) for key in before)
    measures = stage.measure(model, immunized, policy)
    assert measures
    assert all(isinstance(value, float) for value in measures.values())


@pytest.mark.parametrize("name", Stage.available())
def test_a_stage_is_deterministic_given_the_seed(name: str, tmp_path: Path, ground: Ground) -> None:
    stage = quick(name)
    policy, model = ground(stage)

    def state(folder: str, seed: int) -> dict[str, torch.Tensor]:
        seeded = policy.model_copy(update={"seed": seed})
        workspace = replace(quiet(tmp_path / folder), private=quiet(tmp_path).private)
        return stage.immunize(model, seeded, workspace).state()

    first, again, other = state("a", 1), state("b", 1), state("c", 2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", Stage.available())
def test_a_stage_has_no_effect_yet_on_its_input(name: str, ground: Ground) -> None:
    stage = quick(name)
    policy, model = ground(stage)
    assert stage.effect(model, model, policy) == 0


@pytest.mark.parametrize("name", Stage.available())
@pytest.mark.parametrize("option", ["variant", "preset"])
def test_a_variant_that_is_no_name_is_told_in_a_line(name: str, option: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Stage.build(Spec(name=name, **{option: []}))
    assert "\n" not in str(caught.value)
    assert option in str(caught.value)


@pytest.mark.parametrize("name", Stage.available())
def test_a_stage_that_sees_rounded_weights_gives_other_ones_that_nobody_rounded(
    name: str, tmp_path: Path, ground: Ground
) -> None:
    stage = quick(name)
    policy, model = ground(stage)

    def immunized(folder: str, **given: Any) -> ModelHandle:
        workspace = replace(quiet(tmp_path / folder), private=quiet(tmp_path).private)
        return stage.immunize(model, policy.model_copy(update=given), workspace)

    exact, coarse = immunized("exact"), immunized("coarse", awareness={"nf4": 1.0})
    again = immunized("again", awareness={"nf4": 1.0}).state()
    states = exact.state(), coarse.state()
    assert states[0].keys() == states[1].keys() == again.keys()
    assert any(not torch.equal(weight, states[1][key]) for key, weight in states[0].items())
    assert all(torch.equal(weight, again[key]) for key, weight in states[1].items())
    assert [type(part) for part in coarse.module.modules()] == [
        type(part) for part in model.module.modules()
    ]
    (rounded, *_) = seen_names(coarse, "nf4")
    assert not torch.equal(states[1][rounded], emulated(coarse, "nf4").state()[rounded])
