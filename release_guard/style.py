"""The page's colours and style.

The first colours are Okabe and Ito's; the others were chosen so that readers with any common colour
blindness tell all of them apart. Every colour is doubled by a line style, a mark's form or a word.
"""

from collections.abc import Mapping

LIGHT: Mapping[str, str] = {
    "ink": "#1b1b1b",
    "soft": "#595959",
    "paper": "#ffffff",
    "panel": "#f5f5f3",
    "rule": "#d4d4d0",
    "grid": "#e6e6e3",
    "undefended": "#d55e00",
    "defended": "#0072b2",
    "never": "#009e73",
    "sham": "#8f1ff5",
    "ancestor": "#664a10",
    "other": "#b0508f",
    "bad": "#fbe3d3",
    "good": "#d9ebf7",
    "unsure": "#fdf3cf",
    "heat0": "#fde9da",
    "heat1": "#f6bf94",
    "heat2": "#e38a4c",
    "heat3": "#bd5712",
    "heat4": "#6e2c00",
    "onheat": "#ffffff",
}
DARK: Mapping[str, str] = {
    "ink": "#ececec",
    "soft": "#b0b0b0",
    "paper": "#141414",
    "panel": "#1f1f1f",
    "rule": "#444444",
    "grid": "#303030",
    "undefended": "#e69f00",
    "defended": "#56b4e9",
    "never": "#2fbf93",
    "sham": "#b65cff",
    "ancestor": "#fcfc90",
    "other": "#d98fb8",
    "bad": "#4d2a12",
    "good": "#123a55",
    "unsure": "#453b10",
    "heat0": "#3a2a1c",
    "heat1": "#66411c",
    "heat2": "#9c611b",
    "heat3": "#d8892a",
    "heat4": "#ffd28a",
    "onheat": "#141414",
}

_RULES = """
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
details{margin-top:.5rem;font-size:.9rem}
summary{cursor:pointer;color:var(--soft)}
.scroll{position:relative;overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-size:.9rem;min-width:100%}
th,td{text-align:left;vertical-align:top;padding:.35rem .6rem;border-bottom:1px solid var(--rule);
overflow-wrap:break-word}
th{font-weight:600}
thead th{border-bottom:2px solid var(--soft)}
td.wide{min-width:10rem}
td.bad{background:var(--bad)}
td.good{background:var(--good)}
td.unsure{background:var(--unsure)}
@media screen and (max-width:44rem){thead{position:absolute;display:block;width:1px;height:1px;
overflow:hidden;clip-path:inset(50%)}
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
svg .arm-sham{--c:var(--sham);--dash:9 3 2 3}
svg .arm-ancestor{--c:var(--ancestor);--dash:12 4}
svg .plain{--c:var(--soft);--dash:none}
svg .band{fill:var(--c);opacity:.16}
svg .envelope{stroke:var(--c);stroke-width:2.6;stroke-dasharray:var(--dash)}
svg .whisker{stroke:var(--c);stroke-width:2}
svg .mark{fill:var(--c);stroke:var(--panel);stroke-width:1}
svg .bar{fill:var(--c);opacity:.4}
svg .breached{fill:var(--undefended)}
svg .survived{fill:var(--defended)}
svg .collapsed{fill:var(--other)}
svg .hollow{fill:var(--panel);stroke:var(--c);stroke-width:1.6}
svg .untried{fill:none;stroke:var(--grid)}
svg .heat0{fill:var(--heat0)}svg .heat1{fill:var(--heat1)}svg .heat2{fill:var(--heat2)}
svg .heat3{fill:var(--heat3)}svg .heat4{fill:var(--heat4)}
svg .cross{fill:none;stroke:var(--onheat);stroke-width:1.4}
svg .edge{stroke:var(--ink);stroke-width:2.4}
svg .failed{fill:var(--ink)}
@media print{body{font-size:11pt}header,section{max-width:none;padding:.3rem 0}
header{padding:.6rem .8rem}figure,.tile,tr{break-inside:avoid}h2,h3,p.how{break-after:avoid}
figure details:not([open]){display:none}
.scroll{overflow:visible}table{font-size:8pt}th,td{padding:.2rem .3rem}
td.wide{min-width:6.5rem;overflow-wrap:anywhere}.gallery{display:block}p.how{break-inside:avoid}
.gallery figure{display:inline-block;width:48%;vertical-align:top;margin:.3rem .7% .3rem 0}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def _variables(colours: Mapping[str, str]) -> str:
    return ";".join(f"--{name}:{value}" for name, value in colours.items())


CSS = (
    f"\n:root{{{_variables(LIGHT)};color-scheme:light dark}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}{_RULES}"
)
