import pytest
import torch

from release_guard.attacks import Attack
from release_guard.errors import PolicyError
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept

HEAD = {"name": "reinit", "part": "head"}
NOISE = {"name": "weight_noise", "deviation": 0.04}
TRAIN = {"name": "finetune", "lr": 0.002}


@pytest.fixture(scope="module")
def concept(image_data):
    return Concept(name="odd-angles", dataset=str(image_data / "restricted.parquet"), ceiling=0.5)


def chain(*steps):
    return Attack.build(Spec(name="chain", steps=steps))


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
        ((HEAD,), "chain.steps: found .* at least 2 items"),
        ((HEAD, {"name": "finetun"}), "'finetun' is no attack; did you mean 'finetune'"),
        ((HEAD, {"name": "finetune", "rate": 1}), "finetune.rate: not an option of finetune"),
    ],
)
def test_wrong_steps_are_refused(steps, line):
    with pytest.raises(PolicyError, match=line):
        chain(*steps)
