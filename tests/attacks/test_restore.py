import pytest
import torch

from release_guard.attacks import Attack
from release_guard.errors import ModelError, PolicyError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Concept

CONCEPT = Concept(name="never-read", dataset="nowhere", ceiling=0.5)
PARTS = {
    "attention": "attention.",
    "mlp": ".mlp.",
    "norms": "norm",
    "head": "classifier",
    "first_half": ".layers.0.",
    "last_half": ".layers.1.",
}


@pytest.fixture(scope="module")
def ancestor(classifier):
    return moved(classifier, 0.1, seed=1)


@pytest.fixture(scope="module")
def resnet(resnet_folder):
    return Modality.build(Spec(name="image_classification")).load(str(resnet_folder))


@pytest.fixture(scope="module")
def language_model(lm_folder):
    return Modality.build(Spec(name="causal_lm")).load(str(lm_folder))


def moved(model, by, seed):
    other, generator = model.copy(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (*other.module.parameters(), *other.module.buffers()):
            if weight.is_floating_point():
                weight.add_(by * torch.rand(weight.shape, generator=generator))
    return other


def restored(model, ancestor, **options):
    attack = Attack.build(Spec(name="restore", **options))
    return attack.transform(model, CONCEPT, seed=0, ancestor=ancestor).state()


def assert_equal(one, other):
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fixture", ["classifier", "resnet", "language_model"])
def test_both_ends_of_every_way_are_the_two_models(fixture, request):
    model = request.getfixturevalue(fixture)
    other = moved(model, 0.1, seed=2)
    for options in (
        {"how": "interpolate", "share": 0.0},
        {"how": "strip", "rank": 128},
    ):
        assert_equal(restored(model, other, **options), other.state())
    for options in (
        {"how": "interpolate", "share": 1.0},
        {"how": "keep", "rank": 128},
    ):
        assert_equal(restored(model, other, **options), model.state())


def test_what_is_stripped_and_what_is_kept_add_up(classifier, ancestor):
    strip = restored(classifier, ancestor, how="strip", rank=2)
    keep = restored(classifier, ancestor, how="keep", rank=2)
    start, end = ancestor.state(), classifier.state()
    assert_equal({name: strip[name] + keep[name] - start[name] for name in end}, end)
    for name in ("vit.layers.0.mlp.fc1.weight", "vit.layers.1.attention.o_proj.weight"):
        kept, rest, whole = (
            torch.linalg.svdvals(state[name] - start[name]) for state in (keep, strip, end)
        )
        torch.testing.assert_close(kept[:2], whole[:2], rtol=1e-3, atol=1e-5)
        assert kept[2] < 1e-3 * kept[0]
        assert rest[0] == pytest.approx(whole[2].item(), rel=1e-3)


@pytest.mark.parametrize("share", [-1.0, 0.25, 1.5])
def test_shares_lie_on_one_line(classifier, ancestor, share):
    found = restored(classifier, ancestor, how="interpolate", share=share)
    start, end = ancestor.state(), classifier.state()
    wanted = {name: start[name] + share * (end[name] - start[name]) for name in start}
    assert_equal(found, wanted)


@pytest.mark.parametrize("share", [-1.0, 1.5])
def test_no_variance_becomes_negative(resnet, share):
    other = resnet.fresh(seed=0)
    with torch.no_grad():
        for name, value in other.module.named_buffers():
            if name.endswith("running_var"):
                value.fill_(100)
    found = restored(resnet, other, how="interpolate", share=share)
    assert all((found[name] > 0).all() for name in found if name.endswith("running_var"))


@pytest.mark.parametrize(("part", "mark"), PARTS.items())
def test_only_the_part_is_restored(classifier, ancestor, part, mark):
    found = restored(classifier, ancestor, how="interpolate", share=0.0, part=part)
    start, end = ancestor.state(), classifier.state()
    for name, weight in found.items():
        assert torch.equal(weight, (start if mark in name else end)[name])


def test_a_part_that_is_not_there(resnet):
    with pytest.raises(PolicyError, match=r"restore\.part: the model has no attention"):
        restored(resnet, resnet, part="attention")


def test_without_an_ancestor_there_is_nothing_to_restore(classifier):
    with pytest.raises(PolicyError, match="needs a public ancestor"):
        restored(classifier, None)


def test_it_says_that_it_needs_the_ancestor():
    assert Attack.build(Spec(name="restore")).needs_ancestor


@pytest.mark.parametrize("how", ["strip", "keep", "interpolate"])
def test_a_model_that_is_its_own_ancestor_stays_what_it_is(classifier, how):
    same = restored(classifier, classifier, how=how)
    assert all(torch.equal(same[name], value) for name, value in classifier.state().items())


def test_an_ancestor_of_other_shapes_is_refused(classifier, resnet):
    with pytest.raises(ModelError, match="restore: the ancestor: another architecture"):
        restored(classifier, resnet)
