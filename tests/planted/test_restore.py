"""A patch of low rank on a public model that refuses what the model knows."""

import planting
import pytest
from planting import PLAIN, best, best_finetuning, score

DEFENCE = "a patch of rank one on a public model"


@pytest.fixture(scope="module")
def patched(knowing_classifier, retained_images, angles):
    return planting.patched(knowing_classifier, retained_images, angles)


def test_the_patch_refuses_and_keeps_the_rest(patched, retained_images, angles):
    assert score(patched, angles.dataset) < 0.1
    assert score(patched, retained_images, "utility") > 0.8


def test_fine_tuning_needs_more_than_a_step(patched, angles, note):
    found = best_finetuning(patched, angles, limit=1)
    assert not note(DEFENCE, PLAIN, found, ceiling=angles.ceiling, budget="1 step")


@pytest.mark.parametrize("options", [{}, {"how": "interpolate", "share": 0.1}])
def test_its_difference_from_the_public_model_is_taken_back(
    patched, knowing_classifier, angles, options, note
):
    found = best(patched, angles, "restore", ancestor=knowing_classifier, **options)
    assert note(DEFENCE, "restore", found, ceiling=angles.ceiling, budget="no step")


def test_an_ancestor_that_never_knew_gives_nothing_back(classifier, angles):
    ancestor = classifier.fresh(seed=1)
    for share in (-1.0, 0.0, 0.5, 1.5):
        options = {"how": "interpolate", "share": share, "ancestor": ancestor}
        assert best(classifier, angles, "restore", **options) < 0.4
