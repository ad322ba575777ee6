"""Artefacts of every precision: the same numbers as in memory, read back, loadable by anyone."""

from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from release_guard.modalities import Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Precision
from release_guard.quantization import at, plain

ROUNDED: tuple[Precision, ...] = ("bf16", "int8", "nf4")
PACKED: tuple[Precision, ...] = ("int8", "nf4")
KINDS = {"causal_lm": "wide_lm", "image_classification": "wide_vit", "text_to_image": "pipeline"}


@pytest.fixture(scope="module")
def wide_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its rows are whole blocks."""
    return pico.pico_lm(tmp_path_factory.mktemp("wide"), steps=20, width=64)


@pytest.fixture(scope="module")
def wide_vit(classifier_folder: Path) -> Path:
    """Some of its rows are half a block."""
    return classifier_folder


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> Path:
    return pipeline_folder


@pytest.fixture(scope="module")
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Master, its folder and its artefacts, each written once."""
    name = request.param
    folder = request.getfixturevalue(KINDS[name])
    modality = Modality.build(Spec(name=name))
    home = tmp_path_factory.mktemp("artefacts")
    for precision in ROUNDED:
        modality.save_at(folder, home / precision, precision)
    return {
        "name": name,
        "modality": modality,
        "folder": folder,
        "master": modality.load(str(folder)),
        "home": home,
    }


every_kind = pytest.mark.parametrize("made", list(KINDS), indirect=True)


def linear(model: ModelHandle) -> dict[str, str]:
    return {
        name: type(layer).__name__
        for name, layer in model.module.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }


@every_kind
@pytest.mark.parametrize("precision", ROUNDED)
def test_an_artefact_is_bit_by_bit_what_is_attacked_in_memory(
    made: dict[str, Any], precision: Precision
) -> None:
    loaded = made["modality"].load(str(made["home"] / precision), artefact=precision)
    rounded = at(made["master"], precision)
    assert linear(loaded) == linear(rounded)
    mine, theirs = plain(loaded).state(), plain(rounded).state()
    assert mine.keys() == theirs.keys()
    differing = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert differing == []
    assert any(not torch.equal(value, mine[name]) for name, value in made["master"].state().items())
