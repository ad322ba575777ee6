"""Drawn attacks: by the law beside their options, and only what model and data can take."""

import functools
from itertools import islice
from pathlib import Path

import pico
import pytest

from release_guard.attacks import Attack
from release_guard.modalities import Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import MergeTarget, Policy, Target
from release_guard.priors import drawable, draws, fitting, priors, searchable

LISTED = (Spec(name="finetune"), Spec(name="lora", layers=["value"]), Spec(name="weight_noise"))
RATES = {"sgd": (1e-4, 1e-1), "adamw": (1e-6, 1e-2), "adadelta": (1e-2, 10.0)}


def anything(attack: Attack) -> bool:
    return True


@pytest.fixture(scope="module")
def target(image_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = pico.pico_policy(tmp_path_factory.mktemp("policy"), image_data)
    return Policy.load(path).concepts[0]


@pytest.fixture(scope="module")
def model(classifier_folder: Path) -> ModelHandle:
    return Modality.build(Spec(name="image_classification")).load(str(classifier_folder))


@functools.cache
def drawn(count: int, *, seed: str = "0/t", listed: tuple[Spec, ...] = LISTED[:2]) -> list[Spec]:
    return list(islice(draws(listed, seed=seed, fits=anything), count))


def test_the_rate_is_drawn_after_the_optimizer_it_depends_on() -> None:
    assert list(priors(Attack.build(LISTED[0])))[-1] == "lr"


def test_draws_follow_from_the_seed_and_differ_from_each_other() -> None:
    assert drawn(20) == drawn(20)
    assert drawn(20)[:5] == drawn(5)
    assert drawn(5) != drawn(5, seed="1/t")
    assert len({spec.label for spec in drawn(200)}) == 200


def test_families_are_equally_likely_and_what_has_no_prior_stays_as_listed() -> None:
    found = drawn(400)
    adapters = [spec for spec in found if spec.name == "lora"]
    assert 150 < len(adapters) < 250
    assert all(spec.options["layers"] == ["value"] for spec in adapters)
    assert {spec.options["rank"] for spec in adapters} == {1, 4, 8, 16, 64}


@pytest.mark.parametrize("optimizer", RATES)
def test_learning_rates_fill_the_range_of_their_optimizer(optimizer: str) -> None:
    found = [spec.options for spec in drawn(2_000) if spec.name == "finetune"]
    rates = [options["lr"] for options in found if options["optimizer"] == optimizer]
    low, high = RATES[optimizer]
    assert low <= min(rates) < 1.6 * low
    assert high / 1.6 < max(rates) <= high
    assert 0.4 < sum(rate < (low * high) ** 0.5 for rate in rates) / len(rates) < 0.6


def test_options_that_exclude_each_other_are_never_drawn() -> None:
    found = [spec.options for spec in drawn(500) if spec.name == "finetune"]
    assert not [each for each in found if (each["optimizer"], each["momentum"]) == ("nesterov", 0)]


def test_surgical_attacks_are_searched_but_not_drawn() -> None:
    assert [spec.name for spec in drawable(LISTED)] == ["finetune", "lora"]
    assert searchable(LISTED) == LISTED


def test_only_what_the_model_has_is_asked_of_it(model: ModelHandle, target: Target) -> None:
    fits = fitting(model, target)
    assert fits(Attack.build(Spec(name="finetune", last_k=2, head="new")))
    assert not fits(Attack.build(Spec(name="finetune", last_k=4)))
    assert not fits(Attack.build(Spec(name="finetune", new_blocks=3)))
    assert not fits(Attack.build(Spec(name="finetune", batch=10_000)))


def test_merges_realign_only_what_is_known(
    model: ModelHandle, resnet_folder: Path, target: Target
) -> None:
    other = Modality.build(Spec(name="image_classification")).load(str(resnet_folder))
    for option in ({"realign": "joint"}, {"realign": "rotated"}, {"swap": "mlp"}):
        attack = Attack.build(Spec(name="merge", **{"realign": "none", **option}))
        assert fitting(model, target)(attack)
        assert not fitting(other, target)(attack)
    assert fitting(other, target)(Attack.build(Spec(name="merge", realign="none")))


def test_a_batch_is_asked_of_the_donors_examples_too(
    model: ModelHandle, target: Target, image_data: Path, tmp_path: Path
) -> None:
    few = pico.image_data(tmp_path / "few", count=30) / "retained.parquet"
    attack = Attack.build(Spec(name="merge_with_data", batch=32))
    for source, enough in ((image_data / "retained.parquet", True), (few, False)):
        merged = MergeTarget(
            **target.model_dump(include={"name", "dataset", "ceiling"}),
            donor="donor",
            donor_dataset=str(source),
        )
        assert fitting(model, merged)(attack) is enough


def test_a_tied_head_cannot_be_new(text_data: Path, tmp_path: Path, target: Target) -> None:
    folder = pico.pico_lm(tmp_path / "tied", steps=1, tied=True)
    language = Modality.build(Spec(name="causal_lm")).load(str(folder))
    source = str(text_data / "restricted.jsonl")
    fits = fitting(language, target.model_copy(update={"dataset": source}))
    assert fits(Attack.build(Spec(name="finetune", head="kept")))
    assert not fits(Attack.build(Spec(name="finetune", head="new")))


def test_where_nothing_fits_nothing_is_drawn() -> None:
    assert list(draws(LISTED[:2], seed="0", fits=lambda _: False)) == []


def test_a_family_without_continuous_options_runs_dry() -> None:
    few = (Spec(name="quantize"),)
    found = drawn(10_000, listed=few)
    assert 1 < len(found) < 1_000
    assert len({spec.label for spec in found}) == len(found)
