"""Making what publishing needs: keys, smaller models, a demo, completion."""

from pathlib import Path

import click

from release_guard.commands.options import common, made_option, workers_option
from release_guard.commands.shared import make_key, need_torch, open_session
from release_guard.terminal import PROGRAM, Terminal


@click.command()
@click.argument("model")
@click.option(
    "--private",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="gauge.json, from the folder `private` of the run that made the release.",
)
@made_option
@common
@click.pass_obj
def ungauge(terminal: Terminal, *, model: str, private: Path, output: Path) -> None:
    """Take the gauge of MODEL back, so that it merges again, for whom its owner lets do so."""
    need_torch()
    from release_guard.ungauge import ungauge as flow  # noqa: PLC0415

    record = flow(model, private, output)
    terminal.say(f"taken back: {', '.join(record.changes)}")
    terminal.data(str(output), {"output": str(output), "changes": list(record.changes)})


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--pruner",
    type=click.Choice(["depth", "width"]),
    default="depth",
    show_default=True,
    help="depth: fewer layers a block. width: the smallest inner units become zero.",
)
@made_option
@common
@click.pass_obj
def prune(terminal: Terminal, *, model: str, pruner: str, output: Path) -> None:
    """Make a smaller text-to-image pipeline of MODEL, which concept_suppression then distils."""
    need_torch()
    from release_guard import pruning  # noqa: PLC0415
    from release_guard.run import folder_made_whole  # noqa: PLC0415
    from release_guard.sources import local_folder  # noqa: PLC0415

    with folder_made_whole(output) as folder:
        macs = pruning.prune(str(local_folder(model)), folder, pruning.PRUNERS[pruner])
    terminal.say("multiplications of a UNet pass: {:,} before, {:,} after".format(*macs))
    terminal.data(str(output), {"output": str(output), "macs": list(macs)})


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path(), metavar="DIR", help="[default: .]"
)
@common
@click.pass_obj
def keygen(terminal: Terminal, *, output: Path) -> None:
    """Make key.pem (private) and key.pub in DIR; RELEASE_GUARD_KEY_PASSWORD encrypts the first."""
    from release_guard.keys import fingerprint, load_public_key  # noqa: PLC0415

    private, public = make_key(terminal, output)
    mark = fingerprint(load_public_key(public))
    terminal.say(f"keep {private} to yourself, hand out {public}; fingerprint {mark}")
    document = {"private": str(private), "public": str(public), "fingerprint": mark}
    terminal.data(f"{private}\n{public}", document)


@click.command()
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
@workers_option
@common
@click.pass_obj
def demo(terminal: Terminal, *, output: Path, nf4: bool, workers: int) -> int:
    """Watch an unprotected model be refused, an immunized one published, a changed byte noticed."""
    need_torch()
    from release_guard.demo import run_demo  # noqa: PLC0415

    policy_name = "fp32_and_nf4" if nf4 else "policy"
    code = run_demo(output, open_session(terminal, workers), terminal.say, policy_name=policy_name)
    terminal.data(str(output), {"output": str(output), "exit_code": code})
    return code


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common
@click.pass_context
def completion(context: click.Context, *, shell: str) -> None:
    """Print the completion script of SHELL: eval "$(release-guard completion bash)"."""
    from click.shell_completion import get_completion_class  # noqa: PLC0415

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    script = kind(context.find_root().command, {}, PROGRAM, "_RELEASE_GUARD_COMPLETE").source()
    context.obj.data(script, {"shell": shell, "script": script})


COMMANDS = (keygen, prune, ungauge, demo, completion)
