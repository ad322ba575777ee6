"""Everything that touches tensors: immunize, attack, judge, pack. It needs no credential at all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from release_guard import SUITE
from release_guard.attacks import Attack
from release_guard.card import Publication, beside, card
from release_guard.composition import kept
from release_guard.errors import IntegrityError, PolicyError
from release_guard.evidence import SCHEMA, Evidence, StageReport
from release_guard.gate import gate
from release_guard.gauging import FILE as GAUGE_FILE
from release_guard.layout import Artefact, artefacts, require_as_attacked
from release_guard.ledger import Ledger
from release_guard.manifest import EVIDENCE_FOLDER, Manifest, hash_directory
from release_guard.modalities import Modality
from release_guard.policy import Policy
from release_guard.preflight import Order
from release_guard.preparation import apply_stages, open_run, prepare, require_attacked
from release_guard.redteam import red_team
from release_guard.release import Candidate, Check, Result, Verdict
from release_guard.report import render
from release_guard.run import Run, folder_made_whole, share_files
from release_guard.session import Session
from release_guard.sources import local_folder
from release_guard.stages import Stage
from release_guard.subject import Subject


@dataclass(frozen=True)
class Assessed:
    """What the red team found on a model that nobody publishes, and where the report lies."""

    verdict: Verdict
    evidence: Evidence
    report: Path


@dataclass(frozen=True)
class Immunized:
    """A folder of immunized weights, what the stages said, and whether they compose."""

    folder: Path
    stages: tuple[StageReport, ...]
    checks: tuple[Check, ...]

    @property
    def composed(self) -> bool:
        """Whether the effect of every stage is there, as the gate will ask."""
        return all(check.result is Result.PASS for check in self.checks)


def judge(order: Order, output: Path, publication: Publication, session: Session) -> Candidate:
    """Immunize a model, attack it, judge what was found, and pack all of it into a folder.

    Raises:
        PolicyError: The policy's options are wrong, or `output` belongs to another run.
        ModelError: A model or its data cannot be used.
        ImmunizationError: A stage failed.
    """
    check_plugins(order.policy)
    subject, run = prepare(order, output, session)
    evidence = attack(subject, run, order.policy, session)
    verdict = gate(evidence, order.policy)
    return pack(order, run, evidence, verdict, publication)


def assess(order: Order, output: Path, session: Session) -> Assessed:
    """Red-team a model as it is and judge it; nothing is packed, signed or pushed."""
    subject, run = prepare(order, output, session)
    evidence = attack(subject, run, order.policy, session)
    verdict = gate(evidence, order.policy)
    page = render(evidence, verdict, order.policy, title=order.repo)
    run.write(run.report.name, page.encode())
    return Assessed(verdict, evidence, run.report)


def immunize(order: Order, output: Path, session: Session) -> Immunized:
    """Apply the policy's stages and nothing else; `publish` goes on from the same folder.

    Under `torchrun` every process has to call it, and each trains its share.

    Raises:
        PolicyError: The policy has no stage, or `output` belongs to another run.
        ModelError: The model or its data cannot be used, or not in several processes.
        ImmunizationError: A stage failed.
    """
    if not order.policy.stages:
        raise PolicyError(
            "the policy has no stage, so there is nothing to immunize with; add one under "
            "[[stages]], or publish the model as it is"
        )
    opened = open_run(order, output, session)
    reports = apply_stages(opened.base, order.policy, opened.run, session)
    return Immunized(opened.run.immunized, reports, tuple(kept(reports, order.policy)))


def check_plugins(policy: Policy) -> None:
    """Build whatever works on models once, so that a wrong option stops here, before any work."""
    Modality.build(policy.modality, where="modality")
    for place, spec in enumerate(policy.stages):
        Stage.build(spec, where=f"stages[{place}]")
    for place, spec in enumerate(policy.attacks):
        Attack.build(spec, where=f"attacks[{place}]")


def attack(subject: Subject, run: Run, policy: Policy, session: Session) -> Evidence:
    """Red-team the subject; what the ledger or a finished run holds is not repeated."""
    if (known := _finished(subject, run, policy)) is not None:
        return known
    ledger = Ledger(run.ledger, lambda line: session.progress("ledger", 0, 0, line))
    evidence = red_team(subject, policy, ledger, session)
    run.write(run.evidence.name, evidence.to_jsonl())
    return evidence


def _finished(subject: Subject, run: Run, policy: Policy) -> Evidence | None:
    """Evidence of an earlier go, if it is about these very files and nothing crashed."""
    try:
        known = Evidence.read(run.evidence)
    except IntegrityError:
        return None
    roots = [
        hash_directory(folder).payload.root for folder in (subject.undefended, subject.defended)
    ]
    about = [known.base, known.immunized, known.policy, known.suite, known.schema_version]
    same = about == [*roots, policy.digest, SUITE, SCHEMA] and known.as_is == subject.as_is
    same = same and known.artefacts == subject.roots(policy)
    crashed = any(record.outcome.ending == "failed" for record in known.records)
    return known if same and not crashed else None


def pack(
    order: Order, run: Run, evidence: Evidence, verdict: Verdict, publication: Publication
) -> Candidate:
    """Write the upload set: payload, documents, card, policy, evidence, report; no proof yet.

    Raises:
        IntegrityError: The weights are not those that were attacked, or something private would go
            out with them.
    """
    parts = artefacts(evidence, verdict, order.policy)
    folders = {each: _folder_of(each, run) for each in parts}
    payloads = {each: _as_attacked(folder, each.root) for each, folder in folders.items()}
    _as_attacked(run.immunized, evidence.immunized)
    modality = Modality.build(order.policy.modality)
    for each, payload in payloads.items():
        require_attacked(modality, folders[each], payload)
    source = local_folder(order.source)
    theirs = hash_directory(source)
    _require_nothing_private(run, [*payloads.values(), theirs])
    report = render(evidence, verdict, order.policy, title=order.repo).encode()
    run.write(run.report.name, report)
    with folder_made_whole(run.release) as folder:
        for each, payload in payloads.items():
            names = (entry.name for entry in payload.entries)
            share_files(folders[each], folder / each.folder, names)
        share_files(source, folder, _documents(theirs))
        payload = hash_directory(folder).payload
        require_as_attacked({entry.name: entry.digest for entry in payload.entries}, parts)
        shown = replace(publication, payload=payload)
        existing = beside(source)
        text = card(existing, evidence, verdict, order.policy, shown)
        (folder / "README.md").write_text(text, encoding="utf-8")
        proof = folder / EVIDENCE_FOLDER
        proof.mkdir()
        (proof / "policy.toml").write_bytes(order.policy.source)
        (proof / "evidence.jsonl").write_bytes(evidence.to_jsonl())
        (proof / "report.html").write_bytes(report)
    return Candidate(run.release, verdict, payload)


def _folder_of(part: Artefact, run: Run) -> Path:
    return run.immunized if part.precision == "fp32" else run.artefacts / part.precision


def _as_attacked(folder: Path, root: str) -> Manifest:
    """The payload of a folder that must still be what it was.

    Raises:
        IntegrityError: It is not.
    """
    payload = hash_directory(folder).payload
    if payload.root != root:
        raise IntegrityError(f"{folder}: changed since it was attacked; run publish again")
    return payload


def _require_nothing_private(run: Run, manifests: Sequence[Manifest]) -> None:
    """What stages gave to the owner alone stays at home, under whatever name it comes along."""
    private = {entry.digest for entry in hash_directory(run.private).entries}
    for entry in (entry for manifest in manifests for entry in manifest.entries):
        if entry.digest in private or Path(entry.name).name == GAUGE_FILE:
            raise IntegrityError(
                f"{entry.name}: leads back from the release to what its owner kept; move it out of "
                "the model's folder, nothing private is published"
            )


def _documents(manifest: Manifest) -> list[str]:
    kept = (entry.name for entry in manifest.entries if entry.kind == "documentation")
    return [name for name in kept if name != "README.md"]
