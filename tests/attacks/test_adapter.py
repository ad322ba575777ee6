import pytest
import torch

from release_guard.attacks import Attack
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept

METHODS = ("bottleneck", "adalora", "ia3", "prompt")
LR = {"bottleneck": 1e-2, "adalora": 1e-2, "ia3": 0.1, "prompt": 0.1}


@pytest.fixture(scope="module")
def model(lm_folder):
    return Modality.build(Spec(name="causal_lm")).load(str(lm_folder))


@pytest.fixture(scope="module")
def concept(text_data):
    return Concept(name="reversing", dataset=str(text_data / "restricted.jsonl"), ceiling=0.5)


@pytest.fixture(scope="module")
def batch(model, concept):
    return next(model.batches(concept.dataset, "search", size=64, seed=0))


def last_copy(model, concept, *, steps=5, seed=0, **options):
    attack = Attack.build(Spec(name="adapter", **options))
    budget = Budget(limit=steps)
    *_, last = attack.tamper(model, concept, budget=budget, grid_ratio=1.5, seed=seed)
    return last


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_stay_and_new_ones_learn(model, concept, batch, method):
    tampered = last_copy(model, concept, method=method, lr=LR[method], steps=30)
    after = {
        name.replace(".base_layer", ""): value for name, value in tampered.model.state().items()
    }
    assert all(torch.equal(after[name], value) for name, value in model.state().items())
    assert len(after) > len(model.state())
    assert tampered.model.loss(batch) < 0.9 * model.loss(batch)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("bottleneck", 2 * (2 * 3 * 32 + 3 + 32)),
        ("adalora", 2 * 3 * (4 * (32 + 32 + 1) + 3 * (32 + 64 + 1))),
        ("ia3", 2 * (4 * 32 + 2 * 64 + 32)),
        ("prompt", 3 * 32),
    ],
)
def test_parameters_are_those_of_the_method(model, concept, method, parameters):
    assert last_copy(model, concept, method=method, size=3).parameters == parameters


@pytest.mark.parametrize("method", ["bottleneck", "adalora", "ia3"])
def test_nothing_changes_before_the_first_step(model, concept, batch, method):
    tampered = last_copy(model, concept, method=method, lr=1e-12, steps=1, optimizer="sgd")
    torch.testing.assert_close(tampered.model.logits(batch)[0], model.logits(batch)[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_the_copy_is_its_own(model, concept, batch, method):
    tampered = last_copy(model, concept, method=method, lr=LR[method]).model
    before = tampered.logits(batch)[0].detach()
    twin = tampered.copy()
    torch.testing.assert_close(twin.logits(batch)[0], before)
    with torch.no_grad():
        for part in twin.module.parameters():
            part.add_(0.1)
    torch.testing.assert_close(tampered.logits(batch)[0], before)


def test_virtual_tokens_stand_before_the_text(model, concept, batch):
    """As if the vocabulary had them: the same embeddings, looked up by number."""
    tampered = last_copy(model, concept, method="prompt", size=2, lr=1e-12, steps=1)
    embedding = tampered.model.module.get_input_embeddings()
    numbers = [
        (embedding.weight - virtual).abs().sum(dim=1).argmin()
        for virtual in embedding.virtual.weight
    ]
    shown = torch.stack(numbers).expand(len(batch["labels"]), 2)
    longer = {
        "input_ids": torch.cat([shown, batch["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(shown), batch["attention_mask"]], dim=1),
        "labels": torch.cat([torch.full_like(shown, -100), batch["labels"]], dim=1),
    }
    expected, labels = model.logits(longer)
    found, same_labels = tampered.model.logits(batch)
    assert torch.equal(labels, same_labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_virtual_tokens_are_drawn_by_the_seed(model, concept):
    one, other = (
        last_copy(model, concept, method="prompt", lr=1e-12, steps=1, seed=seed).model.module
        for seed in (1, 2)
    )
    weights = [part.get_input_embeddings().virtual.weight for part in (one, other)]
    assert not torch.allclose(*weights, atol=1e-3)
