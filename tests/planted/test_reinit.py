"""A trap in the last block, with the function of the undefended model."""

import pytest
import torch
from planting import PLAIN, TINY, best, best_finetuning

DEFENCE = "a trap in the last block"
STEPS = 40


@pytest.fixture(scope="module")
def trapped(classifier):
    """All of the block's weights are tiny or huge; the other blocks are as they were."""
    model = classifier.copy()
    block = model.blocks[-1]
    with torch.no_grad():
        for norm, readers in (
            (block.layernorm_before, [getattr(block.attention, f"{x}_proj") for x in "qkv"]),
            (block.layernorm_after, [block.mlp.fc1]),
        ):
            norm.weight.mul_(TINY)
            norm.bias.mul_(TINY)
            for reader in readers:
                reader.weight.div_(TINY)
    return model


def test_the_function_is_that_of_the_undefended_model(classifier, trapped, angles):
    batch = next(classifier.batches(angles.dataset, "search", size=32, seed=0))
    one, other = (model.logits(batch)[0] for model in (classifier, trapped))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_fine_tuning_at_any_rate_fails(classifier, trapped, angles, note):
    assert best(classifier, angles, "finetune", limit=STEPS) > angles.ceiling
    found = best_finetuning(trapped, angles, limit=STEPS)
    assert not note(DEFENCE, PLAIN, found, ceiling=angles.ceiling, budget=f"{STEPS} steps")


@pytest.mark.parametrize("part", ["last_k", "norms"])
def test_it_goes_with_the_weights_it_hides_in(trapped, angles, part, note):
    steps = [{"name": "reinit", "part": part}, {"name": "finetune"}]
    found = best(trapped, angles, "chain", steps=steps, limit=STEPS)
    assert note(DEFENCE, "reinit>finetune", found, ceiling=angles.ceiling, budget=f"{STEPS} steps")
