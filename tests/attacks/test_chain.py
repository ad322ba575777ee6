from pathlib import Path

import pytest
import torch
from pico import pico_policy

from release_guard.attacks import Attack
from release_guard.errors import PolicyError
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept, Policy

HEAD = {"name": "reinit", "part": "head"}
NOISE = {"name": "weight_noise", "deviation": 0.04}
TRAIN = {"name": "finetune", "lr": 0.002}


@pytest.fixture(scope="module")
def concept(image_data):
    return Concept(name="odd-angles", dataset=str(image_data / "restricted.parquet"), ceiling=0.5)


ROUND = {"name": "quantize", "format": "nf4"}


def chain(*steps, after=()):
    return Attack.build(Spec(name="chain", steps=steps, after=after))


def copies(attack, model, concept, ancestor=None):
    found = attack.tamper(
        model, concept, budget=Budget(limit=4), grid_ratio=1.5, seed=3, ancestor=ancestor
    )
    return [(one.cost, one.parameters, one.model.state()) for one in found]


def test_steps_follow_each_other_on_one_copy(classifier, concept):
    changed = classifier
    for step in (HEAD, NOISE):
        changed = Attack.build(Spec(**step)).transform(changed, concept, seed=3, ancestor=None)
    wanted = copies(Attack.build(Spec(**TRAIN)), changed, concept)
    found = copies(chain(HEAD, NOISE, TRAIN), classifier, concept)
    assert len(found) == len(wanted) == 4
    for (cost, parameters, state), (cost_, parameters_, state_) in zip(found, wanted, strict=True):
        assert (cost.steps, cost.samples, cost.flops) == (cost_.steps, cost_.samples, cost_.flops)
        assert parameters == parameters_
        assert all(torch.equal(state[name], state_[name]) for name in state_)


def test_their_order_matters(classifier, concept):
    one, other = (
        copies(chain(*steps), classifier, concept)[-1][2]["classifier.weight"]
        for steps in ((HEAD, NOISE), (NOISE, HEAD))
    )
    assert not torch.equal(one, other)


def test_transforms_alone_take_no_step_but_time(classifier, concept):
    ((cost, parameters, _),) = copies(chain(HEAD, NOISE), classifier, concept)
    assert (cost.steps, cost.samples, cost.flops, parameters) == (0, 0, 0, 0)
    assert cost.seconds > 0


def test_what_comes_after_is_done_to_a_copy_at_every_look(classifier, concept):
    plain = copies(chain(ROUND, TRAIN), classifier, concept)
    rounded = copies(chain(ROUND, TRAIN, after=(HEAD, ROUND)), classifier, concept)
    assert len(rounded) == len(plain) == 4
    for (cost, parameters, state), (cost_, parameters_, state_) in zip(plain, rounded, strict=True):
        assert (cost.steps, cost.flops, parameters) == (cost_.steps, cost_.flops, parameters_)
        trained = classifier.copy()
        trained.load_state(state)
        for step in (HEAD, ROUND):
            trained = Attack.build(Spec(**step)).transform(trained, concept, seed=3, ancestor=None)
        assert all(torch.equal(state_[name], weight) for name, weight in trained.state().items())
        assert not all(torch.equal(state_[name], weight) for name, weight in state.items())


def test_one_step_may_be_trained_before_it(classifier, concept):
    (*_, (_, _, state)) = copies(chain(TRAIN, after=(ROUND,)), classifier, concept)
    (*_, (_, _, trained)) = copies(Attack.build(Spec(**TRAIN)), classifier, concept)
    changed = {name for name in state if not torch.equal(state[name], trained[name])}
    assert changed
    assert not any(name.startswith("classifier") for name in changed)


def test_what_comes_after_is_part_of_what_a_chain_is():
    after = ({"name": "restore"}, {"name": "prune", "by": "wanda"})
    spec = Spec(name="chain", steps=(ROUND, TRAIN), after=after)
    assert spec.family == "quantize>finetune>restore>prune"
    assert spec.label.endswith("> restore > prune(by=wanda)")
    assert spec.changed(lr=1.0).family == spec.family
    attack = Attack.build(spec)
    assert attack.needs_ancestor
    assert not attack.surgical
    assert attack.expense == chain(ROUND, TRAIN).expense
    assert chain(HEAD, NOISE, after=after).wants == 32


def test_what_comes_after_lies_where_the_policy_says(concept, tmp_path):
    policy = Policy.load(pico_policy(tmp_path, Path(concept.dataset).parent))
    found = chain(NOISE, after=({"name": "ablate", "neutral": "data.parquet"},)).located(policy)
    assert found.sources == (policy.located("data.parquet"),) != ("data.parquet",)


def test_the_ancestor_reaches_every_step(classifier, concept):
    ancestor = classifier.fresh(seed=7)
    undo = {"name": "restore", "how": "interpolate", "share": 0.0}
    ((_, _, state),) = copies(chain(undo, undo), classifier, concept, ancestor)
    assert all(torch.equal(state[name], weight) for name, weight in ancestor.state().items())


@pytest.mark.parametrize(
    ("steps", "surgical", "needs_ancestor", "expense"),
    [
        ((HEAD, NOISE), True, False, 0),
        ((HEAD, TRAIN), False, False, 2),
        (({"name": "restore"}, TRAIN), False, True, 2),
        ((NOISE, {"name": "restore"}), True, True, 0),
        ((HEAD, {"name": "chain", "steps": (NOISE, TRAIN)}), False, False, 2),
    ],
)
def test_a_chain_is_what_its_steps_make_of_it(steps, surgical, needs_ancestor, expense):
    attack = chain(*steps)
    assert attack.surgical is surgical
    assert attack.needs_ancestor is needs_ancestor
    assert attack.expense == expense
    assert attack.against is None
    aimed = Attack.build(Spec(name="chain", steps=steps, stage="sophon"))
    assert aimed.against == "sophon"


def test_it_works_on_what_all_of_its_steps_work_on():
    only = {"name": "adapter"}
    kinds = Attack.build(Spec(**only)).modalities
    assert chain(HEAD, only).modalities == kinds != ()
    assert chain(HEAD, NOISE).modalities == ()


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        ((TRAIN, HEAD), "chain.steps: found .*; Value error, finetune is no transform"),
        ((HEAD,), "one step is no chain"),
        ((), "chain.steps: found .* at least 1 item"),
        ((HEAD, {"name": "finetun"}), "'finetun' is no attack; did you mean 'finetune'"),
        ((HEAD, {"name": "finetune", "rate": 1}), "finetune.rate: not an option of finetune"),
    ],
)
def test_wrong_steps_are_refused(steps, line):
    with pytest.raises(PolicyError, match=line):
        chain(*steps)


@pytest.mark.parametrize(
    ("after", "line"),
    [
        ((TRAIN,), "chain.after: found .*; Value error, finetune is no transform"),
        (({"name": "quantise"},), "'quantise' is no attack; did you mean 'quantize'"),
        (({"name": "guide"},), "chain.after: .*no kind of model takes all of these steps"),
    ],
)
def test_wrong_ends_are_refused(after, line):
    with pytest.raises(PolicyError, match=line):
        chain(HEAD, {"name": "adapter"}, after=after)
