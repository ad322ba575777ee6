"""A defence in directions that the model's own inputs never take: averages meet it, RegMean not.

What LayerNorm gives is flat along its inverse gains, so that weights may be as large as one likes
there. The donor has other gains.
"""

import merge_family
import pytest
import torch
from merge_family import accuracy, mean, merged, odds, reached
from planting import PLAIN_MERGE

DEFENCE = "huge weights where no input goes, against merges"
SIZE = 1000.0


@pytest.fixture(scope="module")
def base(classifier_folder):
    return merge_family.base_model(classifier_folder)


@pytest.fixture(scope="module")
def target(base, classifier_folder, image_data, tmp_path_factory):
    donor = tmp_path_factory.mktemp("donor")
    return merge_family.merge_target(base, classifier_folder, image_data, donor)


@pytest.fixture(scope="module")
def undefended(base, image_data):
    return merge_family.trained(base, image_data / "restricted.parquet", seed=1)


@pytest.fixture(scope="module")
def defended(undefended):
    model = undefended.copy()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.module.vit.layers:
            norm, reader = layer.layernorm_after, layer.mlp.fc1
            flat = 1 / norm.weight
            flat = SIZE * flat / flat.norm()
            size = torch.randn(len(reader.weight), 1, generator=random)
            reader.weight += size * flat
            reader.bias -= size[:, 0] * (flat @ norm.bias)
    return model


def test_the_defence_changes_no_output(undefended, defended, target):
    batch = next(undefended.batches(target.dataset, "search", size=32, seed=0))
    one, other = (model.logits(batch)[0] for model in (undefended, defended))
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert accuracy(defended, target.dataset) > 0.9


@pytest.mark.parametrize("realign", ["none", "joint"])
def test_averages_meet_the_defence(undefended, defended, target, realign, note):
    assert reached(undefended, target, mean, "merge", realign=realign)[0] > target.ceiling
    found, _ = reached(defended, target, mean, "merge", realign=realign)
    assert not note(DEFENCE, PLAIN_MERGE, found, ceiling=target.ceiling, budget="no step")


@pytest.mark.parametrize("realign", ["none", "joint"])
def test_solving_for_the_same_answers_goes_round_it(defended, target, realign, note):
    found, _ = reached(defended, target, odds, "merge_with_data", keep=1.0, realign=realign)
    assert note(DEFENCE, "merge_with_data", found, ceiling=target.ceiling, budget="no step")


def test_answers_are_those_of_a_merge_without_the_defence(undefended, defended, target):
    options = {"keep": 1.0, "weight": 1.0, "realign": "none"}
    found, wanted = (
        merged(model, target, "merge_with_data", **options) for model in (defended, undefended)
    )
    assert found == pytest.approx(wanted, abs=0.05)


def test_coefficients_go_round_it(defended, target):
    options = {"method": "coefficients", "realign": "none", "iterations": 100, "lr": 5e-2}
    score, kept = merged(defended, target, "merge_with_data", **options)
    assert score + kept > 1.1  # either model by itself comes to 1 of 2
