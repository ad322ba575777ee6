"""Fuzzing by what code is reached: `python tests/fuzz/guided.py READER [libFuzzer options]`.

Needs atheris, which is no dependency of ours: `pip install atheris`. Half of what it tries are its
own bytes; the other half, valid documents changed as those bytes say.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

with atheris.instrument_imports(include=["release_guard", "tomllib", "yaml"]):
    from mutation import broken, damaged
    from readers import only_ours, readers

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def main(name: str, *options: str) -> None:
    """Run one reader until it breaks, or as long as `-max_total_time` says."""
    reader = readers()[name]
    made = damaged(reader.source)
    if reader.document is not None:
        made = broken(reader.source, reader.document, reader.write)

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(made | st.binary())
    def documents(source: bytes) -> None:
        only_ours(lambda: reader.read(source))

    def one(content: bytes) -> None:
        if content[:1] < b"\x80":
            only_ours(lambda: reader.read(content[1:]))
        else:
            documents.hypothesis.fuzz_one_input(content[1:])

    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "valid").write_bytes(b"\0" + reader.source)
        atheris.Setup([sys.argv[0], corpus, "-max_len=65536", "-rss_limit_mb=4096", *options], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
