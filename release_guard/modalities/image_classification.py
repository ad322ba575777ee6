"""Image classifiers of `transformers`. Shapes: N images, C classes, F features."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import PIL.Image
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from release_guard import checkpoints, images
from release_guard.data import Catalogue, Overlap, Split, Table
from release_guard.errors import ModelError, brief
from release_guard.modalities import (
    Batch,
    Modality,
    ModelHandle,
    as_artefact,
    evaluating,
    names_to_pack,
    reinitialize,
    repeated_layers,
)
from release_guard.policy import Precision
from release_guard.sources import local_folder

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

    def load(self, source: str, *, artefact: Precision | None = None) -> "ImageClassifier":
        folder = local_folder(source)
        module = checkpoints.load(
            source,
            folder,
            auto=AutoModelForImageClassification,
            architectures=MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
            modality=self.name,
            artefact=artefact,
        )
        model = ImageClassifier(module, _processor(source, folder, module), self)
        return as_artefact(source, model, artefact)

    def weights(self, folder: Path) -> frozenset[str]:
        return checkpoints.weight_files(str(folder), folder)

    def save_at(self, source: Path, directory: Path, precision: Precision) -> None:
        model = self.load(str(source))
        checkpoints.save_at(
            model.module,
            source,
            directory,
            auto=AutoModelForImageClassification,
            names=names_to_pack(source, model, precision),
            precision=precision,
        )
        model.save_preprocessing(directory)


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
        data = self._images(dataset)
        batches = data.catalogue.batches(split, size=size, seed=seed)
        return (self._batch(data, rows) for rows in batches)

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.module(pixel_values=batch["pixels"]).logits, batch["labels"]

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with hook:
            self.module(pixel_values=batch["pixels"])
        return seen[0], batch["labels"]

    def scores(self, dataset: str, split: Split, *, limit: int) -> Sequence[float]:
        data = self._images(dataset)
        rows = data.catalogue.rows(split)[:limit]
        scores: list[float] = []
        with evaluating(self.module):
            for start in range(0, len(rows), _SCORED_TOGETHER):
                batch = self._batch(data, rows[start : start + _SCORED_TOGETHER])
                logits_NC, labels_N = self.logits(batch)
                right_N = (logits_NC.argmax(dim=1) == labels_N).double()
                right_N[~logits_NC.isfinite().all(dim=1)] = torch.nan
                scores += right_N.tolist()
        return scores

    def digest(self, dataset: str) -> str:
        return self._images(dataset).catalogue.digest

    def files(self, dataset: str) -> str:
        return self._images(dataset).catalogue.files

    def overlap(self, dataset: str, other: str) -> Overlap:
        mine, theirs = self._images(dataset), self._images(other)
        return Overlap(
            exact=mine.catalogue.share_in(theirs.catalogue),
            near=images.near_share(mine.pixels, theirs.pixels),
        )

    @property
    def head(self) -> nn.Linear:
        return _head(self.module)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return repeated_layers(self.module)

    def reinit_head(self, *, seed: int) -> None:
        reinitialize(self.head, seed=seed)

    def units(self, batch: Batch) -> int:
        return round(self._positions(batch["pixels"].shape[1:]) * len(batch["labels"]))

    def save(self, directory: Path) -> None:
        with checkpoints.quiet():
            self.module.save_pretrained(directory)
        self.save_preprocessing(directory)

    def save_preprocessing(self, directory: Path) -> None:
        """Write the image processor."""
        with checkpoints.quiet():
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

    def _batch(self, data: "_Images", rows: Sequence[int]) -> Batch:
        pixels = torch.from_numpy(data.pixels[rows]).to(self.device)
        labels_N = torch.tensor([data.labels[row] for row in rows], device=self.device)
        return {"pixels": _normalized(pixels, self._processor), "labels": labels_N}


@dataclass(frozen=True, eq=False)
class _Images:
    """Decoded images at the model's size.

    Attributes:
        catalogue: Splits and digest.
        pixels: Bytes, (N, channels, height, width).
        labels: Class numbers.
    """

    catalogue: Catalogue
    pixels: Any
    labels: Sequence[int]


@dataclass(frozen=True, eq=False)
class _Reader:
    modality: ImageClassification
    processor: Any
    config: Any

    def __call__(self, source: str) -> _Images:
        table = Table.read(source)
        labels = self._labels(table)
        cells = table.column(self.modality.image_column, option="image_column")
        pictures = [images.decode(cell, f"{source}: row {row}") for row, cell in enumerate(cells)]
        contents = [images.content(picture) for picture in pictures]
        return _Images(
            catalogue=Catalogue.of(
                source, contents, [str(label).encode() for label in labels], files=table.files
            ),
            pixels=self._pixels(pictures, source),
            labels=labels,
        )

    def _labels(self, table: Table) -> list[int]:
        column, known = self.modality.label_column, self.config.label2id
        values = table.column(column, option="label_column")
        if names := table.class_names(column):
            values = _by_name(values, names, known, table)
        labels = [known.get(value, value) for value in values]
        for row, label in enumerate(labels):
            if type(label) is not int or not 0 <= label < self.config.num_labels:
                what = f"row {row}, column {column!r} holds {label!r}"
                wanted = f"the model knows classes 0 to {self.config.num_labels - 1}"
                raise ModelError(f"{table.source}: {what}; {wanted}; mend the column")
        return labels

    def _pixels(self, pictures: Sequence[PIL.Image.Image], source: str) -> Any:
        mode = "L" if _channels(self.config) == 1 else "RGB"
        converted = [picture.convert(mode) for picture in pictures]
        # Resize and crop only: bytes take a quarter of the memory, `_normalized` does the rest.
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        try:
            return self.processor(converted, **options)["pixel_values"]
        except ValueError:
            sizes = sorted({picture.size for picture in pictures})
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


def _processor(source: str, folder: Path, module: Any) -> Any:
    if (folder / "preprocessor_config.json").exists():
        try:
            with checkpoints.quiet():
                return AutoImageProcessor.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False, backend="pil"
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"preprocessor_config.json cannot be used ({brief(error)})"
            raise ModelError(f"{source}: {what}; mend it or remove it") from error
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
