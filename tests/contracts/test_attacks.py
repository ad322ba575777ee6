"""Every attack beside the contract, found by itself."""

import pytest
import torch

from release_guard.attacks import Attack, Choice, LogUniform
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept
from release_guard.stages import Stage

NAMES = Attack.available()


@pytest.fixture(scope="module")
def classifier(classifier_folder):
    return Modality.build(Spec(name="image_classification")).load(str(classifier_folder))


@pytest.fixture(scope="module")
def concept(image_data):
    return Concept(name="odd-angles", dataset=str(image_data / "restricted.parquet"), ceiling=0.5)


@pytest.fixture(params=NAMES)
def attack(request):
    return Attack.build(Spec(name=request.param))


def tamper(attack, model, concept, *, limit=4, seed=0):
    return attack.tamper(model, concept, budget=Budget(limit=limit), grid_ratio=1.5, seed=seed)


def weights(attack, model, concept, seed):
    *_, last = tamper(attack, model, concept, seed=seed)
    return last.model.state()


def test_the_three_promised_attacks_are_there():
    assert {"finetune", "linear_probe", "lora"} <= set(NAMES)


def test_it_says_where_it_comes_from_and_what_it_breaks(attack):
    assert attack.paper.startswith("https://")
    assert attack.against is None or attack.against in Stage.available()
    assert attack.expense >= 1
    assert type(attack).__doc__ != Attack.__doc__


def test_every_prior_lies_within_its_options_bounds(attack):
    priors = {
        name: prior
        for name, field in type(attack).model_fields.items()
        for prior in field.metadata
        if isinstance(prior, LogUniform | Choice)
    }
    for name, prior in priors.items():
        values = prior.values if isinstance(prior, Choice) else (prior.low, prior.high)
        for value in values:
            assert getattr(Attack.build(Spec(name=attack.name, **{name: value})), name) == value


def test_it_attacks_every_concept(attack, concept):
    class Both:
        concepts = (concept,)

    assert attack.targets(Both()) == (concept,)


def test_what_it_was_given_is_left_bit_identical(attack, classifier, concept):
    before, modes = classifier.state(), [part.training for part in classifier.module.modules()]
    needs = [part.requires_grad for part in classifier.module.parameters()]
    state = torch.get_rng_state()
    for tampered in tamper(attack, classifier, concept):
        tampered.model.scores(concept.dataset, "search", limit=8)
    after = classifier.state()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [part.training for part in classifier.module.modules()] == modes
    assert [part.requires_grad for part in classifier.module.parameters()] == needs
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("unit", ["steps", "samples", "flops"])
def test_costs_grow_and_end_at_the_budget(attack, classifier, concept, unit):
    (first, *_) = tamper(attack, classifier, concept, limit=1)
    budget = Budget(unit=unit, limit=7 * first.cost.of(unit))
    costs = [
        tampered.cost
        for tampered in attack.tamper(classifier, concept, budget=budget, grid_ratio=1.5, seed=0)
    ]
    for one in ("steps", "samples", "flops", "seconds"):
        amounts = [cost.of(one) for cost in costs]
        assert amounts == sorted(set(amounts)), one
    assert budget.limit - first.cost.of(unit) < costs[-1].of(unit) <= budget.limit


def test_the_seed_fixes_the_weights_and_another_seed_gives_others(attack, classifier, concept):
    one, again, other = (weights(attack, classifier, concept, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_copies_are_finite_have_all_layers_and_do_not_train(attack, classifier, concept):
    for tampered in tamper(attack, classifier, concept):
        found = {
            name.replace(".base_layer", ""): value.shape
            for name, value in tampered.model.state().items()
        }
        assert all(found[name] == value.shape for name, value in classifier.state().items())
        assert all(value.isfinite().all() for value in tampered.model.state().values())
        assert not any(part.training for part in tampered.model.module.modules())
        assert 0 < tampered.parameters <= sum(map(torch.numel, tampered.model.state().values()))


def test_it_breaches_a_model_nobody_defended(attack, classifier, concept):
    before = classifier.scores(concept.dataset, "search", limit=200)
    *_, last = tamper(attack, classifier, concept, limit=100)
    after = last.model.scores(concept.dataset, "search", limit=200)
    assert sum(before) < 0.3 * len(before)
    assert sum(after) > 0.9 * len(after)


def test_it_learns_from_the_split_that_is_the_attackers(attack, classifier, concept):
    """The rows that were read, by the handle's own account."""
    seen = []

    class Watched(type(classifier)):
        def batches(self, dataset, split, *, size, seed):
            seen.append((dataset, split))
            return super().batches(dataset, split, size=size, seed=seed)

    model = classifier.copy()
    model.__class__ = Watched
    list(tamper(attack, model, concept))
    assert set(seen) == {(concept.dataset, "attack")}
