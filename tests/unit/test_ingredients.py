"""What a merge keeps of the donor's task; the merges themselves are in tests/attacks."""

from pathlib import Path

import merge_family
import pico
import pytest
import torch

from release_guard.engines import Job, run_trial
from release_guard.evidence import Trial
from release_guard.ingredients import head_names, kept
from release_guard.modalities import Modality, ModelHandle
from release_guard.phases import CONFIRM, SEARCH, Folders, Ground
from release_guard.plugins import Spec
from release_guard.policy import Policy

MERGE = {"name": "merge", "method": "linear", "realign": "none"}


@pytest.fixture(scope="module")
def donor(classifier_folder: Path) -> ModelHandle:
    return merge_family.base_model(classifier_folder)


@pytest.fixture(scope="module")
def retained(image_data: Path) -> str:
    return str(image_data / "retained.parquet")


def with_head_of(model: ModelHandle, other: ModelHandle) -> ModelHandle:
    state = model.state() | {name: other.state()[name] for name in head_names(model)}
    changed = model.copy()
    changed.load_state(state)
    return changed


def test_the_donors_last_layer_may_take_the_place_of_the_merges(
    donor: ModelHandle, retained: str
) -> None:
    found = kept(with_head_of(donor, donor.fresh(seed=1)), donor, retained, "search", limit=50)
    assert found.examples == 50
    assert found.merged == found.alone > 0.8
    own = with_head_of(donor.fresh(seed=1), donor)
    lost = kept(own, donor, retained, "search", limit=50)
    assert lost.merged < 0.6 < lost.alone


def test_its_own_last_layer_counts_where_it_does_better(donor: ModelHandle, retained: str) -> None:
    blind = with_head_of(donor, donor.fresh(seed=1))
    found = kept(donor, blind, retained, "search", limit=50)
    assert found.merged > 0.8
    assert found.alone < 0.6


def test_nothing_is_changed(donor: ModelHandle, retained: str) -> None:
    model = donor.fresh(seed=2)
    before = [one.state() for one in (model, donor)]
    kept(model, donor, retained, "confirm", limit=8)
    for state, one in zip(before, (model, donor), strict=True):
        assert all(torch.equal(state[name], value) for name, value in one.state().items())


def test_a_score_that_is_none_is_an_error(donor: ModelHandle, retained: str) -> None:
    broken = donor.copy()
    with torch.no_grad():
        next(broken.module.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        kept(broken, donor, retained, "search", limit=8)


def test_a_head_that_is_tied_to_the_embedding_stays(tmp_path: Path, text_data: Path) -> None:
    folder = pico.pico_lm(tmp_path, tied=True, steps=1)
    model = Modality.build(Spec(name="causal_lm")).load(str(folder))
    source = str(text_data / "retained.jsonl")
    found = kept(model, model.fresh(seed=1), source, "search", limit=8)
    assert found.merged == sum(model.scores(source, "search", limit=8)) / 8


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_a_trial_says_what_was_kept_at_every_precision(
    precision: str, donor: ModelHandle, classifier_folder: Path, image_data: Path, tmp_path: Path
) -> None:
    policy, release = merge_policy(donor, classifier_folder, image_data, tmp_path, precision)
    ground = Ground.of(donor, Folders(release, release), policy)
    for phase in (SEARCH, CONFIRM):
        trial = first(ground, phase, policy)
        outcome = run_trial(Job(trial, str(release), policy))
        assert outcome.note == ""
        assert outcome.ending == "survived", "whether it counts is the gate's to say"
        assert outcome.kept is not None
        assert outcome.kept.examples == outcome.examples == 20
        assert outcome.kept.alone > 0.8


def merge_policy(
    donor: ModelHandle, base: Path, data: Path, folder: Path, precision: str
) -> tuple[Policy, Path]:
    release = folder / "release"
    for name, seed in (("release", 3), ("donor", 0)):
        (folder / name).mkdir()
        other = donor if name == "donor" else donor.fresh(seed=seed)
        other.save(folder / name)
    target = {
        "name": "merged",
        "dataset": str(data / "restricted.parquet"),
        "ceiling": 0.5,
        "donor": str(folder / "donor"),
        "base": str(base),
        "donor_dataset": str(data / "retained.parquet"),
    }
    red = {"search_examples": 20, "confirm_examples": 20}
    changes = {"concepts": None, "merge_targets": [target], "attacks": [MERGE], "red_team": red}
    path = pico.pico_policy(folder, data, precisions=[precision], **changes)
    return Policy.load(path), release


def first(ground: Ground, phase: object, policy: Policy) -> Trial:
    found = ground.trials(
        phase, "defended", policy.targets[0], policy.attacks, policy.precisions, 0.5
    )
    return found[0]
