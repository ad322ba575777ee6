"""`release-guard verify` as consumers run it: exit codes, what it prints, what it loads."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hubserver import Blob, HubServer
from judged import Judged, fixed_key, judge, released, write
from sigstoreserver import ISSUER, SigstoreServer
from tampering import Made

from release_guard.attestation import KEY_FILE
from release_guard.cli import main
from release_guard.manifest import SIGNATURE, FileEntry, Manifest, hash_directory, hash_file
from release_guard.oms import to_statement
from release_guard.signers.key import Key
from release_guard.signers.sigstore import Sigstore

NETWORK = ("torch", "transformers", "huggingface_hub", "huggingface_hub.hf_api", "httpx2")
_MOST_MEMORY, _LARGE = 300 << 20, 320 << 20  # bytes
CLASSES = ["signature", "weights", "configuration", "documentation", "evidence"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    today = datetime.now(UTC)
    times = {"started_at": today - timedelta(hours=1), "finished_at": today}
    written = {name: time.isoformat() for name, time in times.items()}
    return released(tmp_path_factory.mktemp("release"), **written)


@pytest.fixture(autouse=True)
def here(judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the release, the publisher's public key and a stranger's; no pins."""
    shutil.copytree(judged.candidate.directory, tmp_path / "model")
    shutil.copy(str(judged.signer.public), tmp_path / "key.pub")
    fixed_key(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RELEASE_GUARD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RELEASE_GUARD_PINS", str(tmp_path / "pins.toml"))
    return tmp_path


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What `--json` prints, and that it says the exit code."""
    capsys.readouterr()
    code = main(["verify", *arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == code
    return found


def process(*arguments: str, modules: Sequence[str] = (), **variables: str) -> Any:
    program = (
        "import sys\nfrom release_guard.cli import main\ncode = main(sys.argv[1:])\n"
        f"print('loaded:', *[name for name in {list(modules)!r} if name in sys.modules],"
        " file=sys.stderr)\nsys.exit(code)"
    )
    return subprocess.run(  # noqa: S603
        [sys.executable, "-c", program, "verify", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **variables},
        check=False,
    )


def sign_as(number: int, here: Path) -> None:
    """Somebody else signs the whole again and has their key lie in it."""
    signer, folder = fixed_key(here, number), here / "model"
    (folder / SIGNATURE).unlink()
    write(folder, KEY_FILE, signer.public_key)
    write(folder, SIGNATURE, signer.sign(to_statement(hash_directory(folder), name="model")))


def test_intact(capsys: pytest.CaptureFixture[str], judged: Judged) -> None:
    assert main(["verify", "model", "--key", "key.pub"]) == 0
    out, err = capsys.readouterr()
    until = datetime.fromisoformat(judged.evidence.finished_at) + timedelta(days=180)
    assert out.splitlines() == [
        "intact: model",
        "  weights        1 file as signed",
        "  configuration  2 files as signed",
        "  documentation  2 files as signed",
        "  evidence       7 files as signed; judged again: PASS",
        f"  claim          {judged.candidate.verdict.claim}",
        f"  valid until    {until:%Y-%m-%d}",
        f"  policy         sha256:{judged.policy.digest}",
        f"  signer         {judged.signer.identity}",
    ]
    assert err == ""


def test_every_class_in_a_row_of_its_own(
    here: Path, capsys: pytest.CaptureFixture[str], judged: Judged
) -> None:
    for name in ("model.safetensors", "sub/modeling.py", "README.md", ".release-guard/x"):
        write(here / "model", name, b"other")
    (here / "model" / "config.json").unlink()
    assert main(["verify", "model", "--key", "key.pub"]) == 4
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "weights-changed, config-changed, evidence-invalid, documentation-changed: model",
        "  weights        changed: model.safetensors",
        "  configuration  missing: config.json",
        "  configuration  added: sub/modeling.py",
        "  documentation  changed: README.md",
        "  evidence       added: .release-guard/x",
        f"  signer         {judged.signer.identity}",
    ]
    assert err.startswith("next: do not load it")


def test_the_document(here: Path, capsys: pytest.CaptureFixture[str], judged: Judged) -> None:
    found = document(capsys, "model", "--key", "key.pub")
    assert (found["schema_version"], found["command"], found["states"]) == (1, "verify", ["intact"])
    assert (found["target"], found["looked_at"], found["trusted_by"]) == (
        "model",
        "model",
        "command line",
    )
    assert list(found["classes"]) == CLASSES
    assert all(each["holds"] for each in found["classes"].values())
    assert [each["signed"] for each in found["classes"].values()] == [0, 1, 2, 2, 7]
    assert (found["findings"], found["verdict"]) == ([], "PASS")
    assert found["identity"] == judged.signer.identity

    write(here / "model", "config.json", b"other")
    found = document(capsys, "model", "--key", "key.pub")
    assert found["states"] == ["config-changed"]
    assert found["findings"] == [
        {
            "state": "config-changed",
            "message": "changed: config.json",
            "files": ["config.json"],
            "how": "changed",
        }
    ]
    assert found["classes"]["configuration"] == {
        "holds": False,
        "signed": 2,
        "differing": ["config.json"],
        "absent": [],
    }
    assert found["classes"]["weights"]["holds"]


def test_without_a_signature_nothing_is_known(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "model" / SIGNATURE).unlink()
    found = document(capsys, "model", "--key", "key.pub")
    assert found["states"] == ["unsigned"]
    assert [each["holds"] for each in found["classes"].values()] == [False, None, None, None, None]


def test_documents_alone_are_a_warning_unless_it_is_strict(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here / "model", "README.md", b"# Edited on the hub\n")
    relaxed = document(capsys, "model", "--key", "key.pub")
    assert (relaxed["exit_code"], relaxed["states"]) == (0, ["documentation-changed"])
    assert "--strict" in relaxed["warnings"][0]
    strict = document(capsys, "model", "--key", "key.pub", "--strict")
    assert (strict["exit_code"], strict["states"]) == (4, ["documentation-changed"])
    (here / "model" / "README.md").unlink()
    assert document(capsys, "model", "--key", "key.pub", "--strict")["exit_code"] == 4
    partial = document(capsys, "model", "--key", "key.pub", "--strict", "--partial")
    assert (partial["exit_code"], partial["states"]) == (0, ["intact"])
    assert partial["classes"]["documentation"]["absent"] == ["README.md"]


def test_partial_says_what_is_not_here(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "model" / "model.safetensors").unlink()
    assert main(["verify", "model", "--key", "key.pub"]) == 4
    assert "add --partial" in capsys.readouterr().err
    assert main(["verify", "model", "--key", "key.pub", "--partial"]) == 0
    out, _ = capsys.readouterr()
    assert "  weights        0 files as signed, 1 more not here\n" in out


def test_a_policy_of_ones_own(
    here: Path, capsys: pytest.CaptureFixture[str], judged: Judged
) -> None:
    write(here, "mine.toml", judged.policy.source)
    arguments = ("model", "--key", "key.pub", "--policy", "mine.toml")
    assert document(capsys, *arguments)["exit_code"] == 0
    write(here, "mine.toml", judged.policy.source + b"\n")
    assert document(capsys, *arguments)["states"] == ["evidence-invalid"]


def test_rejudge_shows_every_check(capsys: pytest.CaptureFixture[str], judged: Judged) -> None:
    assert main(["verify", "model", "--key", "key.pub", "--rejudge"]) == 0
    out, _ = capsys.readouterr()
    for check in judged.candidate.verdict.checks:
        assert f"  {check.result.name} {check.name}: " in out


def test_what_a_publisher_writes_moves_no_cursor(
    here: Path, capsys: pytest.CaptureFixture[str], judged: Judged
) -> None:
    made = Made(here / "model", judged, judged.signer)
    nasty = {"claim": "no breach\x1b[2J\rintact\u202e"}
    made.state("resistance", lambda found: found["predicate"].update(nasty))
    assert main(["verify", "model", "--key", "key.pub"]) == 0
    out, _ = capsys.readouterr()
    assert "  claim          no breach\\u001b[2J\\rintact\\u202e\n" in out


def test_a_fingerprint(here: Path, capsys: pytest.CaptureFixture[str], judged: Judged) -> None:
    mark = judged.signer.identity
    assert document(capsys, "model", "--fingerprint", mark)["states"] == ["intact"]
    sign_as(2, here)
    assert document(capsys, "model", "--fingerprint", mark)["states"] == ["wrong-signer"]


def test_nobody_is_trusted_for_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "model"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    for option in ("--key", "--fingerprint", "--identity", "--issuer", "--trust-on-first-use"):
        assert option in line
    assert not (here / "pins.toml").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--key", "key.pub", "--fingerprint", "ab" * 32],
        ["--identity", "me@example.org"],
        ["--issuer", "https://example.org"],
        ["--fingerprint", "ab"],
        ["--key", "key.pub", "--trust-on-first-use"],
        ["--key", "model/.release-guard/key.pub"],
    ],
)
def test_one_signer_and_no_more(
    arguments: list[str], capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert main(["verify", "model", *arguments]) == 2
    assert capsys.readouterr().out == ""
    assert not (here / "pins.toml").exists()


def test_first_use_is_told_loudly_and_pinned(
    here: Path, capsys: pytest.CaptureFixture[str], judged: Judged
) -> None:
    first = document(capsys, "model", "--trust-on-first-use", "-q")
    assert (first["exit_code"], first["trusted_by"]) == (0, "first use")
    (warning,) = first["warnings"]
    assert "trusted on first use" in warning
    assert judged.signer.identity in warning
    assert "pins.toml" in warning

    again = document(capsys, "model")
    assert (again["exit_code"], again["trusted_by"], again["warnings"]) == (0, "pin file", [])
    pins = (here / "pins.toml").read_bytes()
    sign_as(2, here)
    for arguments in ([], ["--trust-on-first-use"]):
        found = document(capsys, "model", *arguments)
        assert (found["exit_code"], found["states"]) == (4, ["wrong-signer"])
        assert "change it there only if" in found["warnings"][0]
        assert (here / "pins.toml").read_bytes() == pins
    assert document(capsys, "model", "--key", "2.pub")["states"] != ["wrong-signer"]


@pytest.mark.parametrize("spoilt", ["config.json", SIGNATURE, KEY_FILE])
def test_what_is_not_intact_is_not_pinned(
    here: Path, capsys: pytest.CaptureFixture[str], spoilt: str
) -> None:
    write(here / "model", spoilt, b"other")
    assert main(["verify", "model", "--trust-on-first-use"]) == 4
    assert not (here / "pins.toml").exists()


def test_a_pin_file_that_cannot_be_written_is_no_success(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELEASE_GUARD_PINS", str(here / "key.pub" / "pins.toml"))
    assert main(["verify", "model", "--trust-on-first-use"]) != 0
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1


def test_a_release_without_a_key(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the identity that its publisher announces, or by the one that its first look names."""
    with SigstoreServer() as server:
        server.enter(monkeypatch, here / "home")
        signer = Sigstore(identity=server.workflow, issuer=ISSUER)
        today = datetime.now(UTC).isoformat()
        judge(here / "keyless", signer, started_at=today, finished_at=today).release()
        named = ("--identity", server.workflow, "--issuer", ISSUER)
        assert document(capsys, "keyless", *named)["states"] == ["intact"]
        for wrong in (
            ("--identity", f"{server.workflow}-not", "--issuer", ISSUER),
            ("--identity", server.workflow, "--issuer", f"{ISSUER}/not"),
            ("--key", "key.pub"),
        ):
            assert document(capsys, "keyless", *wrong)["states"] == ["wrong-signer"]

        first = document(capsys, "keyless", "--trust-on-first-use")
        assert (first["states"], first["identity"]) == (["intact"], server.workflow)
        assert f"{server.workflow} by {ISSUER}" in first["warnings"][0]
        assert document(capsys, "keyless")["trusted_by"] == "pin file"
        (here / "model").rename(here / "other")
        (here / "keyless").rename(here / "model")
        sign_as(2, here)
        (here / "model").rename(here / "keyless")
        found = document(capsys, "keyless", "--trust-on-first-use")
        assert (found["exit_code"], found["states"]) == (4, ["wrong-signer"])


@pytest.mark.parametrize("more", [[], ["--rejudge"]])
def test_verifying_a_folder_loads_neither_torch_nor_the_client_of_the_hub(more: list[str]) -> None:
    done = process("model", "--key", "key.pub", *more, modules=NETWORK)
    assert (done.returncode, done.stderr) == (0, "loaded:\n")


def test_a_revision_on_the_hub_without_its_weights(here: Path, judged: Judged) -> None:
    with HubServer() as server:
        server.create("acme/classifier")
        for entry in hash_directory(here / "model").entries:
            content = (here / "model" / entry.name).read_bytes()
            server.add("acme/classifier", entry.name, content)
            if entry.kind == "weights":  # in LFS: the hub lists their digest
                blob = Blob(entry.size, sha256=entry.digest)
                server.repositories["acme/classifier"].head.files[entry.name] = blob
        head = server.repositories["acme/classifier"].head.oid
        server.requests.clear()
        variables = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(here / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_canary",
        }
        done = process(
            "hf://acme/classifier", "--trust-on-first-use", "--json", modules=["torch"], **variables
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["looked_at"] == f"hf://acme/classifier@{head}"
        assert found["states"] == ["intact"]
        assert "hf://acme/classifier" in (here / "pins.toml").read_text()
        assert not any("model.safetensors" in path for _, path in server.requests)
        assert "hf_canary" not in done.stdout + done.stderr

        server.add("acme/classifier", "README.md", b"# Edited on the Hub\n")
        later = process(f"hf://acme/classifier@{head}", "--strict", **variables)
        assert (later.returncode, later.stdout.splitlines()[0]) == (
            0,
            f"intact: hf://acme/classifier@{head}",
        )
        strict = process("hf://acme/classifier", "--strict", **variables)
        assert strict.returncode == 4
        assert strict.stdout.startswith("documentation-changed: hf://acme/classifier@")
        server.add("acme/classifier", "model.safetensors", b"other weights")
        changed = process("hf://acme/classifier", **variables)
        assert changed.returncode == 4
        assert changed.stdout.startswith("weights-changed, documentation-changed: ")


@pytest.mark.parametrize("endpoint", ["http://hub.example.org", "http://10.0.0.1:8080"])
def test_a_hub_that_is_not_https_is_not_asked(endpoint: str) -> None:
    done = process("hf://acme/classifier", "--key", "key.pub", HF_ENDPOINT=endpoint)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not https" in done.stderr


def test_memory_stays_bounded_whatever_the_weights_weigh(here: Path) -> None:
    """Two sparse files, each larger than all the memory it may ever hold."""
    folder = here / "large"
    folder.mkdir()
    names = ["model-1.safetensors", "model-2.safetensors"]
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(_LARGE)
    listed = Manifest.of(FileEntry(name, *hash_file(folder / names[0])) for name in names)
    write(folder, SIGNATURE, fixed_key(here, 1).sign(to_statement(listed, name="large")))
    program = (
        "import sys\nfrom release_guard.cli import main\ncode = main(sys.argv[1:])\n"
        "most = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(most.split()[1], file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program, "verify", "large", "--key", "key.pub", "-q"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("evidence-missing")
    assert "  weights        2 files as signed\n" in done.stdout
    assert int(done.stderr.split()[-1]) << 10 < _MOST_MEMORY


def test_a_key_in_the_environment_is_not_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verifying needs no private key, and looks at none."""
    monkeypatch.setenv("RELEASE_GUARD_SIGNING_KEY", str(here / "nowhere.pem"))
    assert document(capsys, "model", "--key", "key.pub")["exit_code"] == 0
    assert Key(public=here / "key.pub").identity
