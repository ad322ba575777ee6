"""The command line: arguments in, outcome and exit code out. It decides nothing.

Commands import what they need when they run: `--help`, `verify` and a policy's syntax errors never
wait for torch.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from release_guard import __version__
from release_guard.errors import IntegrityError, PolicyError, ReleaseGuardError
from release_guard.terminal import Terminal

if TYPE_CHECKING:
    from release_guard.evidence import Evidence
    from release_guard.manifest import Tree
    from release_guard.policy import Policy
    from release_guard.redteam import Session
    from release_guard.release import Verdict

PROGRAM = "release-guard"
_REFUSED, _INTERRUPTED = 3, 130
_EPILOG = """\b
Exit codes:
  0    done; a release was published, or is intact
  1    something did not work (model, data, disk, network)
  2    the command line or the policy is wrong
  3    the gate refused; nothing was published
  4    signature, digest, required policy or replayed trial do not match
  5    the remote moved, or refused the push
  6    the hub does not know who is asking
  130  interrupted; the same command goes on where it stopped

\b
Environment:
  RELEASE_GUARD_POLICY        policy file, where --policy is not given
  RELEASE_GUARD_SIGNING_KEY   private key: a path, or the PEM itself
  RELEASE_GUARD_KEY_PASSWORD  its password
  HF_TOKEN, HF_ENDPOINT       token and address of the Hugging Face Hub
  GITHUB_STEP_SUMMARY         a file that gets the verdict as Markdown (set by GitHub Actions)
  NO_COLOR, FORCE_COLOR       no colours; colours where there is no terminal
"""

_Command = TypeVar("_Command", bound=Callable[..., Any])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; every error ends here, as lines on stderr and an exit code."""
    terminal = Terminal()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads: wait, do not spin
    try:
        returned = cli.main(arguments, prog_name=PROGRAM, standalone_mode=False, obj=terminal)
    except ReleaseGuardError as error:
        return terminal.fail(str(error).splitlines(), error.exit_code)
    except click.Abort:
        return terminal.stop(_interrupted(terminal), _INTERRUPTED)
    except click.ClickException as error:
        return _misused(error, terminal, sys.argv[1:] if arguments is None else arguments)
    except Exception as error:
        return _unexpected(error, terminal)
    finally:
        terminal.close()
    return int(returned or 0)


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def keep(context: click.Context, _: click.Parameter, value: Any) -> None:
        if (terminal := context.find_object(Terminal)) is not None:
            terminal.command = context.command_path.removeprefix(f"{PROGRAM} ")
            setattr(terminal, name, value)

    return keep


def _common(command: _Command) -> _Command:
    """Options of every command; they reach the terminal even if a later one is wrong."""
    eager: dict[str, Any] = {"is_eager": True, "expose_value": False}
    for option in (
        click.option("-v", "--verbose", count=True, callback=_set("verbosity"), **eager,
                     help="Every trial as it ends; -vv: tracebacks too."),
        click.option("-q", "--quiet", is_flag=True, callback=_set("quiet"), **eager,
                     help="Only warnings and errors on stderr."),
        click.option("--json", is_flag=True, callback=_set("as_json"), **eager,
                     help="Print one JSON document on stdout."),
    ):  # fmt: skip
        command = option(command)
    return command


_policy_option = click.option(
    "--policy",
    "policy_path",
    type=click.Path(path_type=Path),
    envvar="RELEASE_GUARD_POLICY",
    show_envvar=True,
    required=True,
    metavar="FILE",
    help="What must be denied, what must stay, who attacks.",
)
_base_option = click.option(
    "--base", metavar="SOURCE", help="Undefended original, where SOURCE was immunized elsewhere."
)


def _not_there(_: click.Context, __: click.Parameter, folder: Path) -> Path:
    if folder.exists():
        raise click.UsageError(f"{folder} exists already; give --output another name")
    return folder


_made_option = click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    callback=_not_there,
    metavar="DIR",
    help="What is made; it must not exist yet.",
)
_output_option = click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the run; the same one goes on where it stopped. [default: runs/NAME]",
)
_workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="one a core",
    help="Trials at once.",
)
_as_is_option = click.option("--as-is", is_flag=True, help="Judge SOURCE as it is; no stage.")


def _engine_options(command: _Command) -> _Command:
    """Where trials run; handed on to `_session` as they are."""
    for option in (
        click.option("--engine", default="local", show_default=True, metavar="NAME",
                     help="Where trials run: local (this machine) or ray."),
        click.option("--address", metavar="HOST:PORT",
                     help="Head node of a Ray cluster that runs. [default: one is started here]"),
        click.option("--gpus", type=click.FloatRange(min=0), metavar="NUMBER",
                     help="GPUs a trial takes from Ray, such as 0.25. [default: 0]"),
    ):  # fmt: skip
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def cli() -> None:
    """Immunize a model, attack it, and publish only what was shown to resist."""


@cli.command()
@click.argument("source")
@_policy_option
@click.option("--repo", required=True, metavar="OWNER/NAME", help="Where, on the policy's hub.")
@_output_option
@click.option("--dry-run", is_flag=True, help="Stop before anything is signed or sent.")
@_as_is_option
@_base_option
@_workers_option
@_engine_options
@_common
@click.pass_obj
def publish(  # noqa: PLR0913  click hands over one argument an option
    terminal: Terminal,
    /,
    *,
    source: str,
    policy_path: Path,
    repo: str,
    output: Path | None,
    dry_run: bool,
    as_is: bool,
    base: str | None,
    workers: int,
    **where: Any,
) -> int:
    """Immunize SOURCE, attack it, and push it to OWNER/NAME if the policy's gate lets it.

    SOURCE is a folder, or OWNER/NAME@REVISION of the Hugging Face Hub.
    """
    from release_guard.hubs import require_repo_id  # noqa: PLC0415

    require_repo_id(repo)
    policy = _load(policy_path)
    from release_guard import outcome  # noqa: PLC0415
    from release_guard import publish as flow  # noqa: PLC0415
    from release_guard.preflight import Order  # noqa: PLC0415

    order = Order(source, repo, policy, base, as_is=as_is, dry_run=dry_run)
    session = _session(terminal, workers, **where)
    published = flow.publish(order, output or _runs(repo), session)
    verdict, receipt = published.verdict, published.receipt
    folder = published.candidate.directory
    report = folder.with_name("report.html")
    for line in outcome.verdict_lines(verdict, policy):
        terminal.say(line)
    terminal.say(f"report: {report}")
    if receipt is not None:
        terminal.say(f"published: {receipt.url} at {receipt.revision}")
        terminal.say(f"verify: {outcome.verify_command(policy, repo, receipt)}")
    elif verdict.passed:
        terminal.say(f"dry run: nothing was signed or sent; what would be lies in {folder}")
    else:
        terminal.say("nothing was published")
        terminal.say("\n".join(outcome.advice_lines(verdict)))
    document = {
        **outcome.verdict_document(verdict, published.evidence),
        **outcome.pushed_document(receipt),
        "repo": repo,
        "dry_run": dry_run,
        "report": str(report),
        "release": str(folder),
    }
    _step_summary(terminal, verdict, published.evidence, policy)
    terminal.data(receipt.url if receipt else "", document)
    return 0 if verdict.passed else _REFUSED


@cli.command()
@click.argument("source")
@_policy_option
@_output_option
@_workers_option
@_common
@click.pass_obj
def immunize(
    terminal: Terminal, *, source: str, policy_path: Path, output: Path | None, workers: int
) -> int:
    """Apply the policy's stages to SOURCE; `publish` with the same --output goes on from there.

    A large model is shared among processes by
    `torchrun --nproc-per-node N -m release_guard immunize ...`, whose exit code is torchrun's.
    """
    _need_torch()
    from release_guard import shards  # noqa: PLC0415

    with shards.group():
        terminal.follows = not shards.leads()
        policy = _load(policy_path)
        from release_guard import outcome  # noqa: PLC0415
        from release_guard import publish as flow  # noqa: PLC0415
        from release_guard.preflight import Order  # noqa: PLC0415

        session = _session(terminal, max(1, workers // shards.world()))
        if shards.world() > 1:
            terminal.say(f"{shards.world()} processes share the model")
        folder = output or _runs(source)
        done = flow.immunize(Order(source, source, policy), folder, session)
    for line in outcome.immunized_lines(done.checks):
        terminal.say(line)
    terminal.data(str(done.folder), outcome.immunized_document(done))
    return 0 if done.composed or terminal.follows else _REFUSED


@cli.command()
@click.argument("source")
@_policy_option
@_output_option
@_base_option
@_workers_option
@_engine_options
@_common
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
    policy = _load(policy_path)
    from release_guard import outcome  # noqa: PLC0415
    from release_guard.preflight import Order  # noqa: PLC0415
    from release_guard.publish import assess  # noqa: PLC0415

    order = Order(source, source, policy, base, as_is=True)
    session = _session(terminal, workers, **where)
    assessed = assess(order, output or _runs(source, "attack-"), session)
    for line in outcome.verdict_lines(assessed.verdict, policy):
        terminal.say(line)
    _step_summary(terminal, assessed.verdict, assessed.evidence, policy)
    document = outcome.verdict_document(assessed.verdict, assessed.evidence)
    terminal.data(str(assessed.report), {**document, "report": str(assessed.report)})
    return 0 if assessed.verdict.passed else _REFUSED


@cli.command()
@click.argument("source")
@_policy_option
@_output_option
@_as_is_option
@_base_option
@_workers_option
@_common
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
    policy = _load(policy_path)
    import torch  # noqa: PLC0415

    from release_guard import outcome  # noqa: PLC0415
    from release_guard.calibration import survey  # noqa: PLC0415
    from release_guard.preflight import Order  # noqa: PLC0415

    torch.set_num_threads(1)  # as a worker has
    order = Order(source, "", policy, base, as_is=as_is)
    planned = survey(order, output or _runs(source), _session(terminal, workers))
    terminal.data("\n".join(outcome.plan_lines(planned)), outcome.plan_document(planned))


@cli.command()
@click.argument("target")
@click.option(
    "--key",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PUB",
    help="Public key you trust; never one that lies beside the model.",
)
@click.option(
    "--policy",
    "policy_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="It must have been judged by exactly this file.",
)
@click.option("--partial", is_flag=True, help="Missing files are no finding.")
@click.option(
    "--rejudge",
    is_flag=True,
    help="Show every check as the evidence bears it out now; one that was signed otherwise is a "
    "finding. Without it, only the verdict is compared.",
)
@_common
@click.pass_obj
def verify(
    terminal: Terminal,
    *,
    target: str,
    key: Path,
    policy_path: Path | None,
    partial: bool,
    rejudge: bool,
) -> int:
    """Check a release: signature, files, attestations, evidence.

    TARGET is a folder, HUB/OWNER/NAME@REVISION of a directory hub, or
    hf://OWNER/NAME[@REVISION].
    """
    from release_guard import outcome  # noqa: PLC0415
    from release_guard import verify as flow  # noqa: PLC0415
    from release_guard.plugins import Spec  # noqa: PLC0415
    from release_guard.signers import Signer  # noqa: PLC0415

    signer = Signer.build(Spec(name="key", public=str(key)), where="--key")
    digest = None if policy_path is None else _digest(policy_path)
    trust = flow.Trust(signer, digest)
    found = flow.verify(_tree(target), trust, now=_now(), partial=partial, every_check=rejudge)
    lines = [*outcome.verification_lines(found)]
    lines += outcome.rejudged_lines(found) if rejudge else ()
    text = "\n".join(lines)
    terminal.data(text, {"target": target, **outcome.verification_document(found)})
    return found.exit_code


@cli.command()
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
@_engine_options
@_common
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

    _need_torch()
    from release_guard import outcome  # noqa: PLC0415
    from release_guard import replay as flow  # noqa: PLC0415
    from release_guard.preflight import local_folder  # noqa: PLC0415

    path = evidence or flow.evidence_of(run or Path())
    known = Evidence.read(path)
    record = flow.find(known, trial)
    policy = _load(policy_path or path.with_name("policy.toml"))
    if policy.digest != known.policy:
        raise IntegrityError("not the policy of this evidence; give it with --policy")
    ancestor = flow.ancestor_of(policy, base)
    request = flow.Request(record, policy, local_folder(source), ancestor, tuple(known.artefacts))
    found = flow.replay(request, _session(terminal, 1, **where), tolerance=tolerance)
    document = outcome.replay_document(found, known, _surroundings())
    terminal.data("\n".join(outcome.replay_lines(found)), document)
    return 0 if found.agrees else IntegrityError.exit_code


@cli.command()
@click.argument("model")
@click.option(
    "--private",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="gauge.json, from the folder `private` of the run that made the release.",
)
@_made_option
@_common
@click.pass_obj
def ungauge(terminal: Terminal, *, model: str, private: Path, output: Path) -> None:
    """Take the gauge of MODEL back, so that it merges again, for whom its owner lets do so."""
    _need_torch()
    from release_guard.ungauge import ungauge as flow  # noqa: PLC0415

    record = flow(model, private, output)
    terminal.say(f"taken back: {', '.join(record.changes)}")
    terminal.data(str(output), {"output": str(output), "changes": list(record.changes)})


@cli.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--pruner",
    type=click.Choice(["depth", "width"]),
    default="depth",
    show_default=True,
    help="depth: fewer layers a block. width: the smallest inner units become zero.",
)
@_made_option
@_common
@click.pass_obj
def prune(terminal: Terminal, *, model: str, pruner: str, output: Path) -> None:
    """Make a smaller text-to-image pipeline of MODEL, which concept_suppression then distils."""
    _need_torch()
    from release_guard import pruning  # noqa: PLC0415
    from release_guard.preflight import local_folder  # noqa: PLC0415
    from release_guard.run import folder_made_whole  # noqa: PLC0415

    with folder_made_whole(output) as folder:
        macs = pruning.prune(str(local_folder(model)), folder, pruning.PRUNERS[pruner])
    terminal.say("multiplications of a UNet pass: {:,} before, {:,} after".format(*macs))
    terminal.data(str(output), {"output": str(output), "macs": list(macs)})


@cli.group("policy")
def policy_group() -> None:
    """Look at policy files."""


@policy_group.command("check")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@_common
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
@_common
@click.pass_obj
def print_schema(terminal: Terminal) -> None:
    """Print the JSON Schema of policy files (options of plug-ins: see docs/policy.md)."""
    import json  # noqa: PLC0415

    from release_guard.policy import Policy  # noqa: PLC0415

    schema = Policy.model_json_schema()
    terminal.data(json.dumps(schema, indent=2), {"schema": schema})


@cli.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path(), metavar="DIR", help="[default: .]"
)
@_common
@click.pass_obj
def keygen(terminal: Terminal, *, output: Path) -> None:
    """Make key.pem (private) and key.pub in DIR; RELEASE_GUARD_KEY_PASSWORD encrypts the first."""
    from release_guard.signers.key import (  # noqa: PLC0415
        PASSWORD_VARIABLE,
        fingerprint,
        generate_key,
        load_public_key,
    )

    password = os.environ.get(PASSWORD_VARIABLE)
    private, public = generate_key(output, password)
    if not password:
        terminal.warn(f"{private}: not encrypted; set {PASSWORD_VARIABLE} first to have it so")
    mark = fingerprint(load_public_key(public))
    terminal.say(f"keep {private} to yourself, hand out {public}; fingerprint {mark}")
    document = {"private": str(private), "public": str(public), "fingerprint": mark}
    terminal.data(f"{private}\n{public}", document)


@cli.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@_common
@click.pass_obj
def report(terminal: Terminal, *, run: Path) -> None:
    """Write report.html of the folder RUN again, from its evidence and policy."""
    from release_guard.evidence import Evidence  # noqa: PLC0415
    from release_guard.gate import gate  # noqa: PLC0415
    from release_guard.policy import Policy  # noqa: PLC0415
    from release_guard.report import render  # noqa: PLC0415
    from release_guard.run import Run  # noqa: PLC0415

    folder = Run(run)
    evidence, policy = Evidence.read(folder.evidence), Policy.load(folder.policy)
    if evidence.policy != policy.digest:
        raise IntegrityError(f"{folder.policy}: not the policy of this run's evidence")
    verdict = gate(evidence, policy)
    page = render(evidence, verdict, policy, title=run.resolve().name)
    folder.write(folder.report.name, page.encode())
    document = {"report": str(folder.report), "verdict": verdict.result.name}
    terminal.data(str(folder.report), document)


@cli.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    metavar="DIR",
    help="Everything it makes stays there.",
)
@click.option(
    "--nf4",
    is_flag=True,
    help="Publish it in nf4 too, attacked and judged by itself; takes twice as long.",
)
@_workers_option
@_common
@click.pass_obj
def demo(terminal: Terminal, *, output: Path, nf4: bool, workers: int) -> int:
    """Watch an unprotected model be refused, an immunized one published, a changed byte noticed."""
    _need_torch()
    from release_guard.demo import run_demo  # noqa: PLC0415

    policy_name = "fp32_and_nf4" if nf4 else "policy"
    code = run_demo(output, _session(terminal, workers), terminal.say, policy_name=policy_name)
    terminal.data(str(output), {"output": str(output), "exit_code": code})
    return code


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@_common
@click.pass_obj
def completion(terminal: Terminal, *, shell: str) -> None:
    """Print the completion script of SHELL: eval "$(release-guard completion bash)"."""
    from click.shell_completion import get_completion_class  # noqa: PLC0415

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    script = kind(cli, {}, PROGRAM, "_RELEASE_GUARD_COMPLETE").source()
    terminal.data(script, {"shell": shell, "script": script})


def _load(path: Path) -> "Policy":
    """A policy whose plug-ins and files are all there; for commands that work on models."""
    from release_guard.policy import Policy  # noqa: PLC0415

    policy = Policy.load(path)
    _need_torch()
    from release_guard.check import problems  # noqa: PLC0415

    if found := problems(policy):
        raise PolicyError("\n".join(f"{path}: {line}" for line in found))
    return policy


def _need_torch() -> None:
    from release_guard.check import with_torch  # noqa: PLC0415

    if not with_torch():
        raise ReleaseGuardError(
            "this command works on models; install what it needs: "
            "pip install 'model-release-guard[immunize]'"
        )


def _session(
    terminal: Terminal, workers: int, *, engine: str = "local", **options: Any
) -> "Session":
    from release_guard.plugins import Spec  # noqa: PLC0415
    from release_guard.redteam import Session  # noqa: PLC0415

    given = {name: value for name, value in options.items() if value is not None}
    where = Spec(name=engine, **given)
    session = Session(workers, terminal.progress, _now, _surroundings(), where)
    session.build_engine().check()
    return session


def _now() -> Any:
    from datetime import UTC, datetime  # noqa: PLC0415

    return datetime.now(UTC)


def _step_summary(
    terminal: Terminal, verdict: "Verdict", evidence: "Evidence", policy: "Policy"
) -> None:
    """What the page of a workflow's run shows, where there is one; it changes no outcome."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    from release_guard.blocks import summary  # noqa: PLC0415

    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(summary(evidence, verdict, policy))
    except OSError as error:
        terminal.say(f"GITHUB_STEP_SUMMARY: {error}")


def _surroundings() -> dict[str, str]:
    import platform  # noqa: PLC0415
    from importlib.metadata import version  # noqa: PLC0415

    libraries = ("torch", "transformers", "peft", "datasets")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
    }


def _runs(name: str, prefix: str = "") -> Path:
    """`runs/NAME`: where a run lies unless somebody says otherwise."""
    last = Path(name.partition("@")[0]).name or Path(name).resolve().name
    return Path("runs") / f"{prefix}{last}"


def _digest(path: Path) -> str:
    import hashlib  # noqa: PLC0415

    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror})") from None


def _tree(target: str) -> "Tree":
    from release_guard.hubs import Hub, require_repo_id  # noqa: PLC0415
    from release_guard.manifest import DirectoryTree  # noqa: PLC0415
    from release_guard.plugins import Spec  # noqa: PLC0415

    if target.startswith("hf://"):
        repo, _, revision = target.removeprefix("hf://").partition("@")
        require_repo_id(repo)
        return Hub.build(Spec(name="huggingface")).tree(repo, revision or "main")
    folder, separator, revision = target.rpartition("@")
    if Path(target).is_dir() or not separator:
        return DirectoryTree(Path(target))
    head = Path(folder)
    hub = Hub.build(Spec(name="directory", path=str(head.parent.parent)))
    return hub.tree(f"{head.parent.name}/{head.name}", revision)


def _misused(error: click.ClickException, terminal: Terminal, arguments: Sequence[str]) -> int:
    """A wrong command line: click's own words, in JSON only if that was asked for."""
    if "--json" not in arguments:
        error.show()
        return error.exit_code
    terminal.as_json = True
    context = getattr(error, "ctx", None)
    if context is not None:
        terminal.command = context.command_path.removeprefix(f"{PROGRAM} ")
    return terminal.fail([error.format_message()], error.exit_code)


def _interrupted(terminal: Terminal) -> str:
    if terminal.pushing:
        return (
            "stopped while publishing; run the same command again, it looks at what is on the hub "
            "and finishes"
        )
    again = "Run the same command again to go on where it stopped"
    return f"stopped; nothing was published. {again}"


def _unexpected(error: Exception, terminal: Terminal) -> int:
    if terminal.verbosity > 1:
        import traceback  # noqa: PLC0415

        terminal.say(traceback.format_exc())
    first = (str(error).strip().splitlines() or [""])[0]
    what = f"{type(error).__name__}: {first}".rstrip(": ")
    return terminal.fail([f"unexpected {what}; -vv shows the traceback"], 1)
