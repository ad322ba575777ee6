"""A model's own files, which anybody may have written: loaded, or refused in our own words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutation import NUMBERS, as_json, damaged, fuzzed, mutants
from readers import only_ours

from release_guard.checkpoints import check_weights, configuration
from release_guard.modalities import Modality
from release_guard.plugins import Spec

HUGE = [number for number in NUMBERS if isinstance(number, int) and number > 64]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folder(classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(classifier_folder, tmp_path_factory.mktemp("fuzzed") / "model")


@pytest.fixture(scope="module")
def sharded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights under another name, as a list of several would name them."""
    made = shutil.copytree(folder, tmp_path_factory.mktemp("sharded") / "model")
    (made / "model.safetensors").rename(made / "one.safetensors")
    return made


def changed(path: Path, content: bytes, look: Callable[[], object]) -> None:
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        only_ours(look)
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)


def is_small(value: object) -> bool:
    """Sizes are not bounded: a configuration may ask for more layers than a machine holds."""
    text = json.dumps(value)
    return not any(str(number) in text for number in HUGE)


@fuzzed(15)
@given(st.data())
def test_configurations(folder: Path, data: st.DataObject) -> None:
    path = folder / "config.json"
    valid = json.loads(path.read_bytes())
    content = data.draw(mutants(valid).filter(is_small).map(as_json) | damaged(path.read_bytes()))
    loader = Modality.build(Spec(name="image_classification"))
    changed(path, content, lambda: loader.load(str(folder)))


@fuzzed(25)
@given(st.data())
def test_configurations_are_looked_at_first(folder: Path, data: st.DataObject) -> None:
    path = folder / "config.json"
    valid = json.loads(path.read_bytes()) | {"quantization_config": {"quant_method": "x"}}
    content = data.draw(mutants(valid).map(as_json))
    for precision in (None, "nf4"):
        changed(path, content, lambda at=precision: configuration("model", folder, at))


@fuzzed(25)
@given(st.data())
def test_lists_of_weights(sharded: Path, data: st.DataObject) -> None:
    valid = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    content = data.draw(mutants(valid).map(as_json) | damaged(as_json(valid)))
    changed(sharded / INDEX, content, lambda: check_weights("model", sharded))


@fuzzed(25)
@given(st.data())
def test_headers_of_weights(folder: Path, data: st.DataObject) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    made = data.draw(mutants(header).map(as_json) | st.just(whole[8 : 8 + length]))
    size = data.draw(st.sampled_from([len(made), 0, 1, 2**63, 2**64 - 1, len(made) + 1]))
    content = size.to_bytes(8, "little") + made + whole[8 + length :]
    changed(path, content, lambda: check_weights("model", folder))
