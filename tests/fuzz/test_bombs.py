"""Small files made to cost much: all of them together take a minute and four gigabytes at most.

They are read in a process of its own, which the system ends if it takes more.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from readers import only_ours, readers

SECONDS, BYTES = 60, 4 << 30  # of address space; libraries take most of it


def keys(names: Iterable[int]) -> bytes:
    return b"{" + b",".join(b'"%d":0' % name for name in names) + b"}"


def aliases(first: bytes, other: bytes) -> bytes:
    """Sixty lines, each of which stands for the one before it twice."""
    lines = [b"a%d: &a%d " % (n, n) + other % (n - 1, n - 1) for n in range(1, 60)]
    return b"---\n" + b"\n".join([b"a0: &a0 " + first, *lines]) + b"\n---\n"


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a key twice among many": ("bundle", lambda: keys([*range(10**6), 7])),
    "a million keys": ("signed-files", lambda: keys(range(10**6))),
    "a million lists in each other": ("resistance", lambda: b"[" * 10**6),
    "sixteen megabytes of digits": ("svr", lambda: b"9" * (16 << 20)),
    "more than a bundle may have": ("bundle", lambda: b" " * (17 << 20)),
    "a long name": ("signed-files", lambda: b'{"_type":"' + b"x" * 10**7 + b'"}'),
    "a million lines": ("evidence", lambda: b"{}\n" * 10**6),
    "many ledger lines": ("ledger", lambda: b"{}\n" * 10**5),
    "a line without an end": ("ledger", lambda: b"[" * 10**7),
    "aliases of aliases": ("front-matter", lambda: aliases(b"[x, x]", b"[*a%d, *a%d]")),
    "merges of merges": ("front-matter", lambda: aliases(b"{x: 1}", b"{<<: [*a%d, *a%d]}")),
    "a list that holds itself": ("front-matter", lambda: b"---\na: &a [*a]\n---\n"),
    "a list without an end": ("front-matter", lambda: b"---\na: " + b"[" * 10**5 + b"\n---\n"),
    "megabytes of YAML": ("front-matter", lambda: b"---\na: " + b"x" * (4 << 20) + b"\n---\n"),
    "lines of dashes": ("front-matter", lambda: b"---\n" + b"--- x\n" * 10**5),
    "markers": ("card", lambda: b"<!-- release-guard:begin facts -->" * 10**4),
    "half a marker": ("card", lambda: b"<!-- release-guard:begin " + b"x" * 10**6),
    "a dotted key": ("policy", lambda: b".".join([b"a"] * 5 * 10**4) + b" = 1"),
    "a dotted table": ("policy", lambda: b"[" + b".".join([b"a"] * 5 * 10**4) + b"]"),
    "dotted keys": ("policy", lambda: b"\n".join(b"a%d" % n + b".a" * 4_990 for n in range(13))),
    "arrays of arrays": ("policy", lambda: b"a = " + b"[\n" * 5 * 10**4),
    "many policy keys": ("policy", lambda: b"".join(b"k%d = 1\n" % n for n in range(12_000))),
    "a large policy": ("policy", lambda: b"#" * (64 << 20)),
    "a key of megabytes": ("private-key", lambda: b"-----BEGIN EC KEY-----" + b"A" * (32 << 20)),
    "a journal of lists": ("journal", lambda: b"[" * 10**7),
    "a revision of lists": ("revision", lambda: b"[" * 10**7),
    "a head of megabytes": ("head", lambda: b"0" * (32 << 20)),
}


def read_all() -> None:
    """In the other process; the last name it says is of the one that was too much."""
    for name, (reader, make) in BOMBS.items():
        print(name, flush=True)  # noqa: T201
        content = make()
        only_ours(lambda: readers()[reader].read(content))  # noqa: B023  called here


def bound() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


def test_they_are_read_or_refused_within_bounds() -> None:
    here = Path(__file__)
    paths = (str(here.parent), str(here.parents[1]), str(here.parents[2]), *sys.path)
    done = subprocess.run(
        [sys.executable, "-c", "import test_bombs; test_bombs.read_all()"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        preexec_fn=bound,
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout.splitlines()
    assert (done.returncode, told) == (0, list(BOMBS)), f"{told[-1:]}: {done.stderr[-2_000:]}"
