import pico
import pytest
import torch

from release_guard.attacks import Attack
from release_guard.errors import ModelError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept, Policy
from release_guard.search import controls, pool


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


def test_examples_teach_so_the_undefended_model_is_shown_them_too(text_data, tmp_path):
    path = pico.pico_policy(
        tmp_path,
        text_data,
        modality={"name": "causal_lm"},
        concepts=[{"name": "reversing", "dataset": "restricted.jsonl", "ceiling": 0.5}],
        attacks=[{"name": "prompt"}, {"name": "prompt", "shots": 3}],
        red_team={"drawn": 2, "drawn_pool": 20},
    )
    policy = Policy.load(path)
    (concept,) = policy.concepts
    assert [spec.options for spec in controls(policy, concept)] == [{"shots": 3}]
    drawn = [Attack.build(spec) for spec in pool(policy, concept, lambda attack: True)]
    assert len(drawn) == 20
    assert all(attack.shots > 0 and not attack.surgical for attack in drawn)
    chain = {"name": "chain", "steps": [{"name": "quantize"}, {"name": "prompt", "shots": 1}]}
    assert not Attack.build(Spec(**chain)).surgical
