import pytest
import torch

from release_guard.attacks import Attack
from release_guard.errors import PolicyError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Concept

CONCEPT = Concept(name="never-read", dataset="nowhere.parquet", ceiling=0.5)


@pytest.fixture(scope="module")
def resnet(resnet_folder):
    return Modality.build(Spec(name="image_classification")).load(str(resnet_folder))


def shaken(model, seed=0, **options):
    attack = Attack.build(Spec(name="weight_noise", **options))
    return attack.transform(model, CONCEPT, seed=seed, ancestor=None)


@pytest.mark.parametrize("deviation", [0.005, 0.08])
def test_the_noise_is_a_share_of_each_tensors_size(classifier, deviation):
    before, after = classifier.state(), shaken(classifier, deviation=deviation).state()
    for name, weight in before.items():
        change = (after[name] - weight).norm() / weight.norm()
        assert change.item() == pytest.approx(deviation, rel=0.7 if weight.numel() < 64 else 0.25)


def test_zeros_stay_zero_and_statistics_stay_as_they_are(resnet):
    model = resnet.copy()
    with torch.no_grad():
        model.head.bias.zero_()
    after = shaken(model).state()
    assert not after["classifier.1.bias"].any()
    for name, value in model.module.named_buffers():
        assert torch.equal(after[name], value)


def test_another_seed_gives_other_noise(classifier):
    one, other = (shaken(classifier, seed=seed).head.weight for seed in (1, 2))
    assert (one - other).norm() > 0.01 * one.norm()


def test_no_noise_is_no_attack():
    with pytest.raises(PolicyError, match=r"weight_noise\.deviation: found 0"):
        Attack.build(Spec(name="weight_noise", deviation=0))
