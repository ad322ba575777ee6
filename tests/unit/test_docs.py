"""The documents: what they tell people to type parses, what they name is there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from release_guard.commands.group import cli
from release_guard.terminal import PROGRAM

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md")])
COMMAND = re.compile(rf"^(?:.*/)?{PROGRAM} (.+)$")
MAKE = re.compile(r"^make (\w+)")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
CODE = re.compile(r"`([^`]+)`")


def lines(page: Path) -> Iterator[str]:
    """What stands in blocks of code, without comments; one that goes on is one line."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    is_fenced = False
    for line in text.splitlines():
        is_fenced ^= line.startswith("```")
        if is_fenced or line.startswith("    "):
            yield line.partition("  #")[0].strip()


def commands() -> list[str]:
    """Every command line of ours that a page shows."""
    shown = (line for page in PAGES if page.name != "cli.md" for line in lines(page))
    return sorted({match[1] for line in shown if (match := COMMAND.match(line))})


def table() -> list[str]:
    """The commands of README.md's table."""
    rows = re.search(r"\| command \|.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert rows is not None
    cells = [row.split("|")[1] for row in rows[0].splitlines()[2:] if row]
    return [code for cell in cells for code in CODE.findall(cell)]


def resolve(line: str) -> tuple[click.Command, list[str], click.Context]:
    """The command, its arguments, and the context above it, whose settings it keeps."""
    command: click.Command = cli
    arguments = shlex.split(line.replace("$ROOT", "0" * 64))
    above = click.Context(cli, **cli.context_settings)
    while isinstance(command, click.Group):
        _, found, arguments = command.resolve_command(above, arguments)
        assert found is not None
        command = found
    return command, arguments, above


@pytest.mark.parametrize("line", commands())
def test_shown_commands_parse(line: str) -> None:
    command, arguments, above = resolve(line)
    command.make_context(command.name, arguments, parent=above)


@pytest.mark.parametrize("line", table())
def test_listed_commands_take_what_is_listed(line: str) -> None:
    command, arguments, above = resolve(line.replace("SHELL", "bash"))
    if arguments:
        command.make_context(command.name, arguments, parent=above)


def test_something_was_found() -> None:
    assert {"publish", "verify", "plan", "keygen"} <= {line.split()[0] for line in commands()}
    assert {line.split()[0] for line in table()} == set(cli.commands)


def test_make_has_the_targets_that_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {match[1] for page in PAGES for line in lines(page) if (match := MAKE.match(line))}
    assert {"demo", "test", "lint", "bench"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not broken


def test_architecture_has_a_place_for_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("| part |") : text.index("Imports point down;")]
    package = ROOT / "release_guard"
    modules = {path.stem for path in package.glob("[a-z]*.py")}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(CODE.findall(table)) - {"__init__.py"} == modules | {f"{each}/" for each in folders}
