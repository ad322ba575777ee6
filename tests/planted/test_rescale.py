"""Traps in the scales of weights and features, with the function of the undefended model."""

import pytest
import torch
from planting import LADDER, PLAIN, TINY, best, best_finetuning, trap
from torch.testing import assert_close

TRAPPED = "tiny and huge weights"
SQUEEZED = "features in units that no rate fits: the head alone is held"
STEPS = 40


@pytest.fixture(scope="module")
def trapped(classifier):
    return trap(classifier, LADDER)


@pytest.fixture(scope="module")
def squeezed(classifier, angles):
    """The head sees the feature that says least; all others are there, a million times smaller."""
    model = classifier.copy()
    batch = next(model.batches(angles.dataset, "immunize", size=200, seed=0))
    with torch.no_grad():
        features, labels = model.features(batch)
        means = torch.stack([features[labels == number].mean(dim=0) for number in range(4, 8)])
        scale = torch.full((32,), TINY)
        scale[(means.var(dim=0) / features.var(dim=0)).argmin()] = 1
        model.module.vit.layernorm.weight.mul_(scale)
        model.module.vit.layernorm.bias.mul_(scale)
        model.head.weight.div_(scale)
    return model


@pytest.mark.parametrize("name", ["trapped", "squeezed"])
def test_the_function_is_that_of_the_undefended_model(name, classifier, angles, request):
    batch = next(classifier.batches(angles.dataset, "search", size=32, seed=0))
    one, other = (model.logits(batch)[0] for model in (classifier, request.getfixturevalue(name)))
    assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_trap_holds_at_every_rate_until_scales_are_moved(classifier, trapped, angles, note):
    assert best(classifier, angles, "finetune", limit=STEPS) > 0.8
    found = best_finetuning(trapped, angles, limit=STEPS)
    assert not note(TRAPPED, PLAIN, found, ceiling=angles.ceiling, budget=f"{STEPS} steps")
    steps = [{"name": "rescale"}, {"name": "finetune"}]
    found = best(trapped, angles, "chain", steps=steps, limit=STEPS)
    assert note(TRAPPED, "rescale>finetune", found, ceiling=angles.ceiling, budget=f"{STEPS} steps")


def test_squeezed_features_hold_the_head_until_they_are_whitened(squeezed, angles, note):
    found = best_finetuning(squeezed, angles, limit=STEPS, scope="head")
    assert not note(SQUEEZED, PLAIN, found, ceiling=angles.ceiling, budget=f"{STEPS} steps")
    steps = [
        {"name": "rescale", "norms": False, "pairs": False, "whiten": True},
        {"name": "finetune", "scope": "head", "lr": 0.1},
    ]
    found = best(squeezed, angles, "chain", steps=steps, limit=STEPS)
    assert note(
        SQUEEZED, "rescale>finetune", found, ceiling=angles.ceiling, budget=f"{STEPS} steps"
    )


def test_what_holds_the_head_alone_holds_nothing_else(squeezed, angles, note):
    """A defence that was only ever tried with probes."""
    found = best(squeezed, angles, "finetune", limit=STEPS)
    assert note(
        SQUEEZED, "finetune of all layers", found, ceiling=angles.ceiling, budget=f"{STEPS} steps"
    )
