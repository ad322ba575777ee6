"""Building blocks of the report's page: escaped text, tables, sections."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from release_guard.style import CSS

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
"""


@dataclass(frozen=True)
class Cell:
    """One cell of a table; `css` says what it means (bad, good, unsure) or how wide it is."""

    text: str
    css: str = ""
    link: str = ""


def document(title: str, body: str) -> str:
    """The whole file."""
    return (
        f"{HEAD}<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def header(result: str, *, css: str, name: str, claim: str, meta: str) -> str:
    """The verdict, in large type."""
    said = f'<p class="claim">{escape(claim)}</p>\n' if claim else ""
    return (
        f'<header class="{css}">\n<p class="name">{escape(name)}</p>\n<h1>{escape(result)}</h1>\n'
        f'{said}<p class="meta">{escape(meta)}</p>\n</header>\n'
    )


def section(title: str, how: str, *content: str) -> str:
    """A section with one sentence on how to read it."""
    said = f'<p class="how">{escape(how)}</p>\n' if how else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{said}{''.join(content)}</section>\n"


def paragraph(content: str, css: str = "") -> str:
    """One paragraph."""
    return f'<p class="{css}">{escape(content)}</p>\n'


def subheading(content: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(content)}</h3>\n"


def bullets(items: Iterable[str]) -> str:
    """A list of sentences."""
    return f"<ul>\n{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>\n"


def figure(picture: str, caption: str, twin: str = "", *, note: str = "") -> str:
    """A picture with its name, what it comes to and, folded, the table that says the same."""
    said = paragraph(note, "how") if note else ""
    below = folded("The same as a table", twin) if twin else ""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{picture}{said}{below}</figure>\n"


def folded(name: str, content: str) -> str:
    """Content that opens on demand."""
    return f"<details><summary>{escape(name)}</summary>\n{content}</details>\n"


def gallery(figures: Iterable[str]) -> str:
    """Pictures side by side where there is room."""
    return f'<div class="gallery">\n{"".join(figures)}</div>\n'


def tile(what: str, value: str, *notes: str) -> str:
    """One figure in large type."""
    below = "".join(f"<span>{escape(note)}</span>" for note in notes if note)
    return (
        f'<div class="tile"><span class="what">{escape(what)}</span>'
        f"<b>{escape(value)}</b>{below}</div>\n"
    )


def tiles(items: Iterable[str]) -> str:
    """Figures in large type, side by side where there is room."""
    return f'<div class="tiles">\n{"".join(items)}</div>\n'


def table(name: str, head: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> str:
    """A table; a narrow screen shows each row as a list of its own, where names stand by values."""
    body = "".join(_row(head, row) for row in rows)
    top = "".join(f'<th scope="col" role="columnheader">{escape(cell)}</th>' for cell in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
        f'<table role="table">\n<thead role="rowgroup"><tr role="row">{top}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{body}</tbody>\n</table></div>\n'
    )


def _row(head: Sequence[str], row: Sequence[str | Cell]) -> str:
    cells = (_cell(name, cell) for name, cell in zip(head, row, strict=True))
    return f'<tr role="row">{"".join(cells)}</tr>\n'


def _cell(name: str, cell: str | Cell) -> str:
    if isinstance(cell, str):
        cell = Cell(cell)
    content = escape(cell.text)
    if cell.link.startswith("https://"):
        content = f'<a href="{escape(cell.link)}">{content}</a>'
    return f'<td role="cell" data-name="{escape(name)}" class="{cell.css}">{content}</td>'
