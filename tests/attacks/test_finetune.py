import pytest
import torch

from release_guard.attacks import Attack
from release_guard.errors import ModelError, PolicyError
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept


@pytest.fixture(scope="module")
def concept(image_data):
    return Concept(name="odd-angles", dataset=str(image_data / "restricted.parquet"), ceiling=0.5)


def last_copy(model, concept, *, steps=5, seed=0, **options):
    attack = Attack.build(Spec(name="finetune", **options))
    budget = Budget(limit=steps)
    *_, last = attack.tamper(model, concept, budget=budget, grid_ratio=1.5, seed=seed)
    return last


def changed(model, tampered):
    before, after = model.state(), tampered.model.state()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("options", "touched", "untouched"),
    [
        ({"scope": "all"}, "embeddings", "nothing"),
        ({"scope": "head"}, "classifier", "vit"),
        ({"scope": "last_k", "last_k": 1}, ".1.", ".0."),
    ],
)
def test_only_what_is_in_scope_changes(classifier, concept, options, touched, untouched):
    names = changed(classifier, last_copy(classifier, concept, **options))
    assert any(touched in name for name in names)
    assert not any(untouched in name for name in names)


def test_parameters_are_counted(classifier, concept):
    assert last_copy(classifier, concept, scope="head").parameters == 32 * 8 + 8


def test_a_new_head_is_new_for_each_seed_and_kept_by_none(classifier, concept):
    options = {"lr": 1e-12, "optimizer": "sgd", "steps": 1}  # only the start shows
    kept = last_copy(classifier, concept, **options)
    one, other = (last_copy(classifier, concept, head="new", seed=s, **options) for s in (1, 2))
    heads = [model.model.head.weight for model in (kept, one, other)]
    torch.testing.assert_close(heads[0], classifier.head.weight)
    assert (heads[1] - classifier.head.weight).abs().mean() > 0.05
    assert (heads[1] - heads[2]).abs().mean() > 0.05


def test_new_blocks_are_new_and_the_others_are_kept(classifier, concept):
    options = {"lr": 1e-12, "optimizer": "sgd", "steps": 1}  # only the start shows
    before = classifier.state()
    after = last_copy(classifier, concept, new_blocks=1, **options).model.state()
    moved = {name for name in before if (before[name] - after[name]).abs().max() > 1e-3}
    assert moved
    assert all(".1." in name for name in moved)
    with pytest.raises(PolicyError, match="new_blocks is 9, but the model has 2"):
        last_copy(classifier, concept, new_blocks=9, **options)


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adamw", "adagrad", "adadelta"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "one_cycle"])
def test_every_optimizer_lowers_the_loss_under_every_schedule(classifier, concept, name, schedule):
    batch = next(classifier.batches(concept.dataset, "attack", size=64, seed=9))
    lr = {"sgd": 0.03, "nesterov": 0.03, "adagrad": 0.01, "adadelta": 1.0}.get(name, 2e-3)
    options = {"optimizer": name, "schedule": schedule, "lr": lr, "warmup": 2, "clip": 5.0}
    tampered = last_copy(classifier, concept, steps=20, **options)
    assert tampered.model.loss(batch) < 0.8 * classifier.loss(batch)


def test_every_option_reaches_the_weights(classifier, concept):
    base = last_copy(classifier, concept, optimizer="sgd", lr=0.01).model.state()
    for options in (
        {"momentum": 0.5},
        {"weight_decay": 0.1},
        {"clip": 0.1},
        {"warmup": 3},
        {"schedule": "linear"},
        {"schedule": "linear", "schedule_steps": 3},
        {"batch": 16},
        {"lr": 0.02},
        {"optimizer": "nesterov"},
    ):
        spec = {"optimizer": "sgd", "lr": 0.01} | options
        other = last_copy(classifier, concept, **spec).model.state()
        assert not all(torch.equal(base[name], other[name]) for name in base), options


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"lr": 0}, "finetune.lr: found 0; Input should be greater than 0"),
        ({"optimiser": "sgd"}, "finetune.optimiser: .*did you mean 'optimizer'"),
        ({"optimizer": "lion"}, "finetune.optimizer: found 'lion'"),
        ({"optimizer": "nesterov", "momentum": 0}, "finetune.momentum: .*above 0"),
        ({"batch": 0}, "finetune.batch: found 0"),
        ({"clip": -1}, "finetune.clip: found -1"),
        ({"scope": "last_k", "last_k": 0}, "finetune.last_k: found 0"),
    ],
)
def test_wrong_options_are_refused(options, line):
    with pytest.raises(PolicyError, match=line):
        Attack.build(Spec(name="finetune", **options))


def test_fewer_examples_than_a_batch(classifier, concept):
    with pytest.raises(ModelError, match="a batch wants 4000"):
        last_copy(classifier, concept, batch=4000)


def test_divergence_is_an_outcome_not_an_error(classifier, concept):
    tampered = last_copy(classifier, concept, optimizer="sgd", lr=1e30, steps=40)
    assert tampered.cost.steps < 10
    assert not all(part.isfinite().all() for part in tampered.model.module.parameters())
