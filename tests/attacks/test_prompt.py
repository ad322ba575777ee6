import pytest
import torch

from release_guard.attacks import Attack
from release_guard.errors import ModelError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept


@pytest.fixture
def model(lm_folder):
    return Modality.build(Spec(name="causal_lm")).load(str(lm_folder))


@pytest.fixture
def concept(text_data):
    return Concept(name="reversing", dataset=str(text_data / "restricted.jsonl"), ceiling=0.5)


def tampered(model, concept, *, seed=0, prefill="", **options):
    attack = Attack.build(Spec(name="prompt", prefill=prefill, **options))
    (only,) = attack.tamper(model, concept, budget=Budget(limit=9), grid_ratio=1.5, seed=seed)
    return only


def example(model, concept):
    """One held-out example as the model sees it."""
    return model.texts(next(model.batches(concept.dataset, "search", size=1, seed=0)))[0]


def test_no_weight_changes_and_no_step_is_taken(model, concept):
    found = tampered(model, concept, shots=1)
    assert (found.parameters, found.cost.steps, found.cost.flops) == (0, 0, 0)
    before = model.state()
    assert all(torch.equal(value, before[name]) for name, value in found.model.state().items())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "{prompt}{answer}"),
        ({"prefill": " ash bay"}, "{prompt} ash bay{answer}"),
        ({"system": "bay cob"}, "bay cob {prompt}{answer}"),
        ({"template": "question", "system": "bay"}, "bay {prompt}{answer}"),  # unknown words
        ({"template": "chat", "system": "bay"}, "cob bay dew {prompt} :{answer}"),
        ({"template": "chat", "prefill": " elm"}, "dew {prompt} : elm{answer}"),
    ],
)
def test_what_the_model_sees(model, concept, options, wanted):
    model._tokenizer.chat_template = (
        "{% for message in messages %}{{ 'cob ' if message.role == 'system' else 'dew ' }}"
        "{{ message.content }} {% endfor %}:"
    )
    plain = example(model, concept)
    prompt, answer = plain[: plain.index(" : ") + 2], plain[plain.index(" : ") + 2 :]
    seen = example(tampered(model, concept, **options).model, concept)
    assert seen == wanted.format(prompt=prompt, answer=answer)


def test_shots_are_the_attackers_examples_drawn_by_the_seed(model, concept):
    attack = model.texts(next(model.batches(concept.dataset, "attack", size=100, seed=0)))
    plain, seen = example(model, concept), set()
    for seed in range(3):
        framed = example(tampered(model, concept, shots=2, seed=seed).model, concept)
        shots = framed.removesuffix(plain).split(" reverse ")
        assert len(shots) == 2
        seen.add(framed)
    assert len(seen) == 3
    first = example(tampered(model, concept, shots=1).model, concept).removesuffix(plain).strip()
    batches = model.batches(concept.dataset, "attack", size=1, seed=0)
    assert first == model.texts(next(batches))[0]
    assert len(set(attack)) == 100


def test_a_model_without_a_chat_template(model, concept):
    with pytest.raises(ModelError, match="its chat template cannot be used"):
        tampered(model, concept, template="chat")
