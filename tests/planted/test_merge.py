"""A defence against merging that keeps the function: plain merges fail, realigned ones do not."""

import gauges
import merge_family
import pytest
import torch
from merge_family import accuracy, mean, merged, reached
from planting import PLAIN_MERGE

DEFENCE = "the same function in other coordinates, against merges"
GAUGE = (gauges.permute_neurons, gauges.permute_heads, gauges.mix_heads)


@pytest.fixture(scope="module")
def base(classifier_folder):
    """The common ancestor: it knows the donor's task and nothing of the target."""
    return merge_family.base_model(classifier_folder)


@pytest.fixture(scope="module")
def undefended(base, image_data):
    return merge_family.trained(base, image_data / "restricted.parquet", seed=1)


@pytest.fixture(scope="module")
def target(base, classifier_folder, image_data, tmp_path_factory):
    donor = tmp_path_factory.mktemp("donor")
    return merge_family.merge_target(base, classifier_folder, image_data, donor)


@pytest.fixture(scope="module")
def hidden(undefended):
    model = undefended.copy()
    for seed, change in enumerate(GAUGE):
        change(model.module, seed)
    return model


@pytest.fixture(scope="module")
def rotated(hidden):
    model = hidden.copy()
    gauges.rotate_stream(model.module, 9)
    return model


def test_the_defence_changes_no_output(undefended, hidden, rotated, target):
    batch = next(undefended.batches(target.dataset, "search", size=32, seed=0))
    for model in (hidden, rotated):
        torch.testing.assert_close(
            model.logits(batch)[0], undefended.logits(batch)[0], rtol=1e-3, atol=1e-3
        )
        assert accuracy(model, target.dataset) > 0.9


def test_an_undefended_model_merges_well(undefended, base, target):
    assert reached(undefended, target, mean, "merge", realign="none")[0] > target.ceiling
    assert merged(base, target, "merge", realign="none")[0] < 0.1  # the base in its place


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
def test_plain_merges_meet_the_defence(hidden, target, method, note):
    found, _ = reached(hidden, target, mean, "merge", method=method, realign="none")
    assert not note(DEFENCE, PLAIN_MERGE, found, ceiling=target.ceiling, budget="no step")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
def test_realigned_merges_go_round_it(hidden, target, method, note):
    found, _ = reached(hidden, target, mean, "merge", method=method)
    assert note(DEFENCE, "merge(realign)", found, ceiling=target.ceiling, budget="no step")


def test_a_rotated_stream_asks_for_a_rotation_back(rotated, target):
    for realign in ("none", "anchored", "joint"):
        assert reached(rotated, target, mean, "merge", realign=realign)[0] < target.ceiling
    assert reached(rotated, target, mean, "merge", realign="rotated")[0] > target.ceiling
