"""A defence against the defender's own adapter: it says nothing of a fresh one elsewhere."""

import planting
import pytest
import torch
from planting import PLAIN, best

DEFENCE = "a trap where the defender's own adapter sat"
OWN = ("q_proj", "k_proj", "v_proj", "o_proj")
RATES = (1e-2, 3e-2)
STEPS = 60
CEILING = 0.5


@pytest.fixture(scope="module")
def trapped(classifier):
    """The same function, with attention weights that are tiny or huge."""
    model = classifier.copy()
    with torch.no_grad():
        for block in model.blocks:
            attention = block.attention
            readers = (attention.q_proj, attention.k_proj, attention.v_proj)
            planting.shift((block.layernorm_before,), readers)
            planting.shift((attention.v_proj,), (attention.o_proj,))
    return model


def adapted(model, concept, layers):
    return max(
        best(model, concept, "lora", limit=STEPS, lr=lr, layers=layers, head="frozen")
        for lr in RATES
    )


def test_the_defenders_own_adapter_is_held(classifier, trapped, angles, note):
    assert adapted(classifier, angles, OWN) > CEILING
    found = adapted(trapped, angles, OWN)
    assert not note(DEFENCE, PLAIN, found, ceiling=CEILING, budget=f"{STEPS} steps")


def test_a_fresh_one_is_not(trapped, angles, note):
    found = adapted(trapped, angles, ("fc1", "fc2"))
    assert note(DEFENCE, "lora(layers)", found, ceiling=CEILING, budget=f"{STEPS} steps")
