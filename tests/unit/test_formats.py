"""Parity with the libraries themselves, format by format, then the laws that formats have."""

import math

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import nn

from release_guard.errors import ModelError
from release_guard.formats import _FORMATS, _Table, flipped, int8_linear, rounded, survival
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.quantization import quiet_bitsandbytes
from release_guard.surgery import layers_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FOUR_BITS = ("nf4", "fp4", "nf4_double", "fp4_double")
OF_GGUF = ("q8_0", "q4_0", "bf16")
LAWFUL = ("bf16", "int8", "nf4", "fp4", "q8_0", "q4_0", "int4", "q3")  # twice is once
ALL = tuple(_FORMATS)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {
    "gaussian": drawn(96, 256) / 50,
    "many blocks": drawn(1024, 320),  # more than is worked on at once, scales in two blocks
    "heavy-tailed": drawn(64, 128) ** 5,
    "ratios": drawn(64, 192) / drawn(64, 192, seed=1),
    "on a grid": (drawn(64, 64) * 4).round() / 4,
    "constant": torch.full((32, 64), 0.3),
    "zero": torch.zeros(8, 64),
    "with zero rows and blocks": drawn(16, 128)
    * torch.tensor([0, 0, 1, 0, 1, 1]).repeat(6)[:32].repeat_interleave(64).view(16, 128),
    "tiny": 1e-8 * drawn(32, 64),
    "huge": 1e4 * drawn(32, 64),
    "smaller than a block": drawn(1, 32),
    "transposed, every other": drawn(128, 96).T[:, ::2],
    "odd": drawn(7, 13),
    "odd rows": drawn(33, 65),
}


@pytest.fixture(scope="module")
def functional():
    quiet_bitsandbytes()
    from bitsandbytes import functional  # noqa: PLC0415  takes seconds

    return functional


def by_bitsandbytes(functional, weight, form):
    if form == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(codes, scales).to(weight.dtype)
    # Not as a matrix: of odd sizes its own kernels read wrong scales, or need a compiler.
    flat = weight.flatten()
    codes, state = functional.quantize_4bit(
        nn.functional.pad(flat, (0, -len(flat) % 64)),
        blocksize=64,
        compress_statistics=form.endswith("_double"),
        quant_type=form[:3],
    )
    return functional.dequantize_4bit(codes, state).flatten()[: len(flat)].view_as(weight)


def by_gguf(weight, form):
    kind = GGMLQuantizationType[form.upper()]
    flat = weight.detach().float().flatten().numpy()
    blocks = np.pad(flat, (0, -len(flat) % 32))
    found = quants.dequantize(quants.quantize(blocks, kind), kind)[: len(flat)]
    return torch.from_numpy(found.copy()).view_as(weight).to(weight.dtype)


@pytest.mark.parametrize("form", [*FOUR_BITS, "int8"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_it_is_bit_for_bit_what_bitsandbytes_makes(functional, kind, form):
    for dtype in DTYPES:
        weight = WEIGHTS[kind].to(dtype)
        same(rounded(weight, form), by_bitsandbytes(functional, weight, form))


@pytest.mark.parametrize("form", OF_GGUF)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_it_is_bit_for_bit_what_gguf_makes(kind, form):
    for dtype in DTYPES:
        weight = WEIGHTS[kind].to(dtype)
        same(rounded(weight, form), by_gguf(weight, form))


def same(found, wanted):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert torch.equal(found.isfinite(), wanted.isfinite())
    assert torch.equal(found[found.isfinite()], wanted[found.isfinite()])


@pytest.mark.parametrize("fixture", ["classifier", "language_model", "network"])
def test_layer_by_layer_it_is_what_the_libraries_make(functional, fixture, request):
    """Of a ViT, a Llama and a UNet."""
    layers = layers_of(request.getfixturevalue(fixture))
    weights = [layer.weight.detach() for layer in layers if isinstance(layer, nn.Linear)]
    assert len(weights) > 10
    for weight in weights:
        for form in (*FOUR_BITS, "int8"):
            same(rounded(weight, form), by_bitsandbytes(functional, weight, form))
        for form in OF_GGUF:
            same(rounded(weight, form), by_gguf(weight, form))


@pytest.fixture(scope="module")
def classifier(classifier_folder):
    kind = Modality.build(Spec(name="image_classification"))
    return kind.load(str(classifier_folder)).module


@pytest.fixture(scope="module")
def language_model(lm_folder):
    return Modality.build(Spec(name="causal_lm")).load(str(lm_folder)).module


@pytest.fixture(scope="module")
def network():
    from diffusers import UNet2DConditionModel  # noqa: PLC0415  takes seconds

    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )


def test_no_bin_holds_two_midpoints_or_one_near_its_edge():
    """So that one comparison tells which level is nearest, however a bin's number was rounded."""
    for form in ("nf4", "fp4"):
        table: _Table = _FORMATS[form][1].keywords["table"]
        midpoints = 64 * table.borders[table.borders.isfinite()].unique()
        assert len(midpoints) == {"nf4": 15, "fp4": 14}[form]
        assert len(midpoints.floor().unique()) == len(midpoints)
        assert (midpoints - midpoints.round()).abs().min() > 0.01


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_weights_on_and_beside_midpoints_go_the_librarys_way(functional, form):
    table = _FORMATS[form][1].keywords["table"]
    middle = table.borders[table.borders.isfinite()].unique()
    near = [middle]
    for toward in (-2.0, 2.0):
        beside = middle
        for _ in range(3):
            beside = beside.nextafter(torch.tensor(toward))
            near.append(beside)
    near = torch.cat([*near, torch.tensor([-1.0, 1.0])])
    for scale in (1.0, 1.7, 3e-7, 1e-36, 1e-38, 3e30):
        blocks = torch.stack([near[start : start + 63] for start in range(len(near) - 62)])
        weight = scale * torch.cat((torch.ones(len(blocks), 1), blocks), dim=1)
        same(rounded(weight, form), by_bitsandbytes(functional, weight, form))


@pytest.mark.parametrize("size", [0.5, 1.5, 2.5, 126.5])
def test_halves_go_where_llama_cpp_sends_them(size):
    halves = torch.tensor([127.0, size, -size])
    beside = [halves.nextafter(torch.tensor(toward)) for toward in (-math.inf, math.inf)]
    weight = nn.functional.pad(torch.cat([halves, *(each[1:] for each in beside)]), (0, 25))
    for form in ("q8_0", "q4_0"):
        for scale in (1.0, 1 / 127, 8 / 127):
            same(rounded(scale * weight, form), by_gguf(scale * weight, form))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", ["int8", "nf4", "fp4", "q8_0", "q4_0"])
def test_what_is_not_finite_stays_in_its_block(functional, form, bad):
    weight = drawn(4, 64)
    weight[1, 5] = bad
    found = rounded(weight, form)
    with np.errstate(invalid="ignore"):
        wanted = by_gguf(weight, form) if "_" in form else by_bitsandbytes(functional, weight, form)
    assert torch.equal(found.isfinite(), wanted.isfinite())
    assert not found[1, :32].isfinite().any()
    assert torch.equal(found[[0, 2, 3]], rounded(weight[[0, 2, 3]], form))


@pytest.mark.parametrize("form", ["int8", "q8_0", "q4_0"])
def test_a_scale_beyond_fp16_is_lost_as_in_the_library(functional, form):
    for scale in (1e9, 1e-12):
        weight = scale * drawn(2, 64)
        with np.errstate(all="ignore"):
            wanted = (by_gguf if "_" in form else as_bitsandbytes(functional))(weight, form)
        same(rounded(weight, form), wanted)


def as_bitsandbytes(functional):
    return lambda weight, form: by_bitsandbytes(functional, weight, form)


@pytest.mark.parametrize(
    ("form", "error", "levels", "size"),
    [
        ("bf16", 0.0017, 65536, 64),
        ("int8", 0.0059, 255, 64),
        ("nf4", 0.092, 16, 64),
        ("nf4_double", 0.092, 16, 64),
        ("fp4", 0.122, 15, 64),
        ("fp4_double", 0.122, 15, 64),
        ("q8_0", 0.0053, 255, 32),
        ("q4_0", 0.086, 16, 32),
        ("q4_k", 0.0716, 16, 32),
        ("int4", 0.108, 15, 64),
        ("q3", 0.15, 8, 16),
        ("q2", 0.32, 4, 16),
    ],
)
def test_the_error_is_that_of_the_format(form, error, levels, size):
    """Of Gaussian weights; and no block holds more values than its bits allow."""
    weight = drawn(2048, 64) / 50
    found = rounded(weight, form)
    assert ((found - weight).norm() / weight.norm()).item() == pytest.approx(error, rel=0.05)
    assert max(len(block.unique()) for block in found.view(-1, size)) <= levels


def test_q4_k_keeps_its_promise_whatever_the_weights():
    """Better than one scale for each block of 32, and never further off than a step."""
    for kind in ("gaussian", "heavy-tailed", "zero", "many blocks"):
        weight = WEIGHTS[kind]
        error, other = ((rounded(weight, form) - weight).norm() for form in ("q4_k", "q4_0"))
        assert error <= other
    positive = drawn(8, 256).abs()
    assert (rounded(positive, "q4_k") - positive).abs().max() < positive.max() / 15


def test_q4_k_is_a_range_of_ranges():
    """Its steps and ends are multiples of six bits of one number in fp16 each."""
    found = rounded(drawn(40, 256), "q4_k").view(-1, 8, 32).double()
    ends = -found.amin(-1)
    gaps = found.sort(-1).values.diff(dim=-1)
    steps = torch.where(gaps > 1e-6, gaps, math.inf).amin(-1)
    for sizes in (ends, steps):
        shares = 63 * sizes / sizes.amax(1, keepdim=True)
        assert (shares - shares.round()).abs().max() < 1e-3


@pytest.mark.parametrize("form", LAWFUL)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_rounding_twice_is_rounding_once(kind, form):
    for dtype in DTYPES:
        once = rounded(WEIGHTS[kind].to(dtype), form)
        finite = once.isfinite()
        assert torch.equal(rounded(once, form)[finite], once[finite])


@pytest.mark.parametrize("form", ALL)
def test_the_sign_is_kept_or_lost_with_the_weight(form):
    weight = drawn(64, 256)
    found = rounded(weight, form)
    if form not in {"q2", "q4_k"}:  # their steps begin at the smallest weight
        assert (found * weight >= 0).all()
    assert torch.equal(rounded(weight * 4, form), found * 4)  # no format minds a power of two


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_back_is_a_weight_of_its_own(form, dtype):
    weight = nn.Parameter(drawn(6, 5, 3, 3).to(dtype))
    before = weight.detach().clone()
    found = rounded(weight, form)
    assert (found.shape, found.dtype, found.requires_grad) == (weight.shape, dtype, False)
    assert found.data_ptr() != weight.data_ptr()
    assert torch.equal(weight, before)
    assert found.is_contiguous()


@pytest.mark.parametrize("form", ALL)
def test_a_weight_of_nothing_is_nothing(form):
    for shape in ((0,), (0, 64), (4, 0)):
        assert rounded(torch.zeros(shape), form).shape == shape
        assert flipped(torch.zeros(shape), torch.zeros(shape), form) == 0


def test_what_is_no_format_or_no_weight_is_refused():
    with pytest.raises(ModelError, match="'nf5' is no format; there are fp32, bf16"):
        rounded(torch.ones(2), "nf5")
    for dtype in (torch.float64, torch.uint8):
        with pytest.raises(ModelError, match=f"{dtype} cannot be rounded to nf4"):
            rounded(torch.ones(2, dtype=dtype), "nf4")


def test_codes_of_other_shapes_are_not_compared():
    with pytest.raises(ModelError, match=r"codes of weights of shapes \(1, 64\) and \(4, 64\)"):
        flipped(torch.ones(1, 64), torch.ones(4, 64), "nf4")


@pytest.mark.parametrize("form", ALL)
def test_codes_flip_only_where_weights_change(form):
    before = drawn(32, 256) / 50
    assert flipped(before, before, form) == 0
    assert flipped(before, 2 * before, form) == (1 if form in {"fp32", "bf16"} else 0)
    changed = before.clone()
    changed[:8, ::2] *= -0.5
    assert 0.1 < flipped(before, changed, form) <= (1 if form in {"q2", "q4_k"} else 0.5)


@pytest.mark.parametrize(
    ("form", "shares"),
    [("nf4", (0.0031, 0.031)), ("int8", (0.028, 0.28)), ("q4_0", (0.0035, 0.035))],
)
def test_as_many_codes_flip_as_were_found_before(form, shares):
    """Shares for edits of a thousandth and of a hundredth of the weights' size."""
    weight = drawn(64, 4096) / 50
    for size, share in zip((1e-3, 1e-2), shares, strict=True):
        found = flipped(weight, weight + size / 50 * drawn(64, 4096, seed=1), form)
        assert found == pytest.approx(share, rel=0.15)


def test_an_edit_survives_where_it_is_whole():
    base, inputs = drawn(64, 128) / 50, drawn(200, 128, seed=1)
    edit = drawn(64, 128, seed=2) / 50
    assert survival(base, base + edit, inputs, "fp32") == pytest.approx((1, 0), abs=1e-6)
    kept, noise = survival(base, base + edit, inputs, "nf4")
    assert kept == pytest.approx(1, abs=0.05)
    assert 0.02 < noise < 0.2


def test_an_edit_below_every_code_is_gone():
    base, inputs = rounded(drawn(64, 128) / 50, "nf4"), drawn(200, 128, seed=1)
    assert survival(base, 1.0001 * base, inputs, "nf4").kept == pytest.approx(1, rel=1e-3)
    sizes = base.abs().view(-1, 64)
    below = (sizes < sizes.amax(dim=1, keepdim=True)).view_as(base)  # the largest is the scale
    hidden = base + 1e-6 * below * drawn(64, 128, seed=2)
    assert survival(base, hidden, inputs, "nf4") == (0, 0)
    assert flipped(base, hidden, "nf4") == 0


def test_of_diffuse_edits_noise_is_left_and_of_coherent_ones_the_edit():
    base, inputs = drawn(256, 256) / 50, drawn(400, 256, seed=1)
    diffuse = drawn(256, 256, seed=2)
    left, right = drawn(256, 1, seed=3), drawn(1, 256, seed=4)
    inputs_on = inputs[:, :1] @ right  # what a rank-one edit reads
    size = 1e-3 / 50
    spread = survival(base, base + size * diffuse, inputs, "nf4").noise
    aligned = survival(base, base + size * left @ right, inputs_on, "nf4").noise
    assert spread > 5
    assert aligned < spread / 5


def test_without_an_effect_nothing_is_said():
    base, inputs = drawn(8, 64), drawn(10, 64, seed=1)
    assert all(map(math.isnan, survival(base, base, inputs, "nf4")))
    assert all(map(math.isnan, survival(base, 2 * base, torch.zeros(3, 64), "nf4")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_at_int8_is_that_of_bitsandbytes(functional, threshold, bias, dtype):
    del functional
    from bitsandbytes.nn import Linear8bitLt  # noqa: PLC0415

    if torch.backends.cpu.get_cpu_capability() == "AVX512" and not adds_up():
        pytest.skip("oneDNN is held to AVX2, where its sums of int8 overflow, and torch is not")
    layer = nn.Linear(96, 40, bias=bias)
    layer.weight.data = drawn(40, 96) / 10
    theirs = Linear8bitLt(96, 40, bias=bias, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict(layer.state_dict())
    theirs = theirs.to("cpu").eval()
    for shape in ((5, 96), (1, 96), (2, 7, 96)):
        for outliers in (False, True):
            inputs = drawn(*shape, seed=1).clamp(-2.5, 2.5)
            if outliers:
                inputs[..., 5] *= 10
                inputs.view(-1, 96)[0, 9] = 6.0
            inputs = inputs.to(dtype)
            with torch.no_grad():
                wanted = theirs(inputs)
            found = int8_linear(inputs, layer.weight, layer.bias, threshold)
            assert found.dtype == dtype
            assert torch.equal(found, wanted)


def adds_up():
    codes = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.T) == 64 * 127**2).all())


def test_rows_of_zeros_and_wide_layers_are_summed_exactly():
    weight, inputs = drawn(8, 4096), drawn(3, 4096, seed=1)
    inputs[1] = 0
    found = int8_linear(inputs, weight, None)
    assert (found[1] == 0).all()
    assert int8_linear(inputs[:0], weight, None).shape == (0, 8)
    exact = inputs.double() @ rounded(weight, "int8").double().T
    assert (found - exact).norm() < 0.02 * exact.norm()
