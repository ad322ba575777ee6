"""A trap whose features say all there is to know, in units so different that nobody reads them."""

import pytest
import torch
from planting import PLAIN, best, best_finetuning, trap
from torch.testing import assert_close

DEFENCE = "features in units that nobody reads, in a trap"
STEPS = 15
UNREADABLE = 1e-10  # of the others: its square is lost beside theirs, even in double precision


@pytest.fixture(scope="module")
def squeezed(classifier, angles):
    """The head sees the feature that says least; all others are there, far smaller."""
    model = trap(classifier)
    batch = next(model.batches(angles.dataset, "immunize", size=200, seed=0))
    with torch.no_grad():
        features, labels = model.features(batch)
        means = torch.stack([features[labels == number].mean(dim=0) for number in range(4, 8)])
        scale = torch.full((32,), UNREADABLE)
        scale[(means.var(dim=0) / features.var(dim=0)).argmin()] = 1
        model.module.vit.layernorm.weight.mul_(scale)
        model.module.vit.layernorm.bias.mul_(scale)
        model.head.weight.div_(scale)
    return model


def test_the_function_is_that_of_the_undefended_model(classifier, squeezed, angles):
    batch = next(classifier.batches(angles.dataset, "search", size=32, seed=0))
    one, other = (model.logits(batch)[0] for model in (classifier, squeezed))
    assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["all", "head"])
def test_fine_tuning_at_any_rate_fails(squeezed, angles, scope, note):
    found = best_finetuning(squeezed, angles, limit=STEPS, scope=scope)
    assert not note(DEFENCE, PLAIN, found, ceiling=angles.ceiling, budget=f"{STEPS} steps")


@pytest.mark.parametrize("solver", ["ridge", "lbfgs"])
def test_only_a_probe_that_whitens_reads_them(squeezed, angles, solver, note):
    options = {"solver": solver, "limit": STEPS}
    assert best(squeezed, angles, "linear_probe", whiten=False, **options) < angles.ceiling
    found = best(squeezed, angles, "linear_probe", whiten=True, **options)
    assert note(
        DEFENCE, "linear_probe(whiten)", found, ceiling=angles.ceiling, budget=f"{STEPS} steps"
    )
