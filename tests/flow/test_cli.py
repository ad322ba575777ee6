"""The command line as people and programs use it."""

import contextlib
import importlib.util
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_jobs import workers_of
from evidence_builder import POLICY as EVIDENCE_POLICY
from evidence_builder import example_policy, passing_evidence

from release_guard.cli import main
from release_guard.evidence import Trial
from release_guard.run import Run

POLICY = """\
modality = "image_classification"
attacks = [{ name = "finetune", lr = 0.003 }, { name = "lora", lr = 0.01 }]
hub = { name = "directory", path = "hub" }
signer = { name = "key", path = "key.pem", public = "key.pub" }

[retain]
dataset = "retained.parquet"

[[concepts]]
name = "odd-stripes"
dataset = "restricted.parquet"
ceiling = 0.6

[red_team]
profile = "smoke"
budget = { unit = "steps", limit = 60 }
search_examples = 60
confirm_examples = 60
"""
COMMANDS = ("attack", "completion", "demo", "immunize", "keygen", "plan", "policy check",
            "policy schema", "prune", "publish", "replay", "report", "ungauge",
            "verify")  # fmt: skip

Lines = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RELEASE_GUARD_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def errors(capsys: pytest.CaptureFixture[str]) -> Lines:
    """Lines on stderr since the last call; nothing may be on stdout."""

    def lines() -> list[str]:
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    return lines


@pytest.fixture
def policy_file(here: Path, image_data: Path) -> Path:
    return place_policy(here, image_data, POLICY)


def place_policy(folder: Path, image_data: Path, text: str) -> Path:
    for name in ("retained", "restricted"):
        (folder / f"{name}.parquet").symlink_to(image_data / f"{name}.parquet")
    path = folder / "policy.toml"
    path.write_text(text)
    return path


def run(*arguments: str, modules: Sequence[str] = (), **variables: str) -> Any:
    """A process of its own; afterwards it names which of `modules` it had imported."""
    program = (
        "import sys\nfrom release_guard.cli import main\ncode = main(sys.argv[1:])\n"
        f"print(*[name for name in {list(modules)!r} if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    return subprocess.run(  # noqa: S603
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **variables},
        check=False,
    )


def without(module: str, *arguments: str) -> Any:
    """The same where a module is not installed."""
    program = (
        f"import sys\nsys.modules[{module!r}] = None\nfrom release_guard.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(  # noqa: S603
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


HEAVY = ("torch", "transformers", "datasets", "matplotlib", "huggingface_hub")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["publish", "-h"]])
def test_help_waits_for_nothing(arguments: list[str]) -> None:
    done = run(*arguments, modules=(*HEAVY, "pydantic", "rich"))

    assert done.returncode == 0
    assert done.stderr == "\n"
    assert "release-guard" in done.stdout


def test_help_lists_exit_codes_and_variables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0

    out = capsys.readouterr().out
    assert all(f"\n    {code}  " in out for code in ("0  ", "1  ", "2  ", "3  ", "4  ", "130"))
    assert "RELEASE_GUARD_KEY_PASSWORD" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_same_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--help"]) == 0

    out = capsys.readouterr().out
    shown = ("--json", "-q, --quiet", "-v, --verbose", "-h, --help")
    assert [option for option in shown if option not in out] == [], out


def test_python_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "release_guard", "policy", "schema", "--json"],
        capture_output=True,
        timeout=120,
        check=True,
    )

    document = json.loads(done.stdout)
    assert (document["schema_version"], document["command"]) == (1, "policy schema")
    assert document["schema"]["title"] == "Policy"


def test_syntax_errors_do_not_wait_for_torch(here: Path) -> None:
    (here / "policy.toml").write_text(POLICY.replace("ceiling", "cieling"))
    done = run("policy", "check", "policy.toml", modules=HEAVY)

    assert done.returncode == 2
    assert done.stdout == ""
    first, second, imported = done.stderr.splitlines()
    assert first.startswith("error: policy.toml: concepts[0].ceiling: missing; add it")
    assert second.startswith(
        "error: policy.toml: concepts[0].cieling: no such key; did you mean 'ceiling'?"
    )
    assert imported == ""


def test_check_names_options_and_files_at_once(here: Path, errors: Lines) -> None:
    (here / "policy.toml").write_text(POLICY.replace("lr = 0.01", "rnak = 4"))

    assert main(["policy", "check", "policy.toml"]) == 2
    option, *files = errors()
    assert option.startswith(
        "error: policy.toml: attacks[1].rnak: not an option of lora; did you mean 'rank'?"
    )
    assert [line.split(": ")[2] for line in files] == ["retain.dataset", "concepts[0].dataset"]


def test_check_prints_the_digest(policy_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", str(policy_file), "-q"]) == 0

    out, err = capsys.readouterr()
    assert len(out.strip()) == 64
    assert err == ""


def test_check_without_torch_says_what_it_did_not_see(policy_file: Path) -> None:
    done = without("torch", "policy", "check", str(policy_file), "--json")

    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert document["options_checked"] is False
    assert "were not checked" in document["warnings"][0]


def test_publish_without_torch_says_what_to_install(policy_file: Path) -> None:
    done = without("torch", "publish", "x", "--policy", str(policy_file), "--repo", "a/b")

    assert done.returncode == 1
    assert "pip install 'model-release-guard[immunize]'" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("attacks = [{", "attacks = []\nnone = [{", "attacks: found []"),
        ("[[concepts]]", "[[concept]]", "no such key; did you mean 'concepts'?"),
        ("profile", "profil", "red_team.profile: missing"),
    ],
)
def test_publish_refuses_a_wrong_policy_before_anything(
    old: str, new: str, told: str, policy_file: Path, errors: Lines
) -> None:
    policy_file.write_text(POLICY.replace(old, new))

    assert main(["publish", "nowhere", "--policy", "policy.toml", "--repo", "acme/pico"]) == 2
    lines = errors()
    assert any(told in line for line in lines)
    assert all(line.startswith("error: policy.toml: ") for line in lines)
    assert not Path("runs").exists()


def test_policy_without_concepts(policy_file: Path, errors: Lines) -> None:
    start, end = POLICY.index("[[concepts]]"), POLICY.index("[red_team]")
    policy_file.write_text(POLICY[:start] + POLICY[end:])

    assert main(["attack", "nowhere", "--policy", "policy.toml"]) == 2
    assert errors() == [
        "error: policy.toml: a policy needs at least one of [[concepts]] or [[merge_targets]]"
    ]


@pytest.mark.parametrize("repo", ["pico", "a/b/c", "../x/y", "acme/..", "acme/", "", "ac me/x"])
def test_repo_that_is_not_owner_name(repo: str, policy_file: Path, errors: Lines) -> None:
    assert main(["publish", "nowhere", "--policy", "policy.toml", "--repo", repo]) == 2
    (line,) = errors()
    assert "is not a repository id; write owner/name" in line


def test_policy_from_the_environment(
    policy_file: Path, monkeypatch: pytest.MonkeyPatch, errors: Lines
) -> None:
    monkeypatch.setenv("RELEASE_GUARD_POLICY", str(policy_file))

    assert main(["attack", "nowhere"]) == 1
    advice = "give a model folder, or OWNER/NAME@REVISION for a model on the Hub"
    assert errors() == [f"error: nowhere: no such folder; {advice}"]


def test_missing_policy_file(errors: Lines) -> None:
    assert main(["attack", "nowhere", "--policy", "none.toml"]) == 2
    assert errors() == ["error: none.toml: cannot be read (No such file or directory)"]


def test_misspelt_option_offers_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", "x", "--polcy", "y"]) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert "--policy" in err


def test_wrong_command_line_is_json_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--json", "--kye", "x"]) == 2

    document = json.loads(capsys.readouterr().out)
    assert (document["command"], document["exit_code"]) == ("verify", 2)


def test_keygen(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", "--output", "keys", "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert (document["private"], document["public"]) == ("keys/key.pem", "keys/key.pub")
    assert len(document["fingerprint"]) == 64
    assert "not encrypted" in document["warnings"][0]
    assert stat.S_IMODE((here / "keys" / "key.pem").stat().st_mode) == 0o600


def test_keygen_with_a_password_says_nothing_of_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELEASE_GUARD_KEY_PASSWORD", "hunter2hunter2")

    assert main(["keygen"]) == 0
    out, err = capsys.readouterr()
    assert out == "key.pem\nkey.pub\n"
    assert "hunter2" not in err
    assert b"ENCRYPTED" in (here / "key.pem").read_bytes()


def test_keygen_never_overwrites(errors: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    main(["keygen"])
    capsys.readouterr()

    assert main(["keygen"]) == 1
    assert "a key is never overwritten" in errors()[0]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda here: (here / "key.pem").unlink(), "cannot be read"),
        (lambda here: (here / "key.pem").chmod(0o644), "chmod 600"),
        (lambda here: (here / "key.pem").write_text("x"), "not a private key in PEM form"),
    ],
    ids=["missing", "open", "not-pem"],
)
def test_key_problems_end_publish_before_any_work(
    spoil: Callable[[Path], None],
    told: str,
    here: Path,
    policy_file: Path,
    capsys: pytest.CaptureFixture[str],
    errors: Lines,
) -> None:
    main(["keygen", "-q"])
    capsys.readouterr()
    spoil(here)

    assert main(["publish", "nowhere", "--policy", "policy.toml", "--repo", "acme/pico"]) == 1
    (line,) = errors()
    assert told in line


def test_verify_an_unsigned_folder(here: Path) -> None:
    (here / "model").mkdir()
    (here / "model" / "model.safetensors").write_bytes(b"x")
    assert run("keygen").returncode == 0
    done = run("verify", "model", "--key", "key.pub", modules=HEAVY)

    assert done.returncode == 4
    assert done.stdout.startswith("unsigned: model\n  signature      model.sig: missing")
    assert done.stderr.splitlines() == [  # torch stayed out
        "next: do not load it; ask its publisher for the signed release",
        "",
    ]


@pytest.mark.parametrize(
    ("target", "code", "told"),
    [
        ("nothing-here", 1, "no such folder"),
        ("hf://acme", 2, "is not a repository id"),
        ("hub/acme/pico@main", 1, "nothing has been pushed"),
    ],
)
def test_verify_targets(
    target: str, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["keygen", "-q"])
    capsys.readouterr()

    assert main(["verify", target, "--key", "key.pub", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == code
    assert told in document["errors"][0]


def test_report_is_written_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Run.claim(here / "run", {})
    folder.write("policy.toml", EVIDENCE_POLICY.encode())
    folder.write("evidence.jsonl", passing_evidence(example_policy()).to_jsonl())

    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == "run/report.html\n"
    first = folder.report.read_bytes()
    assert b"footwear" in first
    folder.report.unlink()
    main(["report", "run", "-q"])
    assert folder.report.read_bytes() == first


def test_report_wants_the_policy_of_the_evidence(here: Path, errors: Lines) -> None:
    folder = Run.claim(here / "run", {})
    folder.write("policy.toml", EVIDENCE_POLICY.replace("seed = 7", "seed = 8").encode())
    folder.write("evidence.jsonl", passing_evidence(example_policy()).to_jsonl())

    assert main(["report", "run"]) == 4
    assert "not the policy of this run's evidence" in errors()[0]
    assert main(["report", "elsewhere"]) == 1
    assert errors()[0].startswith("error: elsewhere/evidence.jsonl: no such file")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    done = run("completion", shell)

    assert done.returncode == 0
    assert "_RELEASE_GUARD_COMPLETE" in done.stdout


def test_completion_completes() -> None:
    words: Mapping[str, str] = {
        "_RELEASE_GUARD_COMPLETE": "bash_complete",
        "COMP_WORDS": "release-guard pub",
        "COMP_CWORD": "1",
    }

    assert run(**words).stdout == "plain,publish\n"


def test_unexpected_errors_are_one_line() -> None:
    short, long = without("cryptography", "keygen"), without("cryptography", "keygen", "-vv")

    assert (short.returncode, long.returncode) == (1, 1)
    assert short.stdout == long.stdout == ""
    assert short.stderr.startswith("error: unexpected ModuleNotFoundError: ")
    assert short.stderr.endswith("; -vv shows the traceback\n")
    assert short.stderr.count("\n") == 1
    assert long.stderr.startswith("Traceback")


@dataclass(frozen=True)
class Said:
    """What one command of the story said."""

    code: int
    out: str
    err: str
    trials: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory, image_data: Path, classifier_folder: Path
) -> Mapping[str, Said]:
    """An unprotected model: planned, attacked, planned again, published twice, changed policy."""
    folder = tmp_path_factory.mktemp("story")
    text = POLICY.replace(', { name = "lora", lr = 0.01 }', "")
    place_policy(folder, image_data, text)
    common = [str(classifier_folder), "--policy", "policy.toml", "--workers", "1"]
    publish = ["publish", *common, "--repo", "acme/pico", "--as-is"]
    with contextlib.chdir(folder):
        said = {"keys": say("keygen", "-q"), "plan": say("plan", *common, "--as-is", "--json")}
        said["attack"] = say("attack", *common, "--json")
        said |= replays(Path(said["attack"].document["report"]).parent, str(classifier_folder))
        said["plan again"] = say("plan", *common, "--as-is", "--json")
        said["publish"] = say(*publish, "-q", "--json")
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
            said["publish again"] = say(*publish)
        (folder / "policy.toml").write_text(text + "\n")
        said["another policy"] = say(*publish)
        said["hub"] = Said(int(Path("hub").exists()), "", "", b"")
        said["summary"] = Said(0, Path("summary.md").read_text(), "", b"")
    return said


def replays(folder: Path, source: str) -> dict[str, Said]:
    """The first trial of a run again: as it is, on other weights, and from forged evidence."""
    header, *lines = (folder / "evidence.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    record = next(entry["record"] for entry in entries if "record" in entry)
    key = Trial.model_validate(record["trial"]).key
    record["outcome"]["ending"] = "collapsed"
    forged = Path("forged.jsonl")
    forged.write_text("\n".join([header, *map(json.dumps, entries)]))
    common = ["--policy", "policy.toml", "--source", source]
    return {
        "replay": say("replay", key[:16], "--run", str(folder), *common, "--json"),
        "replay in words": say("replay", key, "--run", str(folder), *common),
        "replay of a forgery": say("replay", key, "--evidence", "forged.jsonl", *common, "-q"),
        "replay of nothing": say("replay", "0000", "--run", str(folder), *common),
    }


def say(*arguments: str) -> Said:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    ledger = Path("runs/trials.jsonl")
    return Said(
        code, out.getvalue(), err.getvalue(), ledger.read_bytes() if ledger.exists() else b""
    )


def test_plan_spends_nothing(story: Mapping[str, Said]) -> None:
    plan = story["plan"].document

    assert (story["plan"].code, story["plan"].trials) == (0, b"")
    assert plan["trials"] == sum(row["trials"] for row in plan["rows"])
    assert plan["held"] == 0
    assert 0 < plan["seconds"] < 3_600


def test_plan_knows_what_the_ledger_holds(story: Mapping[str, Said]) -> None:
    plan, again = story["plan"].document, story["plan again"].document

    assert again["held"] == story["attack"].document["trials"] > 0
    assert again["steps"] < plan["steps"]


def test_attack_judges_and_signs_nothing(story: Mapping[str, Said]) -> None:
    attack = story["attack"]

    assert (attack.code, attack.document["verdict"]) == (3, "FAIL")
    assert attack.document["report"].startswith("runs/attack-")
    assert "attack the release: 1 of 1" in attack.err


def test_a_trial_is_replayed_bit_by_bit(story: Mapping[str, Said]) -> None:
    said, document = story["replay"], story["replay"].document

    assert (said.code, document["agreement"], document["distance"]) == (0, "bit-identical", 0)
    assert document["recorded"]["ending"] == document["replayed"]["ending"]
    assert document["recorded_on"] == document["replayed_on"]
    first, trial, recorded, replayed = story["replay in words"].out.splitlines()
    assert first == "bit-identical (largest difference 0, tolerance 0.02)"
    assert "finetune" in trial
    assert recorded.split(": ")[1] == replayed.split(": ")[1]


def test_a_replay_that_differs_exits_with_4(story: Mapping[str, Said]) -> None:
    said = story["replay of a forgery"]

    assert said.code == 4
    assert said.out.startswith("different (")
    assert "  recorded: collapsed" in said.out


def test_a_trial_that_is_not_in_the_evidence(story: Mapping[str, Said]) -> None:
    said = story["replay of nothing"]

    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: 0000: no trial of this evidence")


@pytest.mark.parametrize("given", [[], ["--evidence", "a", "--run", "b"]])
def test_replay_wants_one_place_of_evidence(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "00", "--source", "x", *given]) == 2
    assert "give one of --evidence and --run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "code", "told"),
    [
        (["--engine", "rya"], 2, "engine.name: 'rya' is no engine; did you mean 'ray'?"),
        (["--address", "head:6379"], 2, "engine.address: not an option of local"),
        (["--gpus", "0.5"], 2, "engine.gpus: not an option of local"),
        (["--engine", "ray", "--gpus", "1.5"], 2, "engine.gpus: found 1.5"),
        (["--engine", "ray", "--address", "127.0.0.1:1"], 1, "no Ray cluster answers there"),
    ],
)
def test_an_engine_that_cannot_run_ends_it_before_any_work(
    where: list[str], code: int, told: str, policy_file: Path, errors: Lines
) -> None:
    if "ray" in where and importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    ledger = Path("runs/trials.jsonl")
    ledger.parent.mkdir()
    ledger.write_bytes(b"what was tried")
    common = ["nowhere", "--policy", str(policy_file)]
    for command in (["attack", *common], ["publish", *common, "--repo", "acme/pico"]):
        assert main([*command, *where]) == code
        (line,) = errors()
        assert told in line
    assert ledger.read_bytes() == b"what was tried"
    assert list(ledger.parent.iterdir()) == [ledger]


def test_refusal_says_why_first_then_what_to_do(story: Mapping[str, Said]) -> None:
    publish, again = story["publish"], story["publish again"]

    assert (publish.code, publish.err) == (3, "")
    assert (publish.document["verdict"], publish.document["pushed"]) == ("FAIL", False)
    assert (again.code, again.out) == (3, "")
    told = again.err[again.err.index("REFUSED") :].splitlines()
    assert told[0] == "REFUSED (FAIL), because:"
    assert told[1].startswith("  controls/changed: ")
    assert told[-2] == "nothing was published"
    assert told[-1].startswith("next: ")
    assert story["hub"].code == 0


def test_workflow_page_gets_the_verdict_once(story: Mapping[str, Said]) -> None:
    text = story["summary"].out

    assert text.startswith("**FAIL**: ")
    assert text.count("**FAIL**") == 1
    assert "- FAIL `controls/changed`: " in text


def test_nothing_is_tried_twice(story: Mapping[str, Said]) -> None:
    assert story["attack"].trials.count(b"\n") == story["attack"].document["trials"]
    assert story["publish again"].trials == story["publish"].trials == story["attack"].trials


def test_folder_of_another_run(story: Mapping[str, Said]) -> None:
    assert story["another policy"].code == 2
    assert "belongs to another run (policy differ)" in story["another policy"].err


INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from release_guard.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupt_ends_everything_and_says_how_to_go_on(
    policy_file: Path, classifier_folder: Path
) -> None:
    policy_file.write_text(POLICY.replace("limit = 60", "limit = 100_000"))
    assert main(["keygen", "-q"]) == 0
    arguments = [str(classifier_folder), "--policy", "policy.toml", "--workers", "1"]
    arguments += ["--repo", "acme/pico", "--as-is"]
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", INTERRUPTIBLE, "publish", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = _workers_of(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()

    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == (
        "stopped; nothing was published. Run the same command again to go on where it stopped"
    )
    assert not psutil.wait_procs(workers, timeout=60)[1], "a worker survived"
    assert not Path("hub").exists()


def _workers_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Wait until it has started one."""
    while process.poll() is None:
        if found := workers_of(psutil.Process(process.pid)):
            return found
        time.sleep(0.1)
    raise AssertionError(process.communicate())
