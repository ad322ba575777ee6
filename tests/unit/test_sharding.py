"""Models in parts: two processes do what one does, to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from release_guard import shards
from release_guard.modalities import ModelHandle
from release_guard.sharding import forms, gather, settled

TESTS = Path(__file__).parents[1]


def test_one_process_is_left_as_it_is(classifier: ModelHandle) -> None:
    with shards.group():
        assert (shards.world(), shards.rank(), shards.leads()) == (1, 0, True)
        assert settled(classifier) is classifier
        assert gather(classifier) is classifier
        assert list(forms(classifier)) == [classifier.module]
        assert shards.agree(3)
        rows = torch.arange(6.0)
        state = {"a": [rows, (1, "b")]}
        kept = shards.parted(shards.portable(state))
        assert torch.equal(kept["a"][0], rows)
        assert kept["a"][1] == (1, "b")
        assert shards.like(rows, classifier.head.weight) is rows
        shards.wait()


@pytest.fixture
def models(
    tmp_path: Path,
    image_data: Path,
    classifier_folder: Path,
    resnet_folder: Path,
    text_data: Path,
    lm_folder: Path,
) -> Path:
    """A folder as `sharded_jobs` wants it; one language model's head is its embedding."""
    sources = {"images": image_data, "vit": classifier_folder, "resnet": resnet_folder,
               "texts": text_data, "llama": lm_folder}  # fmt: skip
    for name, source in sources.items():
        (tmp_path / name).symlink_to(source)
    config = AutoConfig.from_pretrained(lm_folder)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(lm_folder).save_pretrained(tmp_path / "tied")
    return tmp_path


def test_two_processes_do_what_one_does(models: Path) -> None:
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", TESTS / "sharded_jobs.py"]
    done = subprocess.run(  # noqa: S603
        [sys.executable, *command, models],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
