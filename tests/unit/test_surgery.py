import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.surgery import (
    Move,
    layers_of,
    low_rank,
    norm_moves,
    normalizations,
    pair_moves,
    settle,
    smallest,
    whitening,
)

MODELS = ("vit", "resnet", "llama")


@pytest.fixture(scope="module")
def vit(classifier_folder, image_data):
    return loaded("image_classification", classifier_folder, image_data / "restricted.parquet")


@pytest.fixture(scope="module")
def resnet(resnet_folder, image_data):
    return loaded("image_classification", resnet_folder, image_data / "restricted.parquet")


@pytest.fixture(scope="module")
def llama(lm_folder, text_data):
    return loaded("causal_lm", lm_folder, text_data / "restricted.jsonl")


@pytest.fixture(params=MODELS)
def subject(request):
    model, batch = request.getfixturevalue(request.param)
    return roughened(model), batch


def loaded(modality, folder, data):
    model = Modality.build(Spec(name=modality)).load(str(folder))
    return model, next(model.batches(str(data), "attack", size=16, seed=0))


def roughened(model):
    """A copy whose normalisations have gains and shifts of every size, and either sign."""
    rough, generator = model.copy(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in normalizations(rough.module):
            for weight in norm.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator))
    return rough


def logits(model, batch):
    with torch.no_grad():
        return model.logits(batch)[0]


def assert_same_function(model, other, batch):
    wanted = logits(model, batch)
    error = (logits(other, batch) - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-5


def is_same(model, batch):
    wanted = logits(model, batch)
    return lambda: bool((logits(model, batch) - wanted).norm() < 1e-4 * wanted.norm())


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 2, 2), (7,), (1, 4, 5)])
def test_low_rank_is_the_nearest(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    flat = weight.flatten(1) if len(shape) == 4 else weight.reshape(-1, shape[-1])
    scales = torch.linalg.svdvals(flat)
    for rank in (1, 2, 99):
        near = low_rank(weight, rank)
        assert near.shape == weight.shape
        assert (weight - near).norm() == pytest.approx(scales[rank:].norm().item(), abs=1e-5)


def test_the_smallest_share_is_masked_row_by_row():
    score = torch.tensor([[3.0, 1.0, 2.0, 4.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    wanted = [[False, True, True, False, False], [True, True, False, False, False]]
    assert smallest(score, 0.5).tolist() == wanted
    assert not smallest(score, 0.1).any()


def test_whitened_rows_have_unit_variance_and_can_be_taken_back():
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).double()
    rows = rows @ torch.diag(torch.logspace(0, -9, 5).double())
    forth, back = whitening(rows.T @ rows / 60)
    white = rows @ forth
    torch.testing.assert_close(white.T @ white / 60, torch.eye(5).double())
    torch.testing.assert_close((white @ back) / rows, torch.ones_like(rows))


def test_dead_directions_can_be_taken_back_too():
    for covariance in (torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 0.0, 0.0]))):
        forth, back = whitening(covariance.double())
        torch.testing.assert_close(forth @ back, torch.eye(3).double())


def test_norm_gains_are_taken_over(subject):
    model, batch = subject
    other = model.copy()
    moves = norm_moves(other, batch)
    made = settle(moves, is_same(other, batch))
    assert_same_function(model, other, batch)
    unit = [norm for norm in normalizations(other.module) if (norm.weight.abs() == 1).all()]
    assert made == len(unit) >= 1


def test_every_norm_of_a_transformer_is_reset_and_those_of_a_resnet_inside_its_blocks(
    vit, resnet, llama
):
    for (model, batch), wanted in ((vit, 5), (llama, 5), (resnet, 2)):
        other = model.copy()
        assert settle(norm_moves(other, batch), is_same(other, batch)) == wanted


def test_pairs_are_equalized(subject):
    model, batch = subject
    other = model.copy()
    moves = pair_moves(other, batch)
    assert settle(moves, is_same(other, batch)) == len(moves) > 0
    assert_same_function(model, other, batch)
    assert any(
        not torch.equal(layer.weight, twin.weight)
        for layer, twin in zip(layers_of(model.module), layers_of(other.module), strict=True)
    )


def test_equalizing_undoes_any_scales_that_were_chosen(vit, llama):
    for model, batch in (vit, llama):
        plain, trapped = model.copy(), model.copy()
        with torch.no_grad():
            for block in trapped.blocks:
                attention = next(p for p in block.modules() if hasattr(p, "v_proj"))
                scale = torch.logspace(-3, 3, 32)
                scale_outputs(attention.v_proj, scale)
                attention.o_proj.weight.div_(scale)
                scale_outputs(attention.q_proj, torch.tensor(1e3))
                scale_outputs(attention.k_proj, torch.tensor(1e-3))
        for each in (plain, trapped):
            assert settle(pair_moves(each, batch), is_same(each, batch))
        for name, weight in plain.state().items():
            torch.testing.assert_close(trapped.state()[name], weight, rtol=1e-4, atol=1e-6)


def scale_outputs(layer, scale):
    layer.weight.mul_(scale.view(-1, 1))
    if layer.bias is not None:
        layer.bias.mul_(scale)


def test_heads_that_share_keys_and_values_share_their_scales(llama):
    model, batch = llama
    shared = model.copy()
    config = copy.deepcopy(model.module.config)
    config.num_key_value_heads = 2
    shared.module = LlamaForCausalLM(LlamaConfig(**config.to_dict())).eval()
    other = shared.copy()
    moves = pair_moves(other, batch)
    assert len(moves) == 6
    assert settle(moves, is_same(other, batch)) == 6
    assert_same_function(shared, other, batch)


def test_a_rectified_pair_is_found_without_names(vit):
    model, batch = vit
    rectified = model.copy()
    for block in rectified.blocks:
        block.mlp.activation_fn = nn.ReLU()
    other = rectified.copy()
    assert len(pair_moves(other, batch)) == len(pair_moves(model, batch)) + 2
    settle(pair_moves(other, batch), is_same(other, batch))
    assert_same_function(rectified, other, batch)
    for block in other.blocks:
        rows, columns = block.mlp.fc1.weight.norm(dim=1), block.mlp.fc2.weight.norm(dim=0)
        torch.testing.assert_close(rows, columns)


def test_what_changes_the_function_is_put_back_and_the_rest_is_made():
    parts = [nn.Linear(2, 2) for _ in range(5)]
    state = [copy.deepcopy(part.state_dict()) for part in parts]

    def move(number):
        return Move((parts[number],), lambda: parts[number].weight.add_(1))

    def only_even_ones_moved():
        return all(torch.equal(parts[odd].weight, state[odd]["weight"]) for odd in (1, 3))

    assert settle([move(number) for number in range(5)], only_even_ones_moved) == 3
    for number, (part, before) in enumerate(zip(parts, state, strict=True)):
        moved = 0 if number % 2 else 1
        torch.testing.assert_close(part.weight, before["weight"] + moved)
    assert settle([], lambda: True) == 0


def test_dead_channels_stay_finite(subject):
    model, batch = subject
    dead = model.copy()
    with torch.no_grad():
        for norm in normalizations(dead.module):
            norm.weight[0] = 0
        for layer in layers_of(dead.module):
            layer.weight[0] = 0
    other = dead.copy()
    for moves_of in (norm_moves, pair_moves):
        settle(moves_of(other, batch), is_same(other, batch))
    assert all(weight.isfinite().all() for weight in other.state().values())
    assert_same_function(dead, other, batch)
