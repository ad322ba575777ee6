"""A model that runs away as soon as it is trained, however slowly: bounded steps do not.

Only if it runs so far that numbers end: what is merely far off its way learns anew.
"""

import pytest
import torch
from planting import PLAIN, RATES, best

DEFENCE = "gradients that throw the model off"
STEEP = 1e14  # at any rate, a step is too large for squares in single precision
STEPS = 16
BETWEEN = (3e-3, 3e-2)  # where plain descent is at its best


@pytest.fixture(scope="module")
def steep(classifier):
    """The same function, with a first attention whose output layer is tiny and its input huge."""
    model = classifier.copy()
    attention = model.blocks[0].attention
    with torch.no_grad():
        attention.v_proj.weight.mul_(STEEP)
        attention.v_proj.bias.mul_(STEEP)
        attention.o_proj.weight.div_(STEEP)
    return model


def fastest(model, concept, **options):
    return max(
        best(model, concept, "finetune", limit=STEPS, lr=lr, optimizer="sgd", **options)
        for lr in (*RATES, *BETWEEN)
    )


def test_gradient_descent_is_thrown_off_at_any_rate(classifier, steep, angles, note):
    assert fastest(classifier, angles) > angles.ceiling
    found = fastest(steep, angles)
    assert not note(DEFENCE, PLAIN, found, ceiling=angles.ceiling, budget=f"{STEPS} steps")


def test_with_a_bound_on_every_step_it_is_faster_than_without_the_defence(steep, angles, note):
    found = fastest(steep, angles, clip=1.0)
    assert note(DEFENCE, "finetune(clip)", found, ceiling=angles.ceiling, budget=f"{STEPS} steps")
