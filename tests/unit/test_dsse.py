import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from release_guard.dsse import MAX_BUNDLE, Envelope, Statement, Subject, pae, read_json
from release_guard.errors import IntegrityError

STATEMENT = Statement(
    "https://example.com/x/v1", [Subject("model", "a" * 64)], {"n": [1, 2.5, None]}
)
BUNDLE = json.loads(
    Envelope(STATEMENT.to_bytes(), b"signature", {"publicKey": {"hint": "h"}}).to_bytes()
)

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
_DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)


def changed(path: str, value: Any) -> bytes:
    bundle = json.loads(json.dumps(BUNDLE))
    *parents, last = path.split(".")
    where = bundle
    for key in parents:
        where = where[int(key) if key.isdigit() else key]
    if value is ...:
        del where[last]
    else:
        where[last] = value
    return json.dumps(bundle).encode()


def test_pae_counts_bytes() -> None:
    assert pae("é".encode()) == b"DSSEv1 28 application/vnd.in-toto+json 2 \xc3\xa9"


@given(st.text(min_size=1), st.lists(st.tuples(st.text(min_size=1), _DIGESTS), min_size=1), _JSON)
def test_statements_come_back_as_they_went(kind: str, subjects: list[Any], value: Any) -> None:
    statement = Statement(kind, tuple(Subject(*each) for each in subjects), {"value": value})
    source = statement.to_bytes()
    assert Statement.from_bytes(source) == statement
    assert Statement.from_bytes(source).to_bytes() == source


@given(st.binary(min_size=1), st.binary(min_size=1))
def test_envelopes_come_back_as_they_went(payload: bytes, signature: bytes) -> None:
    envelope = Envelope(payload, signature, {"publicKey": {"hint": "x"}, "tlogEntries": []})
    assert Envelope.from_bytes(envelope.to_bytes()) == envelope


def test_canonical_bytes() -> None:
    assert STATEMENT.to_bytes() == (
        b'{"_type":"https://in-toto.io/Statement/v1","predicate":{"n":[1,2.5,null]},'
        b'"predicateType":"https://example.com/x/v1","subject":[{"digest":{"sha256":"'
        + b"a" * 64
        + b'"},"name":"model"}]}'
    )


def test_what_is_not_a_number_is_never_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Statement("x", [Subject("m", "a" * 64)], {"n": float("nan")}).to_bytes()


@pytest.mark.parametrize("keyid", ["", None, ...])
def test_keyid_may_be_empty_null_or_absent(keyid: Any) -> None:
    assert Envelope.from_bytes(changed("dsseEnvelope.signatures.0.keyid", keyid))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mediaType", "application/vnd.dev.sigstore.bundle+json;version=0.2"),
        ("mediaType", ...),
        ("extra", 1),
        ("verificationMaterial", None),
        ("verificationMaterial", "key"),
        ("verificationMaterial.secretKey", {}),
        ("dsseEnvelope", []),
        ("dsseEnvelope.extra", 1),
        ("dsseEnvelope.payloadType", "text/plain"),
        ("dsseEnvelope.payload", ""),
        ("dsseEnvelope.payload", "a b="),
        ("dsseEnvelope.payload", "YR=="),  # unused bits set
        ("dsseEnvelope.payload", "YQ"),
        ("dsseEnvelope.payload", "_-8="),
        ("dsseEnvelope.payload", "é==="),
        ("dsseEnvelope.payload", 3),
        ("dsseEnvelope.signatures", []),
        ("dsseEnvelope.signatures", [{"sig": "YQ=="}, {"sig": "YQ=="}]),
        ("dsseEnvelope.signatures", {"sig": "YQ=="}),
        ("dsseEnvelope.signatures", ["YQ=="]),
        ("dsseEnvelope.signatures.0.keyid", "k"),
        ("dsseEnvelope.signatures.0.keyid", []),
        ("dsseEnvelope.signatures.0.keyid", 0),
        ("dsseEnvelope.signatures.0.sig", ...),
        ("dsseEnvelope.signatures.0.cert", "x"),
    ],
)
def test_bundles_of_another_shape_are_refused(path: str, value: Any) -> None:
    with pytest.raises(IntegrityError, match="bundle"):
        Envelope.from_bytes(changed(path, value))


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"nul",
        b"{",
        b'{"a":1,"a":1}',
        b'[{"b":{"a":1,"a":2}}]',
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e999",
        b'"\xff"',
        b'"\\ud800"',
        b'["\\uDFFF"]',
        b'{"\\udc00":1}',
        '{"a":1}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b"[" * 200_000,
        b"9" * 5000,
        b" " * (MAX_BUNDLE + 1),
    ],
    ids=lambda source: repr(source[:20]),
)
def test_json_that_could_be_read_in_two_ways_is_refused(source: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"^thing: "):
        read_json(source, "thing")


def test_escaped_pairs_of_surrogates_are_one_character() -> None:
    assert read_json(rb'"\ud83d\ude00"', "thing") == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_type", "https://in-toto.io/Statement/v0.1"),
        ("predicateType", 1),
        ("predicateType", ""),
        ("predicate", None),
        ("predicate", []),
        ("subject", []),
        ("subject", {}),
        ("subject", ["model"]),
        ("subject", [{"name": "m"}]),
        ("subject", [{"name": "", "digest": {"sha256": "a" * 64}}]),
        ("subject", [{"name": "m", "digest": {"sha512": "a" * 128}}]),
        ("subject", [{"name": "m", "digest": {"sha256": "A" * 64}}]),
        ("subject", [{"name": "m", "digest": {"sha256": "a" * 63}}]),
        ("subject", [{"name": "m", "digest": {"sha256": ["a"]}}]),
    ],
)
def test_statements_of_another_shape_are_refused(key: str, value: Any) -> None:
    statement = json.loads(STATEMENT.to_bytes()) | {key: value}
    with pytest.raises(IntegrityError, match="statement"):
        Statement.from_bytes(json.dumps(statement).encode())


def test_fields_unknown_to_in_toto_are_ignored() -> None:
    statement = json.loads(STATEMENT.to_bytes())
    statement["annotations"] = {}
    statement["subject"][0]["digest"]["sha512"] = "0" * 128
    read = Statement.from_bytes(json.dumps(statement).encode())
    assert read.to_bytes() == STATEMENT.to_bytes()


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_in_our_own_words(source: bytes) -> None:
    for read in (Envelope.from_bytes, Statement.from_bytes):
        with pytest.raises(IntegrityError):
            read(source)


@given(st.sampled_from(["verificationMaterial", "dsseEnvelope", "mediaType", "more"]), _JSON)
def test_any_value_in_a_bundle_is_refused_in_our_own_words(key: str, value: Any) -> None:
    source = json.dumps(BUNDLE | {key: value}).encode()
    if key == "verificationMaterial" and value == {}:
        assert Envelope.from_bytes(source).material == {}
        return
    with pytest.raises(IntegrityError, match=r"\Abundle: [^\n]*\Z"):
        Envelope.from_bytes(source)


def test_payload_is_the_very_bytes() -> None:
    odd = b'{ "spaces" :\n1 }'
    bundle = changed("dsseEnvelope.payload", base64.b64encode(odd).decode())
    assert Envelope.from_bytes(bundle).payload == odd
