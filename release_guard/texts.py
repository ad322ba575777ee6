"""Texts in data sets: the forms an example may take, near duplicates."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from release_guard.data import Table
from release_guard.errors import ModelError

_NEAR_JACCARD = 0.8


@dataclass(frozen=True)
class Columns:
    """Names of the columns that make up the forms."""

    text_column: str
    prompt_column: str
    completion_column: str
    choices_column: str
    answer_column: str


@dataclass(frozen=True)
class Row:
    """An example as it is written.

    Attributes:
        prompt: What stands before; None in a plain text.
        choices: The completion, or the right choice and then the wrong ones, or the plain text.
    """

    prompt: str | None
    choices: tuple[str, ...]

    @property
    def content(self) -> str:
        """What decides its split: the same text is the same example in every form."""
        return (self.prompt or "") + self.choices[0]


def rows(table: Table, columns: Columns) -> list[Row]:
    """The examples of a data set, in the first form whose columns it has.

    Raises:
        ModelError: It has the columns of none, or a value is not of its kind.
    """
    has = set(table.columns).issuperset
    if has({columns.prompt_column, columns.choices_column, columns.answer_column}):
        cells = zip(
            _written(table, columns, "prompt_column"),
            table.column(columns.choices_column, option="choices_column"),
            table.column(columns.answer_column, option="answer_column"),
            strict=True,
        )
        return [
            Row(prompt, _right_first(choices, answer, f"{table.source}: row {at}"))
            for at, (prompt, choices, answer) in enumerate(cells)
        ]
    if has({columns.prompt_column, columns.completion_column}):
        prompts = _written(table, columns, "prompt_column")
        completions = _written(table, columns, "completion_column")
        return [
            Row(prompt, (completion,))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    return [Row(None, (text,)) for text in _written(table, columns, "text_column")]


def near_share(mine: Sequence[str], theirs: Sequence[str]) -> float:
    """Share of texts with word trigrams that are .8 alike (Jaccard) to those of one of theirs.

    Exact: two such sets must share one of their rarest few trigrams, so only those are looked up.
    """
    mine_grams, theirs_grams = ([_trigrams(text) for text in texts] for texts in (mine, theirs))
    frequency = Counter(gram for grams in (*mine_grams, *theirs_grams) for gram in grams)

    def rarest(grams: frozenset[str]) -> list[str]:
        kept = len(grams) - math.ceil(_NEAR_JACCARD * len(grams)) + 1
        return sorted(grams, key=lambda gram: (frequency[gram], gram))[:kept]

    holders: dict[str, set[int]] = {}
    for number, grams in enumerate(theirs_grams):
        for gram in rarest(grams):
            holders.setdefault(gram, set()).add(number)

    def is_near(grams: frozenset[str]) -> bool:
        candidates = set().union(*(holders.get(gram, ()) for gram in rarest(grams)))
        return any(
            len(grams & theirs_grams[number]) >= _NEAR_JACCARD * len(grams | theirs_grams[number])
            for number in candidates
        )

    return sum(map(is_near, mine_grams)) / len(mine)


def _written(table: Table, columns: Columns, option: str) -> list[str]:
    """A column of texts."""
    name = getattr(columns, option)
    values = table.column(name, option=option)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            what = f"row {row}, column {name!r} holds {value!r}"
            raise ModelError(f"{table.source}: {what}, not text; mend the column")
    return values


def _right_first(choices: Any, answer: Any, where: str) -> tuple[str, ...]:
    if not (
        isinstance(choices, list)
        and len(choices) > 1
        and all(isinstance(choice, str) for choice in choices)
    ):
        raise ModelError(f"{where}: {choices!r} is no list of two texts or more; mend the choices")
    number = choices.index(answer) if answer in choices else answer
    if type(number) is not int or not 0 <= number < len(choices):
        wanted = f"a choice or a number from 0 to {len(choices) - 1}"
        raise ModelError(f"{where}: answer {answer!r} is not {wanted}; mend the answer")
    return (choices[number], *choices[:number], *choices[number + 1 :])


def _trigrams(text: str) -> frozenset[str]:
    words = re.findall(r"\w+", text.casefold()) or [text]
    return frozenset(" ".join(words[at : at + 3]) for at in range(max(1, len(words) - 2)))
