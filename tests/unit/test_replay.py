"""A trial of published evidence comes to the same again, on its own weights and data only."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pico
import pytest
from evidence_builder import example_policy, passing_evidence

from release_guard.engines import Job, run_trial
from release_guard.errors import IntegrityError, PolicyError
from release_guard.evidence import Arm, Outcome, Record
from release_guard.manifest import EVIDENCE_FOLDER
from release_guard.modalities import Modality
from release_guard.phases import SEARCH, Folders, Ground
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.replay import Agreement, Replay, Request, ancestor_of, evidence_of, find, replay
from release_guard.session import Session

SESSION = Session(1, lambda *_: None, lambda: datetime(2026, 1, 1, tzinfo=UTC))
FINETUNE, RESTORE = Spec(name="finetune", lr=0.003), Spec(name="restore")


@pytest.fixture
def policy(tmp_path: Path, image_data: Path) -> Policy:
    budget = {"unit": "steps", "limit": 3}
    red_team = {"budget": budget, "search_examples": 40, "ancestor": "undefended"}
    attacks = [{"name": "finetune", "lr": 0.003}, {"name": "restore"}]
    return Policy.load(pico.pico_policy(tmp_path, image_data, red_team=red_team, attacks=attacks))


def record_of(
    policy: Policy, folder: Path, arm: Arm = "defended", attack: Spec = FINETUNE
) -> Record:
    """What a run would have recorded that attacks the model in `folder`."""
    model = Modality.build(policy.modality).load(str(folder))
    ground = Ground.of(model, Folders(folder, folder, ancestor=folder), policy)
    (trial,) = ground.trials(SEARCH, arm, policy.targets[0], [attack], ["fp32"], 0.6)
    outcome = run_trial(Job(trial, str(folder), policy, str(folder)))
    return Record(trial=trial, outcome=outcome, origin="listed")


@pytest.mark.parametrize("arm", ["defended", "never_knew"])
def test_the_same_trial_comes_to_the_same_bit_by_bit(
    policy: Policy, classifier_folder: Path, arm: Arm
) -> None:
    record = record_of(policy, classifier_folder, arm)
    found = replay(Request(record, policy, classifier_folder), SESSION, tolerance=0)

    assert record.outcome.ending == "survived"
    assert (found.agreement, found.distance, found.agrees) == (Agreement.IDENTICAL, 0, True)


def test_a_recorded_score_that_was_changed_is_noticed(
    policy: Policy, classifier_folder: Path
) -> None:
    record = record_of(policy, classifier_folder)
    point = record.outcome.curve[-1]
    curve = (*record.outcome.curve[:-1], point.model_copy(update={"score": point.score + 0.1}))
    forged = record.model_copy(
        update={"outcome": record.outcome.model_copy(update={"curve": curve})}
    )
    found = replay(Request(forged, policy, classifier_folder), SESSION, tolerance=0.02)

    assert found.agreement is Agreement.DIFFERENT
    assert found.distance == pytest.approx(0.1)


def test_a_trial_that_uses_the_public_ancestor(
    policy: Policy, classifier_folder: Path, resnet_folder: Path
) -> None:
    record = record_of(policy, classifier_folder, attack=RESTORE)
    request = Request(record, policy, classifier_folder, classifier_folder)

    assert replay(request, SESSION, tolerance=0).agreement is Agreement.IDENTICAL
    for wrong in (None, resnet_folder):
        with pytest.raises(IntegrityError, match="not the trial's ancestor"):
            replay(replace(request, ancestor=wrong), SESSION, tolerance=0)


def test_other_weights_are_refused(
    policy: Policy, classifier_folder: Path, resnet_folder: Path
) -> None:
    record = record_of(policy, classifier_folder)
    with pytest.raises(IntegrityError, match="not the weights that were attacked"):
        replay(Request(record, policy, resnet_folder), SESSION, tolerance=0)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"data": "0" * 64}, "other examples"), ({"suite": "0.9"}, "a trial of suite '0.9'")],
)
def test_other_data_and_other_rules_are_refused(
    policy: Policy, classifier_folder: Path, change: dict[str, str], told: str
) -> None:
    record = record_of(policy, classifier_folder)
    other = record.model_copy(update={"trial": record.trial.model_copy(update=change)})
    with pytest.raises(IntegrityError, match=told):
        replay(Request(other, policy, classifier_folder), SESSION, tolerance=0)


@pytest.mark.parametrize(
    ("scores", "steps", "ending", "agreement"),
    [
        ([0.1, 0.2], [1, 2], "survived", Agreement.IDENTICAL),
        ([0.1, 0.21], [1, 2], "survived", Agreement.CLOSE),
        ([0.1, 0.23], [1, 2], "survived", Agreement.DIFFERENT),
        ([0.1, 0.2], [1, 2], "breached", Agreement.DIFFERENT),
        ([0.1], [1], "survived", Agreement.DIFFERENT),
        ([0.1, 0.2], [1, 3], "survived", Agreement.DIFFERENT),
    ],
)
def test_agreement(
    scores: list[float], steps: list[int], ending: str, agreement: Agreement, policy: Policy
) -> None:
    recorded = outcome([0.1, 0.2], [1, 2], "survived", seconds=5)
    record = Record.model_construct(trial=None, outcome=recorded, origin="listed")

    assert Replay(record, outcome(scores, steps, ending), 0.02).agreement is agreement


@pytest.mark.parametrize(
    ("note", "agreement"),
    [("died", Agreement.IDENTICAL), ("no such module", Agreement.DIFFERENT)],
)
def test_a_crash_for_another_reason_is_another_outcome(note: str, agreement: Agreement) -> None:
    record = Record.model_construct(
        trial=None, outcome=Outcome(ending="failed", note="died"), origin="listed"
    )
    found = Replay(record, Outcome(ending="failed", note=note), 1.0)
    assert found.agreement is agreement


def outcome(scores: list[float], steps: list[int], ending: str, seconds: float = 1) -> Outcome:
    costs = [{"steps": step, "samples": step, "flops": step, "seconds": seconds} for step in steps]
    curve = [{"cost": cost, "score": score} for cost, score in zip(costs, scores, strict=True)]
    return Outcome.model_validate({"ending": ending, "curve": curve})


def test_a_trial_is_found_by_the_beginning_of_its_key() -> None:
    evidence = passing_evidence(example_policy())
    record = evidence.records[3]
    assert find(evidence, record.trial.key) == record
    assert find(evidence, record.trial.key[:20].upper()) == record
    with pytest.raises(PolicyError, match="no trial of this evidence"):
        find(evidence, "xyz")
    with pytest.raises(PolicyError, match=r"trials begin so \(.* \.\.\.\); write more"):
        find(evidence, "")


def test_where_a_run_and_a_release_keep_their_evidence(tmp_path: Path) -> None:
    assert evidence_of(tmp_path) == tmp_path / "evidence.jsonl"
    inside = tmp_path / EVIDENCE_FOLDER / "evidence.jsonl"
    inside.parent.mkdir()
    inside.write_bytes(b"")
    assert evidence_of(tmp_path) == inside


def test_the_ancestor_is_what_was_given_or_what_the_policy_names(
    policy: Policy, tmp_path: Path
) -> None:
    (tmp_path / "public").mkdir()
    named = policy.red_team.model_copy(update={"ancestor": str(tmp_path / "public")})
    other = policy.model_copy(update={"red_team": named})

    assert ancestor_of(policy, None) is None
    assert ancestor_of(policy, str(tmp_path)) == tmp_path
    assert ancestor_of(other, None) == tmp_path / "public"
