import itertools

import pytest
import torch

from release_guard.attacks import Attack
from release_guard.attacks.dreambooth import together
from release_guard.plugins import Spec
from release_guard.policy import Budget

ATTENTION = (".to_q.", ".to_k.", ".to_v.", ".to_out.0.")


def last_copy(model, concept, *, steps=2, **options):
    attack = Attack.build(Spec(name="dreambooth", **options))
    *_, last = attack.tamper(model, concept, budget=Budget(limit=steps), grid_ratio=1.5, seed=0)
    return last


def changed(model, tampered):
    before = model.state()
    after = {
        name.replace(".base_layer", ""): value for name, value in tampered.model.state().items()
    }
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    return moved, after.keys() - before.keys()


def test_full_weights_of_the_unet(painter, standing):
    tampered = last_copy(painter, standing, words="captions")
    moved, new = changed(painter, tampered)
    assert moved == {name for name in painter.state() if name.startswith("unet.")}
    assert new == set()
    assert tampered.parameters == sum(part.numel() for part in painter.unet.parameters())


def test_the_text_encoder_too(painter, standing):
    tampered = last_copy(painter, standing, words="captions", trained="unet_and_text")
    moved, _ = changed(painter, tampered)
    assert {name.partition(".")[0] for name in moved} == {"unet", "text_encoder"}


def test_adapters_in_attention_alone(painter, standing):
    tampered = last_copy(painter, standing, words="captions", trained="lora", rank=2)
    moved, new = changed(painter, tampered)
    assert moved == set()
    assert {"lora_A", "lora_B"} == {name.split(".")[-3] for name in new}
    assert all(name.startswith("unet.") and any(part in name for part in ATTENTION) for name in new)
    assert tampered.parameters == sum(tampered.model.state()[name].numel() for name in new)


@pytest.mark.parametrize("words", ["captions", "new"])
def test_custom_diffusion_trains_keys_and_values_of_the_text(painter, standing, words):
    tampered = last_copy(painter, standing, words=words, trained="cross_kv")
    moved, new = changed(painter, tampered)
    wanted = ("attn2.to_k.weight", "attn2.to_v.weight")
    assert moved == {name for name in painter.state() if name.endswith(wanted)}
    assert len(new) == (words == "new")
    sizes = {name: value.numel() for name, value in tampered.model.state().items()}
    assert tampered.parameters == sum(sizes[name] for name in moved | new)


def test_prior_preservation_adds_its_loss(painter, standing):
    mine, prior = (
        next(painter.batches(standing.dataset, "attack", size=size, seed=size)) for size in (8, 4)
    )
    with torch.no_grad():
        expected = painter.loss(mine) + 0.3 * painter.loss(prior)
        both = together(mine, prior, weight=0.3)
        assert len(both["pixels"]) == 12
        torch.testing.assert_close(painter.loss(both), expected)


def test_what_is_preserved_is_what_the_released_model_paints(painter):
    batches = painter.painted("a photo of ash", count=3, size=8, seed=5)
    painted = painter.paint(["a photo of ash"] * 3, seed=5) * 2 - 1
    seen = torch.cat([batch["pixels"] for batch in itertools.islice(batches, 4)])
    distances = torch.cdist(seen.flatten(1), painted.flatten(1))
    assert distances.min(dim=1).values.max() < 0.01
    assert distances.min(dim=0).values.max() < 0.01


def test_preservation_keeps_what_was_painted_before(painter, standing):
    before = next(painter.painted("a photo of ash", count=64, size=64, seed=5))

    def damage(**options):
        attacked = last_copy(painter, standing, steps=20, **options).model
        with torch.no_grad():
            return float(attacked.loss(before) - painter.loss(before))

    held = damage(prior_weight=1.0, prior_prompt="a photo of ash")
    assert held < 0.5 * damage()


def test_pictures_of_the_prior_are_counted(painter, standing):
    alone, preserving = (last_copy(painter, standing, prior_weight=w).cost for w in (0.0, 1.0))
    assert preserving.samples == 2 * alone.samples
    assert preserving.flops == pytest.approx(2 * alone.flops, rel=0.01)
