"""The command line: arguments in, outcome and exit code out. It decides nothing.

Commands import what they need when they run: `--help`, `verify` and a policy's syntax errors never
wait for torch.
"""

import gc
import os
import sys
from collections.abc import Sequence

from release_guard.errors import ConfinedError, ReleaseGuardError
from release_guard.terminal import Terminal

_INTERRUPTED = 130


def start() -> int:
    """The process itself. Every push waits for the hook, so what it used is not put away."""
    is_hook = sys.argv[1:4] == ["hook", "run", "pre-push"]
    if is_hook:
        gc.disable()
    code = main()
    if is_hook:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; every error ends here, as lines on stderr and an exit code."""
    terminal = Terminal()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads: wait, do not spin
    try:
        return _run(terminal, sys.argv[1:] if arguments is None else arguments)
    except ReleaseGuardError as error:
        return terminal.fail(str(error).splitlines(), error.exit_code)
    except KeyboardInterrupt:
        return terminal.stop(_interrupted(terminal), _INTERRUPTED)
    except Exception as error:
        return _unexpected(error, terminal)
    finally:
        terminal.close()


def _run(terminal: Terminal, arguments: Sequence[str]) -> int:
    match arguments:
        case ["hook", "run", "pre-push", name, url] if not name.startswith("-"):
            # As git calls it: every push waits for this, so it goes without click.
            from release_guard import hook_run  # noqa: PLC0415

            terminal.command = "hook run pre-push"
            return hook_run.pre_push(terminal, name, url)
    from release_guard.commands import group  # noqa: PLC0415

    return group.run(terminal, arguments)


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
