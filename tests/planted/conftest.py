"""Models to plant defences in."""

import planting
import pytest

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
