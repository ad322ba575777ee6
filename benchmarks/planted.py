"""Broken defences that the red team must catch, and faults that the gate must not pass.

python -m benchmarks planted

Runs `tests/planted` and keeps what its tests note: the same models, the same assertions. If one of
them does not hold, nothing is written.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from benchmarks._common import Time, machine, record, table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from planting import PLAIN, PLAIN_MERGE  # noqa: E402  from the folder above

TITLE = "Planted defences"

Noted = Mapping[str, Any]


def main() -> None:
    about = machine("torch", "transformers")
    with TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        taken, ended = Time.of(lambda: _run(found))
        if ended.returncode:
            sys.exit("planted defences: a test did not pass; nothing was written")
        cases = list(ElementTree.parse(found).iter("testcase"))  # noqa: S314  we wrote it
    noted = [
        {"test": f"{case.get('classname')}.{case.get('name')}", **json.loads(item.get("value", ""))}
        for case in cases
        for item in case.iter("property")
        if item.get("name") == "planted"
    ]
    seconds = round(taken.cpu)
    result = {"seeds": [0], "machine": about, "cpu": seconds, "tests": len(cases), "noted": noted}
    record("planted", result, markdown(result))


def _run(found: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command += [f"--junit-xml={found}", "-o", "junit_family=legacy", "tests/planted"]
    return subprocess.run(command, cwd=ROOT, check=False)  # noqa: S603


def markdown(result: Mapping[str, Any]) -> str:
    noted = result["noted"]
    single = [item for item in noted if not item["verdict"]]
    whole = [item for item in noted if item["verdict"]]
    return (
        f"Every line is an assertion of `make test`; {result['tests']} tests, "
        f"{result['cpu']} CPU seconds. The scores are those of held-out examples, all on "
        "models of some thousand weights: they show that each attack catches what it is for, and "
        "nothing about the strength of published defences.\n\n"
        "### One attack each\n\n"
        f"{table(_SINGLE, _rows(single))}\n\n"
        "`refused by`: the check that a breach by this attack fails. Budgets in brackets; plain "
        "fine-tuning is the best of several learning rates and optimizers, or a plain merge where "
        "that is what the defence is against. A merge's score is the best of those that keep .3 of "
        "the donor's task.\n\n"
        "### From policy to verdict\n\n"
        f"{table(_WHOLE, _rulings(whole))}\n\n"
        "A red team stops at the first confirmed breach, so attacks behind it were not run (-). "
        "Checks that were not shown for want of these trials are left out where others failed."
    )


_SINGLE = (
    "planted defence",
    "plain fine-tuning at the same budget",
    "what catches it",
    "score / ceiling",
    "refused by",
)
_WHOLE = (
    "planted",
    "verdict",
    "attack",
    "score / ceiling",
    "plain fine-tuning",
    "refused by",
)


def _rows(noted: Sequence[Noted]) -> Iterable[Sequence[str]]:
    """One line a defence and attack: the highest score of each over the tests."""
    best: dict[tuple[str, str], Noted] = {}
    for item in noted:
        pair = (item["defence"], item["by"])
        best[pair] = max(best.get(pair, item), item, key=lambda each: each["score"])
    plain = {pair[0]: item for pair, item in best.items() if pair[1] in {PLAIN, PLAIN_MERGE}}
    for (defence, by), item in best.items():
        if by not in {PLAIN, PLAIN_MERGE}:
            beside = plain[defence]
            yield (
                defence,
                f"{beside['score']:.2f} ({beside['budget']})",
                f"`{by}` ({item['budget']})",
                f"{item['score']:.2f} / {item['ceiling']:g}",
                f"`resists/{by.partition('(')[0].split()[0]}`",
            )


def _rulings(noted: Sequence[Noted]) -> Iterable[Sequence[str]]:
    plain = {item["test"]: item for item in noted if item["by"] == PLAIN}
    for item in noted:
        if item["by"] != PLAIN:
            beside = plain.get(item["test"])
            yield (
                item["defence"],
                item["verdict"].upper(),
                f"`{item['by']}` ({item['budget']})",
                f"{_score(item)} / {item['ceiling']:g}",
                _score(beside) if beside else "the same",
                ", ".join(f"`{name}`" for name in item["refused_by"]) or "nothing",
            )


def _score(item: Noted) -> str:
    return f"{item['score']:.2f}" if item["score"] is not None else "-"


if __name__ == "__main__":
    main()
