"""Setting a model repository up: a policy, a key, the hook, the workflow."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from release_guard.commands.options import common
from release_guard.commands.shared import make_key
from release_guard.errors import PolicyError, ReleaseGuardError
from release_guard.places import POLICY_NAME
from release_guard.terminal import Terminal

if TYPE_CHECKING:
    from release_guard.git import Repository

_ISSUER = "https://token.actions.githubusercontent.com"
_WORKFLOW = Path(".github", "workflows", "release-guard.yml")


@dataclass
class _Plan:
    """What was found out, and what is to be written."""

    root: Path
    model: Path
    modality: str
    repo: str
    github: str | None
    keyless: tuple[str, str] | None
    wrote: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @property
    def policy(self) -> Path:
        """Where the policy lies."""
        return self.root / ".github" / POLICY_NAME

    def lines(self) -> list[str]:
        """For somebody who has to say yes."""
        where = "this folder" if self.model == self.root else self.model.name
        signer = f"GitHub's identity {self.keyless[0]}" if self.keyless else "a key of your own"
        return [
            f"model: {where}, {self.modality.replace('_', ' ')}; published as {self.repo}",
            f"signed by: {signer}",
        ]

    def write(self, path: Path, text: str) -> None:
        """A new file; one that is there stays as it is."""
        if path.exists():
            self.kept.append(str(path))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        self.wrote.append(str(path))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path())
@click.option("--repo", metavar="OWNER/NAME", help="On the Hub. [default: that of a git remote]")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the model. [default: FOLDER, or the only one in it that holds a model]",
)
@click.option(
    "--keyless/--key",
    default=None,
    help="Sign by the workflow's identity, or by a key. [default: keyless where a git remote is on "
    "GitHub]",
)
@click.option("--yes", is_flag=True, help="Ask nothing.")
@common
@click.pass_obj
def init(
    terminal: Terminal,
    *,
    folder: Path,
    repo: str | None,
    model: Path | None,
    keyless: bool | None,
    yes: bool,
) -> None:
    """Write a starter policy, a key, the pre-push hook and the release workflow for FOLDER.

    What is there already is never touched, so it may be run again.
    """
    repository = _repository(folder)
    plan = _look(folder, repository, repo=repo, model=model, keyless=keyless, yes=yes)
    for line in plan.lines():
        terminal.say(line)
    if not yes:
        if not sys.stdin.isatty():
            raise PolicyError("init asks before it writes; without a terminal give --yes")
        click.confirm("Go on?", default=True, abort=True, err=True)
    _write_policy(terminal, plan)
    key = None if plan.keyless else _write_key(terminal, plan)
    if repository is None:
        terminal.warn(
            f"{plan.root}: not a git repository, so there is no hook; `git init` it first"
        )
    else:
        _install_hook(terminal, plan, repository, key)
    _write_workflow(terminal, plan)
    for path in plan.kept:
        terminal.say(f"kept as it is: {path}")
    _say_next(terminal, plan, key)
    document = {
        "modality": plan.modality,
        "repo": plan.repo,
        "model": str(plan.model),
        "key": None if key is None else str(key),
        "wrote": plan.wrote,
        "kept": plan.kept,
    }
    terminal.data("\n".join(plan.wrote), document)


def _repository(folder: Path) -> "Repository | None":
    from release_guard.git import Repository  # noqa: PLC0415

    if not folder.is_dir():
        raise PolicyError(f"{folder}: no such folder")
    try:
        return Repository.at(folder)
    except ReleaseGuardError:
        return None


def _look(
    folder: Path,
    repository: "Repository | None",
    *,
    repo: str | None,
    model: Path | None,
    keyless: bool | None,
    yes: bool,
) -> _Plan:
    from release_guard import starter  # noqa: PLC0415
    from release_guard.hubs import require_repo_id  # noqa: PLC0415

    root = folder.resolve() if repository is None else repository.top(folder)
    remotes = {} if repository is None else _remotes(repository)
    place = starter.find_model(root) if model is None else model.resolve()
    modality = starter.modality_of(place)
    repo = repo or starter.hub_repository(remotes)
    if repo is None:
        if yes or not sys.stdin.isatty():
            raise PolicyError("no git remote is on the Hub; say where to publish with --repo")
        repo = click.prompt("Publish as OWNER/NAME", err=True)
    require_repo_id(repo)
    github = starter.github_repository(remotes)
    if keyless and github is None:
        raise PolicyError("no git remote is on GitHub, so no workflow has an identity; give --key")
    signs = None
    if github is not None and keyless is not False:
        path = f"{_WORKFLOW.as_posix()}@refs/heads/main"
        signs = (f"https://github.com/{github}/{path}", _ISSUER)
    return _Plan(root, place, modality, repo, github, signs)


def _remotes(repository: "Repository") -> Mapping[str, str]:
    found = repository.settings()
    names = [key for key in found if key.startswith("remote.") and key.endswith(".url")]
    return {key.removeprefix("remote.").removesuffix(".url"): found[key][-1] for key in names}


def _write_policy(terminal: Terminal, plan: _Plan) -> None:
    """In .github, which is no part of a release: beside the weights it would be a stray file."""
    from release_guard.starter import placeholders, starter_policy  # noqa: PLC0415

    data = "../../data" if plan.model == plan.root else "../data"  # never inside the model
    text = starter_policy(plan.modality, data=data, keyless=plan.keyless)
    plan.write(plan.policy, text)
    if plan.wrote:
        terminal.say(f"put your own data in place of {', '.join(placeholders(text))}")
        if plan.keyless is not None:
            terminal.say("a workflow has only what it can fetch: hf://datasets/OWNER/NAME@REVISION")


def _write_key(terminal: Terminal, plan: _Plan) -> Path:
    """The public key; the private one beside it stays with its owner, outside the repository."""
    from release_guard.starter import key_folder  # noqa: PLC0415

    folder = key_folder(plan.repo)
    public = folder / "key.pub"
    if public.exists():
        plan.kept.append(str(folder / "key.pem"))
        return public
    private, public = make_key(terminal, folder)
    plan.wrote += [str(private), str(public)]
    return public


def _install_hook(
    terminal: Terminal, plan: _Plan, repository: "Repository", key: Path | None
) -> None:
    from release_guard import hook_install as flow  # noqa: PLC0415
    from release_guard.hook_settings import settings_of  # noqa: PLC0415

    settings = settings_of(repository, plan.root)
    place = flow.Place.of(settings)
    if key is not None:
        flow.pin_key(settings, key)
    elif plan.keyless is not None:
        flow.pin_identity(settings, *plan.keyless)
    if place.shared:  # other repositories may share it: only its own command may be told so
        terminal.warn(f"core.hooksPath is {place.shared}; run: release-guard hook install --yes")
        return
    (plan.wrote if flow.install(place) else plan.kept).append(str(place.hook))


def _write_workflow(terminal: Terminal, plan: _Plan) -> None:
    from release_guard.workflow import pinned_action, release_workflow  # noqa: PLC0415

    if plan.keyless is None:
        why = "no git remote is on GitHub" if plan.github is None else "--keyless writes one"
        terminal.say(f"no workflow was written: {why}")
        return
    model = (
        plan.model.relative_to(plan.root) if plan.model.is_relative_to(plan.root) else plan.model
    )
    policy = plan.policy.relative_to(plan.root).as_posix()
    text = release_workflow(model=str(model), policy=policy, repo=plan.repo)
    plan.write(plan.root / _WORKFLOW, text)
    if pinned_action() is None:
        terminal.warn(
            f"{_WORKFLOW}: this build does not know its own commit; put the action's OWNER/NAME "
            "and a commit after `uses:`"
        )


def _say_next(terminal: Terminal, plan: _Plan, key: Path | None) -> None:
    terminal.say(f"next: edit {plan.policy}, then release-guard plan {plan.model}")
    if key is not None:
        terminal.say(f"to publish: export RELEASE_GUARD_SIGNING_KEY={key.with_suffix('.pem')}")
    if plan.keyless is not None:
        terminal.say("the workflow needs a trusted publisher on the Hub; see docs/actions.md")


COMMANDS = (init,)
