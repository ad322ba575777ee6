"""Valid files made invalid: any place of a document changed to anything, then any of its bytes.

Random bytes seldom get past a reader's first line. A valid document with one wrong value does.
"""

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
DOUBLE = "\0double "
"""A key that begins so is written without it: as a key that stands there twice."""

RAW = {
    "\0deep list": "[" * 50_000 + "]" * 50_000,
    "\0deep enough": "[" * 600 + "]" * 600,
    "\0deep table": '{"steps":[' * 300 + "1" + "]}" * 300,
    "\0digits": "9" * 5_000,
    "\0hexadecimal": f"0x{'f' * 5_000}",
    "\0infinity": "1e400",
    "\0many": "[" + "0," * 20_000 + "0]",
    "\0long": f'"{"x" * 100_000}"',
}
"""Texts that are written as what they stand for: too deep or too long for Python to write."""

TEXTS = (
    "",
    "\0",
    "\x1b[2J\x1b[31merror: all is well",
    "a\nerror: not ours",
    "a\r\nb",
    "\u2028\u2029\x85",
    "\u202egnp.sj",
    "\x9b31m",
    "\ufeff",
    "\ud800",
    "\U0001f512",
    "../../etc/passwd",
    "/etc/passwd",
    "a/../b",
    "hf://",
    "hf://a/b@c",
    "file:///etc/passwd",
    "NaN",
    "1e400",
    "-0",
    "0x10",
    "9999-12-31T23:59:59+00:00",
    "0001-01-01T00:00:00+14:00",
    "99999999999999999999",
    "f" * 64,
    "F" * 64,
    "x" * 5_000,
    "%s%n{0}{self.__class__}",
    "<!-- release-guard:end facts -->",
    "-----BEGIN PRIVATE KEY-----",
)
NUMBERS = (
    0,
    -1,
    1,
    True,
    False,
    2**31,
    2**63,
    2**64,
    10**400,
    10**4_299,
    0.0,
    -0.0,
    0.5,
    5e-324,
    1.7976931348623157e308,
    math.inf,
    -math.inf,
    math.nan,
)
TOKENS = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\r\n",
    b"\r",
    b"\xe2\x80\xa8",
    b"\x1b[2J",
    b'"',
    b"'''",
    b'"""',
    b"{}",
    b"[[",
    b"]",
    b"\\ud800",
    b"\\u0000",
    b"NaN",
    b"-Infinity",
    b"1e400",
    b"-0.0",
    b"9" * 5_000,
    b"0x" + b"f" * 5_000,
    b"[" * 2_000,
    b'{"a":' * 2_000,
    b"- " * 2_000,
    b"&a [*a]",
    b"? ",
    b"---\n",
    b"...\n",
    b"#",
    b"<<: ",
    b"!!python/object:os.system x",
    b"2001-99-99",
    b"=",
    b"\n",
)


def fuzzed(examples: int) -> settings:
    """A few examples, always the same; with FUZZ_EXAMPLES so many, others at every run."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=timedelta(seconds=20),
        suppress_health_check=list(HealthCheck),
        database=None,
    )


def values() -> st.SearchStrategy[Any]:
    """Anything that can stand in a document, and what cannot."""
    scalars = st.none() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=8)
    return (
        scalars
        | st.lists(scalars, max_size=3)
        | st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=4), scalars, max_size=3)
        | st.sampled_from(sorted(RAW))
    )


@st.composite
def mutants(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three places changed; the original is left as it is."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(changed))
        if not found:
            return draw(values())
        where, key = found[draw(st.integers(0, len(found) - 1))]
        change = draw(st.sampled_from(_CHANGES))
        change(draw, where, key, found)
    return changed


@st.composite
def damaged(draw: st.DrawFn, source: bytes) -> bytes:
    """The bytes cut, doubled, overwritten, or with something in their midst."""
    place = draw(st.integers(0, len(source)))
    end = min(len(source), place + draw(st.sampled_from([0, 1, 2, 8, 64])))
    head, cut, tail = source[:place], source[place:end], source[end:]
    token = draw(st.sampled_from(TOKENS) | st.binary(max_size=4))
    made: Sequence[bytes] = (
        head,
        head + tail,
        head + token + tail,
        head + cut + cut + tail,
        head + token + cut + tail,
        token + source,
        source + token,
        source.replace(b"\n", b"\r\n"),
        head + source,
    )
    return draw(st.sampled_from(made))


def broken(source: bytes, document: Any, write: Callable[[Any], bytes]) -> st.SearchStrategy[bytes]:
    """Bytes that were a file once: changed as a document, as bytes, or as both."""
    documents = mutants(document).map(write)
    return documents | damaged(source) | documents.flatmap(damaged)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document where something else could stand; long lists by their ends."""
    if isinstance(value, dict):
        keys: Sequence[Any] = list(value)
    elif isinstance(value, list):
        keys = sorted({*range(min(len(value), 4)), *range(len(value))[-2:]})
    else:
        return
    for key in keys:
        yield value, key
        yield from places(value[key])


def as_json(value: Any) -> bytes:
    """JSON, even of what JSON cannot say: NaN, half characters, keys that stand there twice."""
    text = json.dumps(value, default=str)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.replace(json.dumps(DOUBLE)[1:-1], "").encode()


def as_lines(value: Any) -> bytes:
    """One JSON document a line."""
    whole = value if isinstance(value, list) else [value]
    return b"".join(as_json(each) + b"\n" for each in whole)


def as_toml(value: Any) -> bytes:
    """TOML, even of what TOML cannot say."""
    table = value if isinstance(value, dict) else {"value": value}
    lines = [f"{_key(key)} = {_inline(item)}\n" for key, item in table.items() if item is not None]
    return "".join(lines).encode("utf-8", "surrogatepass")


def _delete(_: st.DrawFn, where: Any, key: Any, __: list[Any]) -> None:
    if isinstance(where, dict):
        where.pop(key, None)
    elif key < len(where):
        del where[key]


def _replace(draw: st.DrawFn, where: Any, key: Any, _: list[Any]) -> None:
    _put(where, key, draw(values()))


def _swap(draw: st.DrawFn, where: Any, key: Any, found: list[Any]) -> None:
    """Something from elsewhere in the same document: of a right kind, in a wrong place."""
    other, at = found[draw(st.integers(0, len(found) - 1))]
    _put(where, key, copy.deepcopy(other[at]))


def _wrap(draw: st.DrawFn, where: Any, key: Any, _: list[Any]) -> None:
    value = where[key]
    _put(where, key, draw(st.sampled_from([[value], [value, value], {"name": value}, str(value)])))


def _add(draw: st.DrawFn, where: Any, key: Any, _: list[Any]) -> None:
    """A key twice, a key too many, or an item too many."""
    if isinstance(where, list):
        where.insert(key, copy.deepcopy(where[key]))
        return
    new = draw(st.sampled_from([f"{DOUBLE}{key}", *TEXTS, "name", "steps", "after"]))
    where[new] = draw(st.just(copy.deepcopy(where[key])) | values())


_CHANGES = (_delete, _replace, _replace, _swap, _wrap, _add)


def _put(where: Any, key: Any, value: Any) -> None:
    if isinstance(where, dict) or key < len(where):
        where[key] = value


def _key(key: str) -> str:
    return json.dumps(key.removeprefix(DOUBLE), ensure_ascii=False).replace("\x7f", "\\u007f")


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{_key(key)} = {_inline(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return RAW.get(value, _key(value)).replace('{"steps":', "{steps=")
    return repr(value)
