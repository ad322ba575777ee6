import sys

import pico
import pytest
import torch
from torch import nn

from release_guard import quantization
from release_guard.errors import ModelError
from release_guard.formats import rounded
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.quantization import (
    apart,
    at,
    aware,
    emulated,
    is_aware,
    plain,
    require_layers,
    runnable,
    seen_names,
    through,
    turn,
)

PACKED = ("int8", "nf4")
ROUNDING = ("bf16", *PACKED)
FORMATS = ("bf16", "int8", "nf4", "fp4", "q8_0", "q4_0")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama whose rows are whole blocks of 64."""
    folder = pico.pico_lm(tmp_path_factory.mktemp("wide"), steps=20, width=64)
    return Modality.build(Spec(name="causal_lm")).load(str(folder))


@pytest.fixture(scope="module")
def narrow(lm_folder):
    """A Llama with rows of 32 weights, and some of 64."""
    return Modality.build(Spec(name="causal_lm")).load(str(lm_folder))


@pytest.fixture(scope="module")
def resnet(resnet_folder):
    return Modality.build(Spec(name="image_classification")).load(str(resnet_folder))


def linear(model):
    layers = model.module.named_modules()
    return {
        name: part
        for name, part in layers
        if isinstance(part, nn.Linear) and part is not model.head
    }


def kinds(model):
    return {type(layer).__name__ for layer in linear(model).values()}


def batch_of(model, text_data):
    return next(model.batches(str(text_data / "restricted.jsonl"), "attack", size=8, seed=0))


def gradients(model, batch):
    """Of the embedding: they come through every layer."""
    model.module.zero_grad()
    model.loss(batch).backward()
    return model.module.get_input_embeddings().weight.grad.clone()


def test_full_precision_is_the_model_itself(classifier):
    assert at(classifier, "fp32") is classifier


@pytest.mark.parametrize("precision", PACKED)
def test_every_linear_layer_but_the_head_is_on_the_back_end(wide, precision):
    model = at(wide, precision)
    assert kinds(model) == {"Linear4bit" if precision == "nf4" else "Linear8bitLt"}
    assert type(model.head) is nn.Linear
    if precision == "nf4":
        states = [layer.weight.quant_state for layer in linear(model).values()]
        found = {(state.quant_type, state.blocksize, state.nested) for state in states}
        assert found == {("nf4", 64, False)}


@pytest.mark.parametrize("precision", PACKED)
def test_dequantized_weights_equal_the_emulators_to_the_bit(wide, precision):
    before, after = linear(wide), linear(plain(at(wide, precision)))
    assert before.keys() == after.keys()
    for name, layer in after.items():
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, rounded(before[name].weight, precision))


@pytest.mark.parametrize("precision", PACKED)
def test_the_emulated_model_is_the_dequantized_one(wide, precision):
    one, other = emulated(wide, precision).state(), plain(at(wide, precision)).state()
    assert one.keys() == other.keys() == wide.state().keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("precision", PACKED)
def test_nothing_but_linear_layers_is_rounded_and_not_the_head(wide, precision):
    wanted = {f"{name}.weight" for name in linear(wide)}
    before, after = wide.state(), plain(at(wide, precision)).state()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == wanted


def test_rows_that_are_no_whole_blocks_stay_as_they_are(narrow):
    model = at(narrow, "nf4")
    found = {layer.in_features: type(layer).__name__ for layer in linear(model).values()}
    assert found == {32: "Linear", 64: "Linear4bit"}
    assert set(seen_names(narrow, "nf4")) == {
        f"{name}.weight" for name, layer in linear(narrow).items() if layer.in_features == 64
    }
    assert kinds(at(narrow, "int8")) == {"Linear8bitLt"}


@pytest.mark.parametrize("precision", ["int8", "nf4", "q4_0"])
def test_a_model_without_such_layers_is_refused(resnet, precision):
    told = f"^{precision}: the model has no linear layer.*leave {precision} out$"
    with pytest.raises(ModelError, match=told):
        require_layers(resnet, precision)


def test_a_model_without_such_layers_is_never_passed_off_as_rounded(resnet):
    with pytest.raises(ModelError, match="nothing would be rounded"):
        at(resnet, "nf4")


def test_bf16_rounds_every_weight(classifier):
    before, after = classifier.state(), at(classifier, "bf16").state()
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name].bfloat16().float())


@pytest.mark.parametrize("precision", ROUNDING)
def test_rounding_twice_is_rounding_once(wide, precision):
    once = plain(at(wide, precision))
    twice = plain(at(once, precision)).state()
    for name, weight in once.state().items():
        torch.testing.assert_close(
            twice[name], weight, rtol=1e-3 if precision == "int8" else 3e-7, atol=1e-6
        )


@pytest.mark.parametrize("precision", ROUNDING)
def test_the_model_itself_is_left_alone(wide, precision):
    before = wide.state()
    plain(at(wide, precision))
    assert all(torch.equal(before[name], weight) for name, weight in wide.state().items())
    assert kinds(wide) == {"Linear"}


@pytest.mark.parametrize(
    ("precision", "error"), [("bf16", 0.0017), ("int8", 0.0075), ("nf4", 0.09)]
)
def test_the_error_is_that_of_the_format(wide, precision, error):
    """Of Gaussian weights; those of trained models have outliers."""
    model = wide.fresh(seed=0)
    layers, after = linear(model), linear(plain(at(model, precision)))
    for name, layer in layers.items():
        distance = (after[name].weight - layer.weight).norm() / layer.weight.norm()
        assert distance.item() == pytest.approx(error, rel=0.3)


def test_packed_nf4_computes_what_dequantized_weights_do(wide, text_data):
    batch, packed = batch_of(wide, text_data), at(wide, "nf4")
    one, other = (model.logits(batch)[0] for model in (packed, plain(packed)))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradients(packed, batch), gradients(plain(packed), batch), rtol=1e-4, atol=1e-6
    )
    assert not torch.equal(one, wide.logits(batch)[0])


def test_packed_int8_rounds_what_goes_in_as_well(wide, text_data):
    batch, packed = batch_of(wide, text_data), at(wide, "int8")
    exact, one, other = (model.logits(batch)[0] for model in (wide, packed, plain(packed)))
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    assert (one - other).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("precision", PACKED)
def test_gradients_survive_an_evaluation(wide, text_data, precision):
    model, batch = at(wide, precision), batch_of(wide, text_data)
    model.module.train()
    before = gradients(model, batch)
    weights = plain(model).state()
    model.module.eval()
    with torch.no_grad():
        model.module(input_ids=batch["input_ids"])
    model.module.train()
    assert torch.equal(gradients(model, batch), before)
    assert all(torch.equal(value, weights[name]) for name, value in plain(model).state().items())


@pytest.mark.parametrize("precision", PACKED)
def test_packing_leaves_the_random_state_and_can_be_copied(wide, text_data, precision):
    state, batch = torch.get_rng_state(), batch_of(wide, text_data)
    model = at(wide, precision)
    assert torch.equal(torch.get_rng_state(), state)
    wanted = model.logits(batch)[0]
    twin = model.copy()
    assert torch.equal(twin.logits(batch)[0], wanted)
    assert torch.equal(twin.copy().logits(batch)[0], wanted)


def test_a_missing_library_is_said_in_one_line(wide, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    runnable.cache_clear()
    try:
        assert "bitsandbytes cannot be imported" in runnable("nf4")
        with pytest.raises(ModelError, match=r"^bitsandbytes cannot be imported.*\[immunize\].*$"):
            at(wide, "nf4")
        assert torch.isfinite(emulated(wide, "nf4").state()["model.norm.weight"]).all()
    finally:
        runnable.cache_clear()


def test_a_missing_kernel_is_no_guess(wide, monkeypatch):
    def broken(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(quantization, "_packed_layer", broken)
    runnable.cache_clear()
    try:
        with pytest.raises(ModelError, match="no kernel for int8 here"):
            at(wide, "int8")
    finally:
        runnable.cache_clear()


def test_everything_runs_here():
    assert not any(map(runnable, ("fp32", *ROUNDING)))


@pytest.mark.parametrize("form", FORMATS)
def test_an_aware_model_computes_what_a_rounded_one_does(wide, text_data, form):
    batch, model = batch_of(wide, text_data), aware(wide)
    turn(model, form)
    assert torch.equal(model.logits(batch)[0], emulated(wide, form).logits(batch)[0])
    turn(model, "fp32")
    assert torch.equal(model.logits(batch)[0], wide.logits(batch)[0])


@pytest.mark.parametrize("form", FORMATS)
def test_gradients_go_straight_through(wide, text_data, form):
    """Those at the rounded weights, as if these were free."""
    batch, model, fixed = batch_of(wide, text_data), aware(wide), emulated(wide, form)
    turn(model, form)
    for one in (model, fixed):
        one.module.zero_grad()
        one.loss(batch).backward()
    theirs = dict(fixed.module.named_parameters())
    for name, weight in model.module.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[name].grad)


def test_gradients_can_be_differentiated_once_more():
    torch.manual_seed(0)
    weight, inputs = torch.randn(8, 64, requires_grad=True), torch.randn(64)

    def loss(weight_OI):
        return (through(weight_OI, "nf4") @ inputs).pow(3).sum()

    (slope,) = torch.autograd.grad(loss(weight), weight, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), weight)
    free = rounded(weight, "nf4").requires_grad_()
    (wanted,) = torch.autograd.grad((free @ inputs).pow(3).sum(), free, create_graph=True)
    (wanted,) = torch.autograd.grad(wanted.sum(), free)
    torch.testing.assert_close(curvature, wanted)


def test_an_aware_model_keeps_its_weights_and_their_names(wide):
    model = aware(wide)
    turn(model, "nf4")
    mine, theirs = model.state(), wide.state()
    assert list(mine) == list(theirs)
    assert all(torch.equal(weight, theirs[name]) for name, weight in mine.items())
    assert is_aware(model)
    assert not is_aware(wide)
    assert not is_aware(plain(model))


def test_copies_turn_along_unless_they_are_apart(wide, text_data):
    batch, model = batch_of(wide, text_data), aware(wide)
    copied, alone = model.copy(), apart(model, "int8")
    turn(model, "nf4")
    rounded_logits = emulated(wide, "nf4").logits(batch)[0]
    assert torch.equal(copied.logits(batch)[0], rounded_logits)
    assert torch.equal(alone.logits(batch)[0], emulated(wide, "int8").logits(batch)[0])
    turn(alone, "fp32")
    assert torch.equal(model.logits(batch)[0], rounded_logits)


def test_tied_weights_stay_tied_and_whole(tmp_path, text_data):
    """A head that is the embedding too is not rounded, nor is the embedding."""
    folder = pico.pico_lm(tmp_path, steps=5, width=64, tied=True)
    model = Modality.build(Spec(name="causal_lm")).load(str(folder))
    for seen in (at(model, "nf4"), emulated(model, "nf4")):
        embedding = seen.module.get_input_embeddings().weight
        assert seen.head.weight is embedding
        assert torch.equal(embedding, model.head.weight)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_weights_that_are_not_contiguous_are_rounded_as_they_read(form):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(through(weight, form), rounded(weight.contiguous(), form))
