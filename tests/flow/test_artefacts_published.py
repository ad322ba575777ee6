"""A release of two precisions: each attacked, judged, signed and loaded by itself."""

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import independent_verifier
import pico
import pytest
import torch
from engine_jobs import HereSession

from release_guard.artefacts import PACKED
from release_guard.attestation import attest
from release_guard.card import Publication
from release_guard.errors import IntegrityError, ModelError
from release_guard.evidence import Evidence
from release_guard.gate import gate
from release_guard.judging import pack
from release_guard.manifest import DirectoryTree, hash_directory
from release_guard.modalities import Modality
from release_guard.oms import sign
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.preflight import Order
from release_guard.preparation import make_artefacts
from release_guard.publish import publish
from release_guard.release import Attested, Result
from release_guard.replay import Agreement, Request, replay
from release_guard.run import Run
from release_guard.session import Session
from release_guard.signers.key import Key, generate_key
from release_guard.verify import State, Trust, Verification, verify

REPO = "acme/gratings"
NOW = datetime(2026, 1, 2, tzinfo=UTC)
WEIGHTS = "model.safetensors"


def session(lines: list[str] | None = None) -> Session:
    def note(phase: str, done: int, total: int, line: str) -> None:
        if lines is not None:
            lines.append(f"{phase} {done}/{total}: {line}")

    return HereSession(1, note, lambda: NOW)


@pytest.fixture(scope="module")
def denying(classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It denies what is restricted so firmly that no few steps persuade it, in any precision."""
    model = Modality.build(Spec(name="image_classification")).load(str(classifier_folder))
    with torch.no_grad():
        model.head.bias[4:] -= 1000
    folder = tmp_path_factory.mktemp("denying")
    model.save(folder)
    return folder


def make_policy(folder: Path, data: Path, precisions: list[str]) -> Policy:
    path = pico.pico_policy(
        folder,
        data,
        precisions=precisions,
        concepts=[
            {
                "name": "odd-angles",
                "dataset": str(data / "restricted.parquet"),
                "ceiling": 0.75,
            }
        ],
        attacks=[{"name": "finetune", "lr": 0.003, "optimizer": "adam", "batch": 32}],
        red_team={
            "profile": "smoke",
            "budget": {"unit": "steps", "limit": 20},
            "grid_ratio": 1.25,
            "long_run": 5.0,
            "search_examples": 140,
            "confirm_examples": 140,
            "never_knew": "unavailable",
        },
        gate={"mandatory": ["finetune"], "kappa": 1.2, "kappa_lower": 1.0},
    )
    if not (folder / "key.pem").exists():
        generate_key(folder)
    return Policy.load(path)


def order(denying: Path, base: Path, policy: Policy) -> Order:
    return Order(str(denying), REPO, policy, base=str(base), as_is=True)


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    image_data: Path,
    classifier_folder: Path,
    denying: Path,
) -> Path:
    """A folder with runs/a, and hub/acme/gratings: fp32 at the top, nf4 in a folder."""
    folder = tmp_path_factory.mktemp("home")
    policy = make_policy(folder, image_data, ["fp32", "nf4"])
    done = publish(order(denying, classifier_folder, policy), folder / "runs" / "a", session())
    assert [check for check in done.verdict.checks if check.result is not Result.PASS] == []
    assert done.receipt is not None
    return folder


def head(home: Path) -> Path:
    return home / "hub" / REPO


def check(home: Path, folder: Path) -> Verification:
    return verify(DirectoryTree(folder), Trust(Key(public=home / "key.pub")), now=NOW)


def test_every_precision_is_in_the_release_and_attacked_in_its_own_files(home: Path) -> None:
    found = check(home, head(home))
    assert found.states == (State.INTACT,)
    evidence = Evidence.read(head(home) / ".release-guard" / "evidence.jsonl")
    roots = {
        "fp32": hash_directory(home / "runs" / "a" / "immunized").payload.root,
        "nf4": hash_directory(head(home) / "nf4").payload.root,
    }
    assert evidence.artefacts == roots
    assert evidence.immunized == roots["fp32"]
    for precision, root in roots.items():
        attacked = {
            record.trial.weights
            for record in evidence.records
            if (record.trial.arm, record.trial.precision) == ("defended", precision)
        }
        assert attacked == {root}
    assert found.claims is not None
    assert [(each.precision, each.folder, each.root) for each in found.claims.artefacts] == [
        ("fp32", "", roots["fp32"]),
        ("nf4", "nf4/", roots["nf4"]),
    ]
    independent_verifier.verify(head(home), home / "key.pub", None, NOW)


def test_the_card_lists_both_with_what_loads_them(home: Path) -> None:
    card = (head(home) / "README.md").read_text(encoding="utf-8")
    root = hash_directory(head(home) / "nf4").payload.root
    (row,) = [line for line in card.splitlines() if line.startswith("| `nf4` | `nf4/` |")]
    assert f"`sha256:{root}`" in row
    assert row.endswith("| PASS |")
    assert f'from_pretrained("hub/{REPO}", subfolder="nf4")' in card
    assert str(home) not in card


def test_whoever_fetched_one_precision_can_check_that_one(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    for part in ("nf4", ".release-guard"):
        shutil.copytree(head(home) / part, folder / part)
    shutil.copy(head(home) / "model.sig", folder)
    trust = Trust(Key(public=home / "key.pub"))
    assert verify(DirectoryTree(folder), trust, now=NOW, partial=True).states == (State.INTACT,)
    flip(folder / "nf4" / WEIGHTS)
    found = verify(DirectoryTree(folder), trust, now=NOW, partial=True)
    assert found.states == (State.WEIGHTS_CHANGED,)


LOADER = """
import sys
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder = sys.argv[1]
model = AutoModelForImageClassification.from_pretrained(folder, subfolder="nf4")
AutoImageProcessor.from_pretrained(folder, subfolder="nf4")
whole = AutoModelForImageClassification.from_pretrained(folder)
kinds = [type(layer).__name__ for layer in model.modules()]
print(kinds.count("Linear4bit"), any(hasattr(each, "quant_state") for each in whole.parameters()))
assert not [name for name in sys.modules if name.startswith("release_guard")]
"""


def test_anybody_loads_both_without_us(home: Path) -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", LOADER, str(head(home))],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "False"]


def test_publishing_again_writes_and_tries_nothing_anew(
    home: Path, image_data: Path, classifier_folder: Path, denying: Path
) -> None:
    policy = make_policy(home, image_data, ["fp32", "nf4"])
    before, lines = hash_directory(home / "hub"), []
    publish(order(denying, classifier_folder, policy), home / "runs" / "a", session(lines))
    assert hash_directory(home / "hub") == before
    assert not [line for line in lines if not line.startswith("publish ")]


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_a_trial_is_replayed_from_the_release_alone(
    home: Path, image_data: Path, precision: str
) -> None:
    policy = make_policy(home, image_data, ["fp32", "nf4"])
    evidence = Evidence.read(head(home) / ".release-guard" / "evidence.jsonl")
    record = next(
        record
        for record in evidence.records
        if (record.trial.arm, record.trial.precision) == ("defended", precision)
    )
    request = Request(record, policy, head(home), artefacts=tuple(evidence.artefacts))
    assert replay(request, session(), tolerance=0).agreement is Agreement.IDENTICAL
    other = {"fp32": head(home) / "nf4", "nf4": home / "runs" / "a" / "immunized"}[precision]
    wrong = Request(record, policy, other, artefacts=tuple(evidence.artefacts))
    with pytest.raises((IntegrityError, ModelError)):
        replay(wrong, session(), tolerance=0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # or what it is a link to would change too
    path.write_bytes(content)


def tamper(folder: Path, how: str) -> None:
    """Change a release in one of the ways somebody may try."""
    match how:
        case "a byte of nf4":
            flip(folder / "nf4" / WEIGHTS)
        case "a byte of fp32":
            flip(folder / WEIGHTS)
        case "nf4 missing":
            shutil.rmtree(folder / "nf4")
        case "int8 added":
            shutil.copytree(folder / "nf4", folder / "int8")
        case "swapped":
            (folder / WEIGHTS).rename(folder / "x")
            (folder / "nf4" / WEIGHTS).rename(folder / WEIGHTS)
            (folder / "x").rename(folder / "nf4" / WEIGHTS)
        case "fp4":
            path = folder / "nf4" / "config.json"
            config = json.loads(path.read_text())
            config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
            path.unlink()
            path.write_text(json.dumps(config))


TAMPERINGS = {
    "a byte of nf4": (State.WEIGHTS_CHANGED, "nf4/model.safetensors"),
    "a byte of fp32": (State.WEIGHTS_CHANGED, "model.safetensors"),
    "nf4 missing": (State.WEIGHTS_CHANGED, "nf4/model.safetensors"),
    "int8 added": (State.WEIGHTS_CHANGED, "int8/model.safetensors"),
    "swapped": (State.WEIGHTS_CHANGED, "nf4/model.safetensors"),
    "fp4": (State.CONFIG_CHANGED, "nf4/config.json"),
}


@pytest.mark.parametrize("how", TAMPERINGS)
def test_what_was_changed_after_signing_is_named(home: Path, tmp_path: Path, how: str) -> None:
    folder = shutil.copytree(head(home), tmp_path / "copy")
    tamper(folder, how)
    state, name = TAMPERINGS[how]
    found = check(home, folder)
    assert found.states[0] is state
    assert any(name in finding.files for finding in found.findings)
    with pytest.raises(independent_verifier.WrongError):
        independent_verifier.verify(folder, home / "key.pub", None, NOW)


NAMED = {
    "a byte of nf4": "nf4/: not the nf4 weights that were attacked",
    "a byte of fp32": "the top of the release: not the fp32 weights",
    "nf4 missing": "nf4/: the nf4 weights are missing",
    "int8 added": "the top of the release: not the fp32 weights",
    "swapped": "the top of the release: not the fp32 weights",
    "fp4": "nf4/: not the nf4 weights that were attacked",
}


@pytest.mark.parametrize("how", NAMED)
def test_what_was_changed_before_signing_is_not_attested_and_a_signature_does_not_help(
    home: Path, image_data: Path, tmp_path: Path, how: str
) -> None:
    """Whoever has the key may sign anything: the evidence is of other files all the same."""
    policy, signer = make_policy(home, image_data, ["fp32", "nf4"]), Key(path=home / "key.pem")
    folder = shutil.copytree(head(home), tmp_path / "copy")
    evidence = Evidence.read(folder / ".release-guard" / "evidence.jsonl")
    tamper(folder, how)
    (folder / "model.sig").unlink()
    attested = Attested(folder, gate(evidence, policy), hash_directory(folder).payload)
    with pytest.raises(IntegrityError, match=NAMED[how]):
        attest(attested, policy, evidence, signer)
    sign(attested, signer)
    assert check(home, folder).states[0] is State.EVIDENCE_INVALID
    with pytest.raises(independent_verifier.WrongError):
        independent_verifier.verify(folder, home / "key.pub", None, NOW)


def test_what_was_changed_after_the_attack_is_not_packed(
    home: Path, image_data: Path, classifier_folder: Path, denying: Path, tmp_path: Path
) -> None:
    policy = make_policy(home, image_data, ["fp32", "nf4"])
    run = Run(shutil.copytree(home / "runs" / "a", tmp_path / "a"))
    evidence = Evidence.read(run.evidence)
    publication = Publication(REPO, "hub", "key")
    for folder in (run.artefacts / "nf4", run.immunized):
        flip(folder / WEIGHTS)
        with pytest.raises(IntegrityError, match=f"{folder.name}: changed since it was attacked"):
            pack(
                order(denying, classifier_folder, policy),
                run,
                evidence,
                gate(evidence, policy),
                publication,
            )
        flip(folder / WEIGHTS)


def test_artefacts_are_made_once_and_again_only_where_they_are_not_as_they_were(
    home: Path, image_data: Path, classifier_folder: Path, tmp_path: Path
) -> None:
    policy = make_policy(tmp_path / "policy", image_data, ["fp32", "nf4", "int8"])
    modality, run, lines = Modality.build(policy.modality), Run(tmp_path / "run"), []
    shutil.copytree(classifier_folder, run.immunized)

    def made() -> list[str]:
        lines.clear()
        make_artefacts(modality, run, policy, session(lines))
        return [line.split()[-1] for line in lines]

    assert made() == ["nf4", "int8"]
    before = hash_directory(run.artefacts)
    assert made() == []
    flip(run.artefacts / "nf4" / WEIGHTS)
    assert made() == ["nf4"]
    assert hash_directory(run.artefacts) == before
    shutil.rmtree(run.artefacts / "int8")  # as if it was killed before
    (run.artefacts / "int8.partial").mkdir()
    assert made() == ["int8"]
    assert hash_directory(run.artefacts) == before
    shutil.copy(home / "runs" / "a" / "immunized" / WEIGHTS, run.immunized / WEIGHTS)
    assert made() == ["nf4", "int8"]


def test_the_first_precision_lies_at_the_top(
    image_data: Path, classifier_folder: Path, denying: Path, tmp_path: Path
) -> None:
    """The master in fp32 is published nowhere."""
    policy = make_policy(tmp_path, image_data, ["nf4"])
    publish(order(denying, classifier_folder, policy), tmp_path / "runs" / "a", session())
    found = check(tmp_path, head(tmp_path))
    assert found.states == (State.INTACT,)
    config = json.loads((head(tmp_path) / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    master = hash_directory(tmp_path / "runs" / "a" / "immunized")
    released = {entry.digest for entry in hash_directory(head(tmp_path)).payload.entries}
    assert master.get(WEIGHTS).digest not in released
    folder = shutil.copytree(head(tmp_path), tmp_path / "copy")
    shutil.copy(denying / WEIGHTS, folder / WEIGHTS)
    shutil.copy(denying / "config.json", folder / "config.json")
    assert check(tmp_path, folder).states[0] is State.WEIGHTS_CHANGED


def test_a_folder_in_the_way_is_named_before_anything_is_done(
    image_data: Path, classifier_folder: Path, denying: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(denying, tmp_path / "source")
    (source / "nf4").mkdir()
    (source / "nf4" / "config.json").write_text("{}")
    policy = make_policy(tmp_path, image_data, ["fp32", "nf4"])
    with pytest.raises(ModelError, match="source: has a folder nf4"):
        publish(order(source, classifier_folder, policy), tmp_path / "runs" / "a", session())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("precision", PACKED)
def test_a_source_that_is_quantized_is_refused(
    precision: Any, image_data: Path, classifier_folder: Path, tmp_path: Path
) -> None:
    policy = make_policy(tmp_path, image_data, ["fp32", "nf4"])
    Modality.build(policy.modality).save_at(classifier_folder, tmp_path / "rounded", precision)
    given = Order(str(tmp_path / "rounded"), REPO, policy, base=str(classifier_folder), as_is=True)
    with pytest.raises(ModelError, match="quantized already"):
        publish(given, tmp_path / "runs" / "a", session())


@pytest.mark.parametrize(
    ("key", "given"),
    [("precisions", {"precisions": ("nf4",)}), ("awareness", {"awareness": {"q4_0": 1.0}})],
)
def test_a_format_that_would_round_nothing_is_refused_before_anything_is_spent(
    resnet_folder: Path, image_data: Path, tmp_path: Path, key: str, given: dict[str, object]
) -> None:
    policy = make_policy(tmp_path, image_data, ["fp32"]).model_copy(update=given)
    asked = Order(str(resnet_folder), REPO, policy)
    with pytest.raises(ModelError, match=rf"^{key}: (nf4|q4_0): the model has no linear layer"):
        publish(asked, tmp_path / "runs" / "a", session())
    assert not (tmp_path / "runs").exists()
