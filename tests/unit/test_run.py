"""The folder of a run: one run in it, whole files or none."""

from pathlib import Path

import pytest

from release_guard.errors import PolicyError, ReleaseGuardError
from release_guard.run import Run, folder_made_whole, saving, share_files

ABOUT = {"source": "a" * 64, "policy": "b" * 64, "as_is": False}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted(target: Path) -> None:
    with folder_made_whole(target) as folder:
        (folder / "new").touch()
        raise KeyboardInterrupt


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    first = Run.claim(tmp_path / "run", ABOUT)
    first.write("evidence.jsonl", b"x")

    assert Run.claim(tmp_path / "run", ABOUT) == first


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    Run.claim(tmp_path, ABOUT)

    with pytest.raises(PolicyError, match=r"belongs to another run \(as_is, policy differ\)"):
        Run.claim(tmp_path, ABOUT | {"policy": "c" * 64, "as_is": True})


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")

    with pytest.raises(PolicyError, match="not a run of release-guard; choose another --output"):
        Run.claim(tmp_path, ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_journal(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"source": ')

    with pytest.raises(PolicyError, match="damaged"):
        Run.claim(tmp_path, ABOUT)


def test_the_ledger_is_shared_by_neighbours(tmp_path: Path) -> None:
    assert Run(tmp_path / "a").ledger == Run(tmp_path / "b").ledger


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    run = Run.claim(tmp_path, ABOUT)
    run.write("report.html", b"old")
    (tmp_path / "report.html.partial").symlink_to("/dev/full")

    with pytest.raises(ReleaseGuardError, match=r"cannot be written .*nothing was published"):
        run.write("report.html", b"new" * 10_000)
    assert run.report.read_bytes() == b"old"


def test_folder_takes_its_name_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "immunized"
    with folder_made_whole(target) as folder:
        (folder / "old").touch()
    with pytest.raises(KeyboardInterrupt):
        interrupted(target)

    assert names(target) == ["old"]
    with folder_made_whole(target) as folder:
        assert names(folder) == []  # nothing of the attempt that was stopped
        (folder / "third").touch()
    assert names(target) == ["third"]
    assert names(tmp_path) == ["immunized"]


def test_saving_passes_other_errors_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), saving(tmp_path):
        raise ValueError("mine")


def test_shared_files_are_the_same_bytes_at_no_cost(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "weights").write_bytes(b"w")
    target.mkdir()
    share_files(source, target, ["sub/weights"])

    assert (target / "sub" / "weights").read_bytes() == b"w"
    assert (target / "sub" / "weights").stat().st_ino == (source / "sub" / "weights").stat().st_ino
