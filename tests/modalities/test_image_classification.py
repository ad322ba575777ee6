import json
import shutil
from pathlib import Path

import numpy as np
import pico
import PIL.Image
import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    ViTImageProcessorPil,
)

from release_guard.data import Split
from release_guard.errors import ModelError
from release_guard.modalities.image_classification import ImageClassification, ImageClassifier


@pytest.fixture
def handle(classifier_folder: Path) -> ImageClassifier:
    return ImageClassification().load(str(classifier_folder))


def images(*, count: int = 300, side: int = 8, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, size=(count, side, side), dtype=np.uint8)


def everything(handle: ImageClassifier, dataset: Path, split: Split = "attack") -> torch.Tensor:
    """One batch of all there is."""
    count = len(handle.scores(str(dataset), split, limit=10_000))
    return next(handle.batches(str(dataset), split, size=count, seed=0))["pixels"]


def folder_of_images(directory: Path, names: tuple[str, ...], *, each: int = 40) -> Path:
    for number, name in enumerate(names):
        (directory / name).mkdir(parents=True)
        for at, pixels in enumerate(images(count=each, seed=number)):
            PIL.Image.fromarray(pixels).save(directory / name / f"{at}.png")
    return directory


def named(classifier_folder: Path, directory: Path, names: list[str]) -> ImageClassifier:
    """The pico classifier with names for its classes."""
    shutil.copytree(classifier_folder, directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {str(number): name for number, name in enumerate(names)}
    config["label2id"] = {name: number for number, name in enumerate(names)}
    path.write_text(json.dumps(config))
    return ImageClassification().load(str(directory))


def labels(handle: ImageClassifier, dataset: Path) -> set[int]:
    batch = next(handle.batches(str(dataset), "attack", size=16, seed=0))
    return set(batch["labels"].tolist())


def test_pixels_and_logits_are_those_of_the_library(
    handle: ImageClassifier, classifier_folder: Path, tmp_path: Path
) -> None:
    pixels = images(count=1, side=11)  # has to be resized
    dataset = pico.write_images(tmp_path / "some.parquet", pixels.repeat(20, 0), np.zeros(20, int))
    split = next(s for s in ("immunize", "attack", "utility") if _has(handle, dataset, s))
    batch = next(handle.batches(str(dataset), split, size=20, seed=0))
    processor = ViTImageProcessorPil.from_pretrained(classifier_folder)
    expected = processor(PIL.Image.fromarray(pixels[0]), return_tensors="pt")["pixel_values"]
    assert torch.allclose(batch["pixels"][:1], expected, atol=1e-6)
    theirs = AutoModelForImageClassification.from_pretrained(classifier_folder)
    with torch.no_grad():
        logits, _ = handle.logits(batch)
        assert torch.allclose(logits[:1], theirs(expected).logits, atol=1e-5)


def _has(handle: ImageClassifier, dataset: Path, split: Split) -> bool:
    try:
        return bool(handle.scores(str(dataset), split, limit=1))
    except ModelError:
        return False


def test_scores_are_right_or_wrong(handle: ImageClassifier, image_data: Path) -> None:
    dataset = str(image_data / "retained.parquet")
    scores = handle.scores(dataset, "utility", limit=200)
    assert set(scores) == {0.0, 1.0}
    reversed_head = handle.copy()
    with torch.no_grad():
        reversed_head.head.weight.neg_()
        reversed_head.head.bias.neg_()
    assert sum(reversed_head.scores(dataset, "utility", limit=200)) < 20


def test_splits_do_not_depend_on_the_model(
    handle: ImageClassifier, resnet_folder: Path, image_data: Path
) -> None:
    resnet = ImageClassification().load(str(resnet_folder))
    dataset = str(image_data / "retained.parquet")
    mine, theirs = (
        next(one.batches(dataset, "attack", size=50, seed=4)) for one in (handle, resnet)
    )
    assert torch.equal(mine["labels"], theirs["labels"])
    assert handle.digest(dataset) == resnet.digest(dataset)


def test_running_statistics_are_part_of_the_state(resnet_folder: Path, image_data: Path) -> None:
    resnet = ImageClassification().load(str(resnet_folder))
    before = resnet.state()
    batch = next(resnet.batches(str(image_data / "restricted.parquet"), "attack", size=64, seed=0))
    twin = resnet.copy()
    twin.module.train()
    twin.logits(batch)
    moved = [name for name, value in twin.state().items() if not torch.equal(value, before[name])]
    assert moved
    assert all("running" in name or "num_batches" in name for name in moved)
    resnet.scores(str(image_data / "restricted.parquet"), "search", limit=10)
    assert all(torch.equal(value, before[name]) for name, value in resnet.state().items())


def test_units_are_patches_of_a_vit(handle: ImageClassifier, image_data: Path) -> None:
    batch = next(handle.batches(str(image_data / "retained.parquet"), "attack", size=10, seed=0))
    assert handle.units(batch) == pytest.approx(10 * 17, rel=0.05)  # 16 patches, 1 class token


def test_model_without_preprocessing_is_given_vits(
    classifier_folder: Path, image_data: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(classifier_folder, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    modality = ImageClassification()
    mine, theirs = (modality.load(str(folder)) for folder in (bare, classifier_folder))
    dataset = image_data / "retained.parquet"
    assert torch.equal(everything(mine, dataset), everything(theirs, dataset))
    mine.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "preprocessor_config.json").exists()


def test_images_of_several_sizes_need_something_that_resizes(
    resnet_folder: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(resnet_folder, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    folder = folder_of_images(tmp_path / "images", ("0", "1"))
    PIL.Image.fromarray(images(count=1, side=9)[0]).save(folder / "0" / "large.png")
    with pytest.raises(ModelError, match="several sizes"):
        ImageClassification().load(str(bare)).digest(str(folder))
    assert ImageClassification().load(str(resnet_folder)).digest(str(folder))


def test_processor_that_crops_is_followed(classifier_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier_folder, tmp_path / "model")
    processor = ConvNextImageProcessorPil(
        size={"shortest_edge": 8}, crop_pct=0.5, image_mean=[0.2], image_std=[0.7]
    )
    processor.save_pretrained(folder)
    pixels = images(count=200, side=20)
    dataset = pico.write_images(tmp_path / "some.parquet", pixels, np.zeros(200, int))
    found = everything(ImageClassification().load(str(folder)), dataset)
    every = processor([PIL.Image.fromarray(image) for image in pixels], return_tensors="pt")
    expected = every["pixel_values"].flatten(1)
    distances = torch.cdist(found.flatten(1).double(), expected.double())
    assert distances.min(dim=1).values.max() < 1e-4


def test_images_in_folders_named_by_class_number(handle: ImageClassifier, tmp_path: Path) -> None:
    dataset = folder_of_images(tmp_path / "images", ("5", "6", "7"))
    assert labels(handle, dataset) == {5, 6, 7}


def test_images_in_folders_named_as_the_model_does(classifier_folder: Path, tmp_path: Path) -> None:
    handle = named(classifier_folder, tmp_path / "model", list("hgfedcba"))
    dataset = folder_of_images(tmp_path / "images", ("a", "c"))
    assert labels(handle, dataset) == {7, 5}


def test_images_in_folders_the_model_does_not_know(handle: ImageClassifier, tmp_path: Path) -> None:
    dataset = folder_of_images(tmp_path / "images", ("cats", "dogs"), each=2)
    with pytest.raises(ModelError, match="folder 'cats' is no class of the model"):
        handle.digest(str(dataset))


def test_near_duplicates_are_not_exact(handle: ImageClassifier, tmp_path: Path) -> None:
    pixels, classes = pico.gratings(range(8), count=100, seed=7)
    mine = pico.write_images(tmp_path / "mine.parquet", pixels, classes)
    brighter = np.clip(pixels.astype(int) + 3, 0, 255).astype(np.uint8)
    half = np.concatenate([brighter[:50], images(count=50)])
    theirs = pico.write_images(tmp_path / "theirs.parquet", half, classes)
    overlap = handle.overlap(str(mine), str(theirs))
    assert overlap.exact == 0
    assert overlap.near == pytest.approx(0.5, abs=0.05)


def test_misspelt_column(classifier_folder: Path, image_data: Path) -> None:
    handle = ImageClassification(image_column="img").load(str(classifier_folder))
    with pytest.raises(ModelError, match=r"no column 'img'; set modality.image_column; .*label"):
        handle.digest(str(image_data / "retained.parquet"))


def test_label_beyond_the_head(handle: ImageClassifier, tmp_path: Path) -> None:
    classes = np.array([0, 1, 8])
    dataset = pico.write_images(tmp_path / "some.parquet", images(count=3), classes)
    with pytest.raises(ModelError, match=r"row 2, column 'label' holds 8; .*classes 0 to 7"):
        handle.batches(str(dataset), "attack", size=1, seed=0)


def test_column_without_images(handle: ImageClassifier, tmp_path: Path) -> None:
    dataset = pico.write_jsonl(tmp_path / "some.jsonl", [{"image": "a.png", "label": 0}])
    with pytest.raises(ModelError, match="row 0 holds no image but str"):
        handle.digest(str(dataset))


def test_damaged_preprocessing(classifier_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier_folder, tmp_path / "model")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuch"}')
    with pytest.raises(ModelError, match=r"preprocessor_config.json"):
        ImageClassification().load(str(folder))
