"""Pictures with captions: read, split, cut to a model's size, and shown to who is to judge them.

Shapes: N pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from release_guard import images
from release_guard.data import Catalogue, Split, Table
from release_guard.diffusion import Pipeline
from release_guard.errors import ModelError
from release_guard.judges import Judge

_SHOWN = 200  # real pictures a judge is tried on


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns."""

    image: str
    caption: str
    label: str


@dataclass(frozen=True, eq=False)
class Pictures:
    """Decoded pictures at the model's size.

    Attributes:
        catalogue: Splits and digest.
        pixels: Bytes (N, channels, height, width).
        captions: What stands beside them.
        labels: What they show.
    """

    catalogue: Catalogue
    pixels: Tensor
    captions: Sequence[str]
    labels: Sequence[int]

    def scaled(self, rows: Sequence[int]) -> Tensor:
        """Some of them in [-1, 1]."""
        return self.pixels[list(rows)].float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads a data set as this pipeline and this judge want it.

    Raises:
        ModelError: A picture, a caption or a label cannot be used; says where and what to do.
    """

    columns: Columns
    pipeline: Pipeline
    judge: Judge | None

    def __call__(self, source: str) -> Pictures:
        table = Table.read(source)
        captions = table.column(self.columns.caption, option="caption_column")
        for row, caption in enumerate(captions):
            if not isinstance(caption, str):
                what = f"row {row} has no caption but {type(caption).__name__}"
                raise ModelError(f"{source}: {what}; set modality.caption_column")
        labels = self._labels(table)
        cells = table.column(self.columns.image, option="image_column")
        pictures = [images.decode(cell, f"{source}: row {row}") for row, cell in enumerate(cells)]
        contents = [images.content(picture) for picture in pictures]
        marks = [
            f"{label} {caption}".encode() for label, caption in zip(labels, captions, strict=True)
        ]
        return Pictures(
            catalogue=Catalogue.of(source, contents, marks, files=table.files),
            pixels=torch.stack([self._pixels(picture) for picture in pictures]),
            captions=captions,
            labels=labels,
        )

    def _labels(self, table: Table) -> list[int]:
        column = self.columns.label
        if self.judge is None and column not in table.columns:
            return [0] * len(table.rows)
        values: list[Any] = table.column(column, option="label_column")
        if names := table.class_names(column):
            values = [names[number] for number in values]
        known = {} if self.judge is None else self.judge.numbers
        numbers = known or {value: at for at, value in enumerate(sorted(set(values), key=str))}
        labels = [numbers.get(value, value) for value in values]
        for row, label in enumerate(labels):
            if label not in numbers.values():
                what = f"row {row}, column {column!r} holds {label!r}"
                wanted = f"the judge knows {', '.join(map(str, numbers))}"
                raise ModelError(f"{table.source}: {what}; {wanted}; mend the column")
        return labels

    def _pixels(self, picture: PIL.Image.Image) -> Tensor:
        """Bytes (channels, height, width), the picture's middle cut to the model's square."""
        side = self.pipeline.side
        mode = "L" if self.pipeline.network.vae.config.in_channels == 1 else "RGB"
        fitted = np.array(PIL.ImageOps.fit(picture.convert(mode), (side, side)))
        return torch.from_numpy(fitted).view(side, side, -1).permute(2, 0, 1)


@dataclass(frozen=True, eq=False)
class Control:
    """Tries the judge on real pictures, once a split."""

    judge: Judge | None
    others: str
    pictures: Callable[[str], Pictures]

    def __call__(self, dataset: str, split: Split) -> None:
        if self.judge is None:
            return
        data = self.pictures(dataset)
        rows = data.catalogue.rows(split)[:_SHOWN]
        pixels, labels = [data.scaled(rows)], [data.labels[row] for row in rows]
        if self.others:
            others = self.pictures(self.others)
            more = others.catalogue.rows("utility")[:_SHOWN]
            pixels.append(others.scaled(more))
            labels += [others.labels[row] for row in more]
        self.judge.check(
            (torch.cat(pixels) + 1) / 2, torch.tensor(labels), len(rows), where=dataset
        )
