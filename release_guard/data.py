"""Data sets: read through `datasets`, split by what an example holds, compared by content.

An example's place depends on nothing but its own content, so exact duplicates never straddle two
splits, and rows in another order give the same splits, batches and digest.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import datasets

from release_guard.errors import ModelError, brief
from release_guard.plugins import advise
from release_guard.policy import Concept, Target
from release_guard.sources import files_of, identity, local_data

Split = Literal[
    "immunize",
    "attack",
    "search",
    "confirm",
    "search_half",
    "confirm_half",
    "retain",
    "guard",
    "utility",
]
"""Of a target, stages train on `immunize`, attacks on `attack`; `search` and `confirm` are scored
only, and a data set that only scores is halved (`scored`). Of the retained data, stages train on
`retain` and watch `guard`; `utility` is scored only."""

_INTERVALS: Mapping[Split, tuple[float, float]] = {
    "immunize": (0, 1 / 3),
    "attack": (1 / 3, 2 / 3),
    "search": (2 / 3, 5 / 6),
    "confirm": (5 / 6, 1),
    "search_half": (0, 1 / 2),
    "confirm_half": (1 / 2, 1),
    "retain": (0, 0.6),
    "guard": (0.6, 0.7),
    "utility": (0.7, 1),
}
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_UNREADABLE = (OSError, ValueError, RuntimeError, StopIteration)  # what `datasets` raises


@dataclass(frozen=True)
class Overlap:
    """Shares of a data set's examples that also stand in another one.

    Attributes:
        exact: With the same content.
        near: With nearly or exactly the same content.
    """

    exact: float
    near: float


def scored(target: Target, phase: Literal["search", "confirm"]) -> tuple[str, Split]:
    """Data set and split that score a target: `handle.scores(*scored(target, "search"), ...)`.

    Without `scored_on` that is the split of this name. With it every example of that other data set
    serves: half of them, by content, in the search and the other half in the confirmation.
    """
    if isinstance(target, Concept) and target.scored_on is not None:
        return target.scored_on, "search_half" if phase == "search" else "confirm_half"
    return target.dataset, phase


@dataclass(frozen=True)
class Table:
    """Rows as they were read, images still encoded.

    Attributes:
        source: The data set.
        rows: All of them.
        files: SHA-256 over names and bytes of the files that they were read from.
    """

    source: str
    rows: Any
    files: str

    @classmethod
    def read(cls, source: str) -> Self:
        """Read a data set; of several splits the one called "train".

        Args:
            source: A .parquet, .jsonl, .json or .csv file, a folder of such files or of images,
                or `hf://datasets/OWNER/NAME@REVISION`.

        Raises:
            ModelError: Nothing is there, it cannot be read, it changes meanwhile, or it is empty.
        """
        path = local_data(source)  # `datasets` itself would fall back to whatever revision it has
        request = _request(source, path)
        found = identity(path)
        datasets.disable_progress_bars()
        try:
            rows = datasets.load_dataset(**request, split="train", cache_dir=_cache(found))
        except (*_UNREADABLE, datasets.exceptions.DatasetsError) as error:
            reason = brief(error.__cause__ or error)
            what = f"empty, or cannot be read as a data set ({reason})"
            raise ModelError(f"{source}: {what}; mend it or name another") from error
        if len(rows) == 0:
            raise ModelError(f"{source}: the data set is empty; give it examples")
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        files = _files(path)
        if identity(path) != found:
            raise ModelError(f"{source}: changed while it was read; run the same command again")
        return cls(source, rows, files)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.rows.column_names)

    def column(self, name: str, *, option: str) -> list[Any]:
        """All values of a column.

        Raises:
            ModelError: There is none of this name, or a value is missing.
        """
        if name not in self.columns:
            hint = advise(name, self.columns)
            raise ModelError(f"{self.source}: no column {name!r}; set modality.{option}; {hint}")
        values: list[Any] = self.rows.with_format("arrow")[:][name].to_pylist()
        if None in values:
            place = f"row {values.index(None)}, column {name!r}"
            raise ModelError(f"{self.source}: {place} is empty; fill it or remove the row")
        return values

    def class_names(self, name: str) -> tuple[str, ...]:
        """Names behind the numbers of a class column; none if it has no such names."""
        feature = self.rows.features[name]
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()

    @property
    def is_folder_of_images(self) -> bool:
        """Whether classes were numbered by sorting the folders that happen to be there."""
        return str(self.rows.info.builder_name) == "imagefolder"


@dataclass(frozen=True)
class Catalogue:
    """Which rows of a data set are whose.

    Attributes:
        source: The data set.
        contents: SHA-256 of each row's content, in the order of the rows.
        order: All row numbers, sorted by content and label.
        digest: SHA-256 over all contents and labels, whatever the order of the rows.
        files: SHA-256 over the files that all of it was read from.
    """

    source: str
    contents: tuple[bytes, ...]
    order: tuple[int, ...]
    digest: str
    files: str = ""

    @classmethod
    def of(
        cls, source: str, contents: Sequence[bytes], labels: Sequence[bytes], *, files: str = ""
    ) -> Self:
        """List a data set's examples.

        Args:
            source: The data set.
            contents: What each row holds, labels aside; decides its split.
            labels: The rest of each row, only digested.
            files: Digest of the files they were read from.
        """
        keys = [hashlib.sha256(content).digest() for content in contents]
        marks = [hashlib.sha256(label).digest() for label in labels]
        entries = [key + mark for key, mark in zip(keys, marks, strict=True)]
        order = sorted(range(len(entries)), key=entries.__getitem__)
        digest = hashlib.sha256(b"".join(entries[row] for row in order)).hexdigest()
        return cls(source, tuple(keys), tuple(order), digest, files)

    def rows(self, split: Split) -> list[int]:
        """Row numbers of a split, in an order that is random but always the same.

        Raises:
            ModelError: The split is empty.
        """
        if not (rows := self._splits[split]):
            have = f"none of its {len(self.order)} examples"
            raise ModelError(f"{self.source}: {have} falls into {split!r}; add examples")
        return rows

    @cached_property
    def _splits(self) -> dict[Split, list[int]]:
        places = [(row, _position(self.contents[row])) for row in self.order]
        return {
            split: [row for row, place in places if low <= place < high]
            for split, (low, high) in _INTERVALS.items()
        }

    def batches(self, split: Split, *, size: int, seed: int) -> Iterator[list[int]]:
        """Endless batches of `size` row numbers, shuffled anew each pass.

        What is left over at the end of a pass is dropped.

        Raises:
            ModelError: The split has fewer than `size` examples; at once, not at the first batch.
        """
        rows = self.rows(split)
        if len(rows) < size:
            have = f"{split!r} holds {len(rows)} of {len(self.order)} examples"
            advice = "add examples or lower the batch size"
            raise ModelError(f"{self.source}: {have}, a batch wants {size}; {advice}")
        return _batches(rows, size, seed)

    def share_in(self, other: "Catalogue") -> float:
        """Share of the examples whose content stands in the other data set too."""
        theirs = set(other.contents)
        return sum(content in theirs for content in self.contents) / len(self.contents)


def _request(source: str, path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {"path": str(path)}
    if not path.exists():
        raise ModelError(f"{source}: no such file or folder; check `dataset` in the policy")
    if not (builder := _BUILDERS.get(path.suffix.lower())):
        kinds = ", ".join(_BUILDERS)
        raise ModelError(f"{source}: not a data set; use a folder or one of {kinds}")
    return {"path": builder, "data_files": str(path)}


def _cache(found: object) -> str:
    """Where `datasets` keeps what it made of these files, and of no others.

    It would know them by name and time of change, and both stay when a file is copied over another.
    """
    mark = hashlib.sha256(repr(found).encode()).hexdigest()
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "release-guard" / mark)


def _files(path: Path) -> str:
    """SHA-256 over the names and the bytes of all files, wherever the folder lies."""
    total = hashlib.sha256()
    for file in files_of(path):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{digest} {file.relative_to(path)}\n".encode())
    return total.hexdigest()


def _position(content: bytes) -> float:
    return int.from_bytes(content[:6]) / 2**48


def _batches(rows: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    shuffler = random.Random(seed)  # noqa: S311  order of training data, not a secret
    while True:
        left = list(rows)  # drawn from as it is needed: most callers want one batch
        for _ in range(len(rows) // size):
            yield [_draw(left, shuffler) for _ in range(size)]


def _draw(left: list[int], shuffler: random.Random) -> int:
    place = shuffler.randrange(len(left))
    left[place], left[-1] = left[-1], left[place]
    return left.pop()
