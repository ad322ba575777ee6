"""Write faults.md: every fault at every state of a delivery, and what the hub held afterwards.

python docs/faults.py           run them all, some hundred deliveries, and write the page

Nothing in the page is written by hand. It fails, and writes nothing, if one of them left what must
never be; the tests in tests/hubs run a part of the same.
"""

import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "hubs")]

from faults import KINDS, Pusher, Row, Scene, wrong  # noqa: E402

STATES = ("look", "make", "gate", "upload", "commit", "compare", "tag", "show")
_SENDING = ("upload", "commit", "compare")
_INTRODUCTION = """\
# What faults do to a push

Written by docs/faults.py from {count} deliveries to a Hub on the loopback, through the Hub's own
client, each in a process of its own. A fault strikes at one request, or at it and all that follow:
at the first request of every kind in every state; in the first table, SIGKILL at every request. A
cell holds the exit codes, and what the hub held afterwards:

- **nothing**: no repository; **empty**: a private one without a release;
- **old**: the release that was there; **new**: the whole new one;
- **other**: what the fault put there: somebody else's commit, or a digest that the server made up.

After every fault the same command ran again without it. All {count} times it exited with 0, the hub
held the new release, public and tagged, and both runs together had made one commit{but}. No
repository was made public before it held the whole release.
"""


def main() -> int:
    """Run all of them; 1 if one left what must never be."""
    with tempfile.TemporaryDirectory() as work, Pusher() as pusher:
        first = _scene(Path(work) / "first", pusher)
        update = _scene(Path(work) / "update", pusher, update=True)
        xet = _scene(Path(work) / "xet", pusher, xet=True)
        parts = {
            "A first push, over LFS": list(_told(_rows(first, STATES, every=True))),
            "A push over an earlier release, over LFS": list(_told(_rows(update, _SENDING))),
            "A first push, over Xet": list(_told(_rows(xet, ("upload", "commit")))),
        }
    rows = [row for part in parts.values() for row in part]
    if bad := [row for row in rows if wrong(row)]:
        for row in bad:
            print(f"{wrong(row)}: {row}", file=sys.stderr)  # noqa: T201
        return 1
    (HERE / "faults.md").write_text(page(parts, rows))
    return 0


def page(parts: dict[str, list[Row]], rows: Sequence[Row]) -> str:
    """The introduction, then a table for each part."""
    lied = sum(row.commits > 1 for row in rows)
    but = f" ({lied} times two: the server had put another digest into the first)" if lied else ""
    lines = [_INTRODUCTION.format(count=len(rows), but=but)]
    for title, part in parts.items():
        states = [state for state in STATES if any(row.place.state == state for row in part)]
        lines += [
            f"## {title}",
            "",
            f"| fault | {' | '.join(states)} |",
            "|---" * (len(states) + 1) + "|",
        ]
        for fault in dict.fromkeys(row.fault for row in part):
            cells = [
                _cell(row for row in part if (row.fault, row.place.state) == (fault, state))
                for state in states
            ]
            lines.append(f"| {fault} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cell(rows: Iterable[Row]) -> str:
    found = dict.fromkeys((row.status, _NAMES.get(row.left, row.left)) for row in rows)
    by_left: dict[str, list[str]] = {}
    for status, left in found:
        by_left.setdefault(left, []).append("killed" if status < 0 else str(status))
    return (
        "<br>".join(f"{', '.join(sorted(codes))}: {left}" for left, codes in by_left.items()) or "-"
    )


_NAMES = {"something else": "other", "foreign": "other"}


def _scene(work: Path, pusher: Pusher, *, xet: bool = False, update: bool = False) -> Scene:
    work.mkdir()
    return Scene(work, pusher, xet=xet, update=update)


def _rows(scene: Scene, states: Sequence[str], *, every: bool = False) -> Iterator[Row]:
    for kind in KINDS:
        for place in scene.firsts():
            if place.state in states and (not kind.only_at or place.route in kind.only_at):
                yield scene.row(kind, place)
    for place in scene.places() if every else scene.firsts():
        if place.state in states:
            yield scene.killed(place)


def _told(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        about = (row.transport, row.place.state, row.place.route, row.fault, row.status, row.left)
        print(*about, wrong(row), file=sys.stderr)  # noqa: T201
        yield row


if __name__ == "__main__":
    sys.exit(main())
