import itertools
import math
import time
from pathlib import Path

import pico
import pytest
import torch
from torch import nn

from release_guard.adaptation import (
    Learner,
    Recipe,
    adapt,
    make_optimizer,
    scheduled_lr,
    select,
)
from release_guard.errors import PolicyError
from release_guard.evidence import cost_grid
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget

SGD = Recipe(lr=0.1, optimizer="sgd", momentum=0)


@pytest.fixture(scope="module")
def resnet(resnet_folder):
    return Modality.build(Spec(name="image_classification")).load(str(resnet_folder))


@pytest.fixture
def slope(classifier):
    """A copy whose loss is the sum of the head's biases: each SGD step moves them by its rate."""
    model = classifier.copy()
    select(model, "head")
    model.head.weight.requires_grad_(False)
    model.loss = lambda _: model.head.bias.sum()
    return model


def batches(size=4):
    return itertools.repeat({"pixels": torch.zeros(size, 1, 8, 8), "labels": torch.arange(size)})


def run(model, recipe, limit, unit="steps", ratio=1.5):
    budget = Budget(unit=unit, limit=limit)
    return list(adapt(model, batches(), recipe, budget=budget, grid_ratio=ratio, seed=0))


def rates(slope, recipe, limit, unit="steps"):
    """Learning rates as the weights themselves tell them."""
    seen = []

    def loss(_):
        seen.append(slope.head.bias[0].item())
        return slope.head.bias.sum()

    slope.loss = loss
    run(slope, recipe, limit, unit)
    places = torch.tensor([*seen, slope.head.bias[0].item()], dtype=torch.float64)
    return -places.diff()


@pytest.mark.parametrize(("unit", "limit"), [("steps", 20), ("samples", 80)])
def test_warm_up_then_cosine(slope, unit, limit):
    recipe = Recipe(lr=0.1, optimizer="sgd", momentum=0, schedule="cosine", warmup=5)
    rise = [0.02, 0.04, 0.06, 0.08, 0.1]
    fall = [0.05 * (1 + math.cos(math.pi * step / 15)) for step in range(15)]
    wanted = torch.tensor([*rise, *fall], dtype=torch.float64)
    torch.testing.assert_close(rates(slope, recipe, limit, unit), wanted, atol=1e-6, rtol=0)


def test_linear_schedule_over_a_length_of_its_own(slope):
    recipe = Recipe(lr=0.1, optimizer="sgd", momentum=0, schedule="linear", schedule_steps=4)
    wanted = torch.tensor([0.1, 0.075, 0.05, 0.025, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(rates(slope, recipe, 6), wanted, atol=1e-6, rtol=0)


def test_constant_rate_is_constant(slope):
    wanted = torch.full((7,), 0.1, dtype=torch.float64)
    torch.testing.assert_close(rates(slope, SGD, 7), wanted, atol=1e-6, rtol=0)


def test_one_cycle_rises_then_falls():
    recipe = Recipe(lr=1.0, schedule="one_cycle", schedule_steps=100)
    trace = [scheduled_lr(recipe, step, 0) for step in range(100)]
    assert trace[0] == pytest.approx(1 / 25)
    assert max(range(100), key=trace.__getitem__) == 30
    assert trace[30] == pytest.approx(1)
    assert trace[:31] == sorted(trace[:31])
    assert trace[30:] == sorted(trace[30:], reverse=True)
    assert trace[99] < 1e-3


def test_warm_up_longer_than_the_schedule_ends_where_the_schedule_ends():
    recipe = Recipe(lr=1.0, schedule="cosine", warmup=10, schedule_steps=5)
    assert scheduled_lr(recipe, 9, 0.9) == 1
    assert scheduled_lr(recipe, 10, 0.95) == pytest.approx(0)


@pytest.mark.parametrize(("limit", "ratio"), [(1, 1.5), (2, 1.5), (20, 1.5), (41, 1.5), (30, 1.2)])
def test_copies_are_shown_on_the_grid(slope, limit, ratio):
    costs = run(slope, SGD, limit, ratio=ratio)
    assert [cost.steps for cost in costs] == list(cost_grid(limit, ratio))


def test_grid_grows_by_half_and_ends_at_the_limit():
    assert cost_grid(62, 1.5) == (1, 2, 3, 5, 8, 12, 18, 27, 41, 62)
    assert cost_grid(60, 1.5) == (1, 2, 3, 5, 8, 12, 18, 27, 41, 60)


@pytest.mark.parametrize(("unit", "limit", "steps"), [("samples", 43, 10), ("flops", 9.5, 9)])
def test_a_step_beyond_the_budget_is_not_taken(slope, unit, limit, steps):
    if unit == "flops":
        limit *= Learner(slope, SGD).price(next(batches())).flops
    *_, last = run(slope, SGD, limit, unit)
    assert last.steps == steps
    assert last.samples == 4 * steps


def test_seconds_are_spent_to_the_end_and_not_on_scoring(slope):
    started, slept, last = time.perf_counter(), 0.0, None
    budget = Budget(unit="seconds", limit=0.05)
    for cost in adapt(slope, batches(), SGD, budget=budget, grid_ratio=1.5, seed=0):
        time.sleep(0.02)
        slept, last = slept + 0.02, cost
    assert 0.05 <= last.seconds <= time.perf_counter() - started - slept


@pytest.mark.parametrize(("unit", "limit"), [("steps", 0.5), ("samples", 3), ("flops", 10)])
def test_a_budget_below_one_step_is_refused(slope, unit, limit):
    with pytest.raises(PolicyError, match=f"{limit:g} {unit} is too small"):
        run(slope, SGD, limit, unit)


def test_clipping_bounds_the_global_norm(slope):
    before = slope.head.bias.detach().clone()
    run(slope, Recipe(lr=1.0, optimizer="sgd", momentum=0, clip=0.5), 1)
    assert (slope.head.bias - before).norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, 0.01, momentum=0.8, weight_decay=0.1)),
        ("nesterov", lambda p: torch.optim.SGD(p, 0.01, 0.8, weight_decay=0.1, nesterov=True)),
        ("adam", lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1)),
        ("adamw", lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)),
        ("adagrad", lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.1)),
        ("adadelta", lambda p: torch.optim.Adadelta(p, 0.01, weight_decay=0.1)),
    ],
)
def test_optimizers_are_the_textbook_ones(name, reference):
    ours, theirs = (nn.Parameter(torch.linspace(-1, 2, 5)) for _ in range(2))
    recipe = Recipe(lr=0.01, optimizer=name, momentum=0.8, weight_decay=0.1)
    for parameter, optimizer in (
        (ours, make_optimizer([ours], recipe)),
        (theirs, reference([theirs])),
    ):
        for _ in range(4):
            optimizer.zero_grad()
            parameter.pow(3).sum().backward()
            optimizer.step()
    assert not torch.equal(ours, torch.linspace(-1, 2, 5))
    torch.testing.assert_close(ours, theirs)


def trained(model):
    return {name for name, part in model.module.named_parameters() if part.requires_grad}


def test_scopes_of_a_transformer(classifier):
    model = classifier.copy()
    names = {name for name, _ in model.module.named_parameters()}
    assert select(model, "all") == sum(part.numel() for part in model.module.parameters())
    assert trained(model) == names
    assert select(model, "head") == 32 * 8 + 8
    assert trained(model) == {"classifier.weight", "classifier.bias"}
    select(model, "last_k", last_k=1)
    earlier = {name for name in names if "embeddings" in name or ".0." in name}
    assert trained(model) == names - earlier
    assert any("layernorm" in name for name in trained(model) if "." in name)


def test_more_blocks_than_there_are(classifier):
    with pytest.raises(PolicyError, match="last_k: found 3, but the model has 2 blocks"):
        select(classifier.copy(), "last_k", last_k=3)


def test_the_last_block_of_a_tied_model_comes_with_its_head(tmp_path: Path):
    folder = pico.pico_lm(tmp_path, steps=1, tied=True)
    model = Modality.build(Spec(name="causal_lm")).load(str(folder))
    select(model, "last_k", last_k=1)
    assert model.head.weight.requires_grad
    assert not any(part.requires_grad for part in model.blocks[0].parameters())


def test_flops_follow_what_is_trained(classifier):
    model, (batch, units) = classifier.copy(), (next(batches()), classifier.units(next(batches())))
    weights = sum(part.numel() for part in model.module.parameters())
    flops = {}
    for scope in ("all", "last_k", "head"):
        select(model, scope)
        flops[scope] = Learner(model, SGD).price(batch).flops
    assert flops["all"] == 6 * weights * units
    assert flops["head"] == (2 * weights + 4 * (32 * 8 + 8)) * units
    assert flops["head"] < flops["last_k"] < flops["all"]


def test_frozen_statistics_stay_and_trained_ones_move(resnet):
    for scope, moves in (("head", False), ("all", True)):
        model = resnet.copy()
        select(model, scope)
        before = model.state()
        run(model, Recipe(lr=1e-3), 3)
        after = model.state()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert any("running_mean" in name for name in moved) is moves
        assert not any(part.training for part in model.module.modules())


def test_divergence_ends_the_run_and_leaves_the_broken_model(classifier, image_data):
    model = classifier.copy()
    select(model, "all")
    costs = run(model, Recipe(lr=1e30, optimizer="sgd"), 50)
    assert costs[-1].steps < 10
    scores = model.scores(str(image_data / "restricted.parquet"), "search", limit=5)
    assert all(map(math.isnan, scores))


def test_the_callers_randomness_is_left_alone(slope):
    state = torch.get_rng_state()
    run(slope, SGD, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_depends_on_the_seed_alone(classifier, image_data):
    def weights(seed):
        model = classifier.copy()
        for part in model.module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.5
        select(model, "all")
        data = model.batches(str(image_data / "restricted.parquet"), "attack", size=8, seed=0)
        budget = Budget(limit=3)
        for _ in adapt(model, data, Recipe(lr=1e-2), budget=budget, grid_ratio=1.5, seed=seed):
            torch.rand(1)  # a caller that draws numbers must not matter
        return torch.cat([part.detach().flatten() for part in model.module.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
