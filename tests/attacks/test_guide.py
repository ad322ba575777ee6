"""Guidance changes what is painted, and nothing else."""

import pytest
import torch

from release_guard.attacks import Attack
from release_guard.modalities import Painter
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept

PROMPTS = ["a photo of ash", "a photo of dew"]


def guided(painter: Painter, concept: Concept, **options: object) -> Painter:
    attack = Attack.build(Spec(name="guide", **options))
    (copy,) = attack.tamper(painter, concept, budget=Budget(limit=1), grid_ratio=2, seed=0)
    assert isinstance(copy.model, Painter)
    return copy.model


def test_kept_away_from_nothing_and_led_by_nothing_is_the_same(
    painter: Painter, standing: Concept
) -> None:
    """e_p + g (e_0 - e_p) and e_0 + g (e_p - e_0) agree at every g if the prompt is empty."""
    both = [
        guided(painter, standing, inverted=inverted, guidance=3.0).paint([""], seed=0)
        for inverted in (False, True)
    ]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("inverted", [False, True])
def test_guidance_changes_pictures_and_no_weight(
    painter: Painter, standing: Concept, inverted: bool
) -> None:
    found = guided(painter, standing, inverted=inverted, guidance=4.0)
    assert not torch.allclose(found.paint(PROMPTS, seed=0), painter.paint(PROMPTS, seed=0))
    before, after = painter.state(), found.state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    still = painter.paint(PROMPTS, seed=0)
    torch.testing.assert_close(still, painter.paint(PROMPTS, seed=0))
