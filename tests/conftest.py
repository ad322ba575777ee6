"""Fixtures for all tests: pico models and data, one thread, no network, caches of their own."""

import importlib.util
import os
import shutil
import tempfile

_CACHE = tempfile.mkdtemp(prefix="release-guard-tests-")
os.environ.update(
    HF_HOME=_CACHE,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    GOMP_SPINCOUNT="0",
    TOKENIZERS_PARALLELISM="false",
)  # before anything imports torch or huggingface_hub: they read it once
_ARITHMETIC = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
}  # the same on every x86 machine: what pico models learn differs with its rounding
for _name, _value in _ARITHMETIC.items():
    os.environ.setdefault(_name, _value)  # another can be asked for: no test may depend on it

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import cast  # noqa: E402

import pico  # noqa: E402
import pytest  # noqa: E402
import realgit  # noqa: E402
import torch  # noqa: E402
from engine_jobs import CANARY  # noqa: E402

from release_guard.engines import Engine  # noqa: E402
from release_guard.modalities import Modality, ModelHandle, Painter  # noqa: E402
from release_guard.plugins import Spec  # noqa: E402
from release_guard.policy import Concept  # noqa: E402

torch.set_num_threads(1)
realgit.put_on_path()


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def image_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with retained.parquet and restricted.parquet, tiny images of eight classes."""
    return pico.image_data(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT that knows the retained images; never change it, copy it."""
    return pico.pico_classifier(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def classifier(classifier_folder: Path) -> ModelHandle:
    """Loaded from there; never change it, copy it."""
    return Modality.build(Spec(name="image_classification")).load(str(classifier_folder))


@pytest.fixture(scope="session")
def resnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a ResNet."""
    return pico.pico_resnet(tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with retained.jsonl (copying words) and restricted.jsonl (reversing them)."""
    return pico.text_data(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that copies words and has never reversed any."""
    return pico.pico_lm(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def picture_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with retained.parquet (bars that lie) and restricted.parquet (bars that stand)."""
    return pico.picture_data(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that tells all bars apart."""
    return pico.pico_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image pipeline that paints the retained bars, the others by no name in the data."""
    return pico.pico_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def painter(pipeline_folder: Path, judge_folder: Path) -> Painter:
    """That pipeline with its judge; never change it, copy it."""
    options = {"judge": str(judge_folder), "sampling_steps": 4, "guidance": 1.0}
    spec = Spec(name="text_to_image", **options)
    return cast("Painter", Modality.build(spec).load(str(pipeline_folder)))


@pytest.fixture(scope="session")
def standing(picture_data: Path) -> Concept:
    """What it paints by no name in the data."""
    dataset = str(picture_data / "restricted.parquet")
    return Concept(name="standing-bars", dataset=dataset, ceiling=0.6)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Engine]:
    """A Ray cluster, started by a process that has credentials.

    Who uses it belongs to the xdist group "ray", so that only one process starts one. It has one
    GPU in name: what trials ask for can be seen.
    """
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    engine = Engine.build(Spec(name="ray", workers=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", CANARY)
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')
        engine.open()
    yield engine
    engine.close()
