"""All commands as one: arguments are read here, by click."""

from collections.abc import Sequence

import click

from release_guard import __version__
from release_guard.commands import checking, hooks, making, publishing, starting
from release_guard.terminal import PROGRAM, Terminal

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
  RELEASE_GUARD_PINS          file of pinned signers [~/.config/release-guard/pins.toml]
  HF_TOKEN, HF_ENDPOINT       token and address of the Hugging Face Hub
  GITHUB_STEP_SUMMARY         a file that gets the verdict as Markdown (set by GitHub Actions)
  NO_COLOR, FORCE_COLOR       no colours; colours where there is no terminal
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def cli() -> None:
    """Immunize a model, attack it, and publish only what was shown to resist."""


for _command in (
    *publishing.COMMANDS,
    *checking.COMMANDS,
    *hooks.COMMANDS,
    *making.COMMANDS,
    *starting.COMMANDS,
):
    cli.add_command(_command)


def run(terminal: Terminal, arguments: Sequence[str]) -> int:
    """Run the command that the arguments name and give its exit code.

    Raises:
        ReleaseGuardError: What the command raised.
        KeyboardInterrupt: Somebody ended it, or did not confirm.
    """
    try:
        returned = cli.main(arguments, prog_name=PROGRAM, standalone_mode=False, obj=terminal)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        return _misused(error, terminal, arguments)
    return int(returned or 0)


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
