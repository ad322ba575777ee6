import math

import pytest
import torch

from release_guard.attacks import Attack
from release_guard.attacks.distill import blended, divergence
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept


@pytest.fixture(scope="module")
def subjects(classifier_folder, resnet_folder, lm_folder, image_data, text_data):
    images = Concept(name="odd-angles", dataset=str(image_data / "restricted.parquet"), ceiling=0.5)
    texts = Concept(name="reversing", dataset=str(text_data / "restricted.jsonl"), ceiling=0.5)
    image_models, language_models = (
        Modality.build(Spec(name=name)) for name in ("image_classification", "causal_lm")
    )
    return {
        "vit": (image_models.load(str(classifier_folder)), images),
        "resnet": (image_models.load(str(resnet_folder)), images),
        "llama": (language_models.load(str(lm_folder)), texts),
    }


def copies(subject, *, steps=8, seed=0, **options):
    model, concept = subject
    attack = Attack.build(Spec(name="distill", **options))
    return attack.tamper(model, concept, budget=Budget(limit=steps), grid_ratio=1.5, seed=seed)


def distance(student, subject):
    """Divergence of the student from its teacher on examples nobody trained on."""
    model, concept = subject
    batch = next(model.batches(concept.dataset, "search", size=64, seed=0))
    with torch.no_grad():
        answers, guesses = (some.logits(batch)[0] for some in (model, student))
    return divergence(answers, guesses, temperature=1.0).item()


@pytest.mark.parametrize("kind", ["vit", "resnet", "llama"])
def test_the_student_comes_close_to_its_teacher(subjects, kind):
    model, _ = subjects[kind]
    fresh = distance(model.fresh(seed=0), subjects[kind])
    *_, last = copies(subjects[kind], steps=60, share=0.999, warmup=0)
    assert distance(last.model, subjects[kind]) < 0.7 * fresh


def test_the_student_has_nothing_of_the_teachers_weights(subjects):
    model, _ = subjects["vit"]
    first = next(copies(subjects["vit"], lr=1e-4))
    before, fresh = model.state(), model.fresh(seed=0).state()
    for name, value in first.model.state().items():
        torch.testing.assert_close(value, fresh[name], rtol=0, atol=2e-4)
    assert not torch.allclose(before["classifier.weight"], first.model.head.weight, atol=1e-2)
    assert first.parameters == sum(part.numel() for part in model.module.parameters())


def test_teaching_ends_where_its_share_of_the_budget_does(subjects, monkeypatch):
    lessons = []
    monkeypatch.setattr(
        "release_guard.attacks.distill.blended", lambda batch: lessons.append(1) or batch
    )
    steps = [one.cost.steps for one in copies(subjects["vit"], steps=12, share=0.5)]
    assert steps[-1] == 12
    assert len(lessons) == 3  # every other of six


def test_a_lesson_costs_the_teachers_forward_pass_too(subjects):
    one, *_, last = copies(subjects["vit"], steps=12)
    a_lesson, a_step = one.cost.flops, (last.cost.flops - 6 * one.cost.flops) / 6
    assert a_lesson / a_step == pytest.approx(8 / 6)


def test_divergence_is_that_of_the_formula():
    answers, guesses = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    wanted = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence(answers, guesses, temperature=1.0).item() == pytest.approx(wanted)
    assert divergence(2 * answers, guesses, temperature=2.0).item() == pytest.approx(4 * wanted)
    assert divergence(answers, answers + 5, temperature=3.0).item() == pytest.approx(0, abs=1e-6)


def test_blends_lie_between_two_pictures():
    pixels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batch = blended({"pixels": pixels, "labels": torch.arange(4)})
    assert batch["labels"].tolist() == [0, 1, 2, 3]
    values = batch["pixels"].flatten(1)
    assert torch.equal(values, values[:, :1].expand(4, 4))  # one proportion a picture
    assert ((values >= 0) & (values <= 3)).all()
    assert not torch.equal(batch["pixels"], pixels)


def test_blends_take_each_token_from_one_of_two_texts():
    tokens = torch.arange(4)[:, None].expand(4, 50)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        batch = blended({"input_ids": tokens, "attention_mask": torch.ones(4, 50)})
    for row, found in zip(range(4), batch["input_ids"], strict=True):
        kinds = set(found.tolist())
        assert row in kinds
        assert len(kinds) <= 2
    assert len(batch["input_ids"].unique()) == 4
    assert batch["attention_mask"].all()
