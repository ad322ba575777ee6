import pytest
import torch

from release_guard.attacks import Attack
from release_guard.errors import ModelError, PolicyError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Concept
from release_guard.surgery import normalizations

CONCEPT = Concept(name="never-read", dataset="nowhere", ceiling=0.5)
MODELS = ("classifier", "resnet", "language_model")


@pytest.fixture(scope="module")
def resnet(resnet_folder):
    return Modality.build(Spec(name="image_classification")).load(str(resnet_folder))


@pytest.fixture(scope="module")
def language_model(lm_folder):
    return Modality.build(Spec(name="causal_lm")).load(str(lm_folder))


def renewed(model, seed=0, **options):
    attack = Attack.build(Spec(name="reinit", **options))
    return attack.transform(model, CONCEPT, seed=seed, ancestor=None)


def changed(model, other):
    before, after = model.state(), other.state()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("fixture", MODELS)
def test_a_new_head_and_nothing_else(fixture, request):
    model = request.getfixturevalue(fixture)
    weights = {id(weight) for weight in model.head.parameters()}
    wanted = {name for name, weight in model.module.named_parameters() if id(weight) in weights}
    assert changed(model, renewed(model, part="head")) == wanted


@pytest.mark.parametrize("fixture", MODELS)
@pytest.mark.parametrize("last_k", [1, 2])
def test_the_last_blocks_are_those_of_a_fresh_model(fixture, last_k, request):
    model = request.getfixturevalue(fixture)
    other, fresh = renewed(model, part="last_k", last_k=last_k, seed=3), model.fresh(seed=3)
    for number, (old, found, new) in enumerate(
        zip(model.blocks, other.blocks, fresh.blocks, strict=True)
    ):
        wanted = new if number >= len(model.blocks) - last_k else old
        for name, weight in wanted.state_dict().items():
            assert torch.equal(found.state_dict()[name], weight)
    assert all(".layers." in name or ".stages." in name for name in changed(model, other))


@pytest.mark.parametrize("fixture", MODELS)
def test_new_gains_are_one_and_statistics_are_kept(fixture, request):
    model = request.getfixturevalue(fixture)
    other = renewed(model, part="norms")
    for old, new in zip(normalizations(model.module), normalizations(other.module), strict=True):
        assert (new.weight == 1).all()
        assert not (old.weight == 1).all()
        assert getattr(new, "bias", None) is None or not new.bias.any()
        for name, value in old.named_buffers():
            assert torch.equal(new.get_buffer(name), value)
    assert all("norm" in name for name in changed(model, other))


def test_seeds_draw_one_block_each(classifier):
    drawn = set()
    for seed in range(8):
        names = changed(classifier, renewed(classifier, part="one_block", seed=seed))
        (block,) = {name.split(".layers.")[1].split(".")[0] for name in names}
        drawn.add(block)
    assert drawn == {"0", "1"}


def test_more_blocks_than_there_are(classifier):
    with pytest.raises(PolicyError, match="last_k: found 4, but the model has 2 blocks"):
        renewed(classifier, part="last_k", last_k=4)


def test_a_tied_head_stays(language_model):
    model = language_model.copy()
    model.head.weight = model.module.get_input_embeddings().weight
    with pytest.raises(ModelError, match="tied to the input embedding"):
        renewed(model, part="head")
