"""Every attack beside the contract, found by itself."""

import math
from types import SimpleNamespace

import pico
import pytest
import torch
from evidence_builder import MERGED, example_policy

from release_guard.attacks import Attack, Choice, LogUniform
from release_guard.errors import ModelError, PolicyError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept
from release_guard.stages import Stage

NAMES = Attack.available()
REQUIRED = {"chain": {"steps": ({"name": "reinit"}, {"name": "finetune"})}}
"""Options without which an attack cannot be built, by its name."""
ELSEWHERE = {("merge", "text_to_image"): {"realign": "none"}}
"""Options without which an attack that works on several kinds of models does not on one."""
FEW = {
    "image_classification": lambda at: pico.image_data(at, count=12) / "restricted.parquet",
    "causal_lm": lambda at: pico.text_data(at, count=12) / "restricted.jsonl",
    "text_to_image": lambda at: pico.picture_data(at, count=12) / "restricted.parquet",
}
"""Data sets of a few examples, by kind of model."""


@pytest.fixture(scope="module")
def image_classification(classifier_folder, image_data):
    model = Modality.build(Spec(name="image_classification")).load(str(classifier_folder))
    return model, concept_of(image_data / "restricted.parquet")


@pytest.fixture(scope="module")
def causal_lm(lm_folder, text_data):
    model = Modality.build(Spec(name="causal_lm")).load(str(lm_folder))
    return model, concept_of(text_data / "restricted.jsonl")


@pytest.fixture(scope="module")
def text_to_image(painter, standing):
    return painter, standing


def concept_of(path):
    return Concept(name="restricted", dataset=str(path), ceiling=0.5)


@pytest.fixture(params=NAMES)
def attack(request):
    return Attack.build(Spec(name=request.param, **REQUIRED.get(request.param, {})))


@pytest.fixture
def subject(request, attack):
    """A model the attack works on, and what is restricted; classifiers where it may be any."""
    return request.getfixturevalue((attack.modalities or ("image_classification",))[0])


@pytest.fixture
def model(subject):
    return subject[0]


@pytest.fixture
def concept(subject):
    return subject[1]


@pytest.fixture
def training(attack):
    """For what only an attack that takes steps can show."""
    if attack.surgical:
        pytest.skip("takes no steps")


def tamper(attack, model, concept, *, limit=4, seed=0):
    ancestor = model.fresh(seed=99) if attack.needs_ancestor else None
    return attack.tamper(
        model, concept, budget=Budget(limit=limit), grid_ratio=1.5, seed=seed, ancestor=ancestor
    )


def weights(attack, model, concept, seed):
    *_, last = tamper(attack, model, concept, seed=seed)
    return last.model.state()


def test_the_three_promised_attacks_are_there():
    assert {"finetune", "linear_probe", "lora"} <= set(NAMES)


def test_it_says_where_it_comes_from_and_what_it_breaks(attack):
    assert attack.paper.startswith("https://")
    assert attack.against is None or attack.against in Stage.available()
    assert attack.expense >= (not attack.surgical)
    assert set(attack.modalities) <= set(Modality.available())
    assert type(attack).__doc__ != Attack.__doc__


def test_every_prior_lies_within_its_options_bounds(attack):
    priors = {
        name: prior
        for name, field in type(attack).model_fields.items()
        for prior in field.metadata
        if isinstance(prior, LogUniform | Choice)
    }
    for name, prior in priors.items():
        values = prior.values if isinstance(prior, Choice) else (prior.low, prior.high)
        for value in values:
            assert getattr(Attack.build(Spec(name=attack.name, **{name: value})), name) == value


def test_a_wrong_option_gets_a_line_that_names_it(attack):
    fields = type(attack).model_fields
    rates = {
        name for name in fields if any(isinstance(x, LogUniform) for x in fields[name].metadata)
    }
    for name, field in fields.items():
        if not isinstance(field.default, str) or "Literal" in str(field.annotation):
            for wrong in (-1e9, *((math.nan, math.inf) if name in rates else ())):
                spec = Spec(name=attack.name, **{**REQUIRED.get(attack.name, {}), name: wrong})
                with pytest.raises(PolicyError) as caught:
                    Attack.build(spec, where="attacks[4]")
                (line,) = str(caught.value).splitlines()
                assert line.startswith(f"attacks[4].{name}: found {wrong}; "), line


def test_too_few_examples_are_refused_before_any_step(attack, model, tmp_path):
    if not attack.wants:
        pytest.skip("reads no example")
    kind = (attack.modalities or ("image_classification",))[0]
    few = concept_of(FEW[kind](tmp_path))
    with pytest.raises(ModelError, match=f"restricted.*, a batch wants {attack.wants}; add"):
        next(tamper(attack, model, few))


def test_it_attacks_every_concept(attack, concept):
    class Both:
        concepts = (concept,)
        merge_targets = ()
        red_team = SimpleNamespace(ancestor="undefended")

    assert attack.targets(Both()) == (concept,)


@pytest.mark.parametrize("ancestor", [None, "undefended"])
@pytest.mark.parametrize("chained", [False, True])
def test_the_gate_knows_by_its_name_what_it_attacks(attack, ancestor, chained):
    """It judges without torch, so it cannot ask the attack."""
    spec = Spec(name=attack.name, **REQUIRED.get(attack.name, {}))
    if chained and attack.name != "chain":
        first = {"name": "weight_noise"}
        spec = Spec(name="chain", steps=[first, spec.model_dump()])
    known = example_policy(*MERGED)
    red_team = known.red_team.model_copy(update={"ancestor": ancestor})
    policy = known.model_copy(update={"attacks": (spec,), "red_team": red_team})
    aimed = [target for target in policy.targets if policy.aimed_at(target)]
    assert aimed == list(Attack.build(spec).targets(policy))


def test_what_it_was_given_is_left_bit_identical(attack, model, concept):
    before, modes = model.state(), [part.training for part in model.module.modules()]
    needs = [part.requires_grad for part in model.module.parameters()]
    state = torch.get_rng_state()
    for tampered in tamper(attack, model, concept):
        tampered.model.scores(concept.dataset, "search", limit=8)
    after = model.state()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [part.training for part in model.module.modules()] == modes
    assert [part.requires_grad for part in model.module.parameters()] == needs
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", Modality.available())
def test_it_runs_on_every_kind_of_model_it_names(attack, kind, request):
    if kind not in (attack.modalities or Modality.available()):
        pytest.skip(f"not for {kind}")
    options = {**REQUIRED.get(attack.name, {}), **ELSEWHERE.get((attack.name, kind), {})}
    model, concept = request.getfixturevalue(kind)
    found = tamper(Attack.build(Spec(name=attack.name, **options)), model, concept, limit=1)
    for tampered in found:
        assert len(tampered.model.scores(concept.dataset, "search", limit=4)) == 4


@pytest.mark.usefixtures("training")
@pytest.mark.parametrize("unit", ["steps", "samples", "flops"])
def test_costs_grow_and_end_at_the_budget(attack, model, concept, unit):
    (first, *_) = tamper(attack, model, concept, limit=1)
    budget = Budget(unit=unit, limit=7 * first.cost.of(unit))
    costs = [
        tampered.cost
        for tampered in attack.tamper(model, concept, budget=budget, grid_ratio=1.5, seed=0)
    ]
    for one in ("steps", "samples", "flops", "seconds"):
        amounts = [cost.of(one) for cost in costs]
        assert amounts == sorted(set(amounts)), one
    assert budget.limit - first.cost.of(unit) < costs[-1].of(unit) <= budget.limit


def test_the_seed_fixes_the_weights(attack, model, concept):
    one, again = (weights(attack, model, concept, seed) for seed in (1, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)


@pytest.mark.usefixtures("training")
def test_another_seed_gives_other_weights(attack, model, concept):
    one, other = (weights(attack, model, concept, seed) for seed in (1, 2))
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_copies_are_finite_have_all_layers_and_do_not_train(attack, model, concept):
    for tampered in tamper(attack, model, concept):
        found = {
            name.replace(".base_layer", ""): value.shape
            for name, value in tampered.model.state().items()
        }
        assert all(found[name] == value.shape for name, value in model.state().items())
        assert all(value.isfinite().all() for value in tampered.model.state().values())
        assert not any(part.training for part in tampered.model.module.modules())
        most = sum(map(torch.numel, tampered.model.state().values()))
        assert (not attack.surgical) <= tampered.parameters <= most


@pytest.mark.usefixtures("training")
def test_it_breaches_a_model_nobody_defended(attack, model, concept):
    before = model.scores(concept.dataset, "search", limit=200)
    *_, last = tamper(attack, model, concept, limit=100)
    after = last.model.scores(concept.dataset, "search", limit=200)
    assert sum(before) < 0.4 * len(before)  # of three words, copied or reversed, one is the same
    assert sum(after) > 0.9 * len(after)


def test_it_learns_from_the_split_that_is_the_attackers(attack, model, concept):
    """The rows that were read, by the handle's own account."""
    seen = []

    class Watched(type(model)):
        def batches(self, dataset, split, *, size, seed):
            seen.append((dataset, split))
            return super().batches(dataset, split, size=size, seed=seed)

    watched = model.copy()
    watched.__class__ = Watched
    list(tamper(attack, watched, concept))
    assert set(seen) <= {(concept.dataset, "attack")}
    assert seen or attack.surgical
