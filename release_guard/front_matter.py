"""Edit a card's YAML in place: order, comments and quoting of everything else stay as they are.

A YAML library finds where a value stands; the text is changed there and nowhere else.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]  # ships no annotations

from release_guard.errors import ModelError

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_LONGEST = 1 << 20  # characters of YAML, and values in it
_NO_YAML = (yaml.YAMLError, ValueError, RecursionError)  # of dates and numbers that there are not
_PLAIN = re.compile(r"[A-Za-z][\w./-]*")
_AMBIGUOUS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def edit(document: str, *, values: Mapping[str, Any], tag: str) -> str:
    """Set keys and add one tag in the front matter of a Markdown file, beginning it if need be.

    Args:
        document: The whole file.
        values: Keys to set; texts, or mappings of texts.
        tag: Added to the list `tags` unless it is there.

    Raises:
        ModelError: The front matter is no YAML mapping, or is written in a way that cannot be
            edited without changing more.
    """
    found = _FRONT_MATTER.match(document)
    if found is None and document.startswith("---"):
        raise ModelError("README.md: its YAML front matter does not end; add a line of `---`")
    front, body = (found.group(1), document[found.end() :]) if found else ("", document)
    before = _load(front)
    tags = before.get("tags") or []
    tags = tags if isinstance(tags, list) else [tags]
    expected = {**before, **values, "tags": tags if tag in tags else [*tags, tag]}
    try:
        edited = _with_tag(front, tag)
        for key, value in values.items():
            edited = _with_value(edited, key, _flow(value))
        kept_all = _values(edited) == expected
    except (*_NO_YAML, ModelError):
        kept_all = False
    if not kept_all:
        raise ModelError(
            "README.md: its YAML front matter is written in a way that cannot be edited in place; "
            "write it as plain `key: value` lines"
        )
    return f"---\n{edited}---\n{body}"


def _load(front: str) -> dict[str, Any]:
    try:
        values = _values(front)
    except _NO_YAML as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 2})" if where else ""
        raise ModelError(f"README.md: its front matter is not YAML{line}") from None
    if not isinstance(values, dict | None):
        raise ModelError("README.md: its YAML front matter is not a mapping of keys to values")
    return values or {}


def _values(front: str) -> Any:
    """What the YAML says, if it is of a size: ten lines of aliases can stand for any number.

    Raises:
        ModelError: It is too large, or contains itself.
    """
    loader = yaml.SafeLoader(front) if len(front) <= _LONGEST else None
    root = loader.get_single_node() if loader else None
    if loader is None or (root and _written_out(root, {}) > _LONGEST):
        raise ModelError("README.md: its YAML front matter is too large; shorten it")
    return loader.construct_document(root) if root else None


def _written_out(node: Any, sizes: dict[int, int]) -> int:
    """How many values there are if every alias is written out; a node within itself has no end."""
    if id(node) not in sizes:
        sizes[id(node)] = (
            _LONGEST + 1
        )  # as long as it is not known: whoever meets it again is in it
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = (part for item in inner for part in (item if isinstance(item, tuple) else (item,)))
        sizes[id(node)] = 1 + sum(_written_out(part, sizes) for part in parts)
    return sizes[id(node)]


def _with_tag(front: str, tag: str) -> str:
    _, node = _find(front, "tags")
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        is_text = isinstance(node, yaml.ScalarNode)
        written = front[node.start_mark.index : _end(node)] if is_text else ""
        return _with_value(front, "tags", f"[{written}, {tag}]" if written else f"[{tag}]")
    if any(item.value == tag for item in node.value):
        return front
    last = _end(node.value[-1])
    if node.flow_style:
        return f"{front[:last]}, {tag}{front[last:]}"
    line_end = front.index("\n", last)
    indent = " " * node.start_mark.column
    return f"{front[:line_end]}\n{indent}- {tag}{front[line_end:]}"


def _with_value(front: str, key: str, written: str) -> str:
    name, node = _find(front, key)
    if name is None:
        gap = "" if not front or front.endswith("\n") else "\n"
        return f"{front}{gap}{key}: {written}\n"
    after_colon = front.index(":", name.end_mark.index) + 1
    return f"{front[:after_colon]} {written}{front[max(after_colon, _end(node)) :]}"


def _find(front: str, key: str) -> tuple[Any, Any]:
    root = yaml.compose(front, Loader=yaml.SafeLoader)
    pairs = root.value if root else []
    return next((pair for pair in pairs if pair[0].value == key), (None, None))


def _end(node: Any) -> int:
    """Where a value's text ends; a block's own mark lies behind the comments that follow it."""
    is_block = isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value
    if not is_block:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(last, tuple) else last)


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    is_plain = _PLAIN.fullmatch(value) and value.lower() not in _AMBIGUOUS
    return value if is_plain else json.dumps(value)
