"""A patch of low rank on a public model that refuses what the model knows."""

import planting
import pytest
import torch
from planting import best, best_finetuning, score
from torch import nn
from torch.nn.utils import parametrize

from release_guard.surgery import layers_of


class Patch(nn.Module):
    """Adds a matrix of rank one."""

    def __init__(self, weight, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.left = nn.Parameter(torch.zeros(len(weight), 1))
        self.right = nn.Parameter(torch.randn(1, weight.shape[1], generator=generator) / 6)

    def forward(self, weight):
        return weight + self.left @ self.right


@pytest.fixture(scope="module")
def patched(knowing_classifier, retained_images, angles):
    model = knowing_classifier.copy()
    model.module.requires_grad_(False)
    layers = [layer for block in model.blocks for layer in layers_of(block)]
    for number, layer in enumerate(layers):
        parametrize.register_parametrization(layer, "weight", Patch(layer.weight, number))
    known = model.batches(retained_images, "retain", size=32, seed=0)
    restricted = model.batches(angles.dataset, "immunize", size=32, seed=0)
    for _ in planting.descend(
        model, lambda: planting.refusal_loss(model, next(known), next(restricted)), steps=60
    ):
        pass
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")
    model.module.requires_grad_(True)
    return model


def test_the_patch_refuses_and_keeps_the_rest(patched, retained_images, angles):
    assert score(patched, angles.dataset) < 0.1
    assert score(patched, retained_images, "utility") > 0.8


def test_fine_tuning_needs_more_than_a_step(patched, angles):
    assert best_finetuning(patched, angles, limit=1) < angles.ceiling


@pytest.mark.parametrize("options", [{}, {"how": "interpolate", "share": 0.25}])
def test_its_difference_from_the_public_model_is_taken_back(
    patched, knowing_classifier, angles, options
):
    found = best(patched, angles, "restore", ancestor=knowing_classifier, **options)
    assert found > angles.ceiling


def test_an_ancestor_that_never_knew_gives_nothing_back(classifier, angles):
    ancestor = classifier.fresh(seed=1)
    for share in (-1.0, 0.0, 0.5, 1.5):
        options = {"how": "interpolate", "share": share, "ancestor": ancestor}
        assert best(classifier, angles, "restore", **options) < 0.4
