"""Options that commands share, spelt and explained once."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from release_guard.places import POLICY_NAME
from release_guard.terminal import PROGRAM, Terminal

Command = TypeVar("Command", bound=Callable[..., Any])


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def keep(context: click.Context, _: click.Parameter, value: Any) -> None:
        if (terminal := context.find_object(Terminal)) is not None:
            terminal.command = context.command_path.removeprefix(f"{PROGRAM} ")
            setattr(terminal, name, value)

    return keep


def common(command: Command) -> Command:
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


def _nearest_policy() -> Path | None:
    """`release-guard.toml` of the folder at work, or of one above it in the same git repository."""
    here = Path.cwd()
    parents = [here, *here.parents]
    root = next((folder for folder in parents if (folder / ".git").exists()), here)
    within = parents[: parents.index(root) + 1]
    paths = (each / name for each in within for name in (POLICY_NAME, f".github/{POLICY_NAME}"))
    return next((path for path in paths if path.is_file()), None)


def require_policy(path: Path | None) -> Path:
    """The policy that was named or found.

    Raises:
        click.UsageError: Neither.
    """
    if path is None:
        raise click.UsageError(
            f"no policy: give one with --policy, or put {POLICY_NAME} here or in .github; "
            "`release-guard init` writes one to begin with"
        )
    return path


def _policy_option(*, required: bool) -> Callable[[Command], Command]:
    return click.option(
        "--policy",
        "policy_path",
        type=click.Path(path_type=Path),
        envvar="RELEASE_GUARD_POLICY",
        show_envvar=True,
        default=_nearest_policy,
        show_default=f"{POLICY_NAME} or .github/{POLICY_NAME}, here or above in the repository",
        callback=(lambda _, __, path: require_policy(path)) if required else None,
        metavar="FILE",
        help="What must be denied, what must stay, who attacks.",
    )


policy_option, maybe_policy_option = _policy_option(required=True), _policy_option(required=False)


def _as_digest(_: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
        raise click.BadParameter("not a SHA-256: 64 digits of 0-9 and a-f", param=option)
    return value


def digest_option(name: str, text: str) -> Callable[[Command], Command]:
    """An option that takes a SHA-256 in hex."""
    return click.option(name, metavar="HEX", callback=_as_digest, help=text)


base_option = click.option(
    "--base", metavar="SOURCE", help="Undefended original, where SOURCE was immunized elsewhere."
)


def _not_there(_: click.Context, __: click.Parameter, folder: Path) -> Path:
    if folder.exists():
        raise click.UsageError(f"{folder} exists already; give --output another name")
    return folder


made_option = click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    callback=_not_there,
    metavar="DIR",
    help="What is made; it must not exist yet.",
)
output_option = click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the run; the same one goes on where it stopped. [default: runs/NAME]",
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="one a core",
    help="Trials at once.",
)
as_is_option = click.option("--as-is", is_flag=True, help="Judge SOURCE as it is; no stage.")


def engine_options(command: Command) -> Command:
    """Where trials run; handed on to `open_session` as they are."""
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


def trust_options(command: Command) -> Command:
    """Whose signature counts; handed on to `trust.Trusted` as they are."""
    for option in (
        click.option("--issuer", metavar="URL", help="Who vouches for --identity."),
        click.option("--identity", metavar="NAME",
                     help="Name in the certificate of a keyless signature; with --issuer."),
        click.option("--fingerprint", metavar="HEX",
                     help="SHA-256 of the public key you trust; the release carries the key."),
        click.option("--key", type=click.Path(path_type=Path), metavar="PUB",
                     help="Public key you trust; never one that lies beside the model."),
    ):  # fmt: skip
        command = option(command)
    return command
