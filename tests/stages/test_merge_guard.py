"""The laws of trapping and negating, and that every preset does what it says on pico models."""

import json
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import merge_family
import pico
import pytest
import torch
from torch import Tensor
from workspaces import quiet, resumed_after_a_kill

from release_guard.errors import ImmunizationError, IntegrityError
from release_guard.formats import rounded
from release_guard.gauge import Key, Style
from release_guard.gauging import (
    FILE,
    GaugeRecord,
    gauge_for,
    gauged,
    legal_changes,
    logit_change,
    taken_back,
)
from release_guard.modalities import Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Policy, Precision
from release_guard.quantization import linear_layers
from release_guard.stages import Stage
from release_guard.stages.merge_guard import MergeGuard
from release_guard.trapping import (
    along,
    apart,
    density,
    largest,
    loss_with,
    negated,
    repulsion,
    scaled,
    stranger,
    trap_share,
    trapped,
)

SMALL: dict[str, Any] = {"batch": 16, "probe_every": 4, "keep_every": 2, "start": "undefended"}
PRESETS = ("mergeguard", "params", "mergelock", "trap2", "arf", "hardened")


@pytest.fixture(scope="module")
def base(classifier_folder: Path) -> ModelHandle:
    return merge_family.base_model(classifier_folder)


@pytest.fixture(scope="module")
def undefended(base: ModelHandle, image_data: Path) -> ModelHandle:
    return merge_family.trained(base, image_data / "restricted.parquet", seed=1)


@pytest.fixture
def policy(tmp_path: Path, image_data: Path, classifier_folder: Path) -> Policy:
    return Policy.load(merging_policy(tmp_path, image_data, classifier_folder))


def merging_policy(folder: Path, data: Path, base: Path | None, **changes: Any) -> Path:
    kind = ".parquet" if (data / "restricted.parquet").exists() else ".jsonl"
    target = {
        "name": "task",
        "dataset": str(data / f"restricted{kind}"),
        "ceiling": 0.6,
        "donor": str(base),
        "donor_dataset": str(data / f"retained{kind}"),
    } | ({"base": str(base)} if base else {})
    retain = {"dataset": str(data / f"restricted{kind}"), "margin": 0.999}
    whole = {"concepts": None, "merge_targets": [target], "retain": retain} | changes
    return pico.pico_policy(folder, data, **whole)


def small(preset: str, **options: Any) -> MergeGuard:
    steps = {} if preset in {"params", "mergelock"} else {"train_steps": 4}
    stage = Stage.build(Spec(name="merge_guard", preset=preset, **(SMALL | steps | options)))
    assert isinstance(stage, MergeGuard)
    return stage


# --- Laws


def test_a_trap_looks_everywhere_along_the_way_but_at_the_model_itself() -> None:
    chance = random.Random(0)  # noqa: S311
    drawn = [trap_share(chance) for _ in range(4_000)]
    assert 0.05 <= min(drawn) < 0.06
    assert 1.99 < max(drawn) <= 2
    assert not any(0.95 < share < 1.05 for share in drawn)
    assert sum(share < 0.95 for share in drawn) / len(drawn) == pytest.approx(0.9 / 1.85, abs=0.03)


def test_merges_that_are_trapped_differ_tensor_by_tensor_within_their_bounds() -> None:
    chance, names = random.Random(0), ["a", "b"]  # noqa: S311
    free = [apart(names, chance) for _ in range(2_000)]
    near = [scaled(names, chance) for _ in range(2_000)]
    assert all(0 <= share <= 1 for shares in free for share in shares.values())
    assert all(0.35 <= share <= 1.1 for shares in near for share in shares.values())
    one, other = (torch.tensor([shares[name] for shares in free]) for name in names)
    assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 0.1
    one, other = (torch.tensor([shares[name] for shares in near]) for name in names)
    assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.5  # around a share in common


def test_a_stranger_s_task_vector_is_as_large_and_another() -> None:
    vector = {"w": torch.randn(6, 5), "kernel": torch.randn(4, 3, 2, 2), "b": torch.ones(40)}
    before = {name: tensor.clone() for name, tensor in vector.items()}
    first, same, second = (stranger(vector, random.Random(seed)) for seed in (1, 1, 2))  # noqa: S311
    for name, tensor in vector.items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], tensor)
        assert not torch.equal(first[name], second[name])
        sizes = first[name].abs().flatten().sort().values
        assert torch.equal(sizes, tensor.abs().flatten().sort().values)
    torch.testing.assert_close(*(torch.linalg.svdvals(each["w"]) for each in (first, vector)))
    assert set(first["b"].tolist()) == {-1.0, 1.0}


def test_the_way_begins_at_the_base_and_passes_the_model() -> None:
    base, weights = (
        {"a": torch.zeros(3), "b": torch.ones(3)},
        {"a": torch.ones(3), "b": torch.zeros(3)},
    )
    assert torch.equal(along(base, weights, {"a": 0.0})["a"], base["a"])
    assert torch.equal(along(base, weights, {"a": 1.0})["a"], weights["a"])
    assert torch.equal(along(base, weights, {"a": 0.5})["b"], weights["b"])  # not merged


def test_gradient_of_a_trap_equals_finite_differences_and_ends_at_the_cap() -> None:
    base = {"w": torch.tensor([0.3, -0.2], dtype=torch.float64)}
    rows = torch.randn(5, 2, dtype=torch.float64)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return (rows @ weights["w"] - 1).square().mean()

    def trap(point: Tensor, cap: float = 50.0) -> Tensor:
        weights = {"w": point}
        merged = loss(along(base, weights, {"w": 0.4}))
        return trapped(loss(weights), merged, share=0.4, strength=0.05, cap=cap)

    point = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(trap, (point,))
    (capped,) = torch.autograd.grad(trap(point, cap=0.0), point)
    (own,) = torch.autograd.grad(loss({"w": point}), point)
    torch.testing.assert_close(capped, own)


def test_repulsion_is_what_the_distance_lacks_and_points_away_from_the_base() -> None:
    base = {"w": torch.tensor([3.0, 4.0])}
    near = torch.tensor([3.3, 4.4], requires_grad=True)  # .5 away, of a norm of 5
    gap = repulsion(base, {"w": near}, ["w"], 0.3)
    assert gap.item() == pytest.approx(1.0)
    (slope,) = torch.autograd.grad(gap, near)
    assert float(slope @ (near.detach() - base["w"])) < 0
    assert float(repulsion(base, {"w": torch.tensor([6.0, 8.0])}, ["w"], 0.3)) == 0


def test_density_is_the_sum_of_squares_of_the_weights_not_of_the_task() -> None:
    assert float(density({"a": torch.full((2, 2), 2.0), "b": torch.ones(2)}, ["a"])) == 16


@pytest.mark.parametrize(("beta", "wanted"), [(0.0, 3.0), (1.0, 1.0), (2.0, -1.0)])
def test_negation_takes_back_the_largest_entries_and_no_others(beta: float, wanted: float) -> None:
    base, weight = torch.ones(2, 5), torch.ones(2, 5)
    weight[1, 2] = 3.0
    weight[0, 0] = 1.5
    mask = largest((weight - base).abs(), 0.1)
    assert mask.sum() == 1
    done = negated(base, weight, mask, beta)
    assert float(done[1, 2]) == wanted
    done[1, 2] = weight[1, 2]
    assert torch.equal(done, weight)


def test_loss_with_other_weights_is_the_loss_of_a_model_that_has_them(
    base: ModelHandle, undefended: ModelHandle, policy: Policy
) -> None:
    batch = next(base.batches(policy.merge_targets[0].dataset, "immunize", size=16, seed=0))
    weights = dict(undefended.module.named_parameters())
    torch.testing.assert_close(loss_with(base, weights, batch), undefended.loss(batch))


# --- The stage


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_its_input_and_changes_what_it_should(
    preset: str, undefended: ModelHandle, base: ModelHandle, policy: Policy, tmp_path: Path
) -> None:
    before, stage = undefended.state(), small(preset)
    stage.check(undefended, policy)
    workspace = quiet(tmp_path / "w")
    immunized = stage.immunize(undefended, policy, workspace)
    assert all(torch.equal(before[name], value) for name, value in undefended.state().items())
    after = immunized.state()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (workspace.private / FILE).exists() == bool(stage.gauge)
    if preset in {"params", "mergelock"}:  # a gauge alone is the same function
        batch = next(base.batches(policy.merge_targets[0].dataset, "immunize", size=16, seed=0))
        assert logit_change(undefended, immunized, batch) < 1e-5
        assert abs(stage.effect(undefended, immunized, policy)) > 1e-3
    assert stage.effect(undefended, undefended, policy) == 0


def test_mergeguard_takes_back_nine_hundredths_of_the_matrices(
    undefended: ModelHandle, base: ModelHandle, policy: Policy, tmp_path: Path
) -> None:
    immunized = small("mergeguard", train_steps=0).immunize(undefended, policy, quiet(tmp_path))
    names = [
        name for name in base.state() if name.endswith(("proj.weight", "fc1.weight", "fc2.weight"))
    ]
    own, anchor, found = undefended.state(), base.state(), immunized.state()
    touched = {
        name: float((own[name] != found[name]).double().mean())
        for name in names
        if not torch.equal(own[name], found[name])
    }
    assert len(names) - len(touched) == round(0.1 * len(names))  # the critical ones
    assert all(0.08 < share < 0.13 for share in touched.values())
    for name in touched:
        moved = own[name] != found[name]
        torch.testing.assert_close(found[name][moved], anchor[name][moved])
        sizes = (own[name] - anchor[name]).abs()
        assert sizes[moved].min() >= sizes[~moved].max()


@pytest.mark.parametrize("importance", ["taylor", "theta"])
def test_other_readings_of_what_is_taken_back(
    importance: str, undefended: ModelHandle, policy: Policy, tmp_path: Path
) -> None:
    usual, other = (
        small("mergeguard", train_steps=0, **given).immunize(undefended, policy, quiet(tmp_path))
        for given in ({}, {"importance": importance})
    )
    other_state = other.state()
    assert any(not torch.equal(value, other_state[name]) for name, value in usual.state().items())


def test_what_takes_a_layer_s_place_decides_whether_it_is_critical(
    undefended: ModelHandle, image_data: Path, tmp_path: Path
) -> None:
    """The last queries: worse than none if they are noise, and else what the model needs least."""
    own = undefended.state()
    *_, name = (name for name in own if name.endswith("q_proj.weight"))
    noise = 3 * torch.randn(own[name].shape, generator=torch.Generator().manual_seed(0))
    base = undefended.copy()
    base.load_state(own | {name: noise})
    base.save(tmp_path / "base")
    policy = Policy.load(merging_policy(tmp_path, image_data, tmp_path / "base"))
    one_of_twelve = {"train_steps": 0, "share": 1.0, "critical": 0.09}
    by_base, by_none = (
        small("mergeguard", **one_of_twelve, masked_by=reading)
        .immunize(undefended, policy, quiet(tmp_path))
        .state()
        for reading in ("base", "zero")
    )
    assert all(torch.equal(value, by_base[other]) for other, value in own.items())
    torch.testing.assert_close(by_none[name], noise)


def test_hardening_ruins_merges_and_keeps_the_task(
    undefended: ModelHandle, policy: Policy, tmp_path: Path
) -> None:
    stage = small("hardened", gauge=[], trap=0.1, train_steps=60, lr=3e-3, probe_every=60)
    immunized = stage.immunize(undefended, policy, quiet(tmp_path))
    dataset = policy.merge_targets[0].dataset
    kept, own = (merge_family.accuracy(one, dataset) for one in (immunized, undefended))
    assert kept > own - 0.05
    assert stage.effect(undefended, immunized, policy) > 0.1


def test_the_distance_it_goes_is_one_and_a_half_times_the_task_s(
    undefended: ModelHandle, policy: Policy, tmp_path: Path
) -> None:
    stage = small("arf", gauge=[], rho=None, train_steps=40, lr=5e-3, probe_every=40)
    immunized = stage.immunize(undefended, policy, quiet(tmp_path))
    figures = stage.measure(undefended, immunized, policy)
    moved = [
        figures[f"distance from the base, attention, {what}"] for what in ("undefended", "defended")
    ]
    assert moved[1] > 1.4 * moved[0]


def test_a_killed_run_resumes_to_the_very_same_weights(
    undefended: ModelHandle, policy: Policy, tmp_path: Path
) -> None:
    stage = small("hardened")
    workspace = quiet(tmp_path / "whole")
    whole = stage.immunize(undefended, policy, workspace).state()

    cut = replace(quiet(tmp_path / "cut"), private=workspace.private)
    resumed, steps = resumed_after_a_kill(stage, undefended, policy, cut, at=3)
    assert steps == [3, 4]
    again = resumed.state()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_gauge_follows_from_no_published_seed(
    undefended: ModelHandle, policy: Policy, tmp_path: Path
) -> None:
    stage = small("params")
    one, other = (stage.immunize(undefended, policy, quiet(tmp_path / name)) for name in "ab")
    states = one.state(), other.state()
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    shared = replace(quiet(tmp_path / "c"), private=tmp_path / "a" / "private")
    again = stage.immunize(undefended, policy, shared).state()
    assert all(torch.equal(states[0][name], again[name]) for name in again)
    assert (tmp_path / "a" / "private" / FILE).stat().st_mode & 0o077 == 0


def test_the_record_leads_back_and_refuses_everything_else(
    undefended: ModelHandle, policy: Policy, tmp_path: Path
) -> None:
    workspace = quiet(tmp_path)
    gauge = ["neurons", "heads", "queries", "values", "norms", "stream"]
    stage = small("mergelock", gauge=gauge)
    hidden = stage.immunize(undefended, policy, workspace)
    record = GaugeRecord.load(workspace.private / FILE)
    assert set(record.changes) == set(gauge)
    plain = taken_back(hidden, record).state()
    for name, value in undefended.state().items():
        torch.testing.assert_close(plain[name], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(IntegrityError, match="another model, or changed since"):
        taken_back(undefended, record)
    wrong = record.model_copy(update={"secret": "00" * 32})
    with pytest.raises(IntegrityError, match="the record is damaged"):
        taken_back(hidden, wrong)


def test_what_is_not_legal_is_left_out_and_said(
    undefended: ModelHandle, policy: Policy, tmp_path: Path
) -> None:
    stage = small("hardened")
    (sentence,) = stage.caveats(undefended, policy)
    assert sentence == "The gauge leaves out the scale of neurons: these neurons allow none."
    workspace = quiet(tmp_path)
    stage.immunize(undefended, policy, workspace)
    assert "scales" not in json.loads((workspace.private / FILE).read_text())["changes"]


def test_it_works_on_language_models(lm_folder: Path, text_data: Path, tmp_path: Path) -> None:
    path = merging_policy(tmp_path, text_data, lm_folder, modality={"name": "causal_lm"})
    policy = Policy.load(path)
    base = Modality.build(policy.modality).load(str(lm_folder))
    model = merge_family.trained(base, text_data / "restricted.jsonl", seed=1)
    stage = small("hardened")
    stage.check(model, policy)
    assert stage.caveats(model, policy) == []
    workspace = quiet(tmp_path / "w")
    immunized = stage.immunize(model, policy, workspace)
    record = GaugeRecord.load(workspace.private / FILE)
    assert set(record.changes) == set(stage.gauge)
    batch = next(base.batches(policy.merge_targets[0].dataset, "immunize", size=16, seed=0))
    assert logit_change(immunized, taken_back(immunized, record), batch) < 1e-5


def test_queries_mixed_as_if_there_were_no_rotary_positions_are_refused(
    lm_folder: Path, text_data: Path
) -> None:
    model = Modality.build(Spec(name="causal_lm")).load(str(lm_folder))
    batch = next(model.batches(str(text_data / "retained.jsonl"), "retain", size=16, seed=0))
    right = gauge_for(model, Key(b"x"), ("queries", "values"), "orthogonal")
    wrong = tuple(replace(one, mixing="any") for one in right.body.attentions)
    legal, sentences = legal_changes(
        model, batch, replace(right, body=replace(right.body, attentions=wrong))
    )
    assert legal == ("values",)
    (sentence,) = sentences
    assert sentence.startswith("The gauge leaves out the mixing of queries and keys: it moves")
    assert legal_changes(model, batch, right) == (("queries", "values"), [])


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_whoever_rounds_pays_for_a_general_gauge_and_hardly_for_an_orthogonal_one(
    precision: Precision, undefended: ModelHandle
) -> None:
    def mean_error(style: Style) -> float:
        keys = (Key(bytes([number])) for number in range(5))
        gauges = (gauge_for(undefended, key, ("queries", "values"), style) for key in keys)
        return statistics.mean(rounding_error(gauged(undefended, one), precision) for one in gauges)

    bound = 1.18 * rounding_error(undefended, precision)
    assert mean_error("orthogonal") < bound < mean_error("general")


def rounding_error(model: ModelHandle, precision: Precision) -> float:
    """Of what attention computes from weights alone, which no gauge changes; mean, relative.

    The error of logits is one draw from few directions, and differs by factors from key to key.
    """
    coarse = model.copy()
    with torch.no_grad():
        for layer in linear_layers(coarse):  # also those whose rows are no whole blocks
            layer.weight.copy_(rounded(layer.weight, precision))
    exact, found = map(products, (model, coarse))
    return float(((exact - found).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).mean())


def products(model: ModelHandle) -> Tensor:
    """Queries with keys and values with outputs, of each head of a ViT."""
    found = []
    for part in (block.attention for block in model.blocks):
        read = part.q_proj.weight, part.k_proj.weight
        written = part.v_proj.weight, part.o_proj.weight.T
        for pair in (read, written):
            one_GHD, other_GHD = (weight.detach().unflatten(0, (2, -1)) for weight in pair)
            found.append(one_GHD.mT @ other_GHD)
    return torch.cat(found)


def test_a_resnet_is_trapped_without_a_gauge_and_says_so(
    resnet_folder: Path, image_data: Path, tmp_path: Path
) -> None:
    policy = Policy.load(merging_policy(tmp_path, image_data, resnet_folder))
    base = merge_family.base_model(resnet_folder)
    model = merge_family.trained(base, image_data / "restricted.parquet", seed=1)
    stage = small("hardened")
    (sentence,) = stage.caveats(model, policy)
    assert sentence.startswith("There is no gauge: ResNetForImageClassification")
    workspace = quiet(tmp_path / "w")
    stage.immunize(model, policy, workspace)
    assert not (workspace.private / FILE).exists()
    with pytest.raises(ImmunizationError, match="no part of its gauge is legal"):
        small("params").check(model, policy)


# --- Bad input


def test_without_a_merge_target_it_says_so(
    undefended: ModelHandle, tmp_path: Path, image_data: Path
) -> None:
    policy = Policy.load(pico.pico_policy(tmp_path, image_data))
    with pytest.raises(ImmunizationError, match="names no merge target"):
        small("hardened").check(undefended, policy)


def test_without_a_base_it_says_so(
    undefended: ModelHandle, tmp_path: Path, image_data: Path
) -> None:
    policy = Policy.load(merging_policy(tmp_path, image_data, None))
    with pytest.raises(ImmunizationError, match="not known what the model came from"):
        small("hardened").check(undefended, policy)


def test_a_model_that_is_its_own_base_has_nothing_to_guard(
    base: ModelHandle, policy: Policy
) -> None:
    with pytest.raises(ImmunizationError, match="there is no task to guard"):
        small("hardened").check(base, policy)


def test_negating_away_the_task_is_refused(
    undefended: ModelHandle, policy: Policy, tmp_path: Path
) -> None:
    strict = policy.model_copy(update={"retain": policy.retain.model_copy(update={"margin": 0.01})})
    stage = small("mergeguard", train_steps=0, share=1.0, critical=0.0)
    with pytest.raises(ImmunizationError, match=r"more than retain\.margin"):
        stage.immunize(undefended, strict, quiet(tmp_path))
