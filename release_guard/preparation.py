"""From an order to the models that are compared: checked, immunized or taken as is, loaded."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from release_guard import SUITE, card
from release_guard.errors import ModelError, PolicyError, listed
from release_guard.evidence import Cost, StageReport
from release_guard.manifest import Manifest, could_be_weights, hash_directory
from release_guard.modalities import Modality, settle_threads
from release_guard.phases import data_digests
from release_guard.policy import Policy, Precision
from release_guard.preflight import (
    Order,
    check_attacks,
    check_data,
    check_donors,
    check_formats,
    check_order,
    check_relatives,
    check_stage_kinds,
    check_stages,
    public_ancestor,
)
from release_guard.quantization import runnable
from release_guard.run import Run, folder_made_whole, read_made, share_files
from release_guard.session import Session
from release_guard.sham_weights import sham_of
from release_guard.sharding import gather, settled
from release_guard.shards import leads, wait, world
from release_guard.sources import local_folder
from release_guard.stages import Stage, Workspace
from release_guard.strict_json import canonical_json, loads
from release_guard.subject import Subject

if TYPE_CHECKING:
    from release_guard.modalities import ModelHandle


@dataclass(frozen=True)
class Opened:
    """What a run begins with: all of it checked, the base loaded, the folder claimed."""

    modality: Modality
    source: Path
    undefended: Path
    ancestor: Path | None
    base: "ModelHandle"
    run: Run


def prepare(order: Order, output: Path, session: Session) -> tuple[Subject, Run]:
    """Load the base, immunize it (or take it as it is), and load back the very files to be pushed.

    Raises:
        PolicyError: `output` belongs to another run.
        ModelError: A model or its data cannot be used.
        ImmunizationError: A stage failed.
    """
    opened = open_run(order, output, session)
    base, run = opened.base, opened.run
    stages: tuple[StageReport, ...] = ()
    if order.untouched:
        _take_as_it_is(opened.source, run)
    else:
        stages = apply_stages(base, order.policy, run, session)
    immunized = opened.modality.load(str(run.immunized))
    artefacts = make_artefacts(opened.modality, run, order.policy, session)
    moved = _make_sham(base, immunized, run, order.policy, session)
    subject = Subject(
        opened.undefended,
        run.immunized,
        base,
        immunized,
        stages,
        moved,
        opened.ancestor,
        artefacts=artefacts,
        as_is=order.as_is,
    )
    return subject, run


def open_run(order: Order, output: Path, session: Session) -> Opened:
    """Everything that can be known before anything is spent; claims the folder.

    The leading process claims it; the others, if there are any, wait for that.
    """
    check_order(order, output)
    source = local_folder(order.source)
    undefended = local_folder(order.base) if order.base else source
    manifest = hash_directory(source)
    _require_room(source, manifest, order.policy)
    about: dict[str, Any] = {
        "source": manifest.root,
        "base": hash_directory(undefended).payload.root if order.base else manifest.payload.root,
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
    card.check(source)
    modality = Modality.build(order.policy.modality)
    base = modality.load(str(undefended))
    if order.untouched:
        require_attacked(modality, source, manifest)
    settle_threads(base, session.workers)
    check_data(base, order.policy)
    check_relatives(base, order.policy, ancestor)
    check_formats(base, order.policy)
    if not order.as_is:
        check_stages(base, order.policy)
    about["data"] = data_digests(base, order.policy)
    about["retained"] = base.digest(order.policy.retain.dataset)
    if leads():
        Run.claim(output, about).write(Run(output).policy.name, order.policy.source)
    wait()
    return Opened(modality, source, undefended, ancestor, base, Run(output))


def require_attacked(modality: Modality, folder: Path, manifest: Manifest) -> None:
    """Refuse a folder with more weights than those that are loaded, and so attacked.

    Args:
        modality: Knows what is loaded.
        folder: Would be published as it is.
        manifest: Of all its files.

    Raises:
        ModelError: There are others, under whatever name.
    """
    read = modality.weights(folder)
    names = [entry.name for entry in manifest.payload.entries if entry.name not in read]
    if stray := [name for name in names if could_be_weights(name)]:
        raise ModelError(
            f"{folder}: {listed(stray)} may hold weights that nobody would have attacked, and "
            "would be published with the model; move them out"
        )


def apply_stages(
    base: "ModelHandle", policy: Policy, run: Run, session: Session
) -> tuple[StageReport, ...]:
    """Apply the stages in order and save the result; a finished one is taken from the folder."""
    if run.immunized.is_dir():
        return _reports(run.stages)
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


def _reports(path: Path) -> tuple[StageReport, ...]:
    """What the stages of a finished immunization said."""
    try:
        return tuple(map(StageReport.model_validate, loads(path.read_bytes())))
    except (OSError, ValueError, TypeError):
        raise PolicyError(f"{path}: damaged; choose another --output") from None


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


def _require_room(source: Path, manifest: Manifest, policy: Policy) -> None:
    """Refuse a model with files where the release puts those of another precision."""
    names = [entry.name for entry in manifest.payload.entries]
    for precision in policy.precisions:
        if any(name.startswith(f"{precision}/") for name in names):
            raise ModelError(
                f"{source}: has a folder {precision}, where the release puts its own files of "
                "that precision; rename or remove it"
            )


def make_artefacts(
    modality: Modality, run: Run, policy: Policy, session: Session
) -> dict[Precision, Path]:
    """Folders of the precisions that are not fp32, each written once from the immunized model.

    What cannot be run here is not written; what was changed since, or made from another model, is
    written again.

    Raises:
        ModelError: A precision cannot be written, or what is written cannot be read back as such.
    """
    master = hash_directory(run.immunized).payload.root
    wanted = [each for each in policy.precisions if each != "fp32" and not runnable(each)]
    made = read_made(run.made) if run.made.exists() else {}
    folders: dict[Precision, Path] = {each: run.artefacts / each for each in wanted}
    for precision, target in folders.items():
        if not target.is_dir() or made.get(precision) != [master, _root(target)]:
            session.progress("write the precisions", 0, 1, precision)
            with folder_made_whole(target) as folder:
                modality.save_at(run.immunized, folder, precision)
            made[precision] = [master, _root(target)]
            run.write(run.made.name, canonical_json(made))
        modality.load(str(target), artefact=precision)
    return folders


def _root(folder: Path) -> str:
    return hash_directory(folder).payload.root


def _take_as_it_is(source: Path, run: Run) -> None:
    manifest = hash_directory(source)
    if run.immunized.is_dir() and hash_directory(run.immunized).root == manifest.payload.root:
        return
    with folder_made_whole(run.immunized) as folder:
        share_files(source, folder, (entry.name for entry in manifest.payload.entries))
