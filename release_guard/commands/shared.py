"""What commands share between their arguments and the flow they call."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from release_guard.errors import PolicyError, ReleaseGuardError
from release_guard.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable

    from release_guard.changes import Changes
    from release_guard.evidence import Evidence
    from release_guard.policy import Policy
    from release_guard.release import Verdict
    from release_guard.session import Session

REFUSED = 3  # the gate's answer, as an exit code


def load_policy(path: Path) -> "Policy":
    """A policy whose plug-ins and files are all there; for commands that work on models."""
    from release_guard.policy import Policy  # noqa: PLC0415

    policy = Policy.load(path)
    need_torch()
    from release_guard.check import problems  # noqa: PLC0415

    if found := problems(policy):
        raise PolicyError("\n".join(f"{path}: {line}" for line in found))
    return policy


def need_torch() -> None:
    """Refuse where only the light install is there."""
    from release_guard.check import with_torch  # noqa: PLC0415

    if not with_torch():
        raise ReleaseGuardError(
            "this command works on models; install what it needs: "
            "pip install 'model-release-guard[immunize]'"
        )


def open_session(
    terminal: Terminal, workers: int, *, engine: str = "local", **options: Any
) -> "Session":
    """What a run needs of its surroundings; an engine that cannot run stops it here."""
    from release_guard.plugins import Spec  # noqa: PLC0415
    from release_guard.session import Session  # noqa: PLC0415

    given = {name: value for name, value in options.items() if value is not None}
    where = Spec(name=engine, **given)
    session = Session(workers, terminal.progress, now, surroundings(), where)
    session.build_engine().check()
    return session


def agreement(terminal: Terminal, *, yes: bool) -> "Callable[[Changes], None]":
    """Show what a push will change; ask before it deletes what no signed release put there.

    Args:
        terminal: Where to show it, and to ask if somebody is there.
        yes: Agreed to on the command line.
    """

    def agree(found: "Changes") -> None:
        from release_guard.changes import require_known  # noqa: PLC0415
        from release_guard.outcome import changes_lines  # noqa: PLC0415

        terminal.say("\n".join(changes_lines(found)))
        asked = f"Delete {len(found.foreign)} files there that no signed release put there?"
        if found.foreign and not yes and not terminal.confirms(asked):
            require_known(found)

    return agree


def now() -> Any:
    """The moment, aware."""
    from datetime import UTC, datetime  # noqa: PLC0415

    return datetime.now(UTC)


def make_key(terminal: Terminal, folder: Path) -> tuple[Path, Path]:
    """A new private key, encrypted if a password is there, and its public half."""
    from release_guard.signers.key import PASSWORD_VARIABLE, generate_key  # noqa: PLC0415

    password = os.environ.get(PASSWORD_VARIABLE)
    private, public = generate_key(folder, password)
    if not password:
        terminal.warn(f"{private}: not encrypted; set {PASSWORD_VARIABLE} first to have it so")
    return private, public


def step_summary(
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


def surroundings() -> dict[str, str]:
    """Where trials ran, for the evidence."""
    import platform  # noqa: PLC0415
    from importlib.metadata import version  # noqa: PLC0415

    libraries = ("torch", "transformers", "peft", "datasets")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
    }


def default_run(name: str, source: str, prefix: str = "") -> Path:
    """`runs/NAME`: where a run lies unless somebody says otherwise; beside a model, never in it."""
    last = Path(name.partition("@")[0]).name or Path(name).resolve().name
    runs, model = Path("runs"), Path(source).resolve()
    if model.is_dir() and runs.resolve().is_relative_to(model):
        runs = model.with_name(f"{model.name}-runs")
    return runs / f"{prefix}{last}"


def require_file(path: Path) -> None:
    """Refuse a file that is not there: unlike one that was changed, that is a slip of the pen."""
    if not path.is_file():
        raise ReleaseGuardError(f"{path}: no such file; look at what was named on the command line")


def digest_of(path: Path) -> str:
    """SHA-256 of a policy file, in hex."""
    import hashlib  # noqa: PLC0415

    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror})") from None
