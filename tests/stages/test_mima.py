"""The stage on pico models: both levels, what it refuses, and that a kill changes nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from workspaces import quiet, resumed_after_a_kill

from release_guard.errors import ImmunizationError
from release_guard.modalities import Modality, ModelHandle, Painter
from release_guard.operators import (
    Attacker,
    Full,
    LowRank,
    Objective,
    Operator,
    Words,
    gradients_at,
)
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.stages import Stage
from release_guard.stages.mima import Mima

SMALL = {
    "outer_steps": 4,
    "batch": 4,
    "prior_batch": 4,
    "captions": 40,
    "lower_lr": (0.05, 0.05),
    "upper_lr": 1e-3,
    "probe_every": 2,
    "keep_every": 2,
    "probed": 20,
    "measured_steps": 3,
}
POOL = {
    "variant": "imma",
    "operators": ("full", "words", "lora", "cross_kv"),
    "horizon": (2, 3),
    "lower_lr": (1e-3, 1e-2),
}


@pytest.fixture
def policy(tmp_path: Path, picture_data: Path) -> Policy:
    """Two concepts: bars that stand, told apart by their names."""
    halves = [tmp_path / "left.parquet", tmp_path / "right.parquet"]
    for path, classes in zip(halves, ((4, 5), (6, 7)), strict=True):
        pico.write_pictures(path, *pico.bars(classes, count=120, seed=classes[0]))
    concepts = [{"name": path.stem, "dataset": str(path), "ceiling": 0.6} for path in halves]
    source = pico.pico_policy(
        tmp_path,
        picture_data,
        modality={"name": "text_to_image"},
        retain={"margin": 0.5},
        concepts=concepts,
    )
    return Policy.load(source)


@pytest.fixture
def model(pipeline_folder: Path) -> Painter:
    """Without a judge: it is scored by how well it denoises."""
    loaded = Modality.build(Spec(name="text_to_image")).load(str(pipeline_folder))
    assert isinstance(loaded, Painter)
    return loaded


def stage(**options: Any) -> Mima:
    built = Stage.build(Spec(name="mima", **{**SMALL, **options}))
    assert isinstance(built, Mima)
    return built


def weights(model: ModelHandle) -> dict[str, torch.Tensor]:
    return dict(model.module.named_parameters())


def moved(before: ModelHandle, after: ModelHandle) -> set[str]:
    others = weights(after)
    return {name for name, value in weights(before).items() if not torch.equal(value, others[name])}


@pytest.mark.parametrize(
    "options",
    [{}, {"order": 1}, {"merge_base": "pretrained"}, {"variant": "hardened", **SMALL}, POOL],
    ids=["order 2", "order 1", "fixed base", "hardened", "carried"],
)
def test_only_the_upper_scope_is_changed(
    policy: Policy, model: Painter, tmp_path: Path, options: Mapping[str, Any]
) -> None:
    built = stage(**options, upper_scope="cross_attention")
    built.check(model, policy)
    immunized = built.immunize(model, policy, quiet(tmp_path / "w"))
    changed = moved(model, immunized)
    assert changed
    assert all(".attn2." in name for name in changed)


def test_the_released_code_keeps_the_inner_updates(
    policy: Policy, model: Painter, tmp_path: Path
) -> None:
    built = stage(variant="code", outer_steps=2)
    immunized = built.immunize(model, policy, quiet(tmp_path / "w"))
    outside = {name for name in moved(model, immunized) if ".attn2." not in name}
    assert outside
    assert all(name.startswith("unet.") for name in outside)


@pytest.mark.parametrize("options", [{}, POOL], ids=["merged", "carried"])
def test_a_killed_immunization_resumes_to_the_very_same_weights(
    policy: Policy, model: Painter, tmp_path: Path, options: Mapping[str, Any]
) -> None:
    built = stage(**options)
    whole = built.immunize(model, policy, quiet(tmp_path / "whole"))

    resumed, steps = resumed_after_a_kill(built, model, policy, quiet(tmp_path / "cut"), at=3)
    assert steps == [3, 4]
    assert not moved(whole, resumed)


def test_the_second_order_needs_plain_attention_and_takes_it(
    model: Painter, policy: Policy
) -> None:
    batch = next(model.batches(policy.concepts[0].dataset, "immunize", size=2, seed=0))
    theta = {name: value for name, value in weights(model).items() if ".attn1.to_q" in name}
    values = list(theta.values())
    _, gradients = gradients_at(model, model.loss, theta, batch, values, twice=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(sum(one.square().sum() for one in gradients), values)


@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_other_models_are_merged_by_the_mean(
    kind: str, image_data: Path, classifier_folder: Path, text_data: Path, lm_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    data, folder, name, ending = (
        (image_data, classifier_folder, "image_classification", "parquet")
        if kind == "classifier"
        else (text_data, lm_folder, "causal_lm", "jsonl")
    )
    concept = {"name": "c", "dataset": str(data / f"restricted.{ending}"), "ceiling": 0.6}
    retain = {"dataset": str(data / f"retained.{ending}"), "margin": 0.9}
    source = pico.pico_policy(
        tmp_path, data, modality={"name": name}, retain=retain, concepts=[concept]
    )
    policy = Policy.load(source)
    loaded = Modality.build(policy.modality).load(str(folder))
    for order in (1, 2):
        built = stage(order=order, outer_steps=2)
        built.check(loaded, policy)
        immunized = built.immunize(loaded, policy, quiet(tmp_path / f"w{order}"))
        assert moved(loaded, immunized)
    assert "mean" in built.caveats(loaded, policy)[0]
    for options in (POOL, {"variant": "hardened"}):
        with pytest.raises(ImmunizationError, match="painters alone"):
            stage(**options).check(loaded, policy)


def test_immunizing_leaves_more_loss_after_an_adaptation(
    policy: Policy, model: Painter, tmp_path: Path
) -> None:
    options = {"outer_steps": 12, "order": 1, "upper_lr": 1e-2, "prior_weight": 3.0}
    built = stage(**options, measured_steps=5, measured_lr=3e-3, probe_every=12)
    immunized = built.immunize(model, policy, quiet(tmp_path / "w"))
    assert built.effect(model, model, policy) == 0
    assert built.effect(model, immunized, policy) > 0
    figures = built.measure(model, immunized, policy)
    assert figures["relative distance of cross-attention"] > 0
    assert figures["adapted to left, immunized: loss"] > figures["adapted to left, base: loss"]


def test_the_anchor_is_what_the_base_says_under_retained_captions(
    policy: Policy, model: Painter
) -> None:
    mine = next(model.batches(policy.concepts[0].dataset, "immunize", size=8, seed=9))
    others = next(model.batches(policy.retain.dataset, "retain", size=8, seed=9))
    objective, instead = Objective(model, model), {**mine, "tokens": others["tokens"]}
    with torch.no_grad():
        wanted = (model.predicted(mine) - model.predicted(instead)).square().mean()
        assert objective.distance(mine).item() == 0
        assert objective.distance(mine, captions_of=others).item() == wanted.item() > 0


def test_the_rate_of_a_cycle_rises_and_falls_to_nothing(
    policy: Policy, model: Painter, tmp_path: Path
) -> None:
    built = stage(schedule="cycle", outer_steps=20)
    training: Any = built.training(model, policy, quiet(tmp_path))
    shares = []
    for training.step in range(20):
        shares.append(training._share())
    assert shares[:2] == [0.5, 1.0]
    assert set(shares[2:11]) == {1.0}
    assert shares[10:] == pytest.approx([(20 - step) / 10 for step in range(10, 20)])


def test_what_cannot_work_is_said_before_any_training(policy: Policy, model: Painter) -> None:
    cases = [
        ({"batch": 60}, "lower the batch size"),
        ({"captions": 8, "regular_ridge": 0.0}, "set regular_ridge"),
    ]
    for options, message in cases:
        with pytest.raises(ImmunizationError, match=message):
            stage(**options).check(model, policy)
    with pytest.raises(ImmunizationError, match="names no concept"):
        stage().check(model, policy.model_copy(update={"concepts": ()}))


def test_concepts_that_share_every_word_are_merged_and_too_many_words_are_refused(
    policy: Policy, model: Painter
) -> None:
    one = policy.concepts[0]
    twice = policy.model_copy(update={"concepts": (one, one.model_copy(update={"name": "again"}))})
    alike, alone = stage().merge(model, twice), stage().merge(model, policy)
    assert len(alike.rows) == len(alike.places[0])
    assert len(alone.rows) == sum(map(len, alone.places))
    many = [one.model_copy(update={"name": f"c{at}"}) for at in range(2)]
    assert len(stage().merge(model, policy.model_copy(update={"concepts": tuple(many)})).rows) == 3


def test_options_that_contradict_each_other_are_refused() -> None:
    for options in ({"form": "carried"}, {"persist_lower": True}, {"checkpointing": True}):
        with pytest.raises(Exception, match="order = 2"):
            stage(order=2, **options)


@pytest.mark.parametrize("kind", ["full", "lora", "words"])
def test_an_operator_begins_at_the_released_weights_and_learns(
    kind: str, model: Painter, policy: Policy
) -> None:
    theta = weights(model)
    matrices = tuple(name for name in theta if ".attn2.to_" in name and theta[name].ndim > 1)
    embedding = next(name for name in theta if name.endswith("token_embedding.weight"))
    operators: Mapping[str, Operator] = {
        "full": Full(matrices),
        "lora": LowRank(matrices, rank=2),
        "words": Words(embedding, tuple(pico.token_numbers(pico.BARS[4:6]))),
    }
    attacker = Attacker({"rate": 3e-2}, operators[kind], theta, seed=0)
    assert all(torch.equal(value, theta[name]) for name, value in attacker.weights(theta).items())
    batch = next(model.batches(policy.concepts[0].dataset, "immunize", size=16, seed=0))
    before = model.loss(batch).item()
    for _ in range(6):
        attacker.step(model, theta, batch)
    state = {name: value.detach() for name, value in attacker.weights(theta).items()}
    other = model.copy()
    other.load_state({**other.state(), **state})
    assert other.loss(batch).item() < before
    assert model.loss(batch).item() == before


def test_where_an_anchor_is_asked_for_its_effect_is_nearness_to_it(
    policy: Policy, model: Painter, tmp_path: Path
) -> None:
    """Restricted loss need not rise: what is asked for is another picture, not a bad one."""
    options = {"variant": "hardened", "outer_steps": 12, "upper_lr": 3e-3, "probe_every": 12}
    built = stage(**options, measured_steps=5, measured_lr=3e-3)
    immunized = built.immunize(model, policy, quiet(tmp_path / "w"))
    assert built.effect(model, model, policy) == 0
    assert built.effect(model, immunized, policy) > 0
