"""Write the reference pages from the code: policy.md, policy.schema.json, cli.md.

python docs/generate.py           write them
python docs/generate.py --check   fail if one is not as the code says
"""

import importlib
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from release_guard import policy
from release_guard.attacks import Attack
from release_guard.commands.group import cli
from release_guard.hubs import Hub
from release_guard.modalities import Modality
from release_guard.plugins import Plugin
from release_guard.signers import Signer
from release_guard.stages import Stage
from release_guard.terminal import PROGRAM

HERE = Path(__file__).parent
_TABLES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("Top level", policy.Policy),
    ("[retain]", policy.Retain),
    ("[[concepts]]", policy.Concept),
    ("[[merge_targets]]", policy.MergeTarget),
    ("[red_team]", policy.RedTeam),
    ("budget, in [red_team]", policy.Budget),
    ("[gate]", policy.Gate),
)
_CONTRACTS: Mapping[str, type[Plugin]] = {
    "modality": Modality,
    "[[stages]]": Stage,
    "[[attacks]]": Attack,
    "[signer]": Signer,
    "[hub]": Hub,
}

_INTRODUCTION = (
    "Written by docs/generate.py from the fields themselves; edit those. A policy is TOML; "
    "`policies/default.toml` explains it in place, `docs/policy.schema.json` is its JSON Schema. "
    "A key without a default must be given; in `[red_team]`, `profile` gives most of them."
)


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them."""
    pages = {
        "policy.md": policy_page(),
        "policy.schema.json": json.dumps(policy.Policy.model_json_schema(), indent=2) + "\n",
        "cli.md": cli_page(),
    }
    if arguments == ["--check"]:
        return check(pages)
    for name, page in pages.items():
        (HERE / name).write_text(page)
    return 0


def check(pages: Mapping[str, str]) -> int:
    """1 and a line for each page that is not up to date."""
    stale = [
        name
        for name, page in pages.items()
        if not (HERE / name).exists() or (HERE / name).read_text() != page
    ]
    for name in stale:
        print(f"docs/{name} is not what the code says; run: make docs", file=sys.stderr)  # noqa: T201
    return 1 if stale else 0


def policy_page() -> str:
    """Every key of a policy file, then every option of every plug-in."""
    lines = ["# Policy files", "", _INTRODUCTION]
    for title, model in _TABLES:
        lines += ["", f"## {title}", "", *_table(model)]
    lines += ["", "## What a profile sets", "", *_profiles()]
    for title, contract in _CONTRACTS.items():
        lines += ["", f"## Options of {title}", "", _sentence(contract)]
        for name in contract.available():
            found = contract._implementation(name)
            lines += ["", f"### {name}", "", *_about(found), *_table(found)]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """The help texts of all commands."""
    lines = ["# Command line", "", "Written by docs/generate.py from the commands' help texts."]
    for name, command in _commands(PROGRAM, cli):
        settings: dict[str, Any] = {**cli.context_settings, "terminal_width": 90}
        context = click.Context(command, info_name=name, **settings)
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        lines += ["", f"## {name}", "", "```text", text, "```"]
    return "\n".join(lines) + "\n"


def _commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for child, below in sorted(command.commands.items()):
            yield from _commands(f"{name} {child}", below)


def _profiles() -> Iterator[str]:
    names = list(policy.PROFILES)
    yield f"| key | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    for key in policy.PROFILES[names[0]]:
        values = [json.dumps(policy.PROFILES[name][key]).removesuffix(".0") for name in names]
        yield f"| `{key}` | {' | '.join(values)} |"


def _about(found: type[Plugin]) -> Iterator[str]:
    yield inspect.cleandoc(found.__doc__ or "")
    yield ""
    if paper := getattr(found, "paper", ""):
        yield f"Paper: <{paper}>"
        yield ""


def _table(model: type[BaseModel]) -> Iterator[str]:
    if not model.model_fields:
        yield "No options."
        return
    texts, profile = _docstrings(model), next(iter(policy.PROFILES.values()))
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in model.model_fields.items():
        meaning = field.description or texts.get(key) or _class_text(field.annotation)
        default = "the profile's" if model is policy.RedTeam and key in profile else _default(field)
        cells = (f"`{key}`", _type(field.annotation), default, _one_line(meaning))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _class_text(annotation: Any) -> str:
    """What the class of a table says of itself."""
    for part in (annotation, *typing.get_args(annotation)):
        if inspect.isclass(part) and issubclass(part, BaseModel):
            return inspect.cleandoc(part.__doc__ or "").split("\n\n")[0]
    return ""


def _docstrings(model: type[BaseModel]) -> Mapping[str, str]:
    """Texts under the fields of a class and its parents."""
    texts: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if owner.__module__.startswith("release_guard"):
            source = inspect.getsource(owner)
            pattern = r'^    (\w+): .*?^    """(.*?)"""'
            for part in re.split(r"(?m)^(?=    \w+: )", source):
                if match := re.match(pattern, part, re.DOTALL | re.MULTILINE):
                    texts[match[1]] = match[2]
    return texts


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(json.dumps(value) for value in arguments)
    if origin in {tuple, list}:
        return f"list of {_type(arguments[0])}"
    if arguments:
        return " or ".join(_type(part) for part in arguments if part is not type(None))
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    names |= {"Path": "path", "Spec": "name or table", "ellipsis": ""}
    return names.get(getattr(annotation, "__name__", ""), "table")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "its defaults" if not isinstance(value, policy.Spec) else f'`"{value.name}"`'
    return f"`{json.dumps(value, default=str)}`"


def _sentence(contract: type[Plugin]) -> str:
    module = importlib.import_module(contract.__module__)
    return _one_line(inspect.cleandoc(module.__doc__ or "").split("\n\n")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
