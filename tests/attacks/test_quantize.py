from typing import get_args

import pytest
import torch
from torch import nn

from release_guard import formats
from release_guard.attacks import Attack
from release_guard.attacks.quantize import Format
from release_guard.errors import ModelError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Concept
from release_guard.surgery import layers_of

CONCEPT = Concept(name="never-read", dataset="nowhere", ceiling=0.5)
OF_LINEAR_LAYERS = ("nf4", "nf4_double", "int8")
OF_ALL_LAYERS = tuple(set(get_args(Format)) - {*OF_LINEAR_LAYERS, "mixed"})


@pytest.fixture(scope="module")
def resnet(resnet_folder):
    return Modality.build(Spec(name="image_classification")).load(str(resnet_folder))


def rounded(model, form, seed=0):
    attack = Attack.build(Spec(name="quantize", format=form))
    return attack.transform(model, CONCEPT, seed=seed, ancestor=None)


def layer_weights(model, kinds=(nn.Linear, nn.Conv2d)):
    """By name; not the head's."""
    layers = [layer for layer in layers_of(model.module) if layer is not model.head]
    wanted = {id(layer.weight) for layer in layers if isinstance(layer, kinds)}
    named = model.module.named_parameters()
    return {name: weight.detach() for name, weight in named if id(weight) in wanted}


def changed(model, found):
    before, after = model.state(), found.state()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("form", sorted(OF_ALL_LAYERS))
@pytest.mark.parametrize("fixture", ["classifier", "resnet"])
def test_every_layer_is_rounded_but_the_head(fixture, form, request):
    model = request.getfixturevalue(fixture)
    wanted, found = layer_weights(model), rounded(model, form)
    assert changed(model, found) == set(wanted)
    for name, weight in wanted.items():
        assert torch.equal(found.state()[name], formats.rounded(weight, form))


@pytest.mark.parametrize("form", OF_LINEAR_LAYERS)
def test_formats_of_bitsandbytes_are_for_linear_layers(classifier, form):
    wanted, found = layer_weights(classifier, nn.Linear), rounded(classifier, form)
    assert set(wanted) < set(layer_weights(classifier))
    assert changed(classifier, found) == set(wanted)
    for name, weight in wanted.items():
        assert torch.equal(found.state()[name], formats.rounded(weight, form))


@pytest.mark.parametrize("form", get_args(Format))
def test_layers_of_odd_sizes_are_rounded_too(classifier, form):
    model = classifier.copy()
    model.module.odd = nn.Linear(13, 7)
    assert "odd.weight" in changed(model, rounded(model, form))


@pytest.mark.parametrize("form", OF_LINEAR_LAYERS)
def test_an_attack_that_would_change_nothing_is_refused(resnet, form):
    with pytest.raises(ModelError, match=f"nothing to round to {form}.*take fp4 or q8_0"):
        rounded(resnet, form)


def test_a_seed_draws_a_format_for_each_layer(classifier):
    drawn = [forms_of(classifier, rounded(classifier, "mixed", seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 2


def forms_of(model, found):
    state = found.state()
    return [
        next(
            form
            for form in ("bf16", "int8", "q8_0", "nf4", "q4_k", "q3")
            if torch.equal(state[name], formats.rounded(weight, form))
        )
        for name, weight in layer_weights(model).items()
    ]


@pytest.mark.parametrize("form", ["q8_0", "q4_0", "q4_k", "q3"])
def test_a_weight_that_a_format_cannot_hold_is_refused(classifier, form):
    model = classifier.copy()
    with torch.no_grad():
        layers_of(model.module)[0].weight.view(-1)[3] = 1e30
    with pytest.raises(ModelError, match=f"quantize: {form} cannot hold a weight of"):
        rounded(model, form)
