"""What merges make of a guarded model: presets, bare gauges, and the hardened form, attacked.

python -m benchmarks merge_guard

A vision transformer and a Llama, a base, a fine-tune to be protected and a donor each, at three
seeds. Figures are the best score on the protected task among merges that keep nine tenths of the
donor's task; what each row says is attacked with all that its columns name. Finished cells are kept
under `runs/bench/merge_guard`. Choices were made on seeds 0 and 3; 1 and 2 are held out.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import torch

from benchmarks._common import machine, record, table
from benchmarks._mergeable import CACHE, Family, text, vision
from benchmarks._merges import (
    DATA_USING,
    FITS,
    RECOVERY,
    SHARES,
    TIES,
    Point,
    Thief,
    bar,
    broken,
    front,
)
from release_guard.ingredients import Alignment
from release_guard.modalities import ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.quantization import at, plain
from release_guard.run import folder_made_whole
from release_guard.stages import Stage, Workspace

TITLE = "MergeGuard: merging what was guarded"
SEEDS, GAIN, OWN = (0, 1, 2), 3.0, 1.5
WORTH, UNDONE = (
    10,
    0.9,
)  # points that the unprotected thief gains; share that a joint fit gives back
FAMILIES: Mapping[str, Callable[[int], Family]] = {"vision": vision, "text": text}
STEPS = {"vision": 500, "text": 300}
HARDER = {
    "vision": 500,
    "text": 900,
}  # in 300 steps seed 0 had not learnt the text task: 78.5 alone
ALL = ["neurons", "scales", "heads", "queries", "values", "stream"]
BARE = "hardened, gauge known"  # to whoever merges: as if there were none
ROWS: Mapping[str, Mapping[str, Any]] = {
    "undefended": {},
    "base": {},
    "hardened": {"preset": "hardened"},
    BARE: {"preset": "hardened", "gauge": []},
    "mergeguard": {"preset": "mergeguard"},
    "gauge alone": {"preset": "mergelock", "gauge": ALL, "style": "orthogonal"},
    "trap2": {"preset": "trap2"},
    "arf": {"preset": "arf"},
    "params": {"preset": "params"},
    "mergelock": {"preset": "mergelock"},
}
FREE = ("plain", "anchored", "joint fit", "base's attention", "base's MLP")
DATA = ("RegMean", "Fisher", "AdaMerging", "coefficients")
ROWWISE = "row coefficients"
COLUMNS = (*FREE, *DATA, ROWWISE)
AT = ("joint fit", "RegMean", "coefficients")
PLAN: Mapping[str, Sequence[str]] = {
    "undefended": ("plain", "joint fit", *DATA, ROWWISE),
    "base": ("plain", "RegMean", "coefficients", ROWWISE),
    "hardened": COLUMNS,
    BARE: ("plain", "RegMean", "coefficients", ROWWISE),
    "mergeguard": ("plain", "joint fit", "base's MLP", "RegMean", "coefficients"),
    "gauge alone": ("plain", "joint fit"),
    "trap2": ("plain", "RegMean"),
    "arf": ("plain", "anchored", "joint fit", "RegMean"),
    "params": ("plain", "joint fit"),
    "mergelock": ("plain", "joint fit"),
}
RECOVERED = ("undefended", "base", "hardened")
_VISION_ONLY = {"trap2", "arf", "params", "mergelock"}  # the parts of the other rows
PAPER = (
    ("MergeGuard (2511.11851), ViT-L-14, task arithmetic, mean of 5", "96.1 / 94.4", "86.4 / 36.4"),
    ("PaRaMS (2503.07661), ViT-B-32, EuroSAT and SVHN", "-", "97.0 / 14.5"),
    ("TRAP2 (2601.21898), ViT-B-32, mean of 8", "88.1 / 88.1", "48.3 / near 42.5 (zero-shot)"),
    ("ARF (2606.30360), ViT-B-32, task arithmetic; after their own AGA", "- / 88.1", "67.2 / 27.4"),
)


def main() -> None:
    about = machine("torch", "transformers")
    torch.set_num_threads(1)
    cells = [
        cell(kind, seed, row)
        for seed in SEEDS
        for kind in FAMILIES
        for row in ROWS
        if kind == "vision" or row not in _VISION_ONLY
    ]
    result = {"seeds": list(SEEDS), "machine": about, "cells": cells}
    record("merge_guard", result, markdown(result))


def cell(kind: str, seed: int, row: str) -> dict[str, Any]:
    """One model under all attacks of its row."""
    family = FAMILIES[kind](seed)
    model, figures = released(family, kind, seed, row)
    least = useful(family, kind, seed)

    def fronts(model: ModelHandle, names: Iterable[str], precision: str = "") -> dict[str, Any]:
        return {
            name: front(points(family, model, kind, seed, row, f"{name} {precision}"), least)
            for name in names
        }

    found = {
        "kind": kind,
        "seed": seed,
        "row": row,
        "options": options(kind, row),
        "own": family.score(model, "task"),
        "floor": family.score(family.load("base"), "task"),
        "bar": least,
        "fronts": fronts(model, PLAN[row]),
        "figures": figures,
    }
    if row in RECOVERED:
        found["recovery"] = points(family, model, kind, seed, row, "recovery ")
    for precision in ("int8", "nf4") if row == "hardened" else ():
        rounded = plain(at(model, precision))
        own = family.score(rounded, "task")
        found[precision] = {"own": own, "fronts": fronts(rounded, AT, precision)}
    print(kind, seed, row, found["own"], found["fronts"], file=sys.stderr)
    return found


def options(kind: str, row: str) -> dict[str, Any]:
    """What the stage is given; steps in proportion to the families' own fine-tunes."""
    given = dict(ROWS[row])
    if given.get("preset") == "hardened":
        return given | {"train_steps": HARDER[kind]}
    trains = given.get("preset") in {"mergeguard", "trap2", "arf"}
    return given | ({"train_steps": STEPS[kind]} if trains else {})


def built(kind: str, row: str) -> dict[str, Any]:
    """All of the stage's options, so that a preset that changed is made again."""
    given = options(kind, row)
    return Stage.build(Spec(name="merge_guard", **given)).model_dump(mode="json") if given else {}


def useful(family: Family, kind: str, seed: int) -> float:
    """What a merge must keep of the donor's task; by the merges of the undefended model."""
    model = family.load("undefended")
    reference = points(family, model, kind, seed, "undefended", "plain ")
    if wrong := broken(family, reference):
        raise SystemExit(f"{kind}, seed {seed}: {'; '.join(wrong)}")
    return bar(reference, family.score(family.load("donor"), "theirs"))


def kept(key: str, make: Callable[[], Any]) -> Any:
    """What was found before, if nothing that fixes it changed; else it is made now."""
    how = [SHARES, TIES, DATA_USING, [asdict(fit) for fit in FITS], RECOVERY]
    digest = hashlib.sha256(json.dumps([key, how]).encode()).hexdigest()[:16]
    path = CACHE / "cells" / f"{digest}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def points(
    family: Family, model: ModelHandle, kind: str, seed: int, row: str, column: str
) -> list[Point]:
    """All merges of a column; at a precision, if the column says so."""
    name, _, precision = column.rpartition(" ")
    key = json.dumps([kind, seed, row, built(kind, row), column])
    found = kept(key, lambda: attacked(family, model, row, name, precision))
    return [Point(*point) for point in found]


def nearest(row: str) -> Alignment:
    """How whoever merges brings a release near to the base."""
    if row in {"hardened", "gauge alone"}:
        return "rotated"
    return "joint" if row in {"arf", "params", "mergelock"} else "none"


def attacked(
    family: Family, model: ModelHandle, row: str, name: str, precision: str
) -> list[Point]:
    thief, align = Thief(family, model), nearest(row)
    if name == "recovery":
        return thief.recovered(align)
    if name in {"coefficients", ROWWISE}:
        fits = [fit for fit in FITS if fit.rows == (name == ROWWISE)]
        return thief.fitted(
            fits if row in {"hardened", BARE} and not precision else fits[:1], align
        )
    if name in DATA_USING:
        return thief.with_data(name, align)
    if name in {"plain", "anchored"}:
        return thief.data_free("none" if name == "plain" else "anchored")
    if name == "joint fit":
        return thief.data_free("joint" if align == "none" else align)
    return thief.data_free(align, "attention" if name == "base's attention" else "mlp")


def released(
    family: Family, kind: str, seed: int, row: str
) -> tuple[ModelHandle, Mapping[str, float]]:
    """What is published, and the stage's own figures."""
    if not ROWS[row]:
        return family.load("base" if row == "base" else "undefended"), {}
    key = json.dumps([kind, seed, row, built(kind, row)])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = CACHE / "released" / f"{kind}-{seed}-{digest}"
    figures = folder / "figures.json"
    if not folder.is_dir():
        with folder_made_whole(folder) as partial:
            guarded, measures = immunized(family, kind, seed, row)
            guarded.save(partial)
            (partial / figures.name).write_text(json.dumps(measures))
    return family.load("undefended").peer(str(folder)), json.loads(figures.read_text())


def immunized(
    family: Family, kind: str, seed: int, row: str
) -> tuple[ModelHandle, Mapping[str, float]]:
    stage = Stage.build(Spec(name="merge_guard", **options(kind, row)))
    folder = CACHE / "private" / f"{kind}-{seed}-{row.replace(' ', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(folder, folder, lambda *_: None, lambda _: None)
    model, given = family.load("undefended"), policy(family, seed)
    stage.check(model, given)
    guarded = stage.immunize(model, given, workspace)
    effect = {"effect": stage.effect(model, guarded, given)}
    return guarded, {**stage.measure(model, guarded, given), **effect}


def policy(family: Family, seed: int) -> Policy:
    target = family.target.model_dump(exclude_none=True)
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in target.items())
    source = f"""
        seed = {seed}
        modality = "{family.kind}"
        attacks = ["merge"]
        hub = {{ name = "directory", path = "hub" }}
        retain = {{ dataset = "{target["dataset"]}", margin = 0.99 }}
        red_team = {{ profile = "smoke", budget = {{ unit = "steps", limit = 1 }} }}
        [[merge_targets]]
        {lines}"""
    return Policy.parse(source.encode(), name="benchmark")


def markdown(result: Mapping[str, Any]) -> str:
    cells = result["cells"]
    parts = [_of_family(kind, [one for one in cells if one["kind"] == kind]) for kind in FAMILIES]
    paper = table(["the papers' own figures", "alone, U / D", "merged, U / D"], PAPER)
    return "\n\n".join([*parts, _targets(cells), paper])


def _of_family(kind: str, cells: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in ROWS:
        mine = [one for one in cells if one["row"] == row]
        if mine:
            scores = [
                _range(one["fronts"].get(name, _LEFT_OUT) for one in mine) for name in COLUMNS
            ]
            rows.append([row, _plain(one["own"] for one in mine), *scores])
    hardened = [one for one in cells if one["row"] == "hardened"]
    for precision in ("int8", "nf4"):
        found = [one[precision] for one in hardened]
        scores = [_range(one["fronts"].get(name, _LEFT_OUT) for one in found) for name in COLUMNS]
        rows.append([f"hardened, {precision}", _plain(one["own"] for one in found), *scores])
    sizes = {"vision": "a ViT of 127,000 weights", "text": "a Llama of 110,000 weights"}
    caption = (
        f"Small scale: {sizes[kind]}, one donor. Score on the protected task in %, mean (range) "
        f"over seeds {', '.join(map(str, SEEDS))}; the base by itself reaches "
        f"{_plain(one['floor'] for one in cells if one['row'] == 'base')}. Each column is the best "
        'useful merge; "none": no merge kept the donor\'s task. Recovery, which is no merge: '
    )
    return f"{table(['', 'alone', *COLUMNS], rows)}\n\n{caption}{_recovery(cells)}."


def _recovery(cells: Sequence[Mapping[str, Any]]) -> str:
    told = []
    for row in ("undefended", "hardened", "base"):
        curves = [one["recovery"] for one in cells if one["row"] == row]
        steps = [_plain(point[0] for point in found) for found in zip(*curves, strict=True)]
        told.append(f"{row} {', '.join(steps)}")
    return f"after 10, 50 and 150 steps on 100 labels a task, {'; '.join(told)}"


def _targets(cells: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for kind in FAMILIES:
        by_row = {
            row: [one for one in cells if one["kind"] == kind and one["row"] == row] for row in ROWS
        }
        lines += list(_judged(kind, by_row))
    return "\n".join(f"- {line}" for line in lines)


def _judged(kind: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[str]:
    plain = [gain(one, ["plain"]) for one in rows["undefended"]]
    yield _met(
        min(plain) >= WORTH, f"{kind}: the unprotected thief's gain is 10 points or more", plain
    )
    for row in ("gauge alone", "params", "mergelock"):
        shares = [
            gain(one, ["joint fit"]) / own for one, own in zip(rows[row], plain, strict=False)
        ]
        if shares:
            wanted = f"{kind}, {row}: the joint fit gives back 9 tenths of that gain"
            yield _met(min(shares) >= UNDONE, wanted, [100 * share for share in shares])
    for what, names in (("without data", FREE), ("with data", DATA)):
        for row in ("hardened", BARE):
            gains = [gain(one, names) for one in rows[row]]
            wanted = f"{kind}, {row}: gain of merges {what} <= {GAIN}"
            yield _met(max(gains) <= GAIN, wanted, gains)
    over = [
        gain(one, [ROWWISE]) - gain(never, [ROWWISE])
        for one, never in zip(rows["hardened"], rows["base"], strict=True)
    ]
    wanted = f"{kind}, hardened: a coefficient a row gains <= {GAIN} over the same with the base"
    yield _met(max(over) <= GAIN, wanted, over)
    for precision in ("int8", "nf4"):
        gains = [gain(one | one[precision], COLUMNS) for one in rows["hardened"]]
        yield _met(max(gains) <= GAIN, f"{kind}, hardened, {precision}: gain <= {GAIN}", gains)
    for row, most in (("hardened", OWN), ("mergeguard", OWN)):
        lost = [
            100 * (own["own"] - one["own"])
            for one, own in zip(rows[row], rows["undefended"], strict=True)
        ]
        yield _met(max(lost) <= most, f"{kind}, {row}: own loss <= {most}", lost)


def gain(one: Mapping[str, Any], names: Iterable[str]) -> float:
    """Points over the base's own score of the best useful merge; below 0 where there is none."""
    found = [one["fronts"].get(name) for name in names]
    return 100 * (max([0.0, *(point[0] for point in found if point)]) - one["floor"])


def _met(met: bool, what: str, values: Sequence[float]) -> str:
    figures = ", ".join(f"{value:.1f}" for value in values)
    return f"{what}: {figures} by seed: {'met' if met else '**MISSED**'}"


_LEFT_OUT = "-"


def _range(fronts: Iterable[Any]) -> str:
    found = list(fronts)
    if any(one == _LEFT_OUT for one in found):
        return _LEFT_OUT
    scores = [one[0] for one in found if one is not None]
    missing = f", none at {len(found) - len(scores)}" if len(scores) < len(found) else ""
    return f"{_plain(scores)}{missing}" if scores else "none"


def _plain(scores: Iterable[float]) -> str:
    found = [100 * score for score in scores]
    return f"{mean(found):.1f} ({min(found):.1f} to {max(found):.1f})"


if __name__ == "__main__":
    main()
