"""The ledger: done is not done twice, whatever happens to the file."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from evidence_builder import example_policy, passing_evidence

from release_guard.errors import ReleaseGuardError
from release_guard.evidence import Outcome, Record
from release_guard.ledger import Ledger

RECORDS = passing_evidence(example_policy()).records


def silent(line: str) -> None:
    raise AssertionError(line)


def filled(path: Path, records: tuple[Record, ...] = RECORDS[:3]) -> Ledger:
    ledger = Ledger(path, silent)
    for record in records:
        ledger.add(record.trial, record.outcome)
    return ledger


def test_what_was_added_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "trials.jsonl"
    filled(path)
    again = Ledger(path, silent)

    assert [again.get(record.trial) for record in RECORDS[:3]] == [
        record.outcome for record in RECORDS[:3]
    ]
    assert again.get(RECORDS[3].trial) is None
    assert {trial.key for trial in again} == {record.trial.key for record in RECORDS[:3]}


def test_failed_trials_are_kept_but_tried_again(tmp_path: Path) -> None:
    path, trial = tmp_path / "trials.jsonl", RECORDS[0].trial
    filled(path, ()).add(trial, Outcome(ending="failed", note="crashed"))
    again = Ledger(path, silent)

    assert len(again) == 1
    assert again.get(trial) is None
    assert list(again) == []
    again.add(trial, RECORDS[0].outcome)
    assert Ledger(path, silent).get(trial) == RECORDS[0].outcome


def test_a_changed_trial_is_another_trial(tmp_path: Path) -> None:
    ledger, trial = filled(tmp_path / "trials.jsonl"), RECORDS[0].trial

    for change in ({"seed": 99}, {"weights": "0" * 64}, {"suite": "1.0"}, {"ceiling": 0.4}):
        assert ledger.get(trial.model_copy(update=change)) is None


@pytest.mark.parametrize(
    "damage",
    [b"not json", b"[]", b'{"key": 1}', b"[" * 100_000, b"\xff\xfe", b'{"trial": null}', b""],
    ids=["text", "list", "fields", "deep", "bytes", "null", "empty"],
)
def test_damaged_line_is_named_and_skipped(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    filled(path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    warnings: list[str] = []
    ledger = Ledger(path, warnings.append)

    assert [line.partition(": ")[0] for line in warnings] == [f"{path}:2"]
    assert len(ledger) == 2
    assert ledger.get(RECORDS[0].trial)
    assert ledger.get(RECORDS[2].trial)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"seed":', b'"seed":1'), (b'"score":0.', b'"score":0.0'), (b'"outcome_digest"', b'"x"')],
    ids=["trial", "outcome", "digest"],
)
def test_a_line_that_was_edited_does_not_count(old: bytes, new: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    filled(path, RECORDS[:1])
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    warnings: list[str] = []
    ledger = Ledger(path, warnings.append)

    assert len(ledger) == 0
    assert ledger.get(RECORDS[0].trial) is None
    assert warnings == [
        f"{path}:1: changed since it was written; skipped, that trial will run again"
    ]


def test_half_a_last_line_costs_that_trial_only(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    warnings: list[str] = []
    ledger = Ledger(path, warnings.append)
    ledger.add(RECORDS[2].trial, RECORDS[2].outcome)

    assert f"{path}:3" in warnings[0]
    assert len(Ledger(path, warnings.append)) == 3


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    program = """
import sys
from pathlib import Path
from release_guard.evidence import Evidence
from release_guard.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), print)
for record in Evidence.read(Path(sys.argv[2])).records[int(sys.argv[3])::2]:
    ledger.add(record.trial, record.outcome)
"""
    evidence = tmp_path / "evidence.jsonl"
    evidence.write_bytes(passing_evidence(example_policy()).to_jsonl())
    writers = [
        subprocess.Popen([sys.executable, "-c", program, path, evidence, str(half)])  # noqa: S603
        for half in (0, 1)
    ]

    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    ledger = Ledger(path, silent)
    assert {trial.key for trial in ledger} == {record.trial.key for record in RECORDS}


def test_full_disk_is_one_line_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    ledger = filled(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        with pytest.raises(ReleaseGuardError, match=r"cannot record a trial .* free some space"):
            ledger.add(RECORDS[3].trial, RECORDS[3].outcome)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert ledger.get(RECORDS[3].trial) is None
    ledger.add(RECORDS[3].trial, RECORDS[3].outcome)
    assert len(Ledger(path, lambda _: None)) == 4


def test_no_space_left_on_device(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    path.symlink_to("/dev/full")
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full here")
    ledger = Ledger(tmp_path / "none.jsonl", silent)
    ledger.path = path

    with pytest.raises(ReleaseGuardError, match="No space left"):
        ledger.add(RECORDS[0].trial, RECORDS[0].outcome)
