"""Models and data sets so small that a test can train, attack and judge them. All procedural."""

import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

SIDE = 8
NUM_RETAINED = 4
NUM_CLASSES = 8


def gratings(classes: Iterable[int], *, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy stripes at a random phase; the class is their angle. Bytes (N, 8, 8), labels (N)."""
    random = np.random.default_rng(seed)
    labels = np.array(list(classes))[np.arange(count) % len(list(classes))]
    angles = labels.reshape(-1, 1, 1) * math.pi / NUM_CLASSES
    down, across = np.mgrid[0:SIDE, 0:SIDE]
    waves = across * np.cos(angles) + down * np.sin(angles)
    phases = random.uniform(0, 2 * math.pi, size=(count, 1, 1))
    clean = np.sin(waves * 1.6 + phases)
    noisy = clean + random.normal(0, 0.4, size=clean.shape)
    return np.clip(127 + 60 * noisy, 0, 255).astype(np.uint8), labels


def write_images(path: Path, pixels: np.ndarray, labels: np.ndarray) -> Path:
    """A parquet file of PNG images with the columns `image` and `label`."""
    rows = {
        "image": [{"bytes": _png(image), "path": None} for image in pixels],
        "label": labels.tolist(),
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def image_data(directory: Path, *, count: int = 900, seed: int = 0) -> Path:
    """`retained.parquet` (classes 0-3) and `restricted.parquet` (classes 4-7)."""
    directory.mkdir(parents=True, exist_ok=True)
    retained, restricted = range(0, NUM_CLASSES, 2), range(1, NUM_CLASSES, 2)
    for name, angles, shift in (("retained", retained, 0), ("restricted", restricted, 4)):
        pixels, labels = gratings(angles, count=count, seed=seed + shift)
        write_images(directory / f"{name}.parquet", pixels, labels // 2 + shift)
    return directory


def pico_classifier(directory: Path, *, steps: int = 300, seed: int = 0) -> Path:
    """A ViT that knows the retained classes and has never seen the restricted ones."""
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=SIDE,
        patch_size=2,
        num_channels=1,
        num_labels=NUM_CLASSES,
    )
    return _classifier(directory, ViTForImageClassification, config, steps=steps, seed=seed)


def pico_resnet(directory: Path, *, steps: int = 150, seed: int = 0) -> Path:
    """The same as a ResNet, with running statistics in its BatchNorm layers."""
    config = ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=NUM_CLASSES,
    )
    return _classifier(directory, ResNetForImageClassification, config, steps=steps, seed=seed)


def _classifier(directory: Path, kind: Any, config: Any, *, steps: int, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = kind(config)
        pixels, labels = gratings(range(0, NUM_CLASSES, 2), count=2000, seed=seed + 1000)
        images = torch.from_numpy(pixels).unsqueeze(1).float() / 127.5 - 1
        classes = torch.from_numpy(labels) // 2
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
        module.train()
        for _ in range(steps):
            rows = torch.randint(len(images), (64,))
            loss = module(pixel_values=images[rows], labels=classes[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    module.eval().save_pretrained(directory)
    ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(directory)
    return directory


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
