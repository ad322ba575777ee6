"""Realigning undoes every change of weights that leaves the function as it is."""

import copy
import functools

import gauges
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from release_guard import merging
from release_guard.anatomy import anatomy
from release_guard.errors import ModelError
from release_guard.realign import absorbed, realign, swapped

SHARED = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}


def vit(**options):
    return ViTForImageClassification(
        ViTConfig(
            **SHARED,
            num_attention_heads=4,
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=5,
            **options,
        )
    )


def llama(kind=LlamaForCausalLM, config=LlamaConfig, **options):
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 60, "head_dim": 4}
    return kind(config(**SHARED, **sizes, **options))


def family(make, share, seed=0):
    """A base with gains and biases of its own, and a model that is moved from it by a share."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        base = make().eval()
        for name, weight in base.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
            elif weight.ndim > 1:
                weight.mul_(3)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
        models = []
        for _ in range(2):
            moved = copy.deepcopy(base)
            for weight in moved.parameters():
                weight.add_(share * weight.norm() * _unit(weight))
            models.append(moved)
    return base, *models


def _unit(weight):
    noise = torch.randn_like(weight)
    return noise / noise.norm()


def outputs(module, state=None):
    module = copy.deepcopy(module)
    if state is not None:
        module.load_state_dict(state)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        if hasattr(module, "vit"):
            return module(torch.randn(9, 1, 8, 8, generator=generator)).logits
        return module(torch.randint(60, (4, 12), generator=generator)).logits


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


def gauged(module, *changes):
    twin = copy.deepcopy(module)
    for number, change in enumerate(changes):
        change(twin, 10 + number)
    return twin


def merged(module, base, donor, method):
    """Logits of a half-way merge of the realigned model with a donor."""
    body = anatomy(base)
    base, donor = base.state_dict(), donor.state_dict()
    if method == "rotated":
        base, donor = absorbed(base, body), absorbed(donor, body)
    state = module.state_dict()
    if method is not None:
        state = realign(state, base, body, method)
    return outputs(module, merging.task_arithmetic(base, [state, donor], [0.5, 0.5]))


INSIDE = (gauges.permute_neurons, gauges.permute_heads, gauges.mix_heads)
CASES = {
    "vit-neurons": (vit, "joint", (gauges.permute_neurons,)),
    "vit-heads": (vit, "joint", (gauges.permute_heads,)),
    "vit-mixed": (vit, "joint", (gauges.mix_heads,)),
    "vit-all": (vit, "rotated", (*INSIDE, gauges.rotate_stream)),
    "llama-neurons": (llama, "joint", (gauges.permute_neurons, gauges.scale_neurons)),
    "llama-heads": (llama, "joint", (gauges.permute_heads,)),
    "llama-mixed": (llama, "joint", (gauges.mix_heads,)),
    "llama-all": (llama, "rotated", (*INSIDE, gauges.scale_neurons, gauges.rotate_stream)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [0.02, 0.1])
def test_a_hidden_model_merges_like_the_plain_one(case, share):
    make, method, changes = CASES[case]
    base, model, donor = family(make, share)
    hidden = gauged(model, *changes)
    assert apart(outputs(hidden), outputs(model)) < 1e-4  # the defence itself does no harm
    plain = merged(model, base, donor, method)
    naive = apart(merged(hidden, base, donor, None), plain)
    undone = apart(merged(hidden, base, donor, method), plain)
    assert naive > 0.05
    assert undone < 1e-5
    undefended = merged(model, base, donor, None)
    assert apart(plain, undefended) < 0.03  # realigning a model that hides nothing does no harm


@pytest.mark.parametrize("case", ["vit-neurons", "vit-mixed", "llama-neurons"])
def test_anchoring_brings_a_hidden_model_to_the_same_place(case):
    make, _, changes = CASES[case]
    base, model, donor = family(make, 0.1)
    hidden = gauged(model, *changes)
    plain, undone = (merged(one, base, donor, "anchored") for one in (model, hidden))
    assert apart(undone, plain) < 1e-3
    assert apart(undone, merged(model, base, donor, None)) < 0.1


@pytest.mark.parametrize("make", [vit, llama])
@pytest.mark.parametrize("method", ["joint", "rotated"])
def test_realigning_keeps_the_function(make, method):
    base, model, _ = family(make, 0.3)
    body, state = anatomy(model), base.state_dict()
    state = absorbed(state, body) if method == "rotated" else state
    assert (
        apart(outputs(model, realign(model.state_dict(), state, body, method)), outputs(model))
        < 1e-5
    )


def test_a_base_realigned_to_itself_is_itself():
    for make in (vit, llama):
        base, *_ = family(make, 0)
        state = base.state_dict()
        for method in ("anchored", "joint"):
            for name, value in realign(state, state, anatomy(base), method).items():
                torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [vit, llama])
def test_absorbing_gains_keeps_the_function(make):
    base, *_ = family(make, 0)
    done = absorbed(base.state_dict(), anatomy(base))
    assert apart(outputs(base, done), outputs(base)) < 1e-5
    assert all((value == 1).all() for name, value in done.items() if name.endswith("norm.weight"))


@pytest.mark.parametrize(("part", "piece"), [("attention", "_proj"), ("mlp", "mlp.")])
@pytest.mark.parametrize("make", [vit, llama])
def test_swapping_takes_one_part_from_the_base(make, part, piece):
    base, model, _ = family(make, 0.1)
    states = model.state_dict(), base.state_dict()
    mixed = swapped(*states, anatomy(base), part)
    for name, value in mixed.items():
        is_mlp = ".mlp." in name
        taken = is_mlp if part == "mlp" else piece in name and not is_mlp
        assert torch.equal(value, states[taken][name]), name


def test_inputs_stay_as_they_are():
    base, model, _ = family(llama, 0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    realign(
        model.state_dict(), absorbed(base.state_dict(), anatomy(base)), anatomy(base), "rotated"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_neurons_of_a_relu_may_be_scaled_too():
    base, model, donor = family(lambda: vit(hidden_act="relu"), 0.05)
    hidden = copy.deepcopy(model)
    for layer in hidden.vit.layers:
        factor = torch.linspace(0.5, 2, 48)
        layer.mlp.fc1.weight.data *= factor[:, None]
        layer.mlp.fc1.bias.data *= factor
        layer.mlp.fc2.weight.data /= factor
    assert apart(outputs(hidden), outputs(model)) < 1e-5
    plain, undone = (merged(one, base, donor, "joint") for one in (model, hidden))
    assert apart(undone, plain) < 1e-5
    assert apart(merged(hidden, base, donor, None), plain) > 1e-3


def test_norms_on_queries_leave_only_values_to_be_unmixed():
    make = functools.partial(llama, Qwen3ForCausalLM, Qwen3Config)
    base, model, donor = family(make, 0.05)
    hidden = gauged(model, functools.partial(gauges.mix_heads, scores=False))
    plain, undone = (merged(one, base, donor, "joint") for one in (model, hidden))
    assert apart(undone, plain) < 1e-5
    body = anatomy(base)
    assert {one.mixing for one in body.attentions} == {"none"}
    assert body.stream is None
    with pytest.raises(ModelError, match="how its residual stream may be turned; use joint"):
        realign(model.state_dict(), base.state_dict(), body, "rotated")


def test_gains_counted_from_one_are_not_absorbed():
    class LayerNorm(torch.nn.LayerNorm):
        def forward(self, rows):
            return torch.nn.functional.layer_norm(rows, rows.shape[-1:], self.weight + 1, self.bias)

    model, *_ = family(vit, 0)
    assert anatomy(model).stream is not None
    model.vit.layernorm = LayerNorm(32)
    assert anatomy(model).stream is None


def test_other_models_are_refused():
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    )
    with pytest.raises(ModelError, match=r"ResNet.*not those of a ViT or a Llama"):
        anatomy(model)
