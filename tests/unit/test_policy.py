"""Policies: what they accept, what they say of everything they do not."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pico
import pytest
from evidence_builder import MERGED, POLICY, example_policy

from release_guard.check import problems
from release_guard.errors import PolicyError
from release_guard.policy import PROFILES, Policy

POLICIES = sorted((Path(__file__).parents[2] / "policies").glob("*.toml"))

FINETUNE = {"name": "finetune", "lr": 0.003}
PRUNE = {"name": "prune", "share": 0.3}


def load(text: str, tmp_path: Path) -> Policy:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return Policy.load(path)


def complaints(text: str, tmp_path: Path) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        load(text, tmp_path)
    return str(caught.value).removeprefix(f"{tmp_path}/").split(f"\n{tmp_path}/")


def test_five_policies_ship() -> None:
    assert [path.stem for path in POLICIES] == [
        "default",
        "image_classification",
        "quick",
        "strict",
        "text_to_image",
    ]


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_shipped_policies_build_every_plugin(path: Path) -> None:
    lacking = {line.partition(":")[0] for line in problems(Policy.load(path))}

    assert lacking  # their data are placeholders
    models = {"red_team.never_knew", "red_team.ancestor"}
    assert all(key.endswith((".dataset", ".scored_on")) for key in lacking - models), lacking


def test_shipped_policies_are_what_they_say() -> None:
    default, images, quick, strict, paintings = map(Policy.load, POLICIES)

    assert (default.red_team.profile, default.gate.kappa, default.gate.kappa_lower) == (
        "standard",
        10,
        3,
    )
    assert (quick.red_team.profile, quick.modality.name) == ("quick", "image_classification")
    assert (images.red_team.profile, images.modality.name) == ("standard", quick.modality.name)
    assert (paintings.red_team.profile, paintings.modality.name) == ("standard", "text_to_image")
    assert (strict.red_team.profile, strict.gate.sigma_lower) == ("strong", 1.0)
    assert strict.precisions == ("fp32", "bf16", "int8", "nf4")


def test_default_policy_names_every_key() -> None:
    text = POLICIES[0].read_text()
    tables = Policy.model_json_schema()["$defs"]
    names = ("Retain", "Concept", "MergeTarget", "RedTeam", "Gate")
    keys = {key for name in names for key in properties(tables[name])}

    assert keys | {"modality", "precisions", "seed", "stages", "attacks", "hub", "signer"} <= {
        word.strip("#=[]{} ") for word in text.split()
    }


def properties(table: dict[str, object]) -> set[str]:
    found = table["properties"]
    assert isinstance(found, dict)
    return set(found)


def test_digest_is_that_of_the_file(tmp_path: Path) -> None:
    policy = load(POLICY, tmp_path)

    assert policy.digest == hashlib.sha256(POLICY.encode()).hexdigest()
    assert policy.source == (tmp_path / "policy.toml").read_bytes()


def test_local_sources_are_seen_from_the_policy(tmp_path: Path) -> None:
    text = POLICY.replace('"footwear.parquet"', '"hf://datasets/a/b@main"')
    policy = load(text, tmp_path)

    assert policy.retain.dataset == str(tmp_path / "retained.parquet")
    assert policy.concepts[0].dataset == "hf://datasets/a/b@main"
    assert policy.hub.options["path"] == str(tmp_path / "hub")


def test_profile_gives_way_to_what_is_written(tmp_path: Path) -> None:
    red_team = load(POLICY, tmp_path).red_team

    assert red_team.long_run == 4.0
    assert red_team.search_examples == PROFILES["smoke"]["search_examples"]


def test_misspelt_key_is_told_with_the_nearest(tmp_path: Path) -> None:
    (line,) = complaints(POLICY.replace("kappa_lower", "kapa_lower"), tmp_path)

    assert line.startswith("policy.toml: gate.kapa_lower: no such key; did you mean 'kappa_lower'?")


def test_all_problems_at_once_one_line_each(tmp_path: Path) -> None:
    text = (
        POLICY.replace('precisions = ["fp32"]', 'precisions = ["fp8"]')
        .replace("margin = 0.03", "margin = 3")
        .replace('hub = { name = "directory", path = "hub" }\n', "")
        .replace("limit = 400", "limit = -1")
    )
    lines = complaints(text, tmp_path)

    assert [line.split(": ")[1] for line in lines] == [
        "precisions[0]",
        "retain.margin",
        "red_team.budget.limit",
        "hub",
    ]
    assert "found 'fp8'" in lines[0]
    assert "found 3" in lines[1]
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('name = "footwear"', 'name = "Foot wear"', "lowercase letters"),
        ('precisions = ["fp32"]', 'precisions = ["fp32", "fp32"]', "stands here twice"),
        ("ceiling = 0.5", 'ceiling = "middle"', "ceiling"),
        ("ceiling = 0.5", "ceiling = 1.5", "less than 1"),
        ('{ name = "lora", rank = 8 }', '{ name = "linear_probe" }', "is listed twice"),
        ('profile = "smoke"', 'profile = "smoky"', "'smoke', 'quick', 'standard' or 'strong'"),
        ('profile = "smoke"', "profile = []", "'smoke', 'quick', 'standard' or 'strong'"),
        ("[gate]", '[[concepts]]\nname = "footwear"\ndataset = "x"\nceiling = 0.5\n[gate]', "two"),
        ("seed = 7", "seed = 7\nseed = 8", "not TOML"),
    ],
)  # fmt: skip
def test_wrong_values(old: str, new: str, told: str, tmp_path: Path) -> None:
    assert old in POLICY
    assert told in "\n".join(complaints(POLICY.replace(old, new), tmp_path))


def test_no_concepts(tmp_path: Path) -> None:
    start, end = POLICY.index("[[concepts]]"), POLICY.index("[red_team]")
    (line,) = complaints(POLICY[:start] + POLICY[end:], tmp_path)

    assert line == "policy.toml: a policy needs at least one of [[concepts]] or [[merge_targets]]"


def test_zero_attacks(tmp_path: Path) -> None:
    start, end = POLICY.index("attacks = ["), POLICY.index("hub =")
    (line,) = complaints(POLICY[:start] + "attacks = []\n" + POLICY[end:], tmp_path)

    assert "attacks: found []" in line
    assert "at least 1" in line


def test_midpoint_needs_a_model_that_never_knew(tmp_path: Path) -> None:
    text = POLICY.replace("ceiling = 0.5", 'ceiling = "midpoint"').replace(
        "long_run = 4.0", 'never_knew = "unavailable"'
    )

    assert "needs the never-knew arm" in complaints(text, tmp_path)[0]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("ceiling = 0.5", 'ceiling = "midpoint"', "merge_targets[0].ceiling: found 'midpoint'"),
        ('donor_dataset = "poems.parquet"', "", "merge_targets[0].donor_dataset: missing"),
        ('donor = "donor"', "", "merge_targets[0].donor: missing"),
        ('donor = "donor"', 'donor = "donor"\ndoner = "x"', "did you mean 'donor'"),
        ('name = "maths"', 'name = "footwear"', "two targets are called 'footwear'"),
    ],
)
def test_wrong_merge_targets(old: str, new: str, told: str, tmp_path: Path) -> None:
    (place, merged), _ = MERGED
    assert old in merged
    (line,) = complaints(POLICY.replace(place, merged.replace(old, new)), tmp_path)
    assert told in line


def test_attacks_are_aimed_by_what_they_end_in() -> None:
    merges = ("merge(method=linear)", "merge(method=ties)", "prune > merge_with_data")
    policy = example_policy(*MERGED)
    concept, merge = policy.targets
    assert tuple(spec.label for spec in policy.aimed_at(merge)) == merges
    others = tuple(spec for spec in policy.attacks if spec.label not in merges)
    assert policy.aimed_at(concept) == others
    public = example_policy(*MERGED, ("sham = false", 'sham = false\nancestor = "undefended"'))
    assert public.aimed_at(concept) == public.attacks
    assert tuple(spec.label for spec in public.aimed_at(merge)) == merges


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"none\.toml: cannot be read \(No such file"):
        Policy.load(tmp_path / "none.toml")


def test_schema_knows_both_forms_of_a_plugin() -> None:
    schema = Policy.model_json_schema()

    kinds = [kind.get("type") for kind in schema["properties"]["modality"]["anyOf"]]
    assert "string" in kinds
    assert set(schema["$defs"]["RedTeam"]["required"]) == {"profile", "budget"}
    json.dumps(schema)


def test_check_finds_wrong_options_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "retained.parquet").touch()
    text = POLICY.replace("rank = 8", "rnak = 8").replace('"sophon"', '"sofon"')
    lines = problems(load(text, tmp_path))

    assert lines[0].startswith("stages[0].name: 'sofon' is no stage; did you mean 'sophon'?")
    assert lines[1].startswith("attacks[2].rnak: not an option of lora; did you mean 'rank'?")
    assert lines[2].startswith(f"concepts[0].dataset: {tmp_path}/footwear.parquet is not there")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"gate": {"mandatory": ["finetun"]}},
            "gate.mandatory[0]: 'finetun' is no attack; did you",
        ),
        (
            {"gate": {"mandatory": ["finetune", "lora"]}},
            "gate.mandatory[1]: lora must be tried and",
        ),
        (
            {"attacks": [{"name": "chain", "stage": "nope", "steps": [PRUNE, FINETUNE]}, FINETUNE]},
            "attacks[0].stage: 'nope' is no stage; allowed: concept_suppression",
        ),
    ],
)
def test_check_finds_names_that_would_only_show_at_the_end(
    image_data: Path, tmp_path: Path, changed: dict[str, Any], line: str
) -> None:
    (found,) = problems(Policy.load(pico.pico_policy(tmp_path, image_data, **changed)))
    assert found.startswith(line)


@pytest.mark.parametrize(("old", "new"), [("limit = 400", "limit = inf"), ("= 4.0", "= inf")])
def test_nothing_is_infinite(old: str, new: str, tmp_path: Path) -> None:
    (line,) = complaints(POLICY.replace(old, new), tmp_path)
    assert line.endswith("found inf; Input should be a finite number")


@pytest.mark.parametrize(
    ("precisions", "seen"),
    [
        ('["fp32"]', {"fp32": 0.75}),
        ('["nf4", "fp32"]', {"fp32": 0.25, "nf4": 0.75}),
        ('["fp32", "nf4", "int8"]', {"fp32": 0.125, "int8": 0.125, "nf4": 0.75}),
        ('["fp32", "bf16"]\nawareness = { q4_0 = 2, fp32 = 1 }', {"q4_0": 2, "fp32": 1}),
    ],
)
def test_stages_see_the_coarsest_precision_most(
    precisions: str, seen: dict[str, float], tmp_path: Path
) -> None:
    text = POLICY.replace('precisions = ["fp32"]', f"precisions = {precisions}")
    assert dict(load(text, tmp_path).seen_in) == seen


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("awareness = {}", "awareness"),
        ("awareness = { fp32 = 0 }", "awareness"),
        ("awareness = { gptq = 1 }", "awareness"),
        ("awareness = { nf4 = nan }", "awareness"),
    ],
)
def test_weights_of_formats_are_checked(given: str, told: str, tmp_path: Path) -> None:
    text = POLICY.replace('precisions = ["fp32"]', f'precisions = ["fp32"]\n{given}')
    assert told in complaints(text, tmp_path)[0]
