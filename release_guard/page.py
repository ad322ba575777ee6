"""Building blocks of the report's page: escaped text, tables, sections, and the style of it all.

Colours are Okabe and Ito's, which most colour-blind readers can tell apart; every one of them is
doubled by a line style, a mark's form or a word.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
"""

CSS = """
:root{--ink:#1b1b1b;--soft:#595959;--paper:#fff;--panel:#f5f5f3;--rule:#d4d4d0;--grid:#e6e6e3;
--undefended:#d55e00;--defended:#0072b2;--never:#009e73;--other:#cc79a7;
--bad:#fbe3d3;--good:#d9ebf7;--unsure:#fdf3cf;color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){
:root{--ink:#ececec;--soft:#b0b0b0;--paper:#141414;--panel:#1f1f1f;--rule:#444;--grid:#303030;
--undefended:#e69f00;--defended:#56b4e9;--never:#2fbf93;--other:#d98fb8;
--bad:#4d2a12;--good:#123a55;--unsure:#453b10}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,section{max-width:66rem;margin:0 auto;padding:.2rem 1rem}
header{border-left:.6rem solid var(--soft);background:var(--panel);padding:1.2rem 1rem;
margin-top:1rem}
header.pass{border-color:var(--defended)}
header.fail{border-color:var(--undefended)}
header.inconclusive{border-color:var(--other)}
h1{font-size:2.2rem;line-height:1.1;margin:.1em 0 .3em;letter-spacing:.02em}
h2{font-size:1.3rem;margin:1.2rem 0 .3rem;border-top:1px solid var(--rule);padding-top:1rem}
h3{font-size:1rem;margin:1rem 0 .3rem}
p{margin:.4em 0;max-width:44rem;overflow-wrap:anywhere}
p.claim{font-size:1.1rem}
p.name,p.meta,p.how{color:var(--soft);margin:.2em 0 .6em}
p.name{font-weight:600;overflow-wrap:anywhere}
a{color:inherit}
ul{padding-left:1.2rem;max-width:46rem}
li{margin:.25em 0;overflow-wrap:anywhere}
.tiles,.gallery{display:grid;gap:.8rem;margin:.6rem 0}
.gallery{align-items:start}
.tiles{grid-template-columns:repeat(auto-fit,minmax(13.5rem,1fr))}
.gallery{grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr))}
.tile,figure{background:var(--panel);border-radius:.4rem;padding:.7rem .8rem;margin:0;min-width:0}
.tile b{display:block;font-size:1.55rem;line-height:1.2;overflow-wrap:anywhere}
.tile span{display:block;font-size:.85rem;color:var(--soft)}
.tile span.what{font-weight:600;color:var(--ink);font-size:.95rem}
figure{max-width:31rem}
figcaption{font-weight:600;font-size:.95rem;overflow-wrap:anywhere;margin-bottom:.2rem}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-size:.9rem;min-width:100%}
th,td{text-align:left;vertical-align:top;padding:.35rem .6rem;border-bottom:1px solid var(--rule);
overflow-wrap:break-word}
th{font-weight:600}
thead th{border-bottom:2px solid var(--soft)}
td.wide{min-width:13rem}
td.bad{background:var(--bad)}
td.good{background:var(--good)}
td.unsure{background:var(--unsure)}
@media screen and (max-width:44rem){thead{position:absolute;clip-path:inset(50%)}
table,tbody,tr,td,td.wide{display:block;min-width:0}
tr{border-bottom:2px solid var(--rule);padding:.3rem 0}
td{border:0;padding:.1rem .4rem;overflow-wrap:anywhere}
td:first-child{font-weight:600}
td:not(:first-child)::before{content:attr(data-name) ": ";color:var(--soft)}}
svg{display:block;width:100%;height:auto;font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,
sans-serif;fill:var(--ink)}
svg .tick,svg .title{fill:var(--soft)}
svg .tick{font-size:11px}
svg .strong{font-weight:600}
svg .halo{paint-order:stroke;stroke:var(--panel);stroke-width:4px;stroke-linejoin:round}
svg polyline{fill:none;stroke:var(--soft);stroke-width:1}
svg .grid{stroke:var(--grid)}
svg .axis{stroke:var(--soft)}
svg .ceiling{stroke:var(--ink);stroke-width:1.6;stroke-dasharray:7 4}
svg .budget{stroke:var(--ink);stroke-width:1.6}
svg .beyond{fill:var(--soft);opacity:.12}
svg .reference{stroke:var(--ink);stroke-width:1.4;stroke-dasharray:5 3}
svg .unity{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:1.5 3}
svg .arm-undefended{--c:var(--undefended);--dash:6 3}
svg .arm-defended{--c:var(--defended);--dash:none}
svg .arm-never_knew{--c:var(--never);--dash:2 3}
svg .plain{--c:var(--soft);--dash:none}
svg .trial{stroke:var(--c);stroke-width:1;opacity:.35}
svg .envelope{stroke:var(--c);stroke-width:2.6;stroke-dasharray:var(--dash)}
svg .whisker{stroke:var(--c);stroke-width:2}
svg .mark{fill:var(--c);stroke:var(--panel);stroke-width:1}
svg .bar{fill:var(--c);opacity:.4}
svg .breached{fill:var(--undefended)}
svg .survived{fill:var(--defended)}
svg .collapsed{fill:var(--other)}
svg .failed{fill:var(--ink)}
@media print{body{font-size:11pt}header,section{max-width:none;padding:.3rem 0}
header{padding:.6rem .8rem}figure,.tile,tr{break-inside:avoid}h2,h3{break-after:avoid}
.scroll{overflow:visible}table{font-size:8pt}th,td{padding:.2rem .3rem}
td.wide{min-width:0;overflow-wrap:anywhere}.gallery{grid-template-columns:1fr 1fr}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
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


def figure(picture: str, caption: str) -> str:
    """A picture with its name."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>\n"


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
