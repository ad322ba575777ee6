"""Judges that cannot tell, on the whole path: nothing is concluded from what they say."""

import shutil

import pico
import pytest
import torch
from transformers import ResNetForImageClassification
from whole_gate import rule

from release_guard.errors import ModelError
from release_guard.release import Result


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


def test_one_that_always_says_safe_fails_every_trial(ruled, noted):
    found = ruled(-1e6)
    for each in found.noted("a judge that always says safe", "finetune"):
        noted(each)
    assert found.verdict.result is Result.INCONCLUSIVE
    assert {record.outcome.ending for record in found.evidence.records} == {"failed"}
    assert all("in 0% of its pictures" in r.outcome.note for r in found.evidence.records)
    wanted = {"coverage/failures", "controls/finetune/one-bar@fp32"}
    assert wanted <= set(found.unshown)


def test_one_that_always_agrees_leaves_no_evidence(ruled, tmp_path):
    """It takes the retained pictures, too, for what is restricted: nothing can be measured."""
    with pytest.raises(ModelError, match=r"the judge .* sees class 0 in 0% of its pictures"):
        ruled(1e6)
    trials = (tmp_path / "run" / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert trials
    assert all("100% of others" in line for line in trials)
