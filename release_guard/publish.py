"""The producer's flow: policy -> immunize -> red-team -> gate -> sign -> push -> verify."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from release_guard.attacks import Attack
from release_guard.attestation import attest
from release_guard.card import Publication, card
from release_guard.composition import kept
from release_guard.errors import ImmunizationError, IntegrityError, ModelError, PolicyError
from release_guard.evidence import SCHEMA, SUITE, Cost, Evidence, StageReport, canonical_json
from release_guard.gate import gate
from release_guard.gauging import FILE as GAUGE_FILE
from release_guard.hubs import Hub
from release_guard.ledger import Ledger
from release_guard.manifest import EVIDENCE_FOLDER, Manifest, hash_directory
from release_guard.modalities import Modality, settle_threads
from release_guard.oms import sign
from release_guard.phases import data_digests
from release_guard.plugins import Spec
from release_guard.policy import HUB_PREFIX, Policy
from release_guard.redteam import Session, Subject, red_team
from release_guard.release import Candidate, Check, Receipt, Result, Verdict
from release_guard.report import render
from release_guard.run import Run, folder_made_whole, share_files
from release_guard.sham_weights import sham_of
from release_guard.sharding import gather, settled
from release_guard.shards import leads, wait, world
from release_guard.signers import Signer
from release_guard.stages import Stage, Workspace, misplaced
from release_guard.verify import Trust, require_intact, verify

if TYPE_CHECKING:
    from release_guard.modalities import ModelHandle


@dataclass(frozen=True)
class Order:
    """What is to be published.

    Attributes:
        source: Folder or Hub id of the model.
        repo: `owner/name` on the policy's hub.
        policy: What it must resist.
        base: Undefended original, where `source` was immunized elsewhere; none: `source` itself.
        as_is: Judge `source` as it is; no stage is applied.
        dry_run: Stop before anything is signed.
    """

    source: str
    repo: str
    policy: Policy
    base: str | None = None
    as_is: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Published:
    """What became of an order: `receipt` is None unless the gate passed and it was pushed."""

    verdict: Verdict
    candidate: Candidate
    evidence: Evidence
    receipt: Receipt | None


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


@dataclass(frozen=True)
class _Opened:
    """What a run begins with: all of it checked, the base loaded, the folder claimed."""

    modality: Modality
    source: Path
    undefended: Path
    ancestor: Path | None
    base: "ModelHandle"
    run: Run


def publish(order: Order, output: Path, session: Session) -> Published:
    """Immunize a model and push it if, and only if, it passes the policy's gate."""
    policy = order.policy
    hub, signer = check_plugins(policy)
    head = None if order.dry_run else check_credentials(hub, signer, order.repo)
    subject, run = prepare(order, output, session)
    evidence = attack(subject, run, policy, session)
    verdict = gate(evidence, policy)
    identity = "none (dry run)" if order.dry_run else signer.identity
    base_model = hub_id(order.base or order.source)
    publication = Publication(order.repo, hub.address(order.repo), identity, base_model)
    candidate = pack(order, run, evidence, verdict, publication)
    if not verdict.passed or order.dry_run:
        return Published(verdict, candidate, evidence, None)
    session.progress("publish", 0, 3, "signing")
    release = sign(attest(candidate, policy, evidence, signer), signer, previous=head)
    session.progress("publish", 1, 3, f"pushing to {order.repo}")
    receipt = hub.push(release, order.repo)
    session.progress("publish", 2, 3, "verifying what was pushed")
    pushed = hub.tree(order.repo, receipt.revision)
    require_intact(verify(pushed, Trust(signer, policy.digest), now=session.now()))
    session.progress("publish", 3, 3, "verified")
    return Published(verdict, candidate, evidence, receipt)


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
    opened = _open(order, output, session)
    reports = _immunize(opened.base, order.policy, opened.run, session)
    return Immunized(opened.run.immunized, reports, tuple(kept(reports, order.policy)))


def check_plugins(policy: Policy) -> tuple[Hub, Signer]:
    """Build every plug-in once, so that a wrong option stops here, before any work."""
    Modality.build(policy.modality, where="modality")
    for place, spec in enumerate(policy.stages):
        Stage.build(spec, where=f"stages[{place}]")
    for place, spec in enumerate(policy.attacks):
        Attack.build(spec, where=f"attacks[{place}]")
    return Hub.build(policy.hub, where="hub"), Signer.build(policy.signer, where="signer")


def check_credentials(hub: Hub, signer: Signer, repo: str) -> str:
    """Sign something and knock at the hub: better known now than after hours. The hub's head."""
    signer.sign(b"{}")
    return hub.preflight(repo)


def prepare(order: Order, output: Path, session: Session) -> tuple[Subject, Run]:
    """Load the base, immunize it (or take it as it is), and load back the very files to be pushed.

    Raises:
        PolicyError: `output` belongs to another run.
        ModelError: A model or its data cannot be used.
        ImmunizationError: A stage failed.
    """
    opened = _open(order, output, session)
    base, run = opened.base, opened.run
    stages: tuple[StageReport, ...] = ()
    if order.as_is or not order.policy.stages:
        _take_as_it_is(opened.source, run)
    else:
        stages = _immunize(base, order.policy, run, session)
    immunized = opened.modality.load(str(run.immunized))
    moved = _make_sham(base, immunized, run, order.policy, session)
    subject = Subject(
        opened.undefended,
        run.immunized,
        base,
        immunized,
        stages,
        moved,
        opened.ancestor,
        as_is=order.as_is,
    )
    return subject, run


def _open(order: Order, output: Path, session: Session) -> _Opened:
    """Everything that can be known before anything is spent; claims the folder.

    The leading process claims it; the others, if there are any, wait for that.
    """
    check_order(order)
    source = local_folder(order.source)
    undefended = local_folder(order.base) if order.base else source
    about: dict[str, Any] = {
        "source": hash_directory(source).root,
        "base": hash_directory(undefended).payload.root,
        "policy": order.policy.digest,
        "as_is": order.as_is,
        "suite": SUITE,
    }
    check_attacks(order.policy)
    if not order.as_is:
        check_stage_kinds(order.policy)
    check_donors(order.policy, source, undefended)
    ancestor = public_ancestor(order.policy, source, undefended)
    if ancestor is not None:
        about["ancestor"] = hash_directory(ancestor).payload.root
    modality = Modality.build(order.policy.modality)
    base = modality.load(str(undefended))
    settle_threads(base, session.workers)
    check_data(base, order.policy)
    check_relatives(base, order.policy, ancestor)
    if not order.as_is:
        check_stages(base, order.policy)
    about["data"] = data_digests(base, order.policy)
    about["retained"] = base.digest(order.policy.retain.dataset)
    if leads():
        Run.claim(output, about).write(Run(output).policy.name, order.policy.source)
    wait()
    return _Opened(modality, source, undefended, ancestor, base, Run(output))


def check_stages(base: "ModelHandle", policy: Policy) -> None:
    """Whether every stage can work on this model and these data, in as many processes.

    Raises:
        ImmunizationError: It cannot.
    """
    for place, spec in enumerate(policy.stages):
        stage = Stage.build(spec, where=f"stages[{place}]")
        if world() > 1 and not stage.shardable:
            raise ImmunizationError(
                f"stages[{place}]: {spec.name} works in one process only, and there are {world()}"
            )
        stage.check(base, policy)


def check_stage_kinds(policy: Policy) -> None:
    """Whether every stage is for this kind of model.

    Raises:
        PolicyError: One line for each that is not.
    """
    if lines := tuple(misplaced(policy)):
        raise PolicyError("\n".join(lines))


def check_order(order: Order) -> None:
    """Whether it is clear which model is published.

    Raises:
        PolicyError: The source was immunized elsewhere, and stages would immunize its base instead.
    """
    if order.base and order.policy.stages and not order.as_is:
        raise PolicyError(
            "--base says that the source was immunized elsewhere, but the policy has stages, which "
            "would immunize the base and publish that; add --as-is, or leave --base out"
        )


def check_attacks(policy: Policy) -> None:
    """Whether every listed attack is for this kind of model, and has the ancestor it needs.

    A merge target that names its base brings the ancestor along.

    Raises:
        PolicyError: One line for each that is not.
    """
    lines = []
    for place, spec in enumerate(policy.attacks):
        attack, kind = Attack.build(spec, where=f"attacks[{place}]"), policy.modality.name
        if attack.modalities and kind not in attack.modalities:
            others = ", ".join(attack.modalities)
            lines.append(
                f"attacks[{place}]: {spec.name} is for {others}, not for {kind}; remove it"
            )
        aimed = attack.targets(policy)
        has_bases = bool(aimed) and all(getattr(target, "base", None) for target in aimed)
        if attack.needs_ancestor and policy.red_team.ancestor is None and not has_bases:
            advice = "name one as red_team.ancestor, or remove the attack"
            if policy.merge_targets:
                advice = f"give merge_targets.base, {advice}"
            lines.append(f"attacks[{place}]: {spec.name} needs a public ancestor; {advice}")
    if lines:
        raise PolicyError("\n".join(lines))


def public_ancestor(policy: Policy, source: Path, undefended: Path) -> Path | None:
    """Folder of the ancestor the policy names.

    Raises:
        PolicyError: It is one of the two models that are compared with it.
        ModelError: It cannot be had.
    """
    named = policy.red_team.ancestor
    if named is None or named == "undefended":
        return None if named is None else undefended
    folder = local_folder(named.removeprefix(HUB_PREFIX))
    root = hash_directory(folder).payload.root
    if root == hash_directory(undefended).payload.root:
        advice = 'if that is public, write ancestor = "undefended"'
        raise PolicyError(f"red_team.ancestor: {named} is the undefended model itself; {advice}")
    if root == hash_directory(source).payload.root:
        advice = "name the public model it was made from, or remove the key"
        raise PolicyError(f"red_team.ancestor: {named} is the model to be released; {advice}")
    return folder


def check_relatives(base: "ModelHandle", policy: Policy, ancestor: Path | None) -> None:
    """Whether the ancestor and the donors of merges have the base model's tensors.

    Raises:
        ModelError: One cannot be loaded, or has other shapes or other tokens.
    """
    sources = [str(ancestor)] if policy.red_team.ancestor not in {None, "undefended"} else []
    for target in policy.merge_targets:
        sources += filter(None, [target.donor, target.base])
    for source in dict.fromkeys(sources):
        base.peer(source)


def check_donors(policy: Policy, source: Path, undefended: Path) -> None:
    """Whether every donor is a model of its own.

    Raises:
        PolicyError: It is one of those that it is to be merged with.
        ModelError: It cannot be had.
    """
    for place, target in enumerate(policy.merge_targets):
        others = {"the model to be released": source, "the undefended model": undefended}
        base = target.base or policy.red_team.ancestor
        if base not in {None, "undefended"}:
            others["its own base"] = local_folder(str(base).removeprefix(HUB_PREFIX))
        root = _payload_root(local_folder(target.donor.removeprefix(HUB_PREFIX)))
        for what, folder in others.items():
            if root == _payload_root(folder):
                advice = "name a model with a task of its own"
                raise PolicyError(f"merge_targets[{place}].donor: that is {what}; {advice}")


def _payload_root(folder: Path) -> str:
    return hash_directory(folder).payload.root


def check_data(base: "ModelHandle", policy: Policy) -> None:
    """Everything about the data that can go wrong, before anything is spent.

    Raises:
        ModelError: A data set cannot be read or is too small for an attack, or a concept shares
            examples with the retained data, a merge target with the donor's.
    """
    base.digest(policy.retain.dataset)
    retained, donors = "the retained data", "the donor's data"
    for target, dataset, what in (
        *((concept, policy.retain.dataset, retained) for concept in policy.concepts),
        *((merge, merge.donor_dataset, donors) for merge in policy.merge_targets),
    ):
        overlap = base.overlap(target.dataset, dataset)
        if overlap.exact > policy.gate.max_overlap:
            raise ModelError(
                f"{target.name}: {overlap.exact:.1%} of its examples stand in {what} too "
                f"({target.dataset}); remove them from one of the two, or raise gate.max_overlap"
            )
    for place, spec in enumerate(policy.attacks):
        try:
            _check_read(base, policy, spec)
        except ModelError as error:
            raise ModelError(f"attacks[{place}]: {error}") from error


def _check_read(base: "ModelHandle", policy: Policy, spec: Spec) -> None:
    """Whether an attack has the examples that it reads."""
    attack = Attack.build(spec).located(policy)
    for source in attack.sources:
        base.digest(source)
    if not attack.wants:
        return
    for target in (target for target in policy.targets if spec in policy.aimed_at(target)):
        for dataset in filter(None, (target.dataset, getattr(target, "donor_dataset", None))):
            base.batches(dataset, "attack", size=attack.wants, seed=policy.seed)


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
    manifest = hash_directory(run.immunized)
    if manifest.payload.root != evidence.immunized:
        raise IntegrityError(f"{run.immunized}: changed since it was attacked; run publish again")
    _require_nothing_private(run, [manifest, hash_directory(local_folder(order.source))])
    report = render(evidence, verdict, order.policy, title=order.repo).encode()
    run.write(run.report.name, report)
    source = local_folder(order.source)
    readme = source / "README.md"
    with folder_made_whole(run.release) as folder:
        share_files(run.immunized, folder, (entry.name for entry in manifest.payload.entries))
        share_files(source, folder, _documents(hash_directory(source)))
        existing = readme.read_text(encoding="utf-8") if readme.is_file() else None
        text = card(existing, evidence, verdict, order.policy, publication)
        (folder / "README.md").write_text(text, encoding="utf-8")
        proof = folder / EVIDENCE_FOLDER
        proof.mkdir()
        (proof / "policy.toml").write_bytes(order.policy.source)
        (proof / "evidence.jsonl").write_bytes(evidence.to_jsonl())
        (proof / "report.html").write_bytes(report)
    return Candidate(run.release, verdict, manifest.payload)


def _require_nothing_private(run: Run, manifests: Sequence[Manifest]) -> None:
    """What stages gave to the owner alone stays at home, under whatever name it comes along."""
    private = {entry.digest for entry in hash_directory(run.private).entries}
    for entry in (entry for manifest in manifests for entry in manifest.entries):
        if entry.digest in private or Path(entry.name).name == GAUGE_FILE:
            raise IntegrityError(
                f"{entry.name}: leads back from the release to what its owner kept; move it out of "
                "the model's folder, nothing private is published"
            )


def local_folder(source: str) -> Path:
    """The folder a model lies in; a Hub id is fetched into the Hub's own cache first."""
    if Path(source).is_dir():
        return Path(source).resolve()
    name, separator, revision = source.partition("@")
    if not separator or name.count("/") != 1:
        raise ModelError(
            f"{source}: no such folder; for a model of the Hub write OWNER/NAME@REVISION"
        )
    return _fetch(name, revision)


def hub_id(source: str) -> str | None:
    """`OWNER/NAME` of a source that is not a folder here."""
    return None if Path(source).is_dir() else source.partition("@")[0]


def _fetch(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  half a second to import

    kinds = ["*.safetensors", "*.json", "*.txt", "*.model", "*.md", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=kinds))
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{name}@{revision}: cannot be fetched from the Hub ({first})") from None


def _documents(manifest: Manifest) -> list[str]:
    kept = (entry.name for entry in manifest.entries if entry.kind == "documentation")
    return [name for name in kept if name != "README.md"]


def _take_as_it_is(source: Path, run: Run) -> None:
    manifest = hash_directory(source)
    if run.immunized.is_dir() and hash_directory(run.immunized).root == manifest.payload.root:
        return
    with folder_made_whole(run.immunized) as folder:
        share_files(source, folder, (entry.name for entry in manifest.payload.entries))


def _immunize(
    base: "ModelHandle", policy: Policy, run: Run, session: Session
) -> tuple[StageReport, ...]:
    """Apply the stages in order and save the result; a finished one is taken from the folder."""
    if run.immunized.is_dir():
        return tuple(map(StageReport.model_validate, json.loads(run.stages.read_bytes())))
    model, applied = settled(base), []
    for place, spec in enumerate(policy.stages):
        before, stage = model, Stage.build(spec)
        model, report = _apply(stage, before, policy, run, place, session)
        applied.append((stage, before, report))
        applied = [
            (stage, before, report.seen(spec.name, stage.effect(before, model, policy)))
            for stage, before, report in applied
        ]
    reports = tuple(report for _, _, report in applied)
    if (whole := gather(model)) is not None:
        run.write(run.stages.name, canonical_json([report.model_dump() for report in reports]))
        with folder_made_whole(run.immunized) as folder:
            whole.save(folder)
    wait()
    return reports


def _make_sham(
    base: "ModelHandle", immunized: "ModelHandle", run: Run, policy: Policy, session: Session
) -> Path | None:
    """Folder of the sham, made once: it depends on nothing but what this run is about."""
    if not policy.red_team.sham:
        return None
    if not run.sham.is_dir():

        def progress(done: int, rounds: int, line: str) -> None:
            session.progress("make the sham", done, rounds, line)

        moved = sham_of(base, immunized, policy, progress)
        with folder_made_whole(run.sham) as folder:
            moved.save(folder)
    return run.sham


def _apply(
    stage: Stage, model: "ModelHandle", policy: Policy, run: Run, place: int, session: Session
) -> "tuple[ModelHandle, StageReport]":
    def progress(done: int, steps: int, line: str) -> None:
        session.progress(f"immunize: {stage.name}", done, steps, line)

    spent: list[Cost] = []
    workspace = Workspace(
        directory=run.checkpoints(place, stage.name),
        private=run.private,
        progress=progress,
        spend=spent.append,
        workers=session.workers if world() == 1 else 1,
    )
    started = time.perf_counter()
    immunized = stage.immunize(model, policy, workspace)
    report = StageReport.of(
        name=stage.name,
        paper=stage.paper,
        options=stage.model_dump(mode="json"),
        measures=stage.measure(model, immunized, policy),
        seconds=round(time.perf_counter() - started, 1),
        cost=spent[-1] if spent else None,
        caveats=tuple(stage.caveats(model, policy)),
    )
    return immunized, report
