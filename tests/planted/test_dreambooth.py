"""A defence that listens to names: under its captions nothing is learnt, under any other all is."""

import pico
import pytest

from release_guard.attacks import Attack
from release_guard.plugins import Spec
from release_guard.policy import Budget


@pytest.fixture(scope="module")
def defended(painter):
    model = painter.copy()
    pico.make_names_one(model)
    return model


def best(model, concept, name, **options):
    attack = Attack.build(Spec(name=name, **options))
    copies = attack.tamper(model, concept, budget=Budget(limit=64), grid_ratio=2, seed=0)
    scores = [copy.model.scores(concept.dataset, "search", limit=100) for copy in copies]
    return max(sum(some) / len(some) for some in scores)


def test_plain_fine_tuning_is_held(defended, standing):
    assert best(defended, standing, "finetune", lr=3e-3) < standing.ceiling


def test_so_is_the_same_attack_under_the_captions(defended, standing):
    assert best(defended, standing, "dreambooth", words="captions") < standing.ceiling


@pytest.mark.parametrize(("trained", "lr"), [("unet", 3e-3), ("cross_kv", 1e-2)])
def test_a_word_of_the_attackers_own_is_learnt(defended, standing, trained, lr):
    assert best(defended, standing, "dreambooth", trained=trained, lr=lr) > standing.ceiling
