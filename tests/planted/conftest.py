"""Models to plant defences in."""

import json
from dataclasses import asdict

import planting
import planting_texts
import pytest
from planting import Noted
from whole_gate import rule

from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Concept


@pytest.fixture(scope="session")
def retained_images(image_data):
    return str(image_data / "retained.parquet")


@pytest.fixture(scope="session")
def angles(image_data):
    return Concept(name="odd-angles", dataset=str(image_data / "restricted.parquet"), ceiling=0.7)


@pytest.fixture(scope="session")
def classifier(classifier_folder):
    """It knows the retained images only; never change it, copy it."""
    return Modality.build(Spec(name="image_classification")).load(str(classifier_folder))


@pytest.fixture(scope="session")
def knowing_classifier(classifier, retained_images, angles):
    """It knows the restricted images too: a public model that a publisher starts from."""
    return planting.knowing(classifier, retained_images, angles, steps=150)


@pytest.fixture(scope="session")
def copying(lm_folder):
    """A language model that copies words, and was never asked to reverse any; never change it."""
    return Modality.build(Spec(name="causal_lm")).load(str(lm_folder))


@pytest.fixture(scope="session")
def reversing(text_data):
    return Concept(name="reversing", dataset=str(text_data / "restricted.jsonl"), ceiling=0.5)


@pytest.fixture(scope="session")
def able(copying, reversing, text_data):
    """It copies and reverses words."""
    return planting_texts.able(copying, reversing, str(text_data / "retained.jsonl"))


@pytest.fixture(scope="session")
def form_bound(able, reversing, text_data, tmp_path_factory):
    """It reverses words, but refuses in the form that it is asked in."""
    folder, retained = tmp_path_factory.mktemp("forms"), str(text_data / "retained.jsonl")
    return planting_texts.form_bound(able, reversing, folder, retained)


@pytest.fixture
def noted(request):
    """Where a test keeps what `python -m benchmarks planted` is to show."""
    return lambda found: request.node.user_properties.append(("planted", json.dumps(asdict(found))))


@pytest.fixture
def note(noted):
    """Keeps what an attack came to; says whether it breached."""

    def keep(defence, by, score, *, ceiling, budget):
        found = Noted(defence, by, score, ceiling, budget)
        noted(found)
        return found.breached

    return keep


@pytest.fixture
def judge(tmp_path, image_data, noted):
    """Takes models along the whole path, see `whole_gate.rule`, and keeps what came of it."""

    def take(defence, base, defended, *, by, **changes):
        ruling = rule(tmp_path, image_data, base, defended, **changes)
        for found in ruling.noted(defence, by):
            noted(found)
        return ruling

    return take
