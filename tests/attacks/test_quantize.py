import pytest
import torch

from release_guard.attacks import Attack
from release_guard.attacks.quantize import to_fp4, to_q8_0, to_range, to_signed
from release_guard.errors import ModelError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Concept
from release_guard.quantization import at, quiet_bitsandbytes
from release_guard.surgery import layers_of

CONCEPT = Concept(name="never-read", dataset="nowhere", ceiling=0.5)
EMULATED = ("fp4", "q8_0", "q4_0", "q3", "q2")


@pytest.fixture(scope="module")
def resnet(resnet_folder):
    return Modality.build(Spec(name="image_classification")).load(str(resnet_folder))


def rounded(model, form):
    attack = Attack.build(Spec(name="quantize", format=form))
    return attack.transform(model, CONCEPT, seed=0, ancestor=None)


def gaussian(blocks, size):
    return torch.randn(blocks, size, generator=torch.Generator().manual_seed(0)) / 50


def test_fp4_is_that_of_bitsandbytes():
    quiet_bitsandbytes()
    from bitsandbytes import functional  # noqa: PLC0415  takes seconds

    weight = gaussian(40, 64)
    codes, state = functional.quantize_4bit(
        weight.flatten(), blocksize=64, compress_statistics=False, quant_type="fp4"
    )
    theirs = functional.dequantize_4bit(codes, state).view_as(weight)
    torch.testing.assert_close(to_fp4(weight), theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_formats_of_a_policy_are_the_policys(classifier, form):
    wanted = at(classifier, form).state()
    found = rounded(classifier, form).state()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize(
    ("rounding", "size", "error", "levels"),
    [
        (to_fp4, 64, 0.122, 15),
        (to_q8_0, 32, 0.0053, 255),
        (lambda weight: to_signed(weight, bits=4), 32, 0.086, 16),
        (lambda weight: to_signed(weight, bits=3), 16, 0.15, 8),
        (lambda weight: to_range(weight, bits=2), 16, 0.32, 4),
    ],
)
def test_the_error_is_that_of_the_format(rounding, size, error, levels):
    """Of Gaussian weights; and a block holds no more values than its bits allow."""
    weight = gaussian(2000, size)
    found = rounding(weight)
    assert ((found - weight).norm() / weight.norm()).item() == pytest.approx(error, rel=0.12)
    assert max(len(block.unique()) for block in found) <= levels
    torch.testing.assert_close(rounding(found), found, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "rounding", [to_fp4, to_q8_0, lambda w: to_signed(w, bits=3), lambda w: to_range(w, bits=2)]
)
def test_dead_blocks_and_extreme_ones_stay_finite(rounding):
    for scale in (0.0, 1e-12, 1e6):
        weight = scale * gaussian(3, 64)
        found = rounding(weight)
        assert found.isfinite().all()
        assert (found - weight).norm() <= 0.6 * weight.norm()


def test_the_largest_weight_is_kept_by_signed_blocks():
    weight = gaussian(50, 32)
    place = weight.abs().argmax(dim=1, keepdim=True)
    found = to_signed(weight, bits=4).gather(1, place)
    torch.testing.assert_close(found, weight.gather(1, place), rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", EMULATED)
@pytest.mark.parametrize("fixture", ["classifier", "resnet"])
def test_every_layer_is_rounded_but_the_head(fixture, form, request):
    model = request.getfixturevalue(fixture)
    weights = {id(layer.weight) for layer in layers_of(model.module) if layer is not model.head}
    wanted = {name for name, weight in model.module.named_parameters() if id(weight) in weights}
    before, after = model.state(), rounded(model, form).state()
    assert {name for name in before if not torch.equal(before[name], after[name])} == wanted


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_an_attack_that_would_change_nothing_is_refused(resnet, form):
    with pytest.raises(ModelError, match=f"nothing to round to {form}.*take fp4 or q8_0"):
        rounded(resnet, form)
