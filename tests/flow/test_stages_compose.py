"""Two real stages after each other: what is left of the first one, and who undid it."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pico
import pytest
from engine_jobs import HereSession

from release_guard.judging import Immunized, immunize
from release_guard.modalities import ModelHandle
from release_guard.policy import Policy
from release_guard.preflight import Order
from release_guard.release import Result

SOPHON = {
    "name": "sophon",
    "outer_steps": 60,
    "tail_steps": 0,
    "ntr_steps": 1,
    "alpha": 1e-2,
    "horizon": [5, 20],
    "batch": 32,
    "renew_share": 0.0,
    "probe_every": 20,
    "probed": 200,
}
# The gauge is a secret drawn anew each time, and attacks go otherwise in another: beginning anew
# left 0.13 to 0.52 of the effect, beginning from it 1.03 to 1.35.
KEPT = 0.8
MERGE_GUARD = {"name": "merge_guard", "train_steps": 2, "lr": 1e-5, "batch": 32}
SUPPRESSION = {
    "name": "concept_suppression",
    "total_steps": 60,
    "batch": 16,
    "upper_batch": 16,
    "pool": 32,
    "lr": 2e-3,
    "warmup": 0,
    "probe_every": 20,
}
MIMA = {
    "name": "mima",
    "outer_steps": 10,
    "batch": 16,
    "prior_batch": 8,
    "captions": 40,
    "lower_lr": [0.05, 0.05],
    "upper_lr": 1e-3,
    "measured_steps": 5,
    "probe_every": 5,
    "probed": 50,
}


def immunized(source: Path, policy: Path, folder: Path) -> Immunized:
    session = HereSession(1, lambda *_: None, lambda: datetime(2026, 1, 2, tzinfo=UTC))
    return immunize(Order(str(source), "a/b", Policy.load(policy)), folder / "run", session)


@pytest.fixture
def merged(tmp_path: Path, image_data: Path, classifier: ModelHandle) -> Mapping[str, Any]:
    """What a policy says of the task that merges must lose; the base knows it all but as well."""
    base = classifier.copy()
    base.load_state({name: value * 0.999 for name, value in base.state().items()})
    base.save(tmp_path / "base")
    classifier.fresh(seed=1).save(tmp_path / "donor")
    return {
        "name": "task",
        "dataset": str(image_data / "retained.parquet"),
        "ceiling": 0.9,
        "donor": str(tmp_path / "donor"),
        "base": str(tmp_path / "base"),
        "donor_dataset": str(image_data / "restricted.parquet"),
    }


@pytest.mark.parametrize(
    ("options", "result"),
    [
        ({"start": "undefended"}, Result.PASS),
        ({"start": "base"}, Result.FAIL),
    ],
    ids=["kept", "undone"],
)
def test_merge_guard_keeps_sophon_unless_it_begins_from_the_public_base(
    options: Mapping[str, Any],
    result: Result,
    merged: Mapping[str, Any],
    image_data: Path,
    classifier_folder: Path,
    tmp_path: Path,
) -> None:
    policy = pico.pico_policy(
        tmp_path,
        image_data,
        retain={"margin": 0.9},
        merge_targets=[merged],
        stages=[SOPHON, {**MERGE_GUARD, **options}],
        gate={"stage_effect_kept": KEPT},
    )
    done = immunized(classifier_folder, policy, tmp_path)
    before, after = (effect.value or 0 for effect in done.stages[0].effects)
    assert before > 0
    assert (after >= KEPT * before) == (result is Result.PASS)
    first, second = done.checks
    assert first.result is result, first.detail
    assert second.name == "stages/1-merge_guard"
    if result is Result.FAIL:
        assert "merge_guard undid most of it" in first.detail
        assert not done.composed


def test_mima_keeps_what_concept_suppression_did(
    picture_data: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    modality = {"name": "text_to_image", "sampling_steps": 4, "guidance": 1.0}
    policy = pico.pico_policy(
        tmp_path,
        picture_data,
        modality=modality,
        retain={"margin": 0.9},
        stages=[SUPPRESSION, MIMA],
    )
    done = immunized(pipeline_folder, policy, tmp_path)
    before, after = (effect.value or 0 for effect in done.stages[0].effects)
    assert 0.5 * before < after
    assert before > 0.2
    assert done.checks[0].result is Result.PASS, done.checks
    assert [check.name for check in done.checks] == [
        "stages/0-concept_suppression",
        "stages/1-mima",
    ]
