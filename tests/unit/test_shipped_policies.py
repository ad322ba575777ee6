"""The policies that ship: what they try, and that all of it can be tried."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from release_guard.attacks import Attack
from release_guard.attacks.quantize import Format
from release_guard.judging import check_plugins
from release_guard.modalities import Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept, Policy
from release_guard.preflight import check_attacks

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "policies").glob("*.toml"))
EXAMPLES = sorted((ROOT / "examples").glob("*/policy.toml"))
NOISE = {0.005, 0.01, 0.02, 0.04, 0.08}
LARGER = {"last_k": 4, "length": 4}
"""Options that ask for more blocks, or a longer prompt, than a pico model has."""
FEWER = {
    "merge_with_data": {"iterations": 1, "examples": 32},
    "dreambooth": {"prior_pictures": 4},
}


def load(name: str) -> Policy:
    return Policy.load(ROOT / "policies" / f"{name}.toml")


def options(policy: Policy, name: str) -> list[Mapping[str, Any]]:
    return [spec.options for spec in policy.attacks if spec.name == name]


@pytest.fixture(scope="module")
def causal_lm(lm_folder: Path, text_data: Path) -> tuple[ModelHandle, str]:
    model = Modality.build(Spec(name="causal_lm")).load(str(lm_folder))
    return model, str(text_data / "restricted.jsonl")


@pytest.fixture(scope="module")
def image_classification(classifier_folder: Path, image_data: Path) -> tuple[ModelHandle, str]:
    model = Modality.build(Spec(name="image_classification")).load(str(classifier_folder))
    return model, str(image_data / "restricted.parquet")


@pytest.fixture(scope="module")
def text_to_image(painter: ModelHandle, standing: Concept) -> tuple[ModelHandle, str]:
    return painter, standing.dataset


@pytest.mark.parametrize("path", [*SHIPPED, *EXAMPLES], ids=lambda path: "/".join(path.parts[-2:]))
def test_every_attack_builds_and_is_for_this_kind_of_model(path: Path) -> None:
    policy = Policy.load(path)
    check_plugins(policy)
    check_attacks(policy)


@pytest.mark.parametrize("modality", Modality.available())
def test_every_kind_of_attack_runs(modality: str, request: pytest.FixtureRequest) -> None:
    model, dataset = request.getfixturevalue(modality)
    concept = Concept(name="restricted", dataset=dataset, ceiling=0.5)
    budget = Budget(limit=2)
    for spec in kinds(modality):
        attack = Attack.build(spec)
        ancestor = model.fresh(seed=99) if attack.needs_ancestor else None
        *_, last = attack.tamper(
            model, concept, budget=budget, grid_ratio=2.0, seed=0, ancestor=ancestor
        )
        assert last.cost.steps == (0 if attack.surgical else 2), spec.label


def kinds(modality: str) -> list[Spec]:
    """Of the attacks that differ in numbers alone, one, on few examples."""
    found: dict[str, Spec] = {}
    policies = [
        policy for path in SHIPPED if (policy := Policy.load(path)).modality.name == modality
    ]
    for spec in (spec for policy in policies for spec in policy.attacks):
        if not LARGER.items() & spec.options.items():
            shape = json.dumps(without_numbers(spec.model_dump()), sort_keys=True)
            found.setdefault(shape, spec.changed(**FEWER.get(spec.name, {})))
    return list(found.values())


def without_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_numbers(item) for item in value]
    return None if isinstance(value, int | float) and not isinstance(value, bool) else value


def test_every_attack_there_is_stands_in_a_policy() -> None:
    listed = {part.name for path in SHIPPED for spec in Policy.load(path).attacks
              for part in (spec, *spec.parts)}  # fmt: skip
    assert listed == set(Attack.available())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_trains_nothing_is_listed_whole(path: Path) -> None:
    policy = Policy.load(path)
    assert {each["format"] for each in options(policy, "quantize")} == set(get_args(Format))
    assert {each["deviation"] for each in options(policy, "weight_noise")} == NOISE
    assert {"layer", "model"} <= {each["by"] for each in options(policy, "prune")}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_learning_rates_span_decades_and_optimizers(path: Path) -> None:
    found = options(Policy.load(path), "finetune")
    rates = [float(each["lr"]) for each in found]
    assert max(rates) / min(rates) >= 0.99e4
    assert len({each["optimizer"] for each in found}) >= 3


@pytest.mark.parametrize("name", ["quick", "image_classification"])
def test_classifiers_are_attacked_with_their_head_and_a_new_one(name: str) -> None:
    found = options(load(name), "finetune")
    assert {"kept", "new"} == {each.get("head", "kept") for each in found}


@pytest.mark.parametrize("name", ["default", "strict", "quick", "image_classification"])
def test_weights_are_rewritten_before_they_are_trained(name: str) -> None:
    chains = [spec.parts for spec in load(name).attacks if spec.parts]
    first = [part.options for part, *_ in chains]
    assert {"last_k", "one_block", "norms"} <= {each.get("part") for each in first}
    whitened = [parts for parts in chains if parts[0].options.get("whiten")]
    assert [last.options["scope"] for _, last in whitened] == ["head"]


def test_strict_has_the_ancestor_and_every_precision() -> None:
    strict = load("strict")
    assert {each["how"] for each in options(strict, "restore")} == {"strip", "keep", "interpolate"}
    assert [each["rank"] for each in options(strict, "lora") if each.get("packed")] == [8, 64]
    methods = [each["method"] for name in ("merge", "merge_with_data")
               for each in options(strict, name)]  # fmt: skip
    assert len(set(methods)) == 10


def test_what_default_leaves_out_can_be_put_in(tmp_path: Path) -> None:
    text = (ROOT / "policies" / "default.toml").read_text()
    line = re.compile(r"^( *)# (\{ name = |\[\[|\w+ = (?!\{))", re.MULTILINE)
    path = tmp_path / "policy.toml"
    path.write_text(line.sub(r"\1\2", text))
    default, whole = load("default"), Policy.load(path)
    check_plugins(whole)
    check_attacks(whole)
    assert len(whole.attacks) > len(default.attacks)
    assert whole.merge_targets
    asked = whole.red_team.model_copy(update={"ancestor": None})
    assert asked == default.red_team  # what it says of the profile is so


def test_the_demo_stays_as_cheap_as_it_was() -> None:
    red_team = Policy.load(ROOT / "examples" / "fashion_mnist" / "policy.toml").red_team
    assert (red_team.sham, red_team.drawn, red_team.searched) == (False, 0, 0)


def test_the_demo_in_two_precisions_asks_for_the_same_and_for_tripwires_of_rounding() -> None:
    folder = ROOT / "examples" / "fashion_mnist"
    one, both = (Policy.load(folder / f"{name}.toml") for name in ("policy", "fp32_and_nf4"))
    check_attacks(both)
    assert both.precisions == ("fp32", "nf4")
    assert both.attacks[: len(one.attacks)] == one.attacks
    more = both.attacks[len(one.attacks) :]
    assert {spec.options.get("format") for spec in more} == {"q4_k", "int4", "mixed", None}
    assert [spec.name for spec in more] == ["quantize", "quantize", "quantize", "chain"]
    mine, theirs = both.red_team, one.red_team
    red_team = mine.model_copy(
        update={"search_seeds": theirs.search_seeds, "budget": theirs.budget}
    )
    assert (mine.search_seeds, mine.budget) == (2, Budget(unit="samples", limit=1600))
    (stage,) = both.stages
    assert stage == one.stages[0].changed(outer_steps=2_800)
    changed = {"precisions": one.precisions, "attacks": one.attacks, "red_team": red_team}
    same = both.model_copy(update={**changed, "stages": one.stages})
    assert same.model_dump() == one.model_dump()
