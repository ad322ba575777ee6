"""Looking at what there is: releases, evidence, policies, reports."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from release_guard.commands.options import common, engine_options, trust_options
from release_guard.commands.shared import (
    digest_of,
    load_policy,
    need_torch,
    now,
    open_session,
    require_file,
    surroundings,
)
from release_guard.errors import IntegrityError, PolicyError
from release_guard.terminal import Terminal


@click.command()
@click.argument("target")
@trust_options
@click.option(
    "--trust-on-first-use",
    "first_use",
    is_flag=True,
    help="Where nobody is pinned yet: trust whoever signed it, and pin them.",
)
@click.option(
    "--policy",
    "policy_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="It must have been judged by exactly this file.",
)
@click.option("--partial", is_flag=True, help="Missing files are no finding; missing proof is.")
@click.option("--strict", is_flag=True, help="Exit with 4 if a document changed, too.")
@click.option(
    "--rejudge",
    is_flag=True,
    help="Show every check as the evidence bears it out now; one that was signed otherwise is a "
    "finding. Without it, only the verdict is compared.",
)
@common
@click.pass_obj
def verify(  # noqa: PLR0913
    terminal: Terminal,
    /,
    *,
    target: str,
    first_use: bool,
    policy_path: Path | None,
    partial: bool,
    strict: bool,
    rejudge: bool,
    **given: Any,
) -> int:
    """Check a release: signature, files, attestations, evidence.

    TARGET is a folder (a snapshot in the Hub's cache and a git checkout are folders),
    git:FOLDER[@REVISION] (a commit), hf://OWNER/NAME[@REVISION] (no weights are downloaded), or
    HUB/OWNER/NAME@REVISION of a directory hub.

    Whose signature counts is up to you: --key, --fingerprint, or --identity and --issuer. Without
    any, it is whoever your pin file names for this model.
    """
    from release_guard import inspection, targets  # noqa: PLC0415
    from release_guard import verify as flow  # noqa: PLC0415
    from release_guard.pins import Pins, choose  # noqa: PLC0415
    from release_guard.trust import Trusted  # noqa: PLC0415

    digest = None if policy_path is None else digest_of(policy_path)
    named, known = Trusted.given(given), Pins.default()
    if first_use and named is not None:
        raise click.UsageError("--trust-on-first-use is for whom no option names")
    release = targets.find(target)
    choice = choose(release.place, release, known, given=named, first_use=first_use)
    if choice.trusted.key is not None:
        release.require_foreign(choice.trusted.key)
    trust = flow.Trust(choice.trusted.voucher(release), digest)
    found = flow.verify(release, trust, now=now(), partial=partial, every_check=rejudge)
    found = replace(found, strict=strict)
    if choice.source == "first use" and found.exit_code == 0:
        known.add(release.place, choice.trusted)
    for line in inspection.about_trust(choice, known, release.place, found):
        terminal.warn(line)
    lines = [*inspection.lines(found, release.shown)]
    lines += inspection.rejudged_lines(found) if rejudge else ()
    document = {"target": target, "looked_at": release.shown, "trusted_by": choice.source}
    terminal.data("\n".join(lines), {**document, **inspection.document(found)})
    if text := inspection.advice(found):
        terminal.say(f"next: {text}")
    return found.exit_code


@click.command()
@click.argument("trial")
@click.option(
    "--evidence",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The file that holds it; its policy is looked for beside it.",
)
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of a run or of a release, instead of --evidence.",
)
@click.option(
    "--source", required=True, metavar="SOURCE", help="The weights that the trial attacked."
)
@click.option(
    "--base", metavar="SOURCE", help="Public ancestor, where the trial used the undefended model."
)
@click.option(
    "--policy",
    "policy_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The evidence's policy, byte for byte, where its data are. [default: beside the evidence]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1),
    default=0.02,
    show_default=True,
    metavar="NUMBER",
    help="How far scores may be off on another machine.",
)
@engine_options
@common
@click.pass_obj
def replay(  # noqa: PLR0913
    terminal: Terminal,
    /,
    *,
    trial: str,
    evidence: Path | None,
    run: Path | None,
    source: str,
    base: str | None,
    policy_path: Path | None,
    tolerance: float,
    **where: Any,
) -> int:
    """Run one trial of published evidence again and compare the outcomes.

    TRIAL is its key, or the beginning of one. Whether the evidence is the publisher's, `verify`
    says.
    """
    if (evidence is None) == (run is None):
        raise click.UsageError("give one of --evidence and --run")
    from release_guard.evidence import Evidence  # noqa: PLC0415

    need_torch()
    from release_guard import outcome  # noqa: PLC0415
    from release_guard import replay as flow  # noqa: PLC0415
    from release_guard.sources import local_folder  # noqa: PLC0415

    path = evidence or flow.evidence_of(run or Path())
    require_file(path)
    known = Evidence.read(path)
    record = flow.find(known, trial)
    policy = load_policy(policy_path or path.with_name("policy.toml"))
    if policy.digest != known.policy:
        raise IntegrityError("not the policy of this evidence; give it with --policy")
    ancestor = flow.ancestor_of(policy, base)
    request = flow.Request(record, policy, local_folder(source), ancestor, tuple(known.artefacts))
    found = flow.replay(request, open_session(terminal, 1, **where), tolerance=tolerance)
    document = outcome.replay_document(found, known, surroundings())
    terminal.data("\n".join(outcome.replay_lines(found)), document)
    return 0 if found.agrees else IntegrityError.exit_code


@click.group("policy")
def policy_group() -> None:
    """Look at policy files."""


@policy_group.command("check")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@common
@click.pass_obj
def check_policy(terminal: Terminal, *, path: Path) -> None:
    """Find everything that is wrong with FILE; prints its digest if nothing is."""
    from release_guard import check  # noqa: PLC0415
    from release_guard.policy import Policy  # noqa: PLC0415

    policy = Policy.load(path)
    if not check.with_torch():
        terminal.warn(
            f"{path}: options of modality, stages and attacks were not checked; install "
            "model-release-guard[immunize] for that"
        )
    if found := check.problems(policy):
        raise PolicyError("\n".join(f"{path}: {line}" for line in found))
    terminal.say(f"{path}: nothing is wrong with it; sha256 as `verify --policy` compares it:")
    document = {"policy": str(path), "digest": policy.digest, "options_checked": check.with_torch()}
    terminal.data(policy.digest, document)


@policy_group.command("schema")
@common
@click.pass_obj
def print_schema(terminal: Terminal) -> None:
    """Print the JSON Schema of policy files (options of plug-ins: see docs/policy.md)."""
    import json  # noqa: PLC0415

    from release_guard.policy import Policy  # noqa: PLC0415

    schema = Policy.model_json_schema()
    terminal.data(json.dumps(schema, indent=2), {"schema": schema})


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@common
@click.pass_obj
def report(terminal: Terminal, *, run: Path) -> None:
    """Write report.html of the folder RUN again, from its evidence and policy."""
    from release_guard.evidence import Evidence  # noqa: PLC0415
    from release_guard.gate import judge_again  # noqa: PLC0415
    from release_guard.policy import Policy  # noqa: PLC0415
    from release_guard.report import render  # noqa: PLC0415
    from release_guard.run import Run  # noqa: PLC0415

    folder = Run(run)
    require_file(folder.evidence)
    evidence, policy = Evidence.read(folder.evidence), Policy.load(folder.policy)
    if evidence.policy != policy.digest:
        raise IntegrityError(f"{folder.policy}: not the policy of this run's evidence")
    verdict = judge_again(evidence, policy)
    page = render(evidence, verdict, policy, title=run.resolve().name)
    folder.write(folder.report.name, page.encode())
    document = {"report": str(folder.report), "verdict": verdict.result.name}
    terminal.data(str(folder.report), document)


COMMANDS = (verify, replay, report, policy_group)
