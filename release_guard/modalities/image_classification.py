"""Image classifiers of `transformers`. Shapes: N images, C classes, F features."""

import copy
import functools
import io
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from release_guard import checkpoints
from release_guard.data import Catalogue, Overlap, Split, Table, near_images
from release_guard.errors import ModelError
from release_guard.modalities import Batch, Modality, ModelHandle, evaluating, reinitialize

_NEAR_BITS = 12  # of 256
_SCORED_TOGETHER = 256


class ImageClassification(Modality):
    """Classifiers of images, such as ViT and ResNet, with their image processor.

    A folder without preprocessor_config.json is given ViT's own preprocessing: resized to the
    configuration's `image_size` where there is one, scaled to [0, 1], mean .5, deviation .5.
    """

    stands_for = "accuracy"

    image_column: str = "image"
    """Column of encoded images."""
    label_column: str = "label"
    """Column of classes: numbers, or names from the model's `label2id`."""

    def load(self, source: str) -> "ImageClassifier":
        module = checkpoints.load(
            source,
            auto=AutoModelForImageClassification,
            architectures=MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
            modality=self.name,
        )
        return ImageClassifier(module, _processor(source, module), self)


class ImageClassifier(ModelHandle):
    """A classifier, its preprocessing and its images."""

    module: Any

    def __init__(self, module: Any, processor: Any, modality: ImageClassification) -> None:
        self.module = module
        self._processor = processor
        self._modality = modality
        self._positions = functools.cache(functools.partial(_positions, module))
        read = _Reader(modality, processor, module.config)
        self._images: Callable[[str], _Images] = functools.cache(read)  # shared between copies

    def batches(self, dataset: str, split: Split, *, size: int, seed: int) -> Iterator[Batch]:
        images = self._images(dataset)
        batches = images.catalogue.batches(split, size=size, seed=seed)
        return (self._batch(images, rows) for rows in batches)

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.module(pixel_values=batch["pixels"]).logits, batch["labels"]

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with hook:
            self.module(pixel_values=batch["pixels"])
        return seen[0], batch["labels"]

    def scores(self, dataset: str, split: Split, *, limit: int) -> Sequence[float]:
        images = self._images(dataset)
        rows = images.catalogue.rows(split)[:limit]
        scores: list[float] = []
        with evaluating(self.module):
            for start in range(0, len(rows), _SCORED_TOGETHER):
                batch = self._batch(images, rows[start : start + _SCORED_TOGETHER])
                logits_NC, labels_N = self.logits(batch)
                right_N = (logits_NC.argmax(dim=1) == labels_N).double()
                right_N[~logits_NC.isfinite().all(dim=1)] = torch.nan
                scores += right_N.tolist()
        return scores

    def digest(self, dataset: str) -> str:
        return self._images(dataset).catalogue.digest

    def overlap(self, dataset: str, other: str) -> Overlap:
        mine, theirs = self._images(dataset), self._images(other)
        return Overlap(
            exact=mine.catalogue.share_in(theirs.catalogue),
            near=near_images(mine.sketches, theirs.sketches, bits=_NEAR_BITS),
        )

    @property
    def head(self) -> nn.Linear:
        return _head(self.module)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        parts: Iterator[nn.Module] = self.module.modules()
        lists = [part for part in parts if isinstance(part, nn.ModuleList)]
        return list(max(lists, key=_num_weights))

    def reinit_head(self, *, seed: int) -> None:
        reinitialize(self.head, seed=seed)

    def units(self, batch: Batch) -> int:
        return round(self._positions(batch["pixels"].shape[1:]) * len(batch["labels"]))

    def save(self, directory: Path) -> None:
        with checkpoints.quiet():
            self.module.save_pretrained(directory)
            self._processor.save_pretrained(directory)

    def fresh(self, *, seed: int) -> Self:
        twin = copy.copy(self)
        twin.module = checkpoints.fresh(
            self.module, auto=AutoModelForImageClassification, seed=seed
        )
        return twin

    def peer(self, source: str) -> Self:
        twin = copy.copy(self)
        twin.module = self._modality.load(source).module
        checkpoints.check_same_shape(source, self.module, twin.module)
        return twin

    def _batch(self, images: "_Images", rows: Sequence[int]) -> Batch:
        pixels = torch.from_numpy(images.pixels[rows]).to(self.device)
        labels_N = torch.tensor([images.labels[row] for row in rows], device=self.device)
        return {"pixels": _normalized(pixels, self._processor), "labels": labels_N}


@dataclass(frozen=True)
class _Images:
    """Decoded images at the model's size.

    Attributes:
        catalogue: Splits and digest.
        pixels: Bytes, (N, channels, height, width).
        labels: Class numbers.
        sketches: Perceptual hashes.
    """

    catalogue: Catalogue
    pixels: Any
    labels: Sequence[int]
    sketches: Sequence[bytes]


@dataclass(frozen=True, eq=False)
class _Reader:
    modality: ImageClassification
    processor: Any
    config: Any

    def __call__(self, source: str) -> _Images:
        table = Table.read(source)
        labels = self._labels(table)
        cells = table.column(self.modality.image_column, option="image_column")
        images = [_decode(cell, f"{source}: row {row}") for row, cell in enumerate(cells)]
        contents = [_content(image) for image in images]
        return _Images(
            catalogue=Catalogue.of(source, contents, [str(label).encode() for label in labels]),
            pixels=self._pixels(images, source),
            labels=labels,
            sketches=[_sketch(image) for image in images],
        )

    def _labels(self, table: Table) -> list[int]:
        column, classes = self.modality.label_column, self.config.num_labels
        values = table.column(column, option="label_column")
        if names := table.class_names(column):
            values = _by_name(values, names, self.config.label2id, table)
        known = self.config.label2id
        labels = [known.get(value, value) for value in values]
        for row, label in enumerate(labels):
            if type(label) is not int or not 0 <= label < classes:
                what = f"row {row}, column {column!r} holds {label!r}"
                wanted = f"the model knows classes 0 to {classes - 1} and the names in label2id"
                raise ModelError(f"{table.source}: {what}; {wanted}; mend the column")
        return labels

    def _pixels(self, images: Sequence[PIL.Image.Image], source: str) -> Any:
        mode = "L" if _channels(self.config) == 1 else "RGB"
        converted = [image.convert(mode) for image in images]
        # Resize and crop only: bytes take a quarter of the memory, `_normalized` does the rest.
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        try:
            return self.processor(converted, **options)["pixel_values"]
        except ValueError:
            sizes = sorted({image.size for image in images})
            reason = f"images of several sizes ({sizes[0]}, {sizes[-1]}) and nothing resizes them"
            advice = "add preprocessor_config.json to the model"
            raise ModelError(f"{source}: {reason}; {advice}") from None


def _by_name(
    numbers: Sequence[int], names: Sequence[str], known: Mapping[str, int], table: Table
) -> list[Any]:
    """Class names say what a number means; folders were numbered in the order of their names."""
    if set(names) <= set(known):
        return [names[number] for number in numbers]
    if not table.is_folder_of_images:
        return list(numbers)
    if all(name.isdecimal() for name in names):
        return [int(names[number]) for number in numbers]
    strange = min(set(names) - set(known))
    advice = "name the folders by class numbers or as in the model's label2id"
    raise ModelError(f"{table.source}: folder {strange!r} is no class of the model; {advice}")


def _decode(cell: Any, where: str) -> PIL.Image.Image:
    data, path = cell, None
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
    try:
        if data is None and isinstance(path, str) and "://" not in path:
            data = Path(path).read_bytes()
        if not isinstance(data, bytes):
            advice = "use parquet with encoded images, or a folder of images"
            raise ModelError(f"{where} holds no image but {type(cell).__name__}; {advice}")
        image = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
        image.load()
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ModelError(f"{where}: image cannot be decoded ({error}); remove the row") from None
    if image.mode[0] in "IF":
        raise ModelError(f"{where}: image has more than 8 bits a channel; convert it to 8 bits")
    return image


def _content(image: PIL.Image.Image) -> bytes:
    """Size and colours, whatever the file's format and colour mode."""
    return struct.pack("<II", *image.size) + image.convert("RGB").tobytes()


def _sketch(image: PIL.Image.Image) -> bytes:
    """256 bits: is a pixel of the 17x16 grey thumbnail brighter than its right neighbour?"""
    thumbnail = image.convert("L").resize((17, 16), PIL.Image.Resampling.BOX)
    pixels = np.asarray(thumbnail)
    return np.packbits(pixels[:, 1:] < pixels[:, :-1]).tobytes()


def _processor(source: str, module: Any) -> Any:
    folder = checkpoints.fetch(source)
    if (folder / "preprocessor_config.json").exists():
        with checkpoints.quiet():
            return AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
    side = getattr(module.config, "image_size", None)
    half = [0.5] * _channels(module.config)
    size = {} if side is None else {"size": {"height": side, "width": side}}
    return ViTImageProcessorPil(do_resize=side is not None, image_mean=half, image_std=half, **size)


def _channels(config: Any) -> int:
    return int(getattr(config, "num_channels", 3))


def _normalized(pixels: Tensor, processor: Any) -> Tensor:
    """What the processor does after resizing."""
    scaled = pixels.float()
    if processor.do_rescale:
        scaled = scaled * processor.rescale_factor
    if not processor.do_normalize:
        return scaled
    mean, std = (
        torch.tensor(values, device=pixels.device).view(1, -1, 1, 1)
        for values in (processor.image_mean, processor.image_std)
    )
    return (scaled - mean) / std


def _head(module: Any) -> nn.Linear:
    candidates = [
        part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
        and part.out_features == module.config.num_labels
        and "lora_" not in name
    ]
    if not candidates:
        kind = type(module).__name__
        raise ModelError(f"{kind}: its last layer is not linear; this model cannot be probed")
    return candidates[-1]


def _num_weights(part: Any) -> int:
    return sum(weight.numel() for weight in part.parameters())


def _positions(module: Any, shape: torch.Size) -> float:
    """Places one image is processed at: mean over the weights, so FLOPs = 2 x weights x places."""
    work = weights = 0

    def count(layer: Any, _: Any, output: Tensor) -> None:
        nonlocal work, weights
        work += layer.weight.numel() * output.numel() // layer.weight.shape[0]
        weights += layer.weight.numel()

    layers = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with evaluating(module):
        module(pixel_values=torch.zeros(1, *shape, device=module.device))
    for hook in hooks:
        hook.remove()
    return work / weights
