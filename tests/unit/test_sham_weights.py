"""The sham's weights: as far as the defence went, tensor by tensor, and still of use."""

from pathlib import Path

import pico
import pytest
import torch

from release_guard.errors import ModelError
from release_guard.modalities import Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.sham_weights import distances, place_at, sham_of

SHARE = 1.0  # how far the tensors below move, relative to their norm


def quiet(done: int, rounds: int, line: str) -> None:
    pass


def load(folder: Path) -> ModelHandle:
    return Modality.build(Spec(name="image_classification")).load(str(folder))


def moved(model: ModelHandle, share: float) -> ModelHandle:
    """Every matrix goes by a share of its norm in a random direction; vectors stay."""
    copy, generator = model.copy(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in copy.module.parameters():
            if weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(noise * share * weight.norm() / noise.norm())
    return copy


@pytest.fixture
def policy(image_data: Path, tmp_path: Path) -> Policy:
    return Policy.load(pico.pico_policy(tmp_path, image_data))


@pytest.mark.parametrize("folder", ["classifier_folder", "resnet_folder"])
def test_every_tensor_goes_as_far_and_the_use_stays(
    folder: str, policy: Policy, request: pytest.FixtureRequest
) -> None:
    base = load(request.getfixturevalue(folder))
    before = base.state()
    damaged = moved(base, SHARE)
    sham = sham_of(base, damaged, policy, quiet)

    wanted = distances(base.module, damaged.module)
    assert distances(base.module, sham.module) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert all(torch.equal(before[name], value) for name, value in base.state().items())

    def use(model: ModelHandle) -> float:
        scores = model.scores(policy.retain.dataset, "utility", limit=200)
        return sum(scores) / len(scores)

    assert use(sham) > use(base) - 0.1
    assert use(damaged) < use(base) - 0.2, "this distance must be one at which use is easily lost"


def test_the_same_policy_gives_the_same_weights(policy: Policy, classifier_folder: Path) -> None:
    base = load(classifier_folder)
    first, second = (sham_of(base, moved(base, 0.1), policy, quiet).state() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_practice_does_not_move_goes_somewhere(classifier_folder: Path) -> None:
    base = load(classifier_folder)
    copy, radii = base.copy(), dict.fromkeys(dict(base.module.named_parameters()), 2.0)
    place_at(copy.module, base.module, radii, seed=0)
    assert distances(base.module, copy.module) == pytest.approx(radii, rel=1e-3)


def test_models_of_other_shapes_have_no_distance(
    classifier_folder: Path, resnet_folder: Path
) -> None:
    with pytest.raises(ModelError, match="names or shapes"):
        distances(load(classifier_folder).module, load(resnet_folder).module)
