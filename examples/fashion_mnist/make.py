"""Make the demo's two parquet files from the Fashion-MNIST idx files.

    python examples/fashion_mnist/make.py FOLDER_WITH_IDX_GZ

Retained: 2,400 images of each of the classes 0-4. Restricted: 600 of each of 5-9, with labels 0-4
of their own. Which images: the first of each class in a seeded permutation of the training set.
"""

import gzip
import io
import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture

NAMES = [
    ["t-shirt", "trouser", "pullover", "dress", "coat"],
    ["sandal", "shirt", "sneaker", "bag", "ankle-boot"],
]


def read(path: Path, offset: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=offset)


def png(pixels: np.ndarray) -> dict[str, bytes]:
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, "png", optimize=True)
    return {"bytes": buffer.getvalue()}


def main(folder: Path) -> None:
    images = read(folder / "train-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read(folder / "train-labels-idx1-ubyte.gz", 8)
    order = np.random.default_rng(0).permutation(len(images))
    for name, first, names, count in (
        ("retained", 0, NAMES[0], 2_400),
        ("restricted", 5, NAMES[1], 600),
    ):
        rows = np.concatenate(
            [order[labels[order] == label][:count] for label in range(first, first + 5)]
        )
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        table = Dataset.from_dict(
            {
                "image": [png(images[row]) for row in rows],
                "label": [int(labels[row]) - first for row in rows],
            },
            features=features,
        )
        table.to_parquet(Path(__file__).parent / f"{name}.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
