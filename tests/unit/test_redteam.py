"""The red team on pico models: which arm meets which attack, what is kept, what ends it."""

import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from engine_jobs import HereSession

from release_guard import engines
from release_guard.attacks.finetune import Finetune
from release_guard.errors import IntegrityError, ModelError
from release_guard.evidence import Evidence, Record
from release_guard.ledger import Ledger
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.quantization import runnable
from release_guard.redteam import red_team
from release_guard.subject import Subject

FAST = {"name": "finetune", "optimizer": "adam", "lr": 0.003, "batch": 32}
SLOW = {"name": "finetune", "optimizer": "sgd", "lr": 1e-6, "batch": 32}
SURGICAL = {"name": "weight_noise"}
SMALL = {
    "budget": {"unit": "steps", "limit": 20},
    "search_examples": 60,
    "confirm_examples": 60,
    "long_run": 2.0,
    "grid_ratio": 2.0,
    "never_knew": "unavailable",
}

Team = Callable[..., tuple[Evidence, list[str]]]


@pytest.fixture(scope="module")
def ignorant(classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best of defences but for its use: a model that knows nothing, and learns slowly."""
    folder = tmp_path_factory.mktemp("ignorant")
    model = Modality.build(Spec(name="image_classification")).load(str(classifier_folder))
    model.fresh(seed=9).save(folder)
    return folder


@pytest.fixture(scope="module")
def team(
    tmp_path_factory: pytest.TempPathFactory, image_data: Path, classifier_folder: Path
) -> Team:
    """Attack a folder under the small policy with changes; evidence, and the lines of progress."""

    tmp_path = tmp_path_factory.mktemp("team")  # one ledger for each number of workers

    def attack(
        defended: Path, *, workers: int = 2, folders: dict[str, Path] | None = None, **changes: Any
    ) -> tuple[Evidence, list[str]]:
        red = {**SMALL, **changes.pop("red_team", {})}
        changes = {"attacks": [FAST], **changes, "red_team": red}
        policy = Policy.load(pico.pico_policy(tmp_path, image_data, **changes))
        load = Modality.build(policy.modality).load
        subject = Subject(
            classifier_folder,
            defended,
            load(str(classifier_folder)),
            load(str(defended)),
            **(folders or {}),
        )
        lines: list[str] = []
        session = HereSession(
            workers,
            lambda phase, done, total, line: lines.append(f"{phase}: {line}"),
            lambda: datetime(2026, 1, 2, tzinfo=UTC),
        )
        ledger = Ledger(tmp_path / f"trials{workers}.jsonl", lines.append)
        return red_team(subject, policy, ledger, session), lines

    return attack


def of(evidence: Evidence, arm: str, origin: str) -> list[Record]:
    return [
        record for record in evidence.records if (record.trial.arm, record.origin) == (arm, origin)
    ]


def labels(records: list[Record]) -> set[str]:
    return {record.trial.attack.label for record in records}


def test_data_that_change_under_attack_end_it(
    image_data: Path, classifier_folder: Path, ignorant: Path, tmp_path: Path
) -> None:
    """Others would be measured from then on, and the ledger would not know."""
    here = tmp_path / "images"
    shutil.copytree(image_data, here)
    changes = {"attacks": [SLOW, FAST], "red_team": SMALL}
    policy = Policy.load(pico.pico_policy(tmp_path, here, **changes))
    load = Modality.build(policy.modality).load
    subject = Subject(
        classifier_folder, ignorant, load(str(classifier_folder)), load(str(ignorant))
    )
    ledger, ended = Ledger(tmp_path / "trials.jsonl", lambda _: None), list[str]()

    def replace_data(phase: str, done: int, total: int, line: str) -> None:
        if done and not ended:
            shutil.copy(here / "retained.parquet", here / "restricted.parquet")
            engines._load_cached.cache_clear()  # as a new worker begins
            ended.extend(trial.key for trial in Ledger(tmp_path / "trials.jsonl", lambda _: None))

    session = HereSession(1, replace_data, lambda: datetime(2026, 1, 2, tzinfo=UTC))
    told = r"restricted\.parquet: changed since the run began; put it back, or begin anew"
    with pytest.raises(IntegrityError, match=told):
        red_team(subject, policy, ledger, session)
    assert ended
    assert [trial.key for trial in Ledger(tmp_path / "trials.jsonl", lambda _: None)] == ended


RANDOM = {"red_team": {"drawn": 2, "drawn_pool": 10, "searched": 4}, "attacks": [FAST, SURGICAL]}


def test_every_arm_meets_what_it_must(team: Team, ignorant: Path) -> None:
    evidence, _ = team(ignorant, folders={"sham": ignorant, "ancestor": ignorant}, **RANDOM)

    kept, pool = of(evidence, "defended", "drawn"), of(evidence, "undefended", "drawn")
    breaching = {
        record.trial.attack.label for record in pool if record.outcome.ending == "breached"
    }
    assert len(kept) >= 2
    assert labels(kept) == breaching, "a choice among those that breach would be no draw"
    assert {record.trial.seed for record in kept} <= {record.trial.seed for record in pool}
    assert len({record.trial.seed for record in pool}) == len(pool)
    assert len(of(evidence, "defended", "searched")) == 4
    for arm in ("sham", "ancestor"):
        tried = of(evidence, arm, "listed")
        assert labels(of(evidence, "undefended", "listed")) <= labels(tried)
        assert len(of(evidence, arm, "confirming")) == 3 * len({"finetune"})
    assert evidence.planned == len(evidence.records)


def test_the_long_run_follows_the_best_of_each_family(team: Team, ignorant: Path) -> None:
    adapter = {"name": "lora", "lr": 1e-5, "batch": 32}
    head = {"name": "chain", "steps": [{"name": "reinit", "part": "head"}, SLOW]}
    several = [SLOW, {**SLOW, "lr": 1e-7}, adapter, head]
    evidence, _ = team(ignorant, attacks=several, red_team={"long_run_best": 2})
    everything, _ = team(ignorant, attacks=several, red_team={"long_run_best": 9})

    def followed(found: Evidence) -> list[str]:
        specs = {r.trial.attack.label: r.trial.attack for r in of(found, "defended", "long_run")}
        return sorted(spec.family for spec in specs.values())

    assert len(followed(evidence)) == 2
    assert followed(everything) == ["finetune", "lora", "reinit>finetune"]


def test_surgical_attacks_meet_the_defended_model_only(team: Team, ignorant: Path) -> None:
    evidence, _ = team(ignorant, folders={"sham": ignorant, "ancestor": ignorant}, **RANDOM)

    surgical = [record for record in evidence.records if record.surgical]
    assert {record.trial.arm for record in surgical} == {"defended"}
    assert {record.trial.attack.name for record in surgical} == {"weight_noise"}
    assert {record.origin for record in surgical} >= {"listed", "confirming"}
    assert "long_run" not in {record.origin for record in surgical}


def test_any_number_of_workers_tries_the_same(team: Team, ignorant: Path) -> None:
    folders = {"sham": ignorant, "ancestor": ignorant}
    alone, _ = team(ignorant, workers=1, folders=folders, **RANDOM)
    together, _ = team(ignorant, workers=2, folders=folders, **RANDOM)
    again, lines = team(ignorant, workers=2, folders=folders, **RANDOM)

    keys = [
        {record.trial.key for record in evidence.records} for evidence in (alone, together, again)
    ]
    assert keys[0] == keys[1] == keys[2]
    assert all("(ledger)" in line for line in lines)


def test_a_draw_finds_what_the_list_misses(team: Team, classifier_folder: Path) -> None:
    """The release is the base model; the listed attack is too slow to show that."""
    evidence, lines = team(
        classifier_folder,
        attacks=[SLOW],
        red_team={"drawn": 4, "drawn_pool": 16, "budget": {"unit": "steps", "limit": 40}},
    )

    endings = {record.outcome.ending for record in of(evidence, "defended", "listed")}
    assert endings == {"survived"}
    assert "breach confirmed" in lines[-1]
    assert of(evidence, "defended", "drawn")
    assert not of(evidence, "undefended", "listed"), "controls of a refused model cost time"


def test_an_adaptive_search_finds_what_the_list_misses(team: Team, classifier_folder: Path) -> None:
    evidence, lines = team(
        classifier_folder,
        attacks=[SLOW],
        red_team={"searched": 16, "budget": {"unit": "steps", "limit": 40}},
    )

    assert "breach confirmed" in lines[-1]
    assert 0 < len(of(evidence, "defended", "searched")) <= 16


def test_a_collapse_gets_one_more_attempt(team: Team, ignorant: Path) -> None:
    wild = {"name": "finetune", "optimizer": "sgd", "lr": 1e30, "batch": 32}
    evidence, _ = team(ignorant, attacks=[wild, FAST])

    (collapsed,) = [
        record
        for record in of(evidence, "defended", "listed")
        if record.outcome.ending == "collapsed"
    ]
    (attempt,) = of(evidence, "defended", "tuned")
    assert attempt.trial.attack.options == {**collapsed.trial.attack.options, "lr": 3e29, "clip": 1}
    assert attempt.trial.seed == collapsed.trial.seed


def test_what_runs_out_of_memory_is_tried_again_with_half_the_batch(
    team: Team, ignorant: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both count: the one that failed, and the smaller one, which may breach."""
    fits = Finetune.tamper

    def tamper(attack: Finetune, *arguments: Any, **options: Any) -> Any:
        if attack.batch > 16:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return fits(attack, *arguments, **options)

    monkeypatch.setattr(Finetune, "tamper", tamper)
    evidence, _ = team(ignorant, attacks=[{**FAST, "lr": 0.0029}])  # in no other test's ledger

    (failed,) = of(evidence, "defended", "listed")
    (attempt,) = of(evidence, "defended", "tuned")
    assert failed.outcome.ending == "failed"
    assert failed.outcome.note.startswith("out of memory: tried to allocate 80 GiB")
    assert failed.outcome.note.endswith("twice; the second time nothing else was running")
    assert attempt.trial.attack.options == {**failed.trial.attack.options, "batch": 16}
    assert attempt.outcome.ending in {"survived", "breached"}


def test_the_ancestor_is_given_to_attacks_that_need_it(
    team: Team, image_data: Path, classifier_folder: Path, ignorant: Path
) -> None:
    """What was added to the public base is taken off again: what is left knows everything."""
    known, other = str(image_data / "retained.parquet"), str(image_data / "restricted.parquet")
    evidence, lines = team(
        ignorant,
        attacks=[{"name": "restore", "how": "interpolate", "share": 0.0}, FAST],
        concepts=[{"name": "even-angles", "dataset": known, "ceiling": 0.6}],
        retain={"dataset": other},
        folders={"ancestor": classifier_folder},
    )

    (found,) = [item for item in of(evidence, "defended", "listed") if item.surgical]
    assert found.trial.ancestor == evidence.base
    assert found.outcome.ending == "breached"
    assert "breach confirmed" in lines[-1]


LEAVE_OUT = {"precisions": ["fp32", "bf16"], "gate": {"failed_precision": "leave_out"}}


def of_precision(evidence: Evidence, precision: str) -> set[str]:
    trials = [record.trial for record in evidence.records if record.trial.precision == precision]
    return {trial.split for trial in trials if trial.arm == "defended"}


def test_a_breach_ends_what_it_refuses(team: Team, classifier_folder: Path) -> None:
    """All precisions, unless the policy may leave the finer one out: the coarser one goes on."""
    attacked, lines = team(classifier_folder, workers=1, precisions=["fp32", "bf16"])
    assert of_precision(attacked, "fp32") == {"search", "confirm"}
    assert "confirm" not in of_precision(attacked, "bf16")
    assert "breach confirmed" in lines[-1]

    evidence, lines = team(classifier_folder, workers=1, **LEAVE_OUT)
    assert any("breach confirmed at fp32; going on with bf16" in line for line in lines)
    assert of_precision(evidence, "bf16") == {"search", "confirm"}
    assert "no further trial is needed" in lines[-1]


def test_what_cannot_be_run_is_skipped_and_told(
    team: Team, ignorant: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bitsandbytes", "bitsandbytes.nn"):  # other tests may have imported both
        monkeypatch.setitem(sys.modules, name, None)
    runnable.cache_clear()
    try:
        evidence, lines = team(ignorant, attacks=[FAST], precisions=["fp32", "nf4"])
        with pytest.raises(ModelError, match="bitsandbytes"):
            team(ignorant, attacks=[FAST], precisions=["nf4"])
    finally:
        runnable.cache_clear()
    assert "bitsandbytes" in evidence.unrunnable["nf4"]
    assert evidence.unrunnable.keys() == {"nf4"}
    assert any("nf4 cannot be run here: " in line for line in lines)
    seen = (*(r.trial for r in evidence.records), *evidence.unattacked, *evidence.retention)
    assert {each.precision for each in seen} == {"fp32"}
    assert evidence.planned == len(evidence.records)
