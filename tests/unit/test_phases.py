"""The trials of a phase: what fixes their keys."""

import shutil
from pathlib import Path

import pico
import pytest
from huggingface_hub.constants import HF_HUB_CACHE

from release_guard.manifest import hash_directory
from release_guard.modalities import Modality, ModelHandle
from release_guard.phases import CONTROL, SEARCH, Folders, Ground
from release_guard.plugins import Spec
from release_guard.policy import Concept, MergeTarget, Policy

MERGE = Spec(name="merge", method="linear")


@pytest.fixture(scope="module")
def model(classifier_folder: Path) -> ModelHandle:
    return Modality.build(Spec(name="image_classification")).load(str(classifier_folder))


@pytest.fixture
def target(model: ModelHandle, image_data: Path, tmp_path: Path) -> MergeTarget:
    for seed, name in enumerate(("donor", "base")):
        (tmp_path / name).mkdir()
        model.fresh(seed=seed).save(tmp_path / name)
    return MergeTarget(
        name="merged",
        dataset=str(image_data / "restricted.parquet"),
        ceiling=0.5,
        donor=str(tmp_path / "donor"),
        base=str(tmp_path / "base"),
        donor_dataset=str(image_data / "retained.parquet"),
    )


@pytest.fixture
def policy(target: MergeTarget, image_data: Path, tmp_path: Path) -> Policy:
    merged = target.model_dump(exclude_none=True)
    attacks, red = [MERGE.model_dump()], {"ancestor": "undefended"}
    path = pico.pico_policy(
        tmp_path, image_data, merge_targets=[merged], attacks=attacks, red_team=red
    )
    return Policy.load(path)


def key(model: ModelHandle, policy: Policy, target: MergeTarget, folder: Path) -> str:
    changed = policy.model_copy(update={"merge_targets": (target,)})
    ground = Ground.of(model, Folders(folder, folder, ancestor=folder), changed)
    (trial,) = ground.trials(SEARCH, "defended", target, [MERGE], ["fp32"], 0.5)
    return trial.key


def test_a_merges_key_follows_all_that_goes_into_it(
    model: ModelHandle, policy: Policy, target: MergeTarget, classifier_folder: Path
) -> None:
    def now(**changes: str) -> str:
        other = target.model_copy(update=changes)
        return key(model, policy, other, classifier_folder)

    keys = [now()]
    assert now() == keys[0]
    for path in (target.donor, str(target.base)):
        model.fresh(seed=5).save(Path(path))
        keys.append(now())
    keys.append(now(donor_dataset=target.dataset))
    keys.append(now(dataset=target.donor_dataset))
    assert len(set(keys)) == len(keys)


def test_a_documents_change_is_no_other_donor(
    model: ModelHandle, policy: Policy, target: MergeTarget, classifier_folder: Path
) -> None:
    before = key(model, policy, target, classifier_folder)
    (Path(target.donor) / "README.md").write_text("new", encoding="utf-8")
    assert key(model, policy, target, classifier_folder) == before


def test_a_merge_target_that_names_its_base_needs_no_other_ancestor(
    model: ModelHandle, policy: Policy, target: MergeTarget, classifier_folder: Path
) -> None:
    ground = Ground.of(model, Folders(classifier_folder, ancestor=classifier_folder), policy)
    concept = Concept(name="odd-angles", dataset=target.dataset, ceiling=0.5)
    named = target.model_copy(update={"base": None})
    root = hash_directory(classifier_folder).payload.root

    def ancestors(target: MergeTarget | Concept) -> set[str]:
        known = Ground(policy, ground.roots, {target.name: "4" * 64}, artefacts={}, files={})
        trials = known.trials(CONTROL, "undefended", target, [MERGE], ["fp32"], 0.5)
        return {trial.ancestor for trial in trials}

    assert ancestors(target) == {""}
    assert ancestors(named) == ancestors(concept) == {root}


def cached(repo: str, folder: Path, number: int) -> None:
    """What a branch of the Hub names from now on, as its client keeps it."""
    cache = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    commit = f"{number:040x}"
    shutil.copytree(folder, cache / "snapshots" / commit, dirs_exist_ok=True)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text(commit)


def test_a_branch_of_the_hub_that_moved_is_another_donor(
    model: ModelHandle, policy: Policy, target: MergeTarget, classifier_folder: Path
) -> None:
    donor, base = Path(target.donor), Path(str(target.base))
    on_hub = target.model_copy(update={"donor": "hf://acme/donor@main"})
    keys = []
    for number, folder in enumerate((donor, base, donor)):
        cached("acme/donor", folder, number)
        keys.append(key(model, policy, on_hub, classifier_folder))
    assert keys[0] == keys[2] == key(model, policy, target, classifier_folder)
    assert keys[0] != keys[1]


def test_a_model_that_never_knew_may_lie_on_the_hub(
    model: ModelHandle, policy: Policy, target: MergeTarget, classifier_folder: Path
) -> None:
    cached("acme/never", Path(target.donor), 3)
    red_team = policy.red_team.model_copy(update={"never_knew": "hf://acme/never@main"})
    changed = policy.model_copy(update={"red_team": red_team})
    ground = Ground.of(model, Folders(classifier_folder, classifier_folder), changed)
    assert ground.roots["never_knew"] == hash_directory(Path(target.donor)).payload.root
