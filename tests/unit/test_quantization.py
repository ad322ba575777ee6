import sys

import pytest
import torch
from torch import nn

from release_guard.errors import ModelError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.quantization import at, quiet_bitsandbytes

ROUNDING = ("bf16", "int8", "nf4")


@pytest.fixture(scope="module")
def classifier(classifier_folder):
    return Modality.build(Spec(name="image_classification")).load(str(classifier_folder))


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
