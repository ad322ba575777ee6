from itertools import pairwise
from pathlib import Path

import pico
import pytest

from release_guard.data import Table
from release_guard.errors import ModelError
from release_guard.texts import Columns, Row, near_share, rows

COLUMNS = Columns("text", "prompt", "completion", "choices", "answer")
WORDS = [f"word{number}" for number in range(60)]


def read(path: Path, *lines: dict[str, object]) -> list[Row]:
    return rows(Table.read(str(pico.write_jsonl(path / "some.jsonl", lines))), COLUMNS)


def test_first_form_whose_columns_are_there(tmp_path: Path) -> None:
    line = {"prompt": "a", "completion": " b", "choices": [" c", " d"], "answer": 1, "text": "e"}
    assert read(tmp_path, line) == [Row("a", (" d", " c"))]
    del line["answer"]
    assert read(tmp_path, line) == [Row("a", (" b",))]
    del line["completion"]
    assert read(tmp_path, line) == [Row(None, ("e",))]


def test_answer_may_be_the_text_of_a_choice(tmp_path: Path) -> None:
    line = {"prompt": "a", "choices": ["x", "y", "z"], "answer": "y"}
    assert read(tmp_path, line) == [Row("a", ("y", "x", "z"))]


def test_same_text_is_the_same_example_in_every_form() -> None:
    forms = [Row(None, ("a b",)), Row("a", (" b",)), Row("a", (" b", " c"))]
    assert {form.content for form in forms} == {"a b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"txt": "a"}, "no column 'text'.*did you mean 'txt'"),
        ({"text": 3}, "row 0, column 'text' holds 3, not text"),
        ({"prompt": "a", "choices": ["x"], "answer": 0}, "no list of two texts or more"),
        ({"prompt": "a", "choices": "xy", "answer": 0}, "no list of two texts or more"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": 2}, "answer 2 is not a choice"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": "z"}, "answer 'z' is not a choice"),
    ],
)
def test_bad_rows(tmp_path: Path, line: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, line)


def test_one_changed_word_in_a_long_text_is_near() -> None:
    text = " ".join(WORDS)
    changed = text.replace("word30", "other")
    assert near_share([text, "something else altogether"], [changed]) == 0.5


def test_half_the_words_changed_is_not_near() -> None:
    assert near_share([" ".join(WORDS)], [" ".join(WORDS[:30])]) == 0


def test_case_and_punctuation_do_not_matter() -> None:
    assert near_share(["The Sky, above us."], ["the sky above us"]) == 1


@pytest.mark.parametrize("text", ["", "?!", "one", "one two"])
def test_short_texts_are_near_themselves_only(text: str) -> None:
    assert near_share([text], ["another one here", text]) == 1
    assert near_share([text], ["another one here"]) == 0


def test_prefix_filter_finds_what_comparing_all_pairs_finds() -> None:
    texts = [" ".join(WORDS[start : start + 24]) for start in range(0, 30, 2)]
    texts += [text.replace(f"word{number}", "x") for number, text in enumerate(texts)]

    def grams(text: str) -> set[tuple[str, str, str]]:
        words = text.split()
        return set(zip(words, words[1:], words[2:], strict=False))

    def alike(one: str, other: str) -> float:
        return len(grams(one) & grams(other)) / len(grams(one) | grams(other))

    for one, other in pairwise(texts):
        assert near_share([one], [other]) == float(alike(one, other) >= 0.8)
    expected = sum(any(alike(one, other) >= 0.8 for other in texts[5:]) for one in texts[:5]) / 5
    assert near_share(texts[:5], texts[5:]) == expected
