import sys

import pico
import pytest
import torch
from torch import nn

from release_guard.errors import ModelError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.quantization import at, packed, quiet_bitsandbytes

ROUNDING = ("bf16", "int8", "nf4")


@pytest.fixture(scope="module")
def language_model(lm_folder):
    return Modality.build(Spec(name="causal_lm")).load(str(lm_folder))


def linear(model):
    layers = model.module.named_modules()
    return {name: part for name, part in layers if isinstance(part, nn.Linear)}


def bitsandbytes_weight(layer: nn.Linear, precision: str) -> torch.Tensor:
    """What bitsandbytes' own layer holds after loading these weights."""
    quiet_bitsandbytes()
    import bitsandbytes as bnb  # noqa: PLC0415  takes seconds

    shape = (layer.in_features, layer.out_features)
    if precision == "int8":
        theirs = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
        theirs.load_state_dict({"weight": layer.weight.detach()})
        theirs.to("cpu")
        weight = theirs.weight
        return weight.CB.float() * weight.SCB.view(-1, 1) / 127
    theirs = bnb.nn.Linear4bit(
        *shape, bias=False, compress_statistics=False, quant_type="nf4", compute_dtype=torch.float32
    )
    theirs.load_state_dict({"weight": layer.weight.detach()})
    theirs.to("cpu")
    state = theirs.weight.quant_state
    state.shape = torch.Size([layer.weight.numel()])  # its CPU kernel errs on rows of half a block
    return bnb.functional.dequantize_4bit(theirs.weight.data, state).view_as(layer.weight)


def test_full_precision_is_the_model_itself(classifier):
    assert at(classifier, "fp32") is classifier


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("fixture", ["classifier", "language_model"])
def test_every_layer_equals_the_one_of_bitsandbytes(fixture, precision, request):
    model = request.getfixturevalue(fixture)
    rounded = linear(at(model, precision))
    for name, layer in linear(model).items():
        if layer is not model.head:
            wanted = bitsandbytes_weight(layer, precision)
            torch.testing.assert_close(rounded[name].weight, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("fixture", ["classifier", "language_model"])
def test_nothing_but_linear_layers_is_rounded_and_not_the_head(fixture, precision, request):
    model = request.getfixturevalue(fixture)
    head = next(name for name, layer in linear(model).items() if layer is model.head)
    wanted = {f"{name}.weight" for name in linear(model)} - {f"{head}.weight"}
    before, after = model.state(), at(model, precision).state()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == wanted


def test_bf16_rounds_every_weight(classifier):
    before, after = classifier.state(), at(classifier, "bf16").state()
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name].bfloat16().float())


@pytest.mark.parametrize("precision", ROUNDING)
def test_rounding_twice_is_rounding_once(classifier, precision):
    once = at(classifier, precision)
    twice = at(once, precision)
    before = once.state()
    for name, weight in twice.state().items():
        torch.testing.assert_close(weight, before[name], rtol=3e-7, atol=0)


@pytest.mark.parametrize("precision", ROUNDING)
def test_the_model_itself_is_left_alone(classifier, precision):
    before = classifier.state()
    at(classifier, precision)
    assert all(torch.equal(before[name], weight) for name, weight in classifier.state().items())


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.0017), ("int8", 0.006), ("nf4", 0.09)])
def test_the_error_is_that_of_the_format(classifier, precision, error):
    """Of Gaussian weights; those of trained models have outliers."""
    model = classifier.fresh(seed=0)
    layers, rounded = linear(model), linear(at(model, precision))
    for name, layer in layers.items():
        if layer is not model.head:
            distance = (rounded[name].weight - layer.weight).norm() / layer.weight.norm()
            assert distance.item() == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize("shape", [(7, 33), (32, 32), (40, 96), (8, 160), (16, 128), (1, 2)])
def test_nf4_takes_the_nearest_level_of_each_block_of_64(classifier, shape):
    quiet_bitsandbytes()
    from bitsandbytes.functional import get_4bit_type  # noqa: PLC0415  takes seconds

    model = classifier.copy()
    model.blocks[0].other = nn.Linear(shape[1], shape[0])
    weight = model.blocks[0].other.weight.detach()
    levels = get_4bit_type("nf4", device="cpu").data
    nearest = [
        levels[(block[:, None] / block.abs().max() - levels).abs().argmin(1)] * block.abs().max()
        for block in weight.flatten().split(64)
    ]
    rounded = at(model, "nf4").blocks[0].other.weight
    torch.testing.assert_close(rounded.flatten(), torch.cat(nearest), rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_dead_rows_and_odd_sizes_stay_finite(classifier, precision):
    model = classifier.copy()
    block = model.blocks[0]
    block.odd = nn.Linear(33, 7)
    with torch.no_grad():
        block.odd.weight[2] = 0
    rounded = at(model, precision).blocks[0].odd.weight
    assert rounded.isfinite().all()
    assert not rounded[2].any()
    torch.testing.assert_close(rounded, block.odd.weight, rtol=0, atol=0.03)


def test_gradients_reach_rounded_weights(classifier, image_data):
    rounded = at(classifier, "nf4")
    data = rounded.batches(str(image_data / "restricted.parquet"), "attack", size=4, seed=0)
    rounded.loss(next(data)).backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in linear(rounded).values())


def test_a_missing_library_is_said_in_one_line(classifier, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ModelError, match=r"^bitsandbytes cannot be imported.*\[immunize\].*$"):
        at(classifier, "nf4")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama whose rows are whole blocks of 64, so that they can be packed."""
    folder = pico.pico_lm(tmp_path_factory.mktemp("wide"), steps=20, width=64)
    return Modality.build(Spec(name="causal_lm")).load(str(folder))


def gradients(model, batch):
    """Of the embedding: they come through every layer."""
    model.module.zero_grad()
    model.loss(batch).backward()
    return model.module.get_input_embeddings().weight.grad.clone()


def batch_of(model, text_data):
    return next(model.batches(str(text_data / "restricted.jsonl"), "attack", size=8, seed=0))


def test_every_layer_but_the_head_is_packed(wide):
    layers = linear(packed(wide))
    kinds = {name: type(layer).__name__ for name, layer in layers.items()}
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {"Linear4bit"}
    states = [layer.weight.quant_state for name, layer in layers.items() if name != "lm_head"]
    assert {(state.quant_type, state.blocksize, state.nested) for state in states} == {
        ("nf4", 64, False)
    }


def test_packed_weights_compute_what_rounded_ones_do(wide, text_data):
    batch, rounded = batch_of(wide, text_data), at(wide, "nf4")
    one, other = (model.logits(batch)[0] for model in (packed(wide), rounded))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradients(packed(wide), batch), gradients(rounded, batch), rtol=1e-4, atol=1e-6
    )
    assert not torch.equal(one, wide.logits(batch)[0])


def test_gradients_survive_an_evaluation(wide, text_data):
    model, batch = packed(wide), batch_of(wide, text_data)
    before = gradients(model, batch)
    weights = {name: value.clone() for name, value in model.state().items()}
    model.module.eval()
    with torch.no_grad():
        model.module(input_ids=batch["input_ids"])
    assert torch.equal(gradients(model, batch), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state().items())


def test_layers_that_cannot_be_packed_are_rounded(language_model, text_data):
    model, rounded = packed(language_model), at(language_model, "nf4")
    kinds = {type(layer).__name__ for layer in linear(model).values()}
    assert kinds == {"Linear", "Linear4bit"}  # rows of 32 weights, and of 64
    batch = batch_of(model, text_data)
    one, other = (some.logits(batch)[0] for some in (model, rounded))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_packing_leaves_the_random_state_and_can_be_copied(wide, text_data):
    state, batch = torch.get_rng_state(), batch_of(wide, text_data)
    model = packed(wide)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.copy().logits(batch)[0], model.logits(batch)[0])
