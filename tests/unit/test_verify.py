import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import independent_verifier
import pytest
from evidence_builder import MERGED, example_policy, refused_evidence
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import FILES, NOW, Judged, about, check, fixed_key, judge, write

from release_guard.attestation import EVIDENCE_FILE, KEY_FILE, POLICY_FILE, bundle_name, statements
from release_guard.errors import IntegrityError, ReleaseGuardError
from release_guard.evidence import (
    Arm,
    Change,
    Cost,
    Ending,
    Evidence,
    Origin,
    Outcome,
    Point,
    Record,
    Retention,
    ScoredSplit,
    StageReport,
    Trial,
)
from release_guard.gate import gate
from release_guard.inspection import document, rejudged_lines
from release_guard.manifest import SIGNATURE, DirectoryTree, hash_directory
from release_guard.oms import to_statement
from release_guard.release import Candidate
from release_guard.signers.key import Key
from release_guard.verify import State, Trust, require_intact, verify

SVR, RESISTANCE, TEST_RESULT = (bundle_name(kind) for kind in ("svr", "resistance", "test-result"))
ALL = (
    *FILES,
    POLICY_FILE,
    EVIDENCE_FILE,
    SVR,
    RESISTANCE,
    TEST_RESULT,
    KEY_FILE,
    ".release-guard/report.html",
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Key, Key]:
    folder = tmp_path_factory.mktemp("keys")
    return fixed_key(folder, 1), fixed_key(folder, 2)


@pytest.fixture(scope="module")
def judged(keys: tuple[Key, Key], tmp_path_factory: pytest.TempPathFactory) -> Judged:
    made = judge(tmp_path_factory.mktemp("release") / "model", keys[0])
    made.release()
    return made


@pytest.fixture
def folder(judged: Judged, tmp_path: Path) -> Path:
    return Path(shutil.copytree(judged.candidate.directory, tmp_path / "model"))


@pytest.fixture(scope="module")
def ours(keys: tuple[Key, Key]) -> Key:
    return Key(public=keys[0].public)


def seal(folder: Path, signer: Key) -> None:
    """Sign whatever lies there, as a publisher who is careless or lies could."""
    (folder / SIGNATURE).unlink(missing_ok=True)
    write(folder, SIGNATURE, signer.sign(to_statement(hash_directory(folder), name="model")))


def swap(
    folder: Path, judged: Judged, signer: Key, kind: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """Replace one statement by another that is signed as well, and sign the whole again."""
    source = statements(judged.candidate, judged.policy, judged.evidence)[kind]
    statement = json.loads(source)
    change(statement)
    write(folder, bundle_name(kind), signer.sign(json.dumps(statement).encode()))
    seal(folder, signer)


def replace_evidence(folder: Path, judged: Judged, content: bytes) -> None:
    """Other evidence, named and signed as if it were the run's."""
    write(folder, EVIDENCE_FILE, content)

    def named(statement: dict[str, Any]) -> None:
        digest = hashlib.sha256(content).hexdigest()
        statement["predicate"]["report"]["digest"]["sha256"] = digest

    swap(folder, judged, judged.signer, "resistance", named)


def agrees(folder: Path, key: Key, policy: str | None = None) -> bool:
    """What a verifier that shares no line with ours says."""
    try:
        independent_verifier.verify(folder, key.public, policy, NOW)
    except (independent_verifier.WrongError, KeyError, ValueError, OSError):
        return False
    return True


def test_a_release_is_intact(folder: Path, judged: Judged, ours: Key) -> None:
    found = check(folder, ours, judged.policy.digest)
    assert found.states == (State.INTACT,)
    assert (found.exit_code, found.findings, found.notes) == (0, (), ())
    assert found.identity == ours.identity
    assert found.claims is not None
    assert found.claims.claim == judged.candidate.verdict.claim
    assert found.claims.policy == judged.policy.digest
    require_intact(found)
    assert agrees(folder, ours, judged.policy.digest)


def test_a_release_that_is_about_merges_alone_is_intact(ours: Key, tmp_path: Path) -> None:
    """No mandatory attack trains on a merge target; those that are listed for it must hold."""
    concept = '[[concepts]]\nname = "footwear"\ndataset = "footwear.parquet"\nceiling = 0.5\n'
    policy = example_policy(*MERGED, (concept, ""))
    made = judge(tmp_path / "model", fixed_key(tmp_path, 1), policy=policy)
    assert made.candidate.verdict.passed
    made.release()
    assert check(tmp_path / "model", ours).states == (State.INTACT,)


def test_the_name_of_the_folder_does_not_matter(folder: Path, ours: Key) -> None:
    assert check(folder.rename(folder.with_name("other")), ours).states == (State.INTACT,)


@pytest.mark.parametrize(
    ("name", "changed", "missing"),
    [
        ("model.safetensors", State.WEIGHTS_CHANGED, State.WEIGHTS_CHANGED),
        ("config.json", State.CONFIG_CHANGED, State.CONFIG_CHANGED),
        ("sub/vocab ä.txt", State.CONFIG_CHANGED, State.CONFIG_CHANGED),
        ("README.md", State.DOCUMENTATION_CHANGED, State.DOCUMENTATION_CHANGED),
        (POLICY_FILE, State.EVIDENCE_INVALID, State.EVIDENCE_MISSING),
        (EVIDENCE_FILE, State.EVIDENCE_INVALID, State.EVIDENCE_MISSING),
        (".release-guard/report.html", State.EVIDENCE_INVALID, State.EVIDENCE_MISSING),
        (SVR, State.EVIDENCE_INVALID, State.EVIDENCE_MISSING),
        (RESISTANCE, State.EVIDENCE_INVALID, State.EVIDENCE_MISSING),
        (TEST_RESULT, State.EVIDENCE_INVALID, State.EVIDENCE_MISSING),
    ],
)
def test_every_change_has_its_state(
    folder: Path, ours: Key, name: str, changed: State, missing: State
) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    found = check(folder, ours)
    assert found.states == (changed,)
    assert found.findings[0].files == (name,)
    assert name in found.findings[0].message
    assert found.exit_code == (0 if changed is State.DOCUMENTATION_CHANGED else 4)
    (folder / name).unlink()
    found = check(folder, ours)
    assert found.states == (missing,)
    assert not agrees(folder, ours)
    with pytest.raises(IntegrityError, match="missing: "):
        require_intact(found)


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("extra.safetensors", State.WEIGHTS_CHANGED),
        ("sub/modeling.py", State.CONFIG_CHANGED),
        ("NOTICE", State.DOCUMENTATION_CHANGED),
        (".release-guard/more.json", State.EVIDENCE_INVALID),
    ],
)
def test_an_added_file_has_its_state(folder: Path, ours: Key, name: str, state: State) -> None:
    write(folder, name, b"new")
    found = check(folder, ours)
    assert found.states == (state,)
    assert found.findings[0].message == f"added: {name}"
    assert not agrees(folder, ours)


def test_all_states_are_told_gravest_first(folder: Path, ours: Key) -> None:
    for name in ("model.safetensors", "config.json", "README.md", SVR):
        write(folder, name, b"other")
    found = check(folder, ours, now=datetime(2030, 1, 1, tzinfo=UTC))
    assert found.states == (
        State.WEIGHTS_CHANGED,
        State.CONFIG_CHANGED,
        State.EVIDENCE_INVALID,
        State.DOCUMENTATION_CHANGED,
    )
    assert found.exit_code == 4


def test_a_subset_of_the_files_when_asked_for(folder: Path, ours: Key) -> None:
    for name in ("config.json", "README.md"):
        (folder / name).unlink()
    assert check(folder, ours, partial=True).states == (State.INTACT,)
    assert check(folder, ours).states == (State.CONFIG_CHANGED, State.DOCUMENTATION_CHANGED)
    write(folder, "model.safetensors", b"other")
    assert check(folder, ours, partial=True).states == (State.WEIGHTS_CHANGED,)
    (folder / EVIDENCE_FILE).unlink()
    assert State.EVIDENCE_MISSING in check(folder, ours, partial=True).states


def test_unsigned(folder: Path, ours: Key) -> None:
    (folder / SIGNATURE).unlink()
    found = check(folder, ours)
    assert (found.states, found.exit_code) == ((State.UNSIGNED,), 4)
    assert found.signed is None
    assert not agrees(folder, ours)


def test_another_signer_is_wrong_whatever_key_the_folder_offers(
    folder: Path, keys: tuple[Key, Key], ours: Key
) -> None:
    seal(folder, keys[1])
    write(folder, "key.pub", Path(str(keys[1].public)).read_bytes())
    found = check(folder, ours)
    assert (found.states, found.exit_code) == ((State.WRONG_SIGNER,), 4)
    assert check(folder, Key(public=keys[1].public)).states != (State.INTACT,)
    assert not agrees(folder, ours)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"a":1,"a":1}'])
def test_a_signature_that_is_none(folder: Path, ours: Key, content: bytes) -> None:
    write(folder, SIGNATURE, content)
    assert check(folder, ours).states == (State.WRONG_SIGNER,)


def test_a_signed_statement_about_something_else_is_no_signature(
    folder: Path, judged: Judged, keys: tuple[Key, Key], ours: Key
) -> None:
    shutil.copy(folder / SVR, folder / SIGNATURE)
    assert check(folder, ours).states == (State.UNSIGNED,)
    write(folder, SIGNATURE, keys[0].sign(b"no statement"))
    assert check(folder, ours).states == (State.UNSIGNED,)


def test_a_huge_signature_is_not_read(folder: Path, ours: Key) -> None:
    with (folder / SIGNATURE).open("wb") as file:
        file.truncate((16 << 20) + 1)
    found = check(folder, ours)
    assert found.states == (State.WRONG_SIGNER,)
    assert "not read" in found.findings[0].message


def test_a_path_the_signer_ignored_still_counts_as_added(
    folder: Path, keys: tuple[Key, Key], ours: Key
) -> None:
    manifest = hash_directory(folder).without(SIGNATURE)
    statement = json.loads(to_statement(manifest, name="model"))
    statement["predicate"]["serialization"]["ignore_paths"].append("hidden")
    write(folder, SIGNATURE, keys[0].sign(json.dumps(statement).encode()))
    assert check(folder, ours).states == (State.INTACT,)
    write(folder, "hidden/pytorch_model.bin", b"x")
    found = check(folder, ours)
    assert found.states == (State.WEIGHTS_CHANGED,)


def test_the_policy_must_be_that_of_the_consumer(folder: Path, ours: Key) -> None:
    found = check(folder, ours, "0" * 64)
    assert (found.states, found.exit_code) == ((State.EVIDENCE_INVALID,), 4)
    assert "not by yours" in found.findings[0].message
    assert not agrees(folder, ours, "0" * 64)


def test_a_claim_expires_to_the_second(folder: Path, judged: Judged, ours: Key) -> None:
    end = datetime.fromisoformat(judged.evidence.finished_at) + timedelta(days=180)
    assert check(folder, ours, now=end - timedelta(seconds=1)).states == (State.INTACT,)
    found = check(folder, ours, now=end)
    assert (found.states, found.exit_code) == ((State.EVIDENCE_EXPIRED,), 4)


def test_a_later_major_suite_replaces_the_claim(
    folder: Path, judged: Judged, keys: tuple[Key, Key], ours: Key
) -> None:
    def older(statement: dict[str, Any]) -> None:
        statement["predicate"]["suite"]["version"] = "0.9"

    swap(folder, judged, keys[0], "resistance", older)
    assert check(folder, ours, rejudge=False).states == (State.EVIDENCE_EXPIRED,)


def test_an_attestation_of_another_signer_is_invalid(
    folder: Path, judged: Judged, keys: tuple[Key, Key], ours: Key
) -> None:
    source = statements(judged.candidate, judged.policy, judged.evidence)["svr"]
    write(folder, SVR, keys[1].sign(source))
    seal(folder, keys[0])
    found = check(folder, ours)
    assert found.states == (State.EVIDENCE_INVALID,)
    assert found.findings[0].files == (SVR,)
    assert not agrees(folder, ours)


def test_attestations_of_other_weights_are_invalid(
    folder: Path, keys: tuple[Key, Key], ours: Key
) -> None:
    write(folder, "model.safetensors", b"weights nobody attacked")
    seal(folder, keys[0])
    found = check(folder, ours)
    assert found.states == (State.EVIDENCE_INVALID,)
    assert "about other weights" in found.findings[0].message
    assert not agrees(folder, ours)


def test_a_release_without_attestations_lacks_evidence(
    tmp_path: Path, keys: tuple[Key, Key]
) -> None:
    for name, content in FILES.items():
        write(tmp_path, name, content)
    seal(tmp_path, keys[0])
    found = check(tmp_path, keys[0])
    assert found.states == (State.EVIDENCE_MISSING,)
    assert len(found.findings) == 3


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("svr", lambda statement: statement.update(predicateType="https://example.com/x")),
        ("svr", lambda statement: statement["predicate"].update(properties=[])),
        ("svr", lambda statement: statement["predicate"].update(properties="all")),
        ("svr", lambda statement: statement["subject"].pop()),
        ("svr", lambda statement: statement["subject"].reverse()),
        ("test-result", lambda statement: statement["predicate"].update(result="FAILED")),
        ("test-result", lambda statement: statement["predicate"].update(result="WARNED")),
        ("test-result", lambda statement: statement["predicate"].pop("result")),
        ("test-result", lambda statement: statement["predicate"].update(configuration=[{}])),
        (
            "test-result",
            lambda statement: statement["predicate"]["configuration"][0]["digest"].update(
                sha256="0" * 64
            ),
        ),
        ("resistance", lambda statement: statement["predicate"].update(verdict="pass")),
        ("resistance", lambda statement: statement["predicate"].update(verdict="FAIL")),
        ("resistance", lambda statement: statement["predicate"].update(validUntil="tomorrow")),
        ("resistance", lambda statement: statement["predicate"].update(validUntil=None)),
        (
            "resistance",
            lambda statement: statement["predicate"].update(validUntil="2099-01-01T00:00:00"),
        ),
        (
            "resistance",
            lambda statement: statement["predicate"]["report"]["digest"].update(sha256="0" * 64),
        ),
        ("resistance", lambda statement: statement["subject"][0].update(name="other")),
        ("resistance", lambda statement: statement.update(predicate=[])),
    ],
)
def test_claims_that_do_not_hold_together_are_invalid(
    folder: Path, judged: Judged, keys: tuple[Key, Key], kind: str, change: Any
) -> None:
    swap(folder, judged, keys[0], kind, change)
    found = check(folder, keys[0])
    assert State.EVIDENCE_INVALID in found.states
    assert found.exit_code == 4


def test_unknown_fields_and_attestations_are_ignored_and_noted(
    folder: Path, judged: Judged, keys: tuple[Key, Key], ours: Key
) -> None:
    def more(statement: dict[str, Any]) -> None:
        statement["predicate"]["more"] = {"of": "this"}

    write(folder, ".release-guard/sbom.sigstore.json", b"{}")
    swap(folder, judged, keys[0], "resistance", more)
    found = check(folder, ours)
    assert found.states == (State.INTACT,)
    assert found.notes == (
        (
            ".release-guard/sbom.sigstore.json: a kind of attestation this version does not read; "
            "ignored"
        ),
    )


def forge(folder: Path, judged: Judged, evidence: Evidence, *, claim: Candidate) -> None:
    """Sign evidence together with a verdict that somebody else came to."""
    write(folder, EVIDENCE_FILE, evidence.to_jsonl())
    for kind, source in statements(claim, judged.policy, evidence).items():
        write(folder, bundle_name(kind), judged.signer.sign(source))
    seal(folder, judged.signer)


def test_a_signed_refusal_has_not_passed(folder: Path, judged: Judged, ours: Key) -> None:
    root = judged.candidate.payload.root
    refused = about(refused_evidence(judged.policy, immunized=root), root)
    verdict = gate(refused, judged.policy)
    claim = Candidate(folder, verdict, judged.candidate.payload)
    forge(folder, judged, refused, claim=claim)
    found = check(folder, ours)
    assert (found.states, found.exit_code) == ((State.NOT_PASSED,), 3)
    assert not agrees(folder, ours)


def test_a_pass_that_its_evidence_does_not_bear_out_is_invalid(
    folder: Path, judged: Judged, ours: Key
) -> None:
    root = judged.candidate.payload.root
    refused = about(refused_evidence(judged.policy, immunized=root), root)
    forge(folder, judged, refused, claim=judged.candidate)
    found = check(folder, ours)
    assert (found.states, found.exit_code) == ((State.EVIDENCE_INVALID,), 4)
    assert found.findings[0].message == "the evidence says FAIL, the attestation PASS"
    assert check(folder, ours, rejudge=False).states == (State.INTACT,)


def test_judged_again_every_check_is_as_it_was_signed(
    folder: Path, judged: Judged, ours: Key
) -> None:
    found = check(folder, ours, every_check=True)

    assert found.states == (State.INTACT,)
    assert [(each.name, each.found, each.detail) for each in found.rejudged] == [
        (each.name, each.result, each.detail) for each in judged.candidate.verdict.checks
    ]
    assert all(each.agrees for each in found.rejudged)


@pytest.mark.parametrize("change", ["result", "removed", "invented"])
def test_a_check_that_was_signed_otherwise_is_found_when_every_check_counts(
    folder: Path, judged: Judged, ours: Key, change: str
) -> None:
    def lie(statement: dict[str, Any]) -> None:
        checks = statement["predicate"]["checks"]
        match change:
            case "result":
                checks[0]["result"] = "INCONCLUSIVE"
            case "removed":
                del checks[0]
            case "invented":
                checks.append({"name": "resists/everything", "result": "PASS", "detail": ""})

    swap(folder, judged, judged.signer, "resistance", lie)
    first = judged.candidate.verdict.checks[0].name
    wrong = "resists/everything" if change == "invented" else first

    assert check(folder, ours).states == (State.INTACT,)
    found = check(folder, ours, every_check=True)
    assert (found.states, found.exit_code) == ((State.EVIDENCE_INVALID,), 4)
    assert found.findings[0].message == f"judged again, 1 checks differ: {wrong}"
    (told,) = (line for line in rejudged_lines(found) if "[signed " in line)
    signed = {"result": "INCONCLUSIVE", "removed": "not", "invented": "PASS"}[change]
    assert f"[signed {signed}] {wrong}" in told
    (listed,) = (each for each in document(found)["checks"] if each["signed"] != each["rejudged"])
    assert listed["name"] == wrong


def test_nothing_is_judged_again_that_was_not_signed(folder: Path, ours: Key) -> None:
    (folder / SIGNATURE).unlink()
    found = check(folder, ours, every_check=True)
    assert found.rejudged == ()
    assert "not run again" in " ".join(rejudged_lines(found))


def test_the_format_page_names_every_field_of_the_evidence() -> None:
    page = (Path(__file__).parents[2] / "docs" / "attestation-format.md").read_text()
    _, _, rest = page.partition("## Evidence file, schema")
    version, _, section = rest.partition("\n")
    models = (Evidence, Retention, Record, Trial, Outcome, Point, Cost, Change, StageReport)

    assert int(version) == Evidence.model_fields["schema_version"].default
    for model in models:
        for field in model.model_fields.keys() - {"records"}:
            assert f"`{field}`" in section, (model.__name__, field)
    for word in (word for kind in (Arm, Ending, Origin, ScoredSplit) for word in get_args(kind)):
        assert f"`{word}`" in section, word


@pytest.mark.parametrize("field", ["policy", "immunized"])
def test_signed_evidence_of_another_run_is_invalid(
    folder: Path, judged: Judged, ours: Key, field: str
) -> None:
    other = judged.evidence.model_copy(update={field: "ab" * 32})
    replace_evidence(folder, judged, other.to_jsonl())
    found = check(folder, ours)
    assert found.states == (State.EVIDENCE_INVALID,)
    assert "another policy or other weights" in found.findings[0].message
    assert not agrees(folder, ours)


def test_signed_figures_that_no_arithmetic_holds_are_invalid(
    folder: Path, judged: Judged, ours: Key
) -> None:
    kept = judged.evidence.retention[0]
    absurd = kept.model_copy(update={"base": (1e308, *kept.base[1:])})
    evidence = judged.evidence.model_copy(update={"retention": (absurd,)})
    replace_evidence(folder, judged, evidence.to_jsonl())
    found = check(folder, ours)
    assert found.states == (State.EVIDENCE_INVALID,)


@pytest.mark.parametrize("name", [EVIDENCE_FILE, POLICY_FILE])
def test_signed_files_that_nobody_attested_are_invalid(
    folder: Path, judged: Judged, ours: Key, name: str
) -> None:
    write(folder, name, (folder / name).read_bytes() + b"\n")
    seal(folder, judged.signer)
    for rejudge in (True, False):
        found = check(folder, ours, rejudge=rejudge)
        assert found.states == (State.EVIDENCE_INVALID,)
        assert found.findings[0].message == f"{name}: not the one that was attested"
    assert not agrees(folder, ours)
    (folder / name).unlink()
    seal(folder, judged.signer)
    assert check(folder, ours).states == (State.EVIDENCE_INVALID,)


def test_many_files_are_told_in_one_line(folder: Path, ours: Key) -> None:
    for number in range(9):
        write(folder, f"extra-{number}.bin", b"x")
    (finding,) = check(folder, ours).findings
    assert finding.message == "added: extra-0.bin, extra-1.bin, extra-2.bin and 6 more"
    assert len(finding.files) == 9


@pytest.mark.parametrize(
    "evidence",
    [
        b"",
        b"{}",
        b"null\n",
        b"[]",
        b'{"header":{}}',
        b"\xff",
        b"[" * 100_000,
        b"9" * 5000,
        b'{"header":{"ceilings":{"footwear":1e999}}}',
    ],
    ids=lambda evidence: repr(evidence[:20]),
)
@pytest.mark.parametrize("name", [EVIDENCE_FILE, POLICY_FILE])
def test_signed_nonsense_is_invalid_and_nothing_worse(
    folder: Path, judged: Judged, keys: tuple[Key, Key], name: str, evidence: bytes
) -> None:
    digest = hash_directory(Path(write(folder, name, evidence).parent)).get(Path(name).name)
    assert digest is not None

    def named(field: str) -> Callable[[dict[str, Any]], None]:
        def change(statement: dict[str, Any]) -> None:
            described = statement["predicate"][field]
            for each in described if isinstance(described, list) else [described]:
                each["digest"]["sha256"] = digest.digest

        return change

    if name == EVIDENCE_FILE:
        swap(folder, judged, keys[0], "resistance", named("report"))
    else:
        swap(folder, judged, keys[0], "resistance", named("policy"))
        swap(folder, judged, keys[0], "test-result", named("configuration"))
    found = check(folder, keys[0])
    assert found.states == (State.EVIDENCE_INVALID,)
    assert all("\n" not in finding.message for finding in found.findings)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_signed_evidence_with_any_figure_is_judged_or_refused(
    judged: Judged, ours: Key, data: st.DataObject
) -> None:
    lines = [json.loads(line) for line in judged.evidence.to_jsonl().splitlines()]
    everywhere = list(places(lines))
    where, key = everywhere[data.draw(st.integers(0, len(everywhere) - 1))]
    where[key] = data.draw(
        st.sampled_from([None, 0, -1, 1e308, 5e-324, 10**400, "", "x", [], {}, True])
        | st.sampled_from(["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59+00:00", "2026-01-02"])
    )
    folder = judged.candidate.directory
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    try:
        changed = b"\n".join(json.dumps(line).encode() for line in lines)
        replace_evidence(folder, judged, changed)
        assert check(folder, ours).states in {(State.INTACT,), (State.EVIDENCE_INVALID,)}
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value where something else could stand; long lists by their head."""
    keys = value if isinstance(value, dict) else range(min(len(value), 4))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def test_links_in_the_folder_are_refused(folder: Path, ours: Key) -> None:
    (folder / "link.json").symlink_to("config.json")
    with pytest.raises(IntegrityError, match="holds no links"):
        check(folder, ours)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_anywhere_changes_the_state(
    judged: Judged, ours: Key, data: st.DataObject
) -> None:
    folder = judged.candidate.directory
    path = folder / data.draw(st.sampled_from([*ALL, SIGNATURE]))
    before = path.read_bytes()
    after = bytearray(before)
    after[data.draw(st.integers(0, len(before) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(after)
    try:
        assert check(folder, ours).states != (State.INTACT,)
        assert not agrees(folder, ours)
    finally:
        path.write_bytes(before)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_file_added_removed_or_renamed_changes_the_state(
    judged: Judged, ours: Key, data: st.DataObject
) -> None:
    folder = judged.candidate.directory
    name = data.draw(st.sampled_from([*ALL, SIGNATURE]))
    new = data.draw(st.sampled_from(["a.bin", ".release-guard/b", "c.md", "sub/d", "model.sig2"]))
    content = (folder / name).read_bytes()
    try:
        match data.draw(st.sampled_from(["add", "remove", "rename"])):
            case "add":
                write(folder, new, content)
            case "remove":
                (folder / name).unlink()
            case "rename":
                (folder / name).rename(folder / new)
        assert check(folder, ours).states != (State.INTACT,)
        assert not agrees(folder, ours)
    finally:
        (folder / new).unlink(missing_ok=True)
        write(folder, name, content)


@pytest.mark.parametrize("name", [EVIDENCE_FILE, POLICY_FILE, SVR])
def test_what_is_read_is_compared_not_what_was_hashed_before(
    judged: Judged, ours: Key, name: str
) -> None:
    class Moving(DirectoryTree):
        def read(self, asked: str) -> bytes:
            return super().read(TEST_RESULT if asked == name == SVR else asked) + (
                b"\n" if asked == name else b""
            )

    found = verify(Moving(judged.candidate.directory), Trust(ours), now=NOW)
    assert found.states == (State.EVIDENCE_INVALID,)
    assert "not as signed" in found.findings[0].message


def test_verifying_loads_no_tensors() -> None:
    heavy = ("torch", "transformers", "datasets", "peft", "huggingface_hub", "matplotlib", "numpy")
    code = (
        f"import sys, release_guard.verify; sys.exit(str(sorted({set(heavy)} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.stderr.strip() == "[]"


def test_a_missing_public_key_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ReleaseGuardError, match="cannot be read"):
        check(folder, Key(public=tmp_path / "nowhere.pub"))


def test_the_example_policy_lasts_as_long_as_it_says() -> None:
    assert example_policy().gate.valid_days == 180
