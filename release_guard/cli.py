"""The command line: arguments in, outcome and exit code out. It decides nothing.

Commands import what they need when they run: `--help`, `verify` and a policy's syntax errors never
wait for torch.
"""

import os
import sys
from collections.abc import Sequence

import click

from release_guard import __version__
from release_guard.commands import checking, hooks, making, publishing, starting
from release_guard.errors import ConfinedError, ReleaseGuardError
from release_guard.terminal import PROGRAM, Terminal

_INTERRUPTED = 130
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
    kind = "" if isinstance(error, ConfinedError) else f"{type(error).__name__}: "
    what = f"{kind}{first}".rstrip(": ")
    return terminal.fail([f"unexpected {what}; -vv shows the traceback"], 1)
