"""Whatever lies in a file: it is read, or refused in our own words.

A few examples a reader by default; `make fuzz` asks for thousands, other ones at every run.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutation import broken, damaged, fuzzed
from readers import only_ours, readers

SLOW = {"policy-options", "card"}
NAMES = (
    "bundle",
    "card",
    "evidence",
    "front-matter",
    "gauge",
    "head",
    "journal",
    "key-variable",
    "ledger",
    "pins",
    "policy",
    "policy-options",
    "private-key",
    "public-key",
    "resistance",
    "revision",
    "signed-files",
    "svr",
    "switching",
    "test-result",
)


def test_every_reader_is_here() -> None:
    assert sorted(readers()) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_valid_is_read(name: str) -> None:
    reader = readers()[name]
    if name == "policy-options":
        pytest.skip("its data are not there")
    reader.read(reader.source)
    if reader.document is not None:
        reader.read(reader.write(reader.document))


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.parametrize("name", NAMES)
def test_only_our_own_errors_come_out(name: str) -> None:
    reader = readers()[name]
    if reader.document is None:
        sources = damaged(reader.source) | damaged(reader.source).flatmap(damaged)
    else:
        sources = broken(reader.source, reader.document, reader.write)

    @fuzzed(15 if name in SLOW else 40)
    @given(sources | st.binary(max_size=64))
    def read(source: bytes) -> None:
        only_ours(lambda: reader.read(source))

    read()
