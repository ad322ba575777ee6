"""From a model to a release, or part of the way."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from release_guard.commands.options import (
    as_is_option,
    base_option,
    common,
    digest_option,
    engine_options,
    maybe_policy_option,
    output_option,
    policy_option,
    require_policy,
    workers_option,
)
from release_guard.commands.shared import (
    REFUSED,
    agreement,
    default_run,
    digest_of,
    load_policy,
    need_torch,
    now,
    open_session,
    step_summary,
)
from release_guard.errors import PolicyError
from release_guard.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from release_guard.changes import Changes
    from release_guard.deliver import Packed, Published
    from release_guard.policy import Policy


@click.command()
@click.argument("source", required=False)
@maybe_policy_option
@click.option("--repo", required=True, metavar="OWNER/NAME", help="Where, on the policy's hub.")
@output_option
@click.option("--dry-run", is_flag=True, help="Stop before anything is signed or sent.")
@click.option(
    "--stop-after",
    type=click.Choice(["pack"]),
    help="Leave signing and sending to a later --candidate; needs no credential.",
)
@click.option(
    "--candidate",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Instead of SOURCE: what --stop-after pack left. Judged again, signed, sent.",
)
@digest_option("--expect-root", "Payload root that the candidate must have.")
@digest_option("--expect-policy", "SHA-256 of the policy that it must have been judged by.")
@click.option("--tag", metavar="NAME", help="Tag for the pushed revision, such as v1.0.")
@click.option("--yes", is_flag=True, help="Delete files there that no signed release put there.")
@as_is_option
@base_option
@workers_option
@engine_options
@common
@click.pass_context
def publish(  # noqa: PLR0913  click hands over one argument an option
    context: click.Context,
    /,
    *,
    source: str | None,
    policy_path: Path | None,
    repo: str,
    output: Path | None,
    dry_run: bool,
    stop_after: str | None,
    candidate: Path | None,
    expect_root: str | None,
    expect_policy: str | None,
    tag: str | None,
    yes: bool,
    as_is: bool,
    base: str | None,
    workers: int,
    **where: Any,
) -> int:
    """Immunize SOURCE, attack it, and push it to OWNER/NAME if the policy's gate lets it.

    SOURCE is a folder, or OWNER/NAME@REVISION of the Hugging Face Hub. With --candidate, --policy
    says which one it must have been judged by.
    """
    terminal: Terminal = context.obj
    from release_guard.hubs import require_repo_id, require_tag  # noqa: PLC0415

    require_repo_id(repo)
    if tag is not None:
        require_tag(tag)
    agree = agreement(terminal, yes=yes)
    if candidate is not None:
        from release_guard.deliver import open_candidate  # noqa: PLC0415

        given = {"SOURCE": source, "--stop-after": stop_after, "--base": base, "--dry-run": dry_run}
        _require_judged(expect_root, {**given, "--as-is": as_is})
        asked = {expect_policy, _asked_policy(context, policy_path)} - {None}
        if len(asked) > 1:
            raise click.UsageError("--policy and --expect-policy name two policies; give one")
        digest = next(iter(asked), None)
        packed = open_candidate(candidate, root=expect_root, policy_digest=digest)
        return _publish_candidate(terminal, packed, repo, tag, agree)
    if source is None:
        raise click.UsageError("give SOURCE, or --candidate with what --stop-after pack left")
    if expect_root or expect_policy:
        raise click.UsageError("--expect-root and --expect-policy go with --candidate")
    policy = load_policy(require_policy(policy_path))
    from release_guard import publish as flow  # noqa: PLC0415
    from release_guard.preflight import Order  # noqa: PLC0415

    pack_only = stop_after is not None
    order = Order(source, repo, policy, base, as_is, dry_run, pack_only, tag)
    session = open_session(terminal, workers, **where)
    published = flow.publish(order, output or default_run(repo, source), session, agree)
    return _tell(terminal, published, repo, dry_run=dry_run)


def _require_judged(root: str | None, others: "Mapping[str, object]") -> None:
    """Refuse what would have to be known before a candidate was judged."""
    if root is None:
        raise click.UsageError(
            "--candidate needs --expect-root, the payload root that judging it gave"
        )
    if given := [name for name, value in others.items() if value]:
        raise click.UsageError(f"--candidate was judged already; leave out {', '.join(given)}")


def _asked_policy(context: click.Context, path: Path | None) -> str | None:
    """Digest of the policy that somebody named; one that only lies near is not asked for."""
    named = context.get_parameter_source("policy_path") in {
        click.core.ParameterSource.COMMANDLINE,
        click.core.ParameterSource.ENVIRONMENT,
    }
    return digest_of(path) if named and path is not None else None


def _publish_candidate(
    terminal: Terminal,
    packed: "Packed",
    repo: str,
    tag: str | None,
    agree: "Callable[[Changes], None]",
) -> int:
    from release_guard.deliver import (  # noqa: PLC0415
        Delivery,
        Published,
        check_credentials,
        deliver,
        plugins,
    )

    if not packed.candidate.verdict.passed:
        return _tell(terminal, Published(packed), repo)
    _require_known_endpoint(packed.policy)
    hub, signer = plugins(_without_files(packed.policy))
    head = check_credentials(hub, signer, repo)
    delivery = Delivery(repo, hub, signer, head, terminal.progress, now, agree, tag)
    return _tell(terminal, deliver(packed, delivery), repo)


def _without_files(policy: "Policy") -> "Policy":
    """Key files lie where the candidate was packed, if anywhere: here the environment names one.

    The card says whose key it was packed for, so another one is refused.
    """
    if policy.signer.name != "key":
        return policy
    return policy.model_copy(update={"signer": type(policy.signer)(name="key")})


def _require_known_endpoint(policy: "Policy") -> None:
    """Whoever packed a candidate worked on models: where our token goes is not theirs to say."""
    endpoint = policy.hub.options.get("endpoint")
    here = urlsplit(str(endpoint)).hostname in {"127.0.0.1", "::1", "localhost"}
    if endpoint is not None and not here and endpoint != os.environ.get("HF_ENDPOINT"):
        raise PolicyError(
            f"the candidate's policy sends it to {endpoint}; if a token may go there, set "
            "HF_ENDPOINT to exactly that address"
        )


def _tell(terminal: Terminal, done: "Published", repo: str, *, dry_run: bool = False) -> int:
    """What came of it, for people, for machines, for the page of a workflow's run."""
    from release_guard import outcome  # noqa: PLC0415

    packed, receipt = done.packed, done.receipt
    verdict, folder = packed.candidate.verdict, packed.candidate.directory
    report = folder.with_name("report.html")
    if not report.is_file():  # packed elsewhere
        report = folder / ".release-guard" / "report.html"
    for line in (*outcome.verdict_lines(verdict, packed.policy), f"report: {report}"):
        terminal.say(line)
    if dry_run and done.changes is not None:
        terminal.say("\n".join(outcome.changes_lines(done.changes)))
    for line in outcome.published_lines(packed, repo, receipt, dry_run=dry_run):
        terminal.say(line)
    document = {
        **outcome.verdict_document(verdict, packed.evidence),
        **outcome.pushed_document(receipt),
        **outcome.changes_document(done.changes),
        "repo": repo,
        "dry_run": dry_run,
        "report": str(report),
        "release": str(folder),
        "payload_root": packed.candidate.payload.root,
    }
    step_summary(terminal, verdict, packed.evidence, packed.policy)
    terminal.data(receipt.url if receipt else "", document)
    return 0 if verdict.passed else REFUSED


@click.command()
@click.argument("source")
@policy_option
@output_option
@workers_option
@common
@click.pass_obj
def immunize(
    terminal: Terminal, *, source: str, policy_path: Path, output: Path | None, workers: int
) -> int:
    """Apply the policy's stages to SOURCE; `publish` with the same --output goes on from there.

    A large model is shared among processes by
    `torchrun --nproc-per-node N -m release_guard immunize ...`, whose exit code is torchrun's.
    """
    need_torch()
    from release_guard import shards  # noqa: PLC0415
    from release_guard.engines import without_credentials  # noqa: PLC0415

    with shards.group():
        terminal.follows = not shards.leads()
        policy = load_policy(policy_path)
        from release_guard import judging as flow  # noqa: PLC0415
        from release_guard import outcome  # noqa: PLC0415
        from release_guard.preflight import Order  # noqa: PLC0415
        from release_guard.sources import fetch_all  # noqa: PLC0415

        session = open_session(terminal, max(1, workers // shards.world()))
        fetch_all(policy, source)
        order, folder = Order(source, source, policy), output or default_run(source, source)
        if shards.world() == 1:
            done = session.apart(flow.immunize, order, folder)
        else:  # torchrun's processes are the ones that train: here credentials are taken away
            terminal.say(f"{shards.world()} processes share the model")
            with without_credentials():
                done = flow.immunize(order, folder, session)
    for line in outcome.immunized_lines(done.checks):
        terminal.say(line)
    terminal.data(str(done.folder), outcome.immunized_document(done))
    return 0 if done.composed or terminal.follows else REFUSED


@click.command()
@click.argument("source")
@policy_option
@output_option
@base_option
@workers_option
@engine_options
@common
@click.pass_obj
def attack(
    terminal: Terminal,
    /,
    *,
    source: str,
    policy_path: Path,
    output: Path | None,
    base: str | None,
    workers: int,
    **where: Any,
) -> int:
    """Red-team SOURCE as it is, without publishing; prints where the report lies."""
    policy = load_policy(policy_path)
    from release_guard import outcome  # noqa: PLC0415
    from release_guard.judging import assess  # noqa: PLC0415
    from release_guard.preflight import Order  # noqa: PLC0415
    from release_guard.sources import fetch_all  # noqa: PLC0415

    order = Order(source, source, policy, base, as_is=True)
    session = open_session(terminal, workers, **where)
    fetch_all(policy, source, base)
    assessed = session.apart(assess, order, output or default_run(source, source, "attack-"))
    for line in outcome.verdict_lines(assessed.verdict, policy):
        terminal.say(line)
    step_summary(terminal, assessed.verdict, assessed.evidence, policy)
    document = outcome.verdict_document(assessed.verdict, assessed.evidence)
    terminal.data(str(assessed.report), {**document, "report": str(assessed.report)})
    return 0 if assessed.verdict.passed else REFUSED


@click.command()
@click.argument("source")
@policy_option
@output_option
@as_is_option
@base_option
@workers_option
@common
@click.pass_obj
def plan(  # noqa: PLR0913
    terminal: Terminal,
    *,
    source: str,
    policy_path: Path,
    output: Path | None,
    as_is: bool,
    base: str | None,
    workers: int,
) -> None:
    """Say what `publish SOURCE` would do: trials, steps, time and disk, at most."""
    policy = load_policy(policy_path)
    import torch  # noqa: PLC0415

    from release_guard import outcome  # noqa: PLC0415
    from release_guard.calibration import survey  # noqa: PLC0415
    from release_guard.preflight import Order  # noqa: PLC0415

    torch.set_num_threads(1)  # as a worker has
    order = Order(source, "", policy, base, as_is=as_is)
    planned = survey(order, output or default_run(source, source), open_session(terminal, workers))
    terminal.data("\n".join(outcome.plan_lines(planned)), outcome.plan_document(planned))


COMMANDS = (publish, immunize, attack, plan)
