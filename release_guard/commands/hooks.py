"""The pre-push hook: git calls it, and these put it where git finds it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from release_guard.commands.options import common
from release_guard.errors import PolicyError, ReleaseGuardError
from release_guard.terminal import Terminal

if TYPE_CHECKING:
    from release_guard.hook_install import Place
    from release_guard.hook_settings import Settings

_MEANING = {
    "absent": "nothing verifies what is pushed; run release-guard hook install",
    "foreign": "another hook is there, which need not verify anything; run release-guard hook "
    "install",
    "outdated": "not as this version would write it; run release-guard hook install",
}
_folder = click.option(
    "-C",
    "folder",
    type=click.Path(path_type=Path),
    default=Path(),
    show_default="here",
    metavar="DIR",
    help="A folder of the repository.",
)
_yes = click.option("--yes", is_flag=True, help="Ask nothing; write where core.hooksPath says.")


@click.group("hook")
def hook_group() -> None:
    """Refuse `git push` of what was not shown to resist."""


@hook_group.command()
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    metavar="PUB",
    help="Public key to trust here; a copy goes into the git folder.",
)
@click.option("--identity", metavar="NAME", help="Whose keyless signature to trust, instead.")
@click.option("--issuer", metavar="URL", help="Who vouches for that identity.")
@_yes
@_folder
@common
@click.pass_obj
def install(
    terminal: Terminal,
    *,
    key: Path | None,
    identity: str | None,
    issuer: str | None,
    yes: bool,
    folder: Path,
) -> None:
    """Have every push to the Hub verified; hooks that are there already run after it.

    Run it again after an update, or once the repository begins to use Git LFS.
    """
    if (identity is None) != (issuer is None) or (key is not None and identity is not None):
        raise click.UsageError("give --key, or --identity and --issuer, or none of them")
    from release_guard import hook_install as flow  # noqa: PLC0415

    settings = _settings(folder)
    place = flow.Place.of(settings)
    _may_write(terminal, place, yes=yes)
    if key is not None:
        terminal.say(f"trusted from now on: the key {flow.pin_key(settings, key)}")
    if identity is not None and issuer is not None:
        flow.pin_identity(settings, identity, issuer)
        terminal.say(f"trusted from now on: {identity} by {issuer}")
    changed = flow.install(place)
    terminal.say("installed" if changed else "installed already")
    _show(terminal, folder, {"changed": changed})


@hook_group.command()
@_yes
@_folder
@common
@click.pass_obj
def uninstall(terminal: Terminal, *, yes: bool, folder: Path) -> None:
    """Take the hook away and put back what was there before; whom you trust stays configured."""
    from release_guard import hook_install as flow  # noqa: PLC0415

    place = flow.Place.of(_settings(folder))
    _may_write(terminal, place, yes=yes)
    there = flow.uninstall(place)
    if not there:
        terminal.say("there was no hook of release-guard here")
    terminal.data(str(place.hook), {"hook": str(place.hook), "changed": there})


@hook_group.command()
@_folder
@common
@click.pass_obj
def status(terminal: Terminal, *, folder: Path) -> int:
    """Say whether pushes from here are verified, and by whom; exit code 1 if they are not."""
    return _show(terminal, folder, {})


@hook_group.group()
def run() -> None:
    """What git and pre-commit call; nothing for people."""


@run.command("pre-push")
@click.argument("name", metavar="REMOTE")
@click.argument("url", metavar="URL")
@common
@click.pass_obj
def run_pre_push(terminal: Terminal, *, name: str, url: str) -> int:
    """Verify what git tells on standard input."""
    from release_guard import hook_run  # noqa: PLC0415

    return hook_run.pre_push(terminal, name, url)


@run.command("pre-commit")
@common
@click.pass_obj
def run_pre_commit(terminal: Terminal) -> int:
    """Verify the one ref that pre-commit tells in its variables."""
    from release_guard import hook_run  # noqa: PLC0415

    return hook_run.pre_commit(terminal)


def _settings(folder: Path) -> "Settings":
    from release_guard.git import Repository  # noqa: PLC0415
    from release_guard.hook_settings import settings_of  # noqa: PLC0415

    repository = Repository.at(folder)
    return settings_of(repository, repository.top(folder))


def _may_write(terminal: Terminal, place: "Place", *, yes: bool) -> None:
    """Hooks of all repositories may lie in one folder: nobody changes that by accident."""
    if not place.shared or yes:
        return
    text = f"core.hooksPath is {place.shared}, which other repositories may share"
    if terminal.as_json or not sys.stdin.isatty():
        raise PolicyError(f"{text}; --yes writes there")
    click.confirm(f"{text}. Write there?", abort=True, err=True)


def _show(terminal: Terminal, folder: Path, document: dict[str, Any]) -> int:
    """How things stand, after whatever was done."""
    from release_guard import hook_install as flow  # noqa: PLC0415

    settings = _settings(folder)
    place = flow.Place.of(settings)
    trusted = ""
    problems = [] if place.state is flow.State.INSTALLED else [_MEANING[place.state]]
    try:
        trusted = settings.signer().identity
    except ReleaseGuardError as error:
        problems.append(str(error))
    watched = settings.watched
    if watched and not any(watched.values()):
        problems.append(
            f"no remote is watched ({', '.join(watched)}), as none is the Hub's; to have one "
            f"verified: git config --add release-guard.remotes {next(iter(watched))}"
        )
    lines = [f"{place.hook}: {place.state}"]
    lines += [f"then: {place.next}"] * place.next.exists()
    lines += [f"trusts: {trusted}"] * bool(trusted)
    lines += [f"{'watches' if seen else 'leaves alone'}: {name}" for name, seen in watched.items()]
    for problem in problems:
        terminal.warn(problem)
    about = {
        "hook": str(place.hook),
        "state": str(place.state),
        "next": str(place.next) if place.next.exists() else None,
        "lfs": place.uses_lfs,
        "identity": trusted or None,
        "watched": list(settings.remotes),
        "remotes": dict(watched),
    }
    terminal.data("\n".join(lines), {**document, **about})
    return 1 if problems else 0


COMMANDS = (hook_group,)
