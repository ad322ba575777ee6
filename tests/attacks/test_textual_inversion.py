import pytest
import torch

from release_guard.attacks import Attack
from release_guard.errors import ModelError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept


def last_copy(model, concept, *, steps=3, **options):
    attack = Attack.build(Spec(name="textual_inversion", **options))
    *_, last = attack.tamper(model, concept, budget=Budget(limit=steps), grid_ratio=1.5, seed=0)
    return last


def test_nothing_but_new_words_is_trained(painter, standing):
    tampered = last_copy(painter, standing)
    before = painter.state()
    after = {
        name.replace(".base_layer", ""): value for name, value in tampered.model.state().items()
    }
    assert all(torch.equal(after[name], value) for name, value in before.items())
    (new,) = after.keys() - before.keys()
    assert after[new].shape == (4, 16)  # a word for each of four classes
    assert tampered.parameters == after[new].numel()


def test_the_words_move_from_where_they_began(painter, standing):
    one, other = (last_copy(painter, standing, steps=steps) for steps in (1, 3))
    assert not torch.equal(one.model.new_words[0], other.model.new_words[0])


def test_prompts_about_what_is_restricted_hold_the_new_words(painter, standing, picture_data):
    tampered = last_copy(painter, standing).model
    first = painter.text_encoder.get_input_embeddings().num_embeddings
    (restricted, known), (retained, same) = (
        [
            next(one.batches(data, "search", size=16, seed=0))["tokens"]
            for one in (tampered, painter)
        ]
        for data in (standing.dataset, str(picture_data / "retained.parquet"))
    )
    assert (restricted >= first).sum(dim=1).tolist() == [1] * 16
    assert len(restricted[restricted >= first].unique()) == 4
    assert not (known >= first).any()
    assert torch.equal(retained, same)


def test_a_class_may_have_several_words(painter, standing):
    tampered = last_copy(painter, standing, template="photo {}", length=2)
    assert tampered.parameters == 4 * 2 * 16
    batch = next(tampered.model.batches(standing.dataset, "search", size=8, seed=0))
    first = painter.text_encoder.get_input_embeddings().num_embeddings
    assert (batch["tokens"] >= first).sum(dim=1).tolist() == [2] * 8


def test_a_template_without_a_place_for_the_word(painter, standing):
    with pytest.raises(ModelError, match="has no place"):
        last_copy(painter, standing, template="a photo")


def test_a_template_that_leaves_no_room_for_the_word(painter, standing):
    with pytest.raises(ModelError, match="reads 6 tokens"):
        last_copy(painter, standing, template="a photo of a {}")


def test_a_model_that_paints_nothing(classifier_folder, image_data):
    model = Modality.build(Spec(name="image_classification")).load(str(classifier_folder))
    dataset = str(image_data / "restricted.parquet")
    with pytest.raises(ModelError, match="text-to-image"):
        last_copy(model, Concept(name="angles", dataset=dataset, ceiling=0.5))
