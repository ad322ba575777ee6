"""Getting the arms ready: a sham is made once, relatives are looked at before any work."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pico
import pytest

from release_guard.calibration import survey
from release_guard.errors import ModelError, PolicyError
from release_guard.manifest import hash_directory
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.preflight import Order
from release_guard.preparation import prepare
from release_guard.session import Session

Policies = Callable[..., Policy]


def session() -> Session:
    return Session(1, lambda *_: None, lambda: datetime(2026, 1, 2, tzinfo=UTC))


@pytest.fixture
def policies(tmp_path: Path, image_data: Path) -> Policies:
    def make(**changes: Any) -> Policy:
        return Policy.load(pico.pico_policy(tmp_path, image_data, **changes))

    return make


@pytest.fixture(scope="module")
def defended(classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's immunized model: other weights."""
    folder = tmp_path_factory.mktemp("defended")
    Modality.build(Spec(name="image_classification")).load(str(classifier_folder)).fresh(
        seed=9
    ).save(folder)
    return folder


def test_the_sham_is_made_once_and_is_another_model(
    policies: Policies, classifier_folder: Path, defended: Path, tmp_path: Path
) -> None:
    policy = policies(red_team={"sham": True, "ancestor": "undefended"})
    order = Order(str(defended), "acme/m", policy, base=str(classifier_folder))
    subject, run = prepare(order, tmp_path / "runs" / "a", session())

    assert subject.sham == run.sham
    assert subject.ancestor == subject.undefended
    roots = {
        hash_directory(folder).payload.root
        for folder in (subject.undefended, subject.defended, run.sham)
    }
    assert len(roots) == 3
    made = (run.sham / "model.safetensors").stat().st_mtime_ns
    prepare(order, tmp_path / "runs" / "a", session())
    assert (run.sham / "model.safetensors").stat().st_mtime_ns == made


def test_a_source_that_was_immunized_elsewhere_is_not_replaced_by_its_immunized_base(
    policies: Policies, classifier_folder: Path, defended: Path, tmp_path: Path
) -> None:
    policy = policies(stages=[{"name": "sophon"}])
    order = Order(str(defended), "acme/m", policy, base=str(classifier_folder))
    for look in (prepare, survey):
        with pytest.raises(PolicyError, match="add --as-is"):
            look(order, tmp_path / "run", session())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("which", "told"),
    [
        ("classifier_folder", 'write ancestor = "undefended"'),
        ("defended", "the model to be released"),
    ],
)
def test_an_ancestor_that_is_one_of_the_models_itself(
    which: str, told: str, policies: Policies, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    ancestor = str(request.getfixturevalue(which))
    base, source = (str(request.getfixturevalue(n)) for n in ("classifier_folder", "defended"))
    order = Order(source, "acme/m", policies(red_team={"ancestor": ancestor}), base=base)
    with pytest.raises(PolicyError, match=told):
        prepare(order, tmp_path / "run", session())
    assert not (tmp_path / "run").exists()


def test_an_ancestor_of_other_shapes(
    policies: Policies, classifier_folder: Path, resnet_folder: Path, tmp_path: Path
) -> None:
    policy = policies(red_team={"ancestor": str(resnet_folder)})
    with pytest.raises(ModelError, match=resnet_folder.name):
        prepare(Order(str(classifier_folder), "acme/m", policy), tmp_path / "run", session())
    assert not (tmp_path / "run").exists()


def test_a_donor_of_other_shapes(
    policies: Policies, classifier_folder: Path, resnet_folder: Path, image_data: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    source = str(image_data / "restricted.parquet")
    target = {"name": "merged", "dataset": source, "ceiling": 0.6, "donor": str(resnet_folder)}
    target["donor_dataset"] = str(image_data / "retained.parquet")
    with pytest.raises(ModelError, match=resnet_folder.name):
        prepare(
            Order(str(classifier_folder), "acme/m", policies(merge_targets=[target])),
            tmp_path / "run",
            session(),
        )
    assert not (tmp_path / "run").exists()


def test_attacks_that_lack_something_are_named_together(
    policies: Policies, classifier_folder: Path, tmp_path: Path
) -> None:
    policy = policies(attacks=[{"name": "restore"}, {"name": "ablate"}, {"name": "finetune"}])
    with pytest.raises(PolicyError) as caught:
        prepare(Order(str(classifier_folder), "acme/m", policy), tmp_path / "run", session())
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["attacks[0]", "attacks[1]"]
    assert "needs a public ancestor" in lines[0]
    assert "not for image_classification" in lines[1]


def test_a_plan_counts_every_arm(
    policies: Policies, classifier_folder: Path, defended: Path, tmp_path: Path
) -> None:
    red = {"sham": True, "drawn": 3, "drawn_pool": 9, "searched": 4, "ancestor": str(defended),
           "budget": {"unit": "steps", "limit": 10}, "never_knew": "unavailable"}  # fmt: skip
    attacks = [{"name": "finetune", "batch": 16}, {"name": "restore"}]
    policy = policies(red_team=red, attacks=attacks)
    plan = survey(Order(str(classifier_folder), "acme/m", policy), tmp_path / "run", session())

    trials = {(row.phase, row.arm): row.trials for row in plan.rows if "confirm" not in row.phase}
    assert trials == {
        ("attack the release", "defended"): 2,
        ("draw attacks at random", "undefended"): 9,
        ("draw attacks at random", "defended"): 9,
        ("search for attacks", "defended"): 4,
        ("attack the controls", "undefended"): 1,
        ("attack the controls", "sham"): 2,
        ("attack the controls", "ancestor"): 2,
        ("long run", "defended"): 3,
    }
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "what"), [("restricted", "data"), ("retained", "retained")])
def test_a_run_about_other_examples_does_not_go_on(
    name: str, what: str, classifier_folder: Path, tmp_path: Path
) -> None:
    """Under the same policy file: evidence that is there would be taken for theirs."""
    data = pico.image_data(tmp_path / "data")
    policy = Policy.load(pico.pico_policy(tmp_path, data))
    order = Order(str(classifier_folder), "acme/m", policy, as_is=True)
    prepare(order, tmp_path / "run", session())
    prepare(order, tmp_path / "run", session())
    other = pico.image_data(tmp_path / "other", seed=7) / f"{name}.parquet"
    other.rename(data / f"{name}.parquet")
    with pytest.raises(PolicyError, match=rf"belongs to another run \({what} differ\)"):
        prepare(order, tmp_path / "run", session())
