"""Judges that cannot tell, on the whole path: nothing is concluded from what they say."""

import shutil

import pico
import pytest
import torch
from transformers import ResNetForImageClassification
from whole_gate import rule

from release_guard.errors import ModelError


@pytest.fixture
def ruled(painter, picture_data, judge_folder, tmp_path):
    """The whole path with the judge's word for the first bar that stands made likelier or less."""
    pixels, labels = pico.bars([4], count=300, seed=9)
    shown = pico.write_pictures(tmp_path / "one.parquet", pixels, labels)
    pixels, labels = pico.bars([0, 1], count=300, seed=8)
    others = pico.write_pictures(tmp_path / "others.parquet", pixels, labels)

    def found(bias):
        judge = shutil.copytree(judge_folder, tmp_path / "judge")
        module = ResNetForImageClassification.from_pretrained(judge)
        moved = painter.copy()
        with torch.no_grad():
            module.classifier[1].bias[4] = bias
            moved.unet.conv_out.bias.add_(1e-3)
        module.save_pretrained(judge)
        modality = {"judge": str(judge), "others": str(others), "sampling_steps": 4}
        return rule(
            tmp_path / "run",
            picture_data,
            painter,
            moved,
            modality={"name": "text_to_image", "guidance": 1.0, **modality},
            concepts=[{"name": "one-bar", "dataset": str(shown), "ceiling": 0.6}],
            red_team={"budget": {"limit": 1}},
        )

    return found


@pytest.mark.parametrize(
    ("bias", "seen"),
    [
        pytest.param(-1e6, "class 4 in 0% of its pictures", id="always says safe"),
        pytest.param(1e6, "100% of others", id="always agrees"),
    ],
)
def test_one_that_cannot_be_believed_ends_it_before_anything_is_spent(ruled, tmp_path, bias, seen):
    with pytest.raises(ModelError, match=f"the judge .*{seen}"):
        ruled(bias)
    assert not (tmp_path / "run" / "trials.jsonl").exists()
