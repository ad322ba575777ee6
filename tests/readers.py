"""Everything that reads a file somebody else may have written, as one function of its bytes.

What is read may be of use or refused in our own words; nothing else may come of it.
"""

import hashlib
import json
import os
import tempfile
import tomllib
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from evidence_builder import MERGED, example_policy, passing_evidence
from judged import fixed_key
from mutation import DOUBLE, as_json, as_lines, as_toml
from releases import make_release

from release_guard import front_matter
from release_guard.attestation import PREDICATE_TYPES, read_claims, statements, subjects
from release_guard.card import Publication, card
from release_guard.check import problems
from release_guard.errors import PolicyError, ReleaseGuardError
from release_guard.evidence import Evidence
from release_guard.gate import gate, judge_again
from release_guard.gauging import GaugeRecord
from release_guard.hubs.directory import Directory
from release_guard.keys import load_public_key
from release_guard.ledger import Ledger
from release_guard.manifest import DirectoryTree, FileEntry, Manifest
from release_guard.oms import from_statement, to_statement
from release_guard.pins import Pins
from release_guard.policy import Policy
from release_guard.release import Candidate
from release_guard.run import Run
from release_guard.signers.key import Key

MOST = 2_100  # characters of a message's line
Read = Callable[[bytes], Any]
ODD = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@dataclass(frozen=True)
class Reader:
    """A reader and a file it takes.

    Attributes:
        source: A valid one.
        read: Takes the content of a file.
        document: The same as values, or None where only bytes can be changed.
        write: Makes a file of them.
    """

    source: bytes
    read: Read
    document: Any = None
    write: Callable[[Any], bytes] = field(default=as_json)


def only_ours(read: Callable[[], Any]) -> Any:
    """What a reader returns; None if it refuses in our words, which a terminal can show."""
    try:
        return read()
    except ReleaseGuardError as error:
        require_plain(str(error), lines=isinstance(error, PolicyError))
        return None


def require_plain(message: str, *, lines: bool = False) -> None:
    """A message of some length, on one line (of a policy: several), nothing that moves a cursor."""
    assert message.strip(), "no message at all"
    assert all(len(line) <= MOST for line in message.split("\n")), "a line nobody can read"
    text = message.replace("\n", " ") if lines else message
    odd = [character for character in text if unicodedata.category(character) in ODD]
    assert not odd, f"{odd[:3]!a} in {message[:200]!a}"


def require_absent(secret: str, text: str) -> None:
    """No part of a secret stands in a text."""
    pieces = (secret[at : at + 24] for at in range(0, len(secret) - 23, 24))
    assert not [piece for piece in pieces if len(set(piece)) > 8 and piece in text]


@cache
def readers() -> Mapping[str, Reader]:
    """By name. Made once: keys, a policy, evidence, three statements and a hub of two revisions."""
    home = Path(tempfile.mkdtemp(prefix="release-guard-readers-"))
    policy = example_policy(*MERGED)
    signer = fixed_key(home)
    evidence = passing_evidence(policy)
    return {
        **_policies(policy, home),
        **_bundles(signer),
        **_claims(policy, evidence, signer),
        **_evidence(policy, evidence, home),
        **_runs(home),
        **_hub(home),
        **_keys(signer, home),
        **_cards(policy, evidence),
    }


def _json(source: bytes, read: Read) -> Reader:
    return Reader(source, read, json.loads(source))


def _policies(policy: Policy, home: Path) -> Mapping[str, Reader]:
    def parse(content: bytes) -> Policy:
        found = Policy.parse(content, name="policy.toml")
        assert found.digest
        return found

    def load(content: bytes) -> None:
        found = Policy.parse(content, name="policy.toml", directory=home)
        wrong = problems(found)
        for target in found.targets:
            assert all(spec.label and spec.family for spec in found.aimed_at(target))
        if wrong:
            raise PolicyError("\n".join(wrong))

    table = tomllib.loads(policy.source.decode())
    return {
        "policy": Reader(policy.source, parse, table, as_toml),
        "policy-options": Reader(policy.source, load, table, as_toml),
    }


def _bundles(signer: Key) -> Mapping[str, Reader]:
    files = Manifest.of(FileEntry(f"{name}.json", f"{name}" * 64, 3) for name in "abc")
    statement = to_statement(files, name="model")
    return {
        "bundle": _json(signer.sign(statement), signer.verify),
        "signed-files": _json(statement, from_statement),
    }


def _claims(policy: Policy, evidence: Evidence, signer: Key) -> Mapping[str, Reader]:
    payload = Manifest.of([FileEntry("model.safetensors", "11" * 32, 3)])
    named = evidence.model_copy(update={"immunized": payload.root, "artefacts": {}})
    candidate = Candidate(Path("model"), gate(evidence, policy), payload)
    made = statements(candidate, policy, named)
    expected = subjects({entry.name: entry.digest for entry in payload.entries})

    def read_with(kind: str) -> Read:
        def read(content: bytes) -> Any:
            claims = read_claims({**made, kind: content}, expected)
            return claims.lacking(policy), f"{claims.valid_until:%Y-%m-%d}"

        return read

    return {kind: _json(made[kind], read_with(kind)) for kind in PREDICATE_TYPES}


def _evidence(policy: Policy, evidence: Evidence, home: Path) -> Mapping[str, Reader]:
    source = evidence.to_jsonl()
    ledger = Ledger(home / "ledger" / "trials.jsonl", require_plain)
    for record in evidence.records[:4]:
        ledger.add(record.trial, record.outcome)
    lines = ledger.path.read_bytes()

    def judge(content: bytes) -> Any:
        found = Evidence.from_jsonl(content)
        again = found.to_jsonl()
        assert Evidence.from_jsonl(again).to_jsonl() == again
        return judge_again(found, policy)

    def read_ledger(content: bytes) -> Any:
        path = home / "trials.jsonl"
        path.write_bytes(content)
        found = Ledger(path, require_plain)
        assert len(found) <= content.count(b'"trial"')
        return [found.get(trial) for trial in found]

    return {
        "evidence": Reader(source, judge, _lines(source), as_lines),
        "ledger": Reader(lines, read_ledger, _lines(lines), as_lines),
    }


def _lines(source: bytes) -> list[Any]:
    return [json.loads(line) for line in source.splitlines()]


def _runs(home: Path) -> Mapping[str, Reader]:
    about = {"source": "1" * 64, "policy": "2" * 64, "as_is": False, "suite": "2.1"}
    folder = home / "run"
    source = Run.claim(folder, about).journal.read_bytes()

    def claim(content: bytes) -> Run:
        (folder / "run.json").write_bytes(content)
        return Run.claim(folder, about)

    record = {
        "modality": {"name": "causal_lm"},
        "secret": "ab" * 32,
        "changes": ["neurons"],
        "style": "diagonal",
        "kept": {"a": [1.0]},
        "before": "1" * 64,
        "after": "2" * 64,
        "undefended": "3" * 64,
        "sketch": {"a": 1.0},
    }

    def read_gauge(content: bytes) -> Any:
        path = home / "gauge.json"
        path.write_bytes(content)
        return GaugeRecord.load(path)

    return {
        "journal": _json(source, claim),
        "gauge": Reader(as_json(record), read_gauge, record),
    }


def _hub(home: Path) -> Mapping[str, Reader]:
    hub = Directory(path=home / "hub")
    first = make_release(home / "first")
    hub.push(first, "acme/model")
    store = home / "hub" / ".revisions" / "acme" / "model"
    head = (store / "head").read_text().strip()
    revision = (store / "revisions" / f"{head}.json").read_bytes()
    switch = as_json({"inode": (home / "hub" / "acme" / "model").stat().st_ino, "revision": head})

    def look() -> Any:
        hub.preflight("acme/model")
        tree = hub.tree("acme/model")
        return tree.manifest, tree.read("config.json")

    def read_revision(content: bytes) -> Any:
        """Named by its own digest: whoever may write there can do that too."""
        name = hashlib.sha256(content).hexdigest()[:40]
        path = store / "revisions" / f"{name}.json"
        path.write_bytes(content)
        try:
            tree = hub.tree("acme/model", name)
            return tree.manifest, tree.read("config.json")
        finally:
            if name != head:
                path.unlink()

    def read_at(name: str) -> Read:
        def read(content: bytes) -> Any:
            before = (store / "head").read_bytes()
            (store / name).write_bytes(content)
            try:
                return look()
            finally:
                (store / "switching").unlink(missing_ok=True)
                (store / "head").write_bytes(before)

        return read

    return {
        "revision": _json(revision, read_revision),
        "switching": _json(switch, read_at("switching")),
        "head": Reader(f"{head}\n".encode(), read_at("head")),
    }


def _keys(signer: Key, home: Path) -> Mapping[str, Reader]:
    assert signer.path is not None
    assert signer.public is not None

    def public(content: bytes) -> Any:
        path = home / "fuzzed.pub"
        path.write_bytes(content)
        return load_public_key(path).curve.name

    def private(content: bytes) -> bytes:
        path = home / "fuzzed.pem"
        path.write_bytes(content)
        path.chmod(0o600)
        return Key(path=path).sign(b"{}")

    def variable(content: bytes) -> Any:
        """What it holds is a secret, or the path of one."""
        try:
            value = os.fsdecode(content.replace(b"\0", b""))
        except ValueError:
            return None
        os.environ["RELEASE_GUARD_SIGNING_KEY"] = value
        try:
            return Key().sign(b"{}")
        except ReleaseGuardError as error:
            require_absent(value, str(error))
            raise
        finally:
            del os.environ["RELEASE_GUARD_SIGNING_KEY"]

    def pinned(content: bytes) -> Any:
        path = home / "pins.toml"
        path.write_bytes(content)
        path.chmod(0o600)
        found = Pins(path).get(NAME)
        return found.voucher(DirectoryTree(home)) if found and found.key else found

    table = {"schema_version": 1, "pins": {NAME: {"key": "1.pub"}}}
    return {
        "pins": Reader(as_toml(table), pinned, table, as_toml),
        "public-key": Reader(signer.public.read_bytes(), public),
        "private-key": Reader(signer.path.read_bytes(), private),
        "key-variable": Reader(signer.path.read_bytes(), variable),
    }


NAME = "hf://acme/model"
README = """---
license: apache-2.0   # of the weights
tags: [a, "b"]
base_model: someone/model
metrics: {accuracy: 0.5, date: &day 2026-01-02}
model-index:
- name: x
  results: [{task: {type: text}, date: *day}]
---
# Title

Text.
"""


def _cards(policy: Policy, evidence: Evidence) -> Mapping[str, Reader]:
    verdict = gate(evidence, policy)
    publication = Publication("acme/model", "hf://acme/model", "f" * 64, "someone/model")
    whole = card(README, evidence, verdict, policy, publication)
    front = yaml.safe_load(README.split("---\n")[1])

    def merge(content: bytes) -> Any:
        with suppress(UnicodeDecodeError):
            made = card(content.decode(), evidence, verdict, policy, publication)
            again = card(made, evidence, verdict, policy, publication)
            assert again == made, "a card made twice differs"
            return made

    def edit(content: bytes) -> Any:
        with suppress(UnicodeDecodeError):
            return front_matter.edit(content.decode(), values={"a": "b"}, tag="c")

    def as_front(value: Any) -> bytes:
        """A line a key; JSON is YAML, nearly."""
        pairs = value.items() if isinstance(value, dict) else [("value", value)]
        lines = (
            f"{key.removeprefix(DOUBLE)}: ".encode("utf-8", "surrogatepass") + as_json(item)
            for key, item in pairs
        )
        return b"---\n" + b"\n".join(lines) + b"\n---\nText.\n"

    return {
        "card": Reader(whole.encode(), merge),
        "front-matter": Reader(README.encode(), edit, json.loads(as_json(front)), as_front),
    }
