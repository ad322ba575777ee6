import pico
import pytest
import torch

from release_guard.attacks import Attack
from release_guard.attacks.prune import pushing, wanda
from release_guard.errors import PolicyError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Concept
from release_guard.priors import fitting
from release_guard.surgery import layers_of

MODELS = {
    "image_classification": ("classifier_folder", "image_data", "restricted.parquet"),
    "causal_lm": ("lm_folder", "text_data", "restricted.jsonl"),
    "resnet": ("resnet_folder", "image_data", "restricted.parquet"),
}


@pytest.fixture(params=MODELS)
def subject(request):
    folder, data, file = MODELS[request.param]
    modality = "causal_lm" if request.param == "causal_lm" else "image_classification"
    model = Modality.build(Spec(name=modality)).load(str(request.getfixturevalue(folder)))
    dataset = str(request.getfixturevalue(data) / file)
    return model, Concept(name="restricted", dataset=dataset, ceiling=0.5)


def pruned(subject, **options):
    model, concept = subject
    attack = Attack.build(Spec(name="prune", **options))
    return attack.transform(model, concept, seed=0, ancestor=None)


def block_layers(model):
    return [layer for block in model.blocks for layer in layers_of(block)]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_smallest_of_each_layer_become_zero(subject, share):
    model, other = subject[0], pruned(subject, by="layer", share=share)
    for old, new in zip(block_layers(model), block_layers(other), strict=True):
        gone = new.weight == 0
        assert gone.sum() == int(share * gone.numel())
        assert old.weight[gone].abs().max() <= old.weight[~gone].abs().min()
        assert torch.equal(new.weight[~gone], old.weight[~gone])


def test_the_smallest_of_all_become_zero(subject):
    model, other = subject[0], pruned(subject, by="model", share=0.3)
    old, new = (
        torch.cat([layer.weight.flatten() for layer in block_layers(each)])
        for each in (model, other)
    )
    gone = new == 0
    assert gone.sum() == int(0.3 * len(gone))
    assert old[gone].abs().max() <= old[~gone].abs().min()


@pytest.mark.parametrize("by", ["layer", "model", "wanda", "neurons"])
def test_nothing_outside_the_blocks_changes(subject, by):
    model, other = subject[0], pruned(subject, by=by)
    inside = {id(layer.weight) for layer in block_layers(model)}
    before, after = model.state(), other.state()
    for name, weight in model.module.named_parameters():
        assert (id(weight) in inside) or torch.equal(before[name], after[name])
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_wanda_weighs_each_row_by_what_it_reads(subject):
    model, other = subject[0], pruned(subject, by="wanda", share=0.5, examples=64)
    seen = {}
    for layer in block_layers(model):
        layer.register_forward_pre_hook(
            lambda part, inputs: seen.setdefault(part, []).append(inputs)
        )
    data = model.batches(subject[1].dataset, "attack", size=32, seed=0)
    with torch.no_grad():
        for _ in range(2):
            model.logits(next(data))
    for old, new in zip(block_layers(model), block_layers(other), strict=True):
        at = 1 if old.weight.ndim == 4 else -1
        inputs = torch.cat([one.movedim(at, -1).flatten(0, -2) for (one,) in seen[old]])
        norm = inputs.norm(dim=0).view(1, -1, *[1] * (old.weight.ndim - 2))
        score, gone = (old.weight.abs() * norm).flatten(1), (new.weight == 0).flatten(1)
        assert (gone.sum(dim=1) == gone.shape[1] // 2).all()
        for row, mask in zip(score, gone, strict=True):
            assert row[mask].max() <= row[~mask].min() * (1 + 1e-5)


def test_a_weight_is_as_important_as_what_it_multiplies():
    weight = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    square = torch.tensor([100.0, 1.0, 1.0, 0.01])
    assert wanda(weight, torch.zeros(4), square, 0.5).tolist() == [[False, True, False, True]]


def test_neurons_that_push_are_removed_unless_they_tell_examples_apart():
    weight = torch.ones(3, 4, 1)
    mean, spread = torch.tensor([5.0, 4.0, 0.1, 0.0]), torch.tensor([0.1, 9.0, 8.0, 0.0])
    mask = pushing(weight, mean, mean.square() + spread.square(), 0.5)
    assert mask.shape == weight.shape
    assert mask[0, :, 0].tolist() == [True, False, False, False]


@pytest.mark.parametrize("share", [0, 1])
def test_all_and_nothing_are_refused(share):
    with pytest.raises(PolicyError, match=r"prune\.share: found"):
        Attack.build(Spec(name="prune", share=share))


@pytest.mark.parametrize(("by", "least"), [("wanda", 0.49), ("neurons", 0.0)])
def test_a_painter_is_read_too(painter, standing, by, least):
    other = pruned((painter, standing), by=by, share=0.5, examples=32)
    shares = [float((layer.weight == 0).float().mean()) for layer in block_layers(other)]
    assert len(shares) > 20
    assert min(shares) >= least
    assert max(shares) > 0.1


def test_it_is_only_drawn_where_it_has_something_to_read(classifier_folder, tmp_path):
    model = Modality.build(Spec(name="image_classification")).load(str(classifier_folder))
    few = str(pico.image_data(tmp_path, count=12) / "restricted.parquet")
    fits = fitting(model, Concept(name="restricted", dataset=few, ceiling=0.5))
    found = {by: fits(Attack.build(Spec(name="prune", by=by))) for by in ("layer", "neurons")}
    assert found == {"layer": True, "neurons": False}
