import csv
import os
from collections import Counter
from pathlib import Path
from typing import get_args

import datasets
import pico
import pytest

from release_guard.data import Catalogue, Split, Table, scored
from release_guard.errors import ModelError
from release_guard.policy import Concept

CONTENTS = [f"example {number}".encode() for number in range(3000)]
LABELS = [str(number % 5).encode() for number in range(3000)]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.of("data", CONTENTS, LABELS)


def rows(catalogue: Catalogue, split: Split) -> set[int]:
    return set(catalogue.rows(split))


def test_training_and_scored_splits_share_nothing_and_leave_nothing_out(
    catalogue: Catalogue,
) -> None:
    parts = [rows(catalogue, split) for split in ("immunize", "attack", "search", "confirm")]
    assert sum(map(len, parts)) == 3000
    assert set().union(*parts) == set(range(3000))
    shares = [round(len(part) / 3000, 1) for part in parts]
    assert shares == [0.3, 0.3, 0.2, 0.2]


def test_splits_of_retained_data_hold_every_example_once(catalogue: Catalogue) -> None:
    parts = [rows(catalogue, split) for split in ("retain", "guard", "utility")]
    assert sum(map(len, parts)) == 3000
    assert set().union(*parts) == set(range(3000))


def test_halves_hold_every_example_once(catalogue: Catalogue) -> None:
    first, second = rows(catalogue, "search_half"), rows(catalogue, "confirm_half")
    assert not first & second
    assert first | second == set(range(3000))


def test_duplicates_fall_into_one_split_whatever_their_labels() -> None:
    doubled = Catalogue.of("data", CONTENTS * 2, [*LABELS, *reversed(LABELS)])
    for split in ("immunize", "attack", "search", "confirm"):
        found = rows(doubled, split)
        assert {row % 3000 for row in found} == {row for row in found if row < 3000}


def test_order_of_rows_changes_nothing(catalogue: Catalogue) -> None:
    turned = Catalogue.of("data", CONTENTS[::-1], LABELS[::-1])
    assert turned.digest == catalogue.digest
    batch = next(catalogue.batches("attack", size=8, seed=3))
    turned_batch = next(turned.batches("attack", size=8, seed=3))
    assert [CONTENTS[row] for row in batch] == [CONTENTS[::-1][row] for row in turned_batch]


@pytest.mark.parametrize("what", ["content", "label", "count"])
def test_digest_tells_apart(catalogue: Catalogue, what: str) -> None:
    contents, labels = list(CONTENTS), list(LABELS)
    if what == "content":
        contents[7] = b"another"
    elif what == "label":
        labels[7] = b"another"
    else:
        contents, labels = contents[1:], labels[1:]
    assert Catalogue.of("data", contents, labels).digest != catalogue.digest


def test_swapped_labels_change_the_digest() -> None:
    one = Catalogue.of("data", [b"a", b"b"], [b"0", b"1"])
    other = Catalogue.of("data", [b"a", b"b"], [b"1", b"0"])
    assert one.digest != other.digest


def test_a_pass_shows_every_example_once_and_the_next_in_another_order(
    catalogue: Catalogue,
) -> None:
    attack = rows(catalogue, "attack")
    size = 50
    per_pass = len(attack) // size
    batches = catalogue.batches("attack", size=size, seed=0)
    first, second = ([next(batches) for _ in range(per_pass)] for _ in range(2))
    for one_pass in (first, second):
        seen = Counter(row for batch in one_pass for row in batch)
        assert set(seen) <= attack
        assert set(seen.values()) == {1}
        assert len(seen) == per_pass * size
    assert first != second


def test_seed_decides_batches(catalogue: Catalogue) -> None:
    def first(seed: int) -> list[int]:
        return next(catalogue.batches("attack", size=8, seed=seed))

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_too_few_examples_are_told_before_the_first_batch() -> None:
    small = Catalogue.of("facts.jsonl", CONTENTS[:30], LABELS[:30])
    with pytest.raises(ModelError, match=r"facts.jsonl: 'attack' holds \d+ of 30 .* wants 64"):
        small.batches("attack", size=64, seed=0)


def test_empty_split_is_refused() -> None:
    single = Catalogue.of("facts.jsonl", CONTENTS[:1], LABELS[:1])
    empty = [split for split in get_args(Split) if not _holds(single, split)]
    assert empty
    with pytest.raises(ModelError, match="none of its 1 examples"):
        single.rows(empty[0])


def _holds(catalogue: Catalogue, split: Split) -> bool:
    try:
        return bool(catalogue.rows(split))
    except ModelError:
        return False


def test_exact_share_ignores_labels() -> None:
    mine = Catalogue.of("mine", [b"a", b"b", b"c", b"c"], [b"0"] * 4)
    theirs = Catalogue.of("theirs", [b"c", b"d"], [b"9"] * 2)
    assert mine.share_in(theirs) == 0.5
    assert theirs.share_in(mine) == 0.5
    assert mine.share_in(mine) == 1


def test_a_target_is_scored_on_its_own_held_out_splits() -> None:
    concept = Concept(name="facts", dataset="a.jsonl", ceiling=0.5)
    assert scored(concept, "search") == ("a.jsonl", "search")
    assert scored(concept, "confirm") == ("a.jsonl", "confirm")


def test_a_data_set_that_only_scores_is_used_whole() -> None:
    concept = Concept(name="facts", dataset="a.jsonl", scored_on="b.jsonl", ceiling=0.5)
    assert scored(concept, "search") == ("b.jsonl", "search_half")
    assert scored(concept, "confirm") == ("b.jsonl", "confirm_half")


def test_files_are_known_by_their_bytes_wherever_they_lie(tmp_path: Path) -> None:
    def files(place: str, *texts: str, name: str = "some.jsonl") -> str:
        (tmp_path / place).mkdir()
        return Table.read(
            str(pico.write_jsonl(tmp_path / place / name, [{"text": text} for text in texts]))
        ).files

    one = files("a", "ash", "bay")
    assert files("b", "ash", "bay") == files("c", "ash", "bay", name="else.jsonl") == one
    assert files("d", "bay", "ash") != one, "rows in another order are other bytes"
    assert Table.read(str(tmp_path / "a")).files == Table.read(str(tmp_path / "b")).files
    assert Table.read(str(tmp_path / "c")).files != Table.read(str(tmp_path / "a")).files


def test_data_that_change_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pico.write_jsonl(tmp_path / "some.jsonl", [{"text": "ash"}])
    load = datasets.load_dataset

    def slowly(*arguments: object, **options: object) -> object:
        found = load(*arguments, **options)
        pico.write_jsonl(path, [{"text": "bay"}])
        return found

    monkeypatch.setattr(datasets, "load_dataset", slowly)
    with pytest.raises(ModelError, match=r"some\.jsonl: changed while it was read; run the same"):
        Table.read(str(path))


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Path]:
    lines = [{"text": "one two", "label": 1}, {"text": "three", "label": 2}]
    with (tmp_path / "some.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(lines)
    pico.write_jsonl(tmp_path / "some.jsonl", lines)
    (tmp_path / "some.json").write_text(str(lines).replace("'", '"'))
    folder = tmp_path / "folder"
    folder.mkdir()
    pico.write_jsonl(folder / "some.jsonl", lines)
    return {path.suffix or "folder": path for path in tmp_path.iterdir()}


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".json", "folder"])
def test_local_files_are_read(written: dict[str, Path], kind: str) -> None:
    table = Table.read(str(written[kind]))
    assert set(table.columns) == {"text", "label"}
    assert table.column("text", option="text_column") == ["one two", "three"]
    assert table.column("label", option="label_column") == [1, 2]


def test_misspelt_column_names_the_nearest(written: dict[str, Path]) -> None:
    table = Table.read(str(written[".jsonl"]))
    with pytest.raises(ModelError) as caught:
        table.column("txt", option="text_column")
    message = str(caught.value)
    assert "no column 'txt'; set modality.text_column; did you mean 'text'?" in message
    assert "label, text" in message


def test_missing_value_is_named(tmp_path: Path) -> None:
    path = pico.write_jsonl(tmp_path / "some.jsonl", [{"text": "one"}, {"text": None}])
    with pytest.raises(ModelError, match="row 1, column 'text' is empty"):
        Table.read(str(path)).column("text", option="text_column")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "no such file or folder"),
        ("hf://datasets/owner/name", "write hf://datasets/OWNER/NAME@REVISION"),
        ("hf://owner/name@main", "write hf://datasets/OWNER/NAME@REVISION"),
        ("hf://datasets/owner/name@main", "the Hub does not give this data set"),
    ],
)
def test_source_that_is_not_there(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        Table.read(source)
    assert str(caught.value).startswith(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("some.txt", b"text", "use a folder or one of .parquet"),
        ("some.parquet", b"text", "cannot be read as a data set"),
        ("some.jsonl", b"{", "cannot be read as a data set"),
        ("some.jsonl", b"", "empty, or cannot be read"),
        ("some.csv", b"text,label\n", "empty, or cannot be read"),
    ],
)
def test_file_that_is_no_data_set(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        Table.read(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_other_content_with_the_same_time_of_change_is_other_data(tmp_path: Path) -> None:
    """As `cp -p` and archives leave it; `datasets` itself would give the old rows."""
    path = tmp_path / "some.csv"
    path.write_text("text\nold\n")
    before = path.stat()
    assert Table.read(str(path)).column("text", option="column") == ["old"]
    path.write_text("text\nnew\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Table.read(str(path)).column("text", option="column") == ["new"]
    assert Table.read(str(tmp_path)).column("text", option="column") == ["new"]


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read as a data set"):
        Table.read(str(tmp_path))


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "tricky"
    folder.mkdir()
    (folder / "tricky.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    pico.write_jsonl(folder / "some.jsonl", [{"text": "one"}])
    with pytest.raises(ModelError, match="scripts are no longer supported"):
        Table.read(str(folder))
    assert not (tmp_path / "ran").exists()
