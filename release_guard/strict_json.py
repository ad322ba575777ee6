"""JSON that means the same to everyone: UTF-8, no doubled key, finite numbers, whole characters."""

import json
import math
from typing import Any


def loads(source: bytes) -> Any:
    """Read a document that somebody else may have written.

    Raises:
        ValueError: Anything that two readers could take for different things, or that Python cannot
            hold: nested too deep, integers of thousands of digits.
    """
    try:
        value = json.loads(
            source.decode(),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
        if b"\\ud" in source.lower():  # an escape may spell half a character, which no file holds
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, no NaN, UTF-8: equal values give equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    ).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {key!a} stands there twice")
        value[key] = item
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
