import math

import numpy as np
import pico
import pytest
import scipy.optimize
import torch

from release_guard.attacks import Attack, linear_probe
from release_guard.attacks.linear_probe import ridge, scaling
from release_guard.errors import ModelError, PolicyError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept


@pytest.fixture(scope="module")
def concept(image_data):
    return Concept(name="odd-angles", dataset=str(image_data / "restricted.parquet"), ceiling=0.5)


def copies(model, concept, *, limit=6, unit="steps", seed=0, **options):
    attack = Attack.build(Spec(name="linear_probe", **options))
    budget = Budget(unit=unit, limit=limit)
    return attack.tamper(model, concept, budget=budget, grid_ratio=1.5, seed=seed)


def last_copy(model, concept, **options):
    *_, last = copies(model, concept, **options)
    return last


def score(tampered, concept):
    scores = tampered.model.scores(concept.dataset, "search", limit=200)
    return sum(scores) / len(scores)


def read(model, concept, num_batches):
    """The very rows a probe of this length sees."""
    data = model.batches(concept.dataset, "attack", size=32, seed=0)
    with torch.no_grad():
        rows = [model.features(next(data)) for _ in range(num_batches)]
    return (torch.cat(part).double() for part in zip(*rows, strict=True))


def test_ridge_is_least_squares_with_a_penalty(classifier, concept):
    features, labels = read(classifier, concept, 6)
    centred = features - features.mean(0)
    targets = torch.nn.functional.one_hot(labels.long(), 8).double()
    variance = centred.square().mean(0).mean()
    # The penalty as further examples: the textbook's augmented system.
    penalty = math.sqrt(0.1 * len(features)) * torch.eye(32).double() * variance.sqrt()
    system = torch.cat([centred, penalty])
    sides = torch.cat([targets - targets.mean(0), torch.zeros(32, 8)])
    wanted = np.linalg.lstsq(system.numpy(), sides.numpy())[0].T
    head = last_copy(classifier, concept, strength=0.1).model.head
    torch.testing.assert_close(head.weight.double(), torch.from_numpy(wanted), atol=1e-4, rtol=1e-4)
    predicted = features @ head.weight.double().T + head.bias.double()
    torch.testing.assert_close(predicted.mean(0), targets.mean(0), atol=1e-4, rtol=0)


def test_lbfgs_finds_the_minimum_scipy_finds(classifier, concept):
    features, labels = read(classifier, concept, 3)
    centred = (features - features.mean(0)) / (features - features.mean(0)).square().mean().sqrt()

    def loss(flat):
        weights = torch.from_numpy(flat).requires_grad_()
        logits = centred @ weights[:256].view(8, 32).T + weights[256:]
        value = torch.nn.functional.cross_entropy(logits, labels.long())
        value = value + 0.05 * weights[:256].square().sum()
        value.backward()
        return value.item(), weights.grad.numpy()

    best = scipy.optimize.minimize(loss, np.zeros(264), jac=True, method="L-BFGS-B").x
    options = {"solver": "lbfgs", "strength": 0.1, "iterations": 300, "limit": 3}
    head = last_copy(classifier, concept, **options).model.head
    ours = torch.softmax(features @ head.weight.double().T + head.bias.double(), 1)
    weights = torch.from_numpy(best)
    theirs = torch.softmax(centred @ weights[:256].view(8, 32).T + weights[256:], 1)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("solver", ["ridge", "lbfgs"])
@pytest.mark.parametrize("whiten", [False, True])
def test_frozen_features_give_the_concept_away(classifier, concept, solver, whiten):
    probe = last_copy(classifier, concept, solver=solver, whiten=whiten, limit=15)
    assert score(probe, concept) > 0.9


def test_only_the_head_changes(classifier, concept):
    before, after = classifier.state(), last_copy(classifier, concept).model.state()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert last_copy(classifier, concept).parameters == 32 * 8 + 8


def test_whitening_undoes_ill_conditioning():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=generator).double()
    targets = torch.randn(200, 3, generator=generator).double()
    squeeze = torch.diag(torch.logspace(0, -4, 6).double())

    def predictions(rows, whiten):
        covariance, cross = rows.T @ rows / 200, targets.T @ rows / 200
        return rows @ ridge(covariance, cross, strength=1e-3, whiten=whiten).T

    plain = predictions(features, whiten=True)
    torch.testing.assert_close(predictions(features @ squeeze, whiten=True), plain)
    assert (predictions(features @ squeeze, whiten=False) - plain).norm() > 0.1 * plain.norm()


def test_whitened_features_have_unit_variance_everywhere():
    rows = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).double()
    covariance = rows.T @ rows / 50
    scale = scaling(covariance, whiten=True)
    torch.testing.assert_close(scale.T @ covariance @ scale, torch.eye(5).double())
    scale = scaling(covariance, whiten=False)
    assert (scale.T @ covariance @ scale).diagonal().mean().item() == pytest.approx(1)


@pytest.mark.parametrize("solver", ["ridge", "lbfgs"])
@pytest.mark.parametrize("whiten", [False, True])
def test_dead_features_give_a_probe_that_knows_nothing(classifier, concept, solver, whiten):
    model = classifier.copy()
    model.module.vit.layernorm.weight.data.zero_()
    probe = last_copy(model, concept, solver=solver, whiten=whiten)
    assert score(probe, concept) < 0.5
    assert probe.model.head.weight.isfinite().all()


@pytest.mark.parametrize("solver", ["ridge", "lbfgs"])
def test_a_broken_model_stays_broken(classifier, concept, solver):
    model = classifier.copy()
    model.module.vit.layernorm.weight.data.fill_(torch.nan)
    assert math.isnan(score(last_copy(model, concept, solver=solver), concept))


@pytest.mark.parametrize(("unit", "limit"), [("steps", 4), ("samples", 128)])
def test_the_budget_bounds_what_is_read(classifier, concept, unit, limit):
    costs = [copy.cost for copy in copies(classifier, concept, unit=unit, limit=limit)]
    assert [cost.samples for cost in costs] == [32, 64, 96, 128]
    assert [cost.steps for cost in costs] == [1, 2, 3, 4]


def test_examples_bound_what_is_read(classifier, concept):
    costs = [copy.cost for copy in copies(classifier, concept, limit=500, examples=320)]
    assert [cost.steps for cost in costs] == [1, 2, 3, 5, 8, 10]


def test_fitting_is_paid_for(classifier, concept):
    ridge_cost, lbfgs_cost = (
        last_copy(classifier, concept, solver=solver).cost for solver in ("ridge", "lbfgs")
    )
    weights = sum(part.numel() for part in classifier.module.parameters())
    data = classifier.batches(concept.dataset, "attack", size=32, seed=0)
    reading = 6 * 2 * weights * classifier.units(next(data))
    assert reading < ridge_cost.flops < lbfgs_cost.flops


@pytest.mark.parametrize("solver", ["ridge", "lbfgs"])
def test_a_language_model_is_probed_even_if_its_head_is_tied(tmp_path, text_data, solver):
    folder = pico.pico_lm(tmp_path, steps=1, tied=True)
    model = Modality.build(Spec(name="causal_lm")).load(str(folder))
    concept = Concept(name="reversing", dataset=str(text_data / "restricted.jsonl"), ceiling=0.5)
    tampered = last_copy(model, concept, solver=solver)
    embedding = model.module.get_input_embeddings().weight
    assert torch.equal(tampered.model.module.get_input_embeddings().weight, embedding)
    assert not torch.equal(tampered.model.head.weight, embedding)
    assert tampered.model.head.bias is None
    batch = next(model.batches(concept.dataset, "attack", size=64, seed=0))
    hits = [
        (logits.argmax(1) == labels).float().mean()
        for logits, labels in (tampered.model.logits(batch), model.logits(batch))
    ]
    assert hits[0] > hits[1] + 0.1


def test_a_head_too_large_for_lbfgs_is_refused_before_anything_is_read(
    classifier, concept, monkeypatch
):
    monkeypatch.setattr(linear_probe, "_MOST_WEIGHTS", 100)
    with pytest.raises(
        ModelError, match="lbfgs cannot fit a head of 256 weights; use solver ridge"
    ):
        next(copies(classifier, concept, solver="lbfgs"))


def test_a_strength_of_zero_is_refused():
    with pytest.raises(PolicyError, match=r"linear_probe\.strength: found 0"):
        Attack.build(Spec(name="linear_probe", strength=0))
