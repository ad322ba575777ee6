"""What fuzzing found, each once more by name."""

import json
from pathlib import Path

import pytest
from evidence_builder import POLICY
from readers import only_ours, readers
from releases import make_release

from release_guard import card
from release_guard.checkpoints import check_weights
from release_guard.errors import (
    IntegrityError,
    ModelError,
    PolicyError,
    ReleaseGuardError,
    printable,
)
from release_guard.hubs.directory import Directory, _name
from release_guard.ledger import Ledger
from release_guard.pipelines import PARTS, _index
from release_guard.policy import Policy
from release_guard.preparation import _reports
from release_guard.run import Run, read_made
from release_guard.signers.key import KEY_VARIABLE, Key, generate_key

DIGITS = b"9" * 5_000
FOUND = {
    "a number that Python does not read": ("policy", b"seed = " + DIGITS),
    "a number that Python does not write": ("policy", b"seed = 0x" + b"f" * 5_000),
    "arrays in arrays": ("policy", b"seed = " + b"[" * 3_000),
    "tables in tables": ("policy", b"seed" + b".a" * 3_000 + b" = 1"),
    "a key that looks like another message": ("policy", b'"a\\nerror: all is well" = 1'),
    "a key that clears the screen": ("policy", b'"\\u001b[2J" = 1'),
    "a path that is a number": ("policy-options", POLICY.replace('"hub" }', "5 }").encode()),
    "a path longer than a name may be": (
        "policy-options",
        POLICY.replace("retained.parquet", "x" * 5_000).encode(),
    ),
    "steps that are numbers": (
        "policy",
        POLICY.replace('{ name = "linear_probe" }', '{ name = "chain", steps = [1] }').encode(),
    ),
    "steps in steps": (
        "policy",
        POLICY.replace(
            '{ name = "linear_probe" }', '{ name = "chain", steps = [' * 40 + "1" + "] }" * 40
        ).encode(),
    ),
    "a journal that is a number": ("journal", b"8"),
    "a journal of lists": ("journal", b"[" * 100_000),
    "a journal that is no text": ("journal", b"\xff"),
    "a head that is no text": ("head", b"\xff"),
    "a head with a NUL": ("head", b"\0" * 40),
    "a head that leads away": ("head", b"../../../../etc/passwd"),
    "half a switch": ("switching", b""),
    "a date that there is not": ("front-matter", b"---\na: 2001-99-99\n---\n"),
    "a number that YAML does not read": ("front-matter", b"---\na: " + DIGITS + b"\n---\n"),
    "lists in lists": ("front-matter", b"---\na: " + b"[" * 3_000 + b"\n---\n"),
    "a key without a colon": ("front-matter", b"---\n? tags\n---\n"),
    "a key in base64": ("key-variable", b"MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg" * 8),
    "a key that is no text": ("key-variable", b"-----BEGIN PRIVATE KEY-----\n\xff\n"),
}


@pytest.mark.parametrize("what", FOUND)
def test_it_is_refused_in_our_own_words(what: str) -> None:
    name, source = FOUND[what]
    with pytest.raises(ReleaseGuardError):
        readers()[name].read(source)
    only_ours(lambda: readers()[name].read(source))


def test_messages_move_no_cursor_and_fake_no_line() -> None:
    text = "a\x1b[2J\x9b1m\u202ereversed\u2028\nerror: not ours\ud800"
    assert str(IntegrityError(text)) == printable(text)
    assert str(IntegrityError(text)).isprintable()
    assert str(PolicyError("one\ntwo\x1b")).splitlines() == ["one", "two\\u001b"]
    assert len(str(ModelError("x" * 10**6))) < 3_000
    assert str(ModelError("Jürgen's 模型 🔒")) == "Jürgen's 模型 🔒"


def test_escapes_in_json_are_read_back() -> None:
    text = "a\x9b\u202e\u2028\x7f"
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text


@pytest.mark.parametrize(
    "value", ["NaN", "1e999", '"\\ud800"', "[" * 500 + "]" * 500, '1,"rank":2']
)
def test_a_ledger_line_that_two_would_read_differently_is_skipped(
    tmp_path: Path, value: str
) -> None:
    source = readers()["ledger"].source.splitlines()[0].decode()
    path, warnings = tmp_path / "trials.jsonl", list[str]()
    path.write_text(source.replace('"name":"', f'"rank":{value},"name":"', 1) + "\n")
    assert len(Ledger(path, warnings.append)) == 0
    assert len(warnings) == 1


def test_a_ledger_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ReleaseGuardError, match="cannot be read"):
        Ledger(tmp_path, print)


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(PolicyError, match="choose another --output"):
        Run.claim(tmp_path / "run", {})


@pytest.mark.parametrize("content", [b"5", b"{}", b"[5]", b"[", b"\xff", b"[" * 10_000])
def test_what_a_run_wrote_and_somebody_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stages.json"
    path.write_bytes(content)
    if content != b"{}":
        for read in (_reports, read_made):
            with pytest.raises(PolicyError, match=r"stages.json: damaged; choose another"):
                read(path)


def test_a_revision_names_no_file_beyond_its_hub(tmp_path: Path) -> None:
    hub = Directory(path=tmp_path / "hub")
    receipt = hub.push(make_release(tmp_path / "release"), "acme/model")
    store = tmp_path / "hub" / ".revisions" / "acme" / "model"
    revision = json.loads((store / "revisions" / f"{receipt.revision}.json").read_bytes())
    revision["files"][0]["digest"] = "../../../../../secret"
    (tmp_path / "secret").write_text("not theirs")
    content = json.dumps(revision).encode()
    (store / "revisions" / f"{_name(content)}.json").write_bytes(content)
    with pytest.raises(IntegrityError, match="is damaged"):
        hub.tree("acme/model", _name(content))
    for other in ("../head", "a\0b", "x" * 5_000, "\ud800"):
        with pytest.raises(ReleaseGuardError, match="has no revision"):
            hub.tree("acme/model", other)


def test_a_variable_that_holds_no_key_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("MIGHAgEAMBMGByqGSM49AgEG", "x" * 5_000, "/nowhere/key.pem", "two\nlines"):
        monkeypatch.setenv(KEY_VARIABLE, value)
        with pytest.raises(ReleaseGuardError) as refused:
            Key().sign(b"{}")
        assert value[:12] not in str(refused.value)
        assert KEY_VARIABLE in str(refused.value)


def test_a_password_that_is_no_text_encrypts_and_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, _ = generate_key(tmp_path, "\udcff secret")
    monkeypatch.setenv("RELEASE_GUARD_KEY_PASSWORD", "\udcff secret")
    assert Key(path=private).sign(b"{}")


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe not UTF-8",
        b"---\na: [\n---\n",
        b"<!-- release-guard:begin facts -->",
        b"<!-- release-guard:end nothing -->",
    ],
)
def test_a_readme_that_cannot_become_the_card_is_found_before_anything_is_spent(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(ModelError, match=r"README.md: "):
        card.check(tmp_path)


def test_a_readme_that_can(tmp_path: Path) -> None:
    card.check(tmp_path)
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\ntags: [a]\r\n---\r\n# Title\r\n")
    card.check(tmp_path)


@pytest.mark.parametrize("listed", [5, ["a"], {"a": 5}, {"a": "../other.safetensors"}, {"a": ""}])
def test_an_index_lists_files_beside_it(tmp_path: Path, listed: object) -> None:
    index = "model.safetensors.index.json"
    (tmp_path / index).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(ModelError):
        check_weights("model", tmp_path)


@pytest.mark.parametrize("part", [["a"], ["a", "b", "c"], [["a"], "b"], [{}, 1]])
def test_a_pipeline_names_a_library_and_a_class(tmp_path: Path, part: object) -> None:
    index = {"_class_name": "StableDiffusionPipeline", **dict.fromkeys(PARTS, part)}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model_index\.json"):
        _index("model", tmp_path)


def test_a_policy_of_one_endless_line() -> None:
    with pytest.raises(PolicyError, match="a line is longer than 10,000 bytes"):
        Policy.parse(b"seed = 1 # " + b"x" * 20_000, name="policy.toml")
