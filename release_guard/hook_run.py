"""The pre-push hook at work: what git or pre-commit tells in, lines and an exit code out.

Every push waits for it, so it imports no more than it needs.
"""

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from release_guard.errors import PolicyError
from release_guard.git import Repository
from release_guard.hook_settings import settings_of
from release_guard.pushed import Remote, Update, from_pre_commit, read_updates

if TYPE_CHECKING:
    from release_guard.hook import Checked
    from release_guard.terminal import Terminal


def pre_push(terminal: "Terminal", name: str, url: str) -> int:
    """Verify what git tells on standard input, pushed to a remote of this name and address."""
    return _check(terminal, Remote(name, url), read_updates(sys.stdin.buffer.read()))


def pre_commit(terminal: "Terminal") -> int:
    """Verify the one ref that pre-commit tells in its variables.

    Raises:
        PolicyError: It tells of none.
    """
    name, url = (os.environ.get(f"PRE_COMMIT_REMOTE_{part}") for part in ("NAME", "URL"))
    if not name or not url:
        raise PolicyError("pre-commit does not say what is pushed where; let git push call it")
    return _check(terminal, Remote(name, url), (from_pre_commit(os.environ),))


def _check(terminal: "Terminal", remote: Remote, updates: Sequence[Update]) -> int:
    settings = settings_of(Repository.of_hook(), Path.cwd())
    for key in settings.unknown:
        terminal.warn(f"git config {key}: no setting of release-guard; is it misspelt?")
    if not settings.watches(remote):
        if terminal.verbosity:
            terminal.say(f"{remote}: not watched, nothing was verified")
        terminal.data("", {"remote": str(remote), "watched": False, "refs": []})
        return 0
    from release_guard.hook import check_push  # noqa: PLC0415  verifying, where it is asked for

    found = check_push(remote, updates, settings, now())
    document = {"remote": str(remote), "watched": True, "refs": [_ref(each) for each in found]}
    if code := max((each.exit_code for each in found), default=0):
        lines = [f"{each.update.ref}: {line}" for each in found for line in each.problems]
        return terminal.fail([*lines, "nothing was pushed"], code, document)
    for each in found:
        for note in each.notes:
            terminal.say(f"{each.update.ref}: {note}; the release itself is as it was signed")
    terminal.data("", document)
    return 0


def now() -> datetime:
    """The moment, aware."""
    return datetime.now(UTC)


def _ref(checked: "Checked") -> dict[str, Any]:
    return {
        "ref": checked.update.ref,
        "commit": checked.commit,
        "deleted": checked.update.deletes,
        "exit_code": checked.exit_code,
        "states": [str(state) for state in checked.states],
        "problems": list(checked.problems),
        "notes": list(checked.notes),
    }
