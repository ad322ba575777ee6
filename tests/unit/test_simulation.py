"""What simulated attackers do, step by step."""

import copy
import random
from dataclasses import replace
from pathlib import Path

import pico
import pytest
import torch

from release_guard.modalities import Batch, Modality, ModelHandle, Painter
from release_guard.plugins import Spec
from release_guard.quantization import aware, emulated, is_aware, seen_names, turn
from release_guard.simulation import Attacker, Drawn, Habits, has_own_head

PLAIN = Drawn(adam=False, lr=0.1, life=3)
HABITS = Habits(
    horizon=(3, 9),
    adam_share=0.5,
    adam_lr=(1e-4, 1e-2),
    sgd_lr=(1e-2, 1.0),
    momentum=0.9,
    reinit_share=0.5,
    renew_share=0.5,
)


@pytest.fixture
def batch(classifier: ModelHandle, image_data: Path) -> Batch:
    source = str(image_data / "restricted.parquet")
    return next(classifier.batches(source, "immunize", size=16, seed=0))


def test_a_step_of_plain_sgd_is_one_gradient_times_the_rate(
    classifier: ModelHandle, batch: Batch
) -> None:
    attacker = Attacker.of(classifier, PLAIN, seed=0)
    before = [parameter.detach().clone() for parameter in attacker.parameters]
    model = classifier.copy()
    parameters = list(model.module.parameters())
    gradients = torch.autograd.grad(model.loss(batch), parameters)
    attacker.step(batch)
    for old, new, gradient in zip(before, attacker.parameters, gradients, strict=True):
        torch.testing.assert_close(new.detach(), old - 0.1 * gradient)
    assert attacker.age == 1


def test_a_gradient_is_that_of_the_loss_where_the_attacker_stands(
    classifier: ModelHandle, batch: Batch
) -> None:
    attacker = Attacker.of(classifier, PLAIN, seed=0)
    attacker.step(batch)
    twin = attacker.model.copy()
    wanted = torch.autograd.grad(twin.loss(batch), list(twin.module.parameters()))
    found = attacker.gradients(attacker.model.loss(batch))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert all(parameter.grad is None for parameter in attacker.parameters)


def test_a_new_head_differs_and_passes_no_gradient_on(
    classifier: ModelHandle, batch: Batch
) -> None:
    attacker = Attacker.of(classifier, replace(PLAIN, new_head=True, new_blocks=1), seed=0)
    assert not torch.equal(attacker.model.head.weight, classifier.head.weight)
    assert not attacker.model.head.bias.any()
    renewed = [*attacker.model.head.parameters(), *attacker.model.blocks[-1].parameters()]
    ids = {id(parameter) for parameter in renewed}
    found = attacker.gradients(attacker.model.loss(batch))
    for parameter, gradient in zip(attacker.parameters, found, strict=True):
        assert gradient.any() != (id(parameter) in ids)


def test_it_rides_on_the_released_weights_except_where_it_began_anew(
    classifier: ModelHandle,
) -> None:
    attacker = Attacker.of(classifier, replace(PLAIN, new_head=True), seed=0)
    before = [parameter.detach().clone() for parameter in attacker.parameters]
    attacker.ride([torch.ones_like(parameter) for parameter in attacker.parameters])
    head = {id(parameter) for parameter in attacker.model.head.parameters()}
    for old, new in zip(before, attacker.parameters, strict=True):
        torch.testing.assert_close(new.detach(), old + float(id(new) not in head))


@pytest.mark.parametrize("adam", [True, False])
def test_one_that_was_kept_goes_on_as_if_nothing_had_been(
    classifier: ModelHandle, batch: Batch, adam: bool
) -> None:
    drawn = Drawn(adam=adam, lr=1e-3, momentum=0.9, new_head=True, life=5)
    attacker = Attacker.of(classifier, drawn, seed=0)
    attacker.step(batch)
    again = Attacker.again(classifier, copy.deepcopy(attacker.kept()))
    attacker.step(batch)
    again.step(batch)
    assert (again.age, again.life, again.own) == (2, 5, attacker.own)
    pairs = zip(attacker.parameters, again.parameters, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_habits_are_kept_to() -> None:
    chance = random.Random(0)  # noqa: S311  no secret
    drawn = [
        HABITS.draw(num_concepts=3, num_blocks=4, own_head=True, chance=chance) for _ in range(400)
    ]
    assert {one.concept for one in drawn} == {0, 1, 2}
    assert {one.new_blocks for one in drawn} == {0, 1, 2}
    assert {one.life for one in drawn} == set(range(3, 10))
    assert all(1e-4 <= one.lr <= 1e-2 for one in drawn if one.adam)
    assert all(1e-2 <= one.lr <= 1.0 for one in drawn if not one.adam)
    for share in (one.adam for one in drawn), (one.new_head for one in drawn):
        assert 0.4 < sum(share) / 400 < 0.6


def test_a_head_that_is_not_the_models_own_is_kept(
    classifier: ModelHandle, lm_folder: Path, painter: Painter, tmp_path: Path
) -> None:
    language = Modality.build(Spec(name="causal_lm"))
    tied = pico.pico_lm(tmp_path / "tied", steps=1, tied=True)
    assert has_own_head(classifier)
    assert has_own_head(language.load(str(lm_folder)))
    assert not has_own_head(language.load(str(tied)))
    assert not has_own_head(painter)
    chance = random.Random(0)  # noqa: S311
    everybody = replace(HABITS, reinit_share=1.0)
    drawn = everybody.draw(num_concepts=1, num_blocks=2, own_head=False, chance=chance)
    assert not drawn.new_head


FORMATS = {"fp32": 0.25, "int8": 0.25, "nf4": 0.5}
PACKED = replace(PLAIN, form="nf4", rank=8)


@pytest.fixture
def theta(classifier: ModelHandle) -> ModelHandle:
    """Released weights while a stage shows them in nf4."""
    model = aware(classifier)
    turn(model, "nf4")
    return model


def test_with_one_format_nothing_more_is_drawn() -> None:
    def draw(habits: Habits) -> tuple[Drawn, float]:
        chance = random.Random(0)  # noqa: S311
        drawn = habits.draw(num_concepts=2, num_blocks=2, own_head=True, chance=chance)
        return drawn, chance.random()

    assert draw(HABITS) == draw(replace(HABITS, formats={"fp32": 3.0}, packed_share=1.0))


def test_formats_and_adapters_come_in_their_shares() -> None:
    habits = replace(HABITS, formats=FORMATS, packed_share=0.5)
    chance = random.Random(0)  # noqa: S311
    drawn = [
        habits.draw(num_concepts=1, num_blocks=2, own_head=True, chance=chance) for _ in range(2000)
    ]
    for form, share in FORMATS.items():
        mine = [one for one in drawn if one.form == form]
        assert len(mine) / len(drawn) == pytest.approx(share, abs=0.05)
        packed = sum(one.rank > 0 for one in mine) / len(mine)
        assert packed == pytest.approx(0.0 if form == "fp32" else 0.5, abs=0.06)
    assert not any(one.new_blocks for one in drawn if one.rank)


def test_whoever_dequantizes_begins_at_rounded_weights_and_trains_all(
    classifier: ModelHandle, theta: ModelHandle, batch: Batch
) -> None:
    attacker = Attacker.of(theta, replace(PLAIN, form="nf4"), seed=0)
    wanted = emulated(classifier, "nf4").state()
    assert not is_aware(attacker.model)
    assert all(torch.equal(one, wanted[name]) for name, one in attacker.model.state().items())
    attacker.step(batch)
    assert all(
        not torch.equal(one, wanted[name])
        for name, one in attacker.model.state().items()
        if name in seen_names(classifier, "nf4")
    )


def test_whoever_has_them_packed_trains_adapters_and_the_head_alone(
    theta: ModelHandle, batch: Batch
) -> None:
    attacker = Attacker.of(theta, PACKED, seed=0)
    before = attacker.model.state()
    wanted = attacker.model.loss(batch)
    torch.testing.assert_close(wanted, theta.loss(batch))  # adapters add nothing at first
    for _ in range(3):
        attacker.step(batch)
    head = {"classifier.weight", "classifier.bias"}
    changed = {
        name for name, one in attacker.model.state().items() if not torch.equal(one, before[name])
    }
    assert changed == head
    assert all(up.any() for up in attacker.adapters[1::2])
    assert attacker.model.loss(batch) < wanted
    assert all(parameter.requires_grad for parameter in attacker.parameters)


def test_its_rounding_follows_the_released_weights(
    classifier: ModelHandle, theta: ModelHandle, batch: Batch
) -> None:
    """Beside adapters, weights are those of the release, rounded anew; its format is its own."""
    attacker = Attacker.of(theta, PACKED, seed=0)
    attacker.step(batch)
    moves = [0.05 * torch.randn_like(parameter) for parameter in attacker.parameters]
    attacker.ride(moves)
    moved = classifier.copy()
    with torch.no_grad():
        for parameter, move in zip(moved.module.parameters(), moves, strict=True):
            parameter.add_(move)
    rounded = emulated(moved, "nf4")
    rounded.head.load_state_dict(attacker.model.head.state_dict())
    turn(theta, "fp32")
    assert not torch.equal(attacker.model.loss(batch), rounded.loss(batch))
    with torch.no_grad():
        for adapter in attacker.adapters[1::2]:
            adapter.zero_()
    torch.testing.assert_close(attacker.model.loss(batch), rounded.loss(batch))


def test_gradients_reach_the_weights_that_it_leaves_as_they_are(
    theta: ModelHandle, batch: Batch
) -> None:
    attacker = Attacker.of(theta, PACKED, seed=0)
    attacker.step(batch)
    assert all(one.any() for one in attacker.gradients(attacker.model.loss(batch)))
    assert not any(
        adapter.grad is not None and adapter.grad.isnan().any() for adapter in attacker.adapters
    )


def test_one_with_adapters_goes_on_from_what_was_kept(theta: ModelHandle, batch: Batch) -> None:
    attacker = Attacker.of(theta, replace(PACKED, adam=True, lr=1e-2), seed=0)
    attacker.step(batch)
    again = Attacker.again(theta, copy.deepcopy(attacker.kept()))
    for one in (attacker, again):
        one.step(batch)
    assert torch.equal(attacker.model.loss(batch), again.model.loss(batch))
    assert again.age == 2
