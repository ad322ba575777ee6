"""A runner of GitHub Actions, as far as our workflows need one: their shell is really run.

    runner = Runner(tmp_path, actions={"OWNER/NAME": folder}, checkout=model_repository)
    jobs = runner.run(workflow)
    jobs["judge"].outcome, jobs["judge"].outputs, jobs["judge"].log

What GitHub does and this does too: a job starts with an empty workspace and an environment of its
own; it can ask for an identity token only where its permissions say so; `if`, `needs`, `env`,
`with` and outputs are evaluated; `run` is written to a file for bash, with the files for outputs
and summary beside it; workflow commands count only where the log is not fenced off. Artifacts leave
hidden files out unless told otherwise. Other people's actions are stood in for.
"""

import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SHELLS = {
    None: ["bash", "-e"],
    "bash": ["bash", "--noprofile", "--norc", "-eo", "pipefail"],
}
_TOKEN = re.compile(r"'(?:[^']|'')*'|&&|\|\||[!=]=|[!()]|[A-Za-z_][\w.-]*|\s+")
_WORDS = {"&&": " and ", "||": " or ", "!": " not ", "==": "==", "!=": "!=", "(": "(", ")": ")"}
_COMMAND = re.compile(r"::(?P<name>[\w-]+)(?: (?P<properties>[^:]*))?::(?P<data>.*)")


@dataclass
class Ran:
    """A shell that was run, and all that came of it."""

    id: str
    code: int
    output: str
    environment: dict[str, str]
    outputs: dict[str, str] = field(default_factory=dict)
    summary: str = ""

    @property
    def commands(self) -> list[tuple[str, str, str]]:
        """Name, properties and data of every workflow command the runner would have obeyed."""
        found, fence = [], None
        for line in re.split(r"\r\n|\r|\n", self.output):  # where .NET ends a line
            match = _COMMAND.fullmatch(line.strip())
            if not match:
                continue
            name = match["name"]
            if fence is not None:
                fence = None if name == fence else fence
            elif name == "stop-commands":
                fence = match["data"]
            else:
                found.append((name, match["properties"] or "", match["data"]))
        return found


@dataclass
class Job:
    outcome: str = "success"
    outputs: dict[str, str] = field(default_factory=dict)
    ran: list[Ran] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    name: str = ""
    workspace: Path = Path()

    @property
    def log(self) -> str:
        return "".join(ran.output for ran in self.ran)

    def step(self, name: str) -> Ran:
        return next(ran for ran in self.ran if ran.id == name)


@dataclass
class Runner:
    """Attributes:
    folder: Everything lies there.
    actions: Where our own actions lie, by OWNER/NAME.
    checkout: What `actions/checkout` checks out.
    variables: What every step finds in its environment besides.
    identity: ACTIONS_ID_TOKEN_REQUEST_URL and _TOKEN, for jobs that may ask.
    replaced: Shell to run instead of the steps with these ids (or JOB/ID), for which this is not
        the place.
    between: Called with every artifact, before anybody downloads it.
    """

    folder: Path
    actions: Mapping[str, Path] = field(default_factory=dict)
    checkout: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    github: Mapping[str, str] = field(default_factory=dict)
    between: Callable[[Path], object] = lambda _: None

    def run(self, workflow: str) -> dict[str, Job]:
        """Every job, in an order in which no job comes before what it needs."""
        document = yaml.safe_load(workflow)
        done: dict[str, Job] = {}
        waiting = dict(document["jobs"])
        while waiting:
            name = next(each for each, job in waiting.items() if not _needs(job) - {*done})
            definition = waiting.pop(name)
            if all(done[each].outcome == "success" for each in _needs(definition)):
                done[name] = self._job(name, definition, document, done)
            else:
                done[name] = Job("skipped")
        return done

    def use(self, action: Path, inputs: Mapping[str, str]) -> Job:
        """One composite action in a job that may ask for identity tokens if `identity` is given."""
        job = self._new_job("job")
        environment = {**self._base(job, "job"), **self.identity}
        given = {"inputs": {}, "env": environment, "github": {**self.github}, "steps": {}}
        self._composite(job, action, inputs, given)
        return job

    def _job(self, name: str, definition: Any, document: Any, done: Mapping[str, Job]) -> Job:
        job = self._new_job(name)
        needs = {each: {"outputs": done[each].outputs} for each in _needs(definition)}
        contexts: dict[str, Any] = {"needs": needs, "steps": {}, "github": {**self.github}}
        environment = self._base(job, name)
        allowed = definition.get("permissions", document["permissions"])
        if allowed.get("id-token") == "write":
            environment |= self.identity
        for values in (document.get("env", {}), definition.get("env", {})):
            environment |= {key: evaluate(value, contexts) for key, value in values.items()}
        contexts["env"] = environment
        self._steps(job, definition["steps"], contexts)
        outputs = definition.get("outputs", {}).items()
        job.outputs = {key: evaluate(value, contexts) for key, value in outputs}
        return job

    def _new_job(self, name: str) -> Job:
        workspace = self.folder / name / "workspace"
        for folder in (workspace, self.folder / name / "temp", self.folder / name / "home"):
            folder.mkdir(parents=True)
        return Job(name=name, workspace=workspace)

    def _base(self, job: Job, name: str) -> dict[str, str]:
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # with the Python set up
            "HOME": str(self.folder / name / "home"),
            "LANG": "C.UTF-8",
            "CI": "true",
            "GITHUB_ACTIONS": "true",
            "GITHUB_WORKSPACE": str(job.workspace),
            "RUNNER_TEMP": str(self.folder / name / "temp"),
            **{f"GITHUB_{key.upper()}": value for key, value in self.github.items()},
            **self.variables,
        }

    def _steps(self, job: Job, steps: Sequence[Any], contexts: dict[str, Any]) -> None:
        for number, step in enumerate(steps):
            name = step.get("id", f"step-{number}")
            condition = step.get("if", "success()")
            contexts["status"] = job.outcome
            if not holds(condition, contexts):
                job.skipped.append(name)
                continue
            outputs = self._run_or_use(job, name, step, contexts)
            contexts["steps"][name] = {"outputs": outputs}

    def _run_or_use(
        self, job: Job, name: str, step: Any, contexts: dict[str, Any]
    ) -> Mapping[str, str]:
        own = {key: evaluate(value, contexts) for key, value in step.get("env", {}).items()}
        environment = {**contexts["env"], **own}
        if "run" in step:
            script = self.replaced.get(name) or self.replaced.get(f"{job.name}/{name}", step["run"])
            assert "${{" not in script, f"{name}: an expression inside of run"
            ran = self._shell(job, name, script, SHELLS[step.get("shell")], environment)
            return ran.outputs
        action = step["uses"].partition("@")[0]
        given = {key: evaluate(value, contexts) for key, value in step.get("with", {}).items()}
        if action in self.actions:
            inner = {**contexts, "env": environment, "steps": {}}
            return self._composite(job, self.actions[action], given, inner)
        return STAND_INS[action](self, job, given)

    def _composite(
        self, job: Job, folder: Path, given: Mapping[str, str], contexts: dict[str, Any]
    ) -> Mapping[str, str]:
        definition = yaml.safe_load((folder / "action.yml").read_text())
        assert not {*given} - {*definition["inputs"]}, "an input that the action does not have"
        inputs = {
            name: given.get(name, each.get("default", ""))
            for name, each in definition["inputs"].items()
        }
        contexts["inputs"] = inputs
        contexts["github"]["action_path"] = str(folder)
        contexts["env"] = {**contexts["env"], "GITHUB_ACTION_PATH": str(folder)}
        self._steps(job, definition["runs"]["steps"], contexts)
        outputs = definition.get("outputs", {}).items()
        return {name: evaluate(each["value"], contexts) for name, each in outputs}

    def _shell(
        self, job: Job, name: str, script: str, shell: Sequence[str], variables: Mapping[str, str]
    ) -> Ran:
        files = self.folder / f"files-{secrets.token_hex(4)}"
        files.mkdir()
        (files / "script.sh").write_text(script)
        paths = {f"GITHUB_{each}": files / each for each in ("OUTPUT", "STEP_SUMMARY")}
        for path in paths.values():
            path.touch()
        environment = {**variables, **{key: str(path) for key, path in paths.items()}}
        done = subprocess.run(  # noqa: S603
            [*shell, str(files / "script.sh")],
            cwd=job.workspace,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        outputs = read_outputs(paths["GITHUB_OUTPUT"].read_text())
        summary = paths["GITHUB_STEP_SUMMARY"].read_text()
        job.ran.append(Ran(name, done.returncode, done.stdout, environment, outputs, summary))
        if done.returncode:
            job.outcome = "failure"
        return job.ran[-1]


def _needs(job: Any) -> set[str]:
    needs = job.get("needs", [])
    return {needs} if isinstance(needs, str) else {*needs}


def evaluate(value: Any, contexts: Mapping[str, Any]) -> str:
    """A value of the workflow with its expressions replaced."""
    if isinstance(value, bool):
        return str(value).lower()
    return re.sub(r"\$\{\{(.*?)\}\}", lambda match: str(_valued(match[1], contexts)), str(value))


def holds(condition: str, contexts: Mapping[str, Any]) -> bool:
    bare = condition.strip().removeprefix("${{").removesuffix("}}")
    asks_for_status = re.search(r"\b(success|failure|always|cancelled)\(", bare)
    return bool(_valued(bare if asks_for_status else f"success() && ({bare})", contexts))


def _valued(expression: str, contexts: Mapping[str, Any]) -> Any:
    """The few operators that we use are Python's, by other names."""
    parts = _TOKEN.findall(expression)
    assert "".join(parts) == expression, f"what the runner does not know: {expression}"
    functions = {
        "success": lambda: contexts["status"] == "success",
        "failure": lambda: contexts["status"] == "failure",
        "always": lambda: True,
        "cancelled": lambda: False,
    }
    python = ""
    for part in parts:
        if part in _WORDS or part.isspace():
            python += _WORDS.get(part, " ")
        elif part.startswith("'"):
            python += repr(part[1:-1].replace("''", "'"))
        elif part in functions:
            python += part
        else:
            python += repr(_looked_up(part, contexts))
    return eval(python, {"__builtins__": {}}, functions)  # noqa: S307  our own workflows


def _looked_up(path: str, contexts: Mapping[str, Any]) -> Any:
    found: Any = contexts
    for part in path.split("."):
        found = found.get(part, "")
        if found == "":
            return ""
    return found


def read_outputs(text: str) -> dict[str, str]:
    """NAME=VALUE, or NAME<<END, lines, END."""
    found, lines = {}, iter(text.split("\n"))
    for line in lines:
        name, separator, end = line.partition("<<")
        if separator and "=" not in name:
            value: list[str] = []
            while (each := next(lines)) != end:
                value.append(each)
            found[name] = "\n".join(value)
        elif line:
            name, _, found[name] = line.partition("=")
    return found


def _check_out(runner: Runner, job: Job, given: Mapping[str, str]) -> dict[str, str]:
    assert given["persist-credentials"] == "false"
    assert runner.checkout is not None, "this job may not check anything out"
    target = job.workspace / given.get("path", ".")
    only = given.get("sparse-checkout")
    if only is None:
        shutil.copytree(runner.checkout, target, dirs_exist_ok=True)
    else:
        assert given["sparse-checkout-cone-mode"] == "false"  # else all files beside it come too
        (target / only).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(runner.checkout / only, target / only)
    return {}


def _upload(runner: Runner, job: Job, given: Mapping[str, str]) -> dict[str, str]:
    source, target = job.workspace / given["path"], runner.folder / "artifacts" / given["name"]
    hidden = given.get("include-hidden-files") == "true"
    leave_out = None if hidden else shutil.ignore_patterns(".*")
    if not source.exists():
        assert given.get("if-no-files-found") == "error", f"{source}: nothing to upload"
        job.outcome = "failure"
    elif source.is_dir():
        shutil.copytree(source, target, ignore=leave_out)
    else:
        target.mkdir(parents=True)
        shutil.copy(source, target)
    runner.between(target)
    return {}


def _download(runner: Runner, job: Job, given: Mapping[str, str]) -> dict[str, str]:
    source = runner.folder / "artifacts" / given["name"]
    shutil.copytree(source, job.workspace / given["path"], dirs_exist_ok=True)
    return {}


STAND_INS: dict[str, Callable[[Runner, Job, Mapping[str, str]], dict[str, str]]] = {
    "actions/checkout": _check_out,
    "actions/setup-python": lambda *_: {"python-path": "python"},
    "actions/upload-artifact": _upload,
    "actions/download-artifact": _download,
    "pypa/gh-action-pypi-publish": lambda *_: {},
}
