import pytest
import torch
from torch import nn
from torch.testing import assert_close

from release_guard.attacks import Attack
from release_guard.errors import ModelError, PolicyError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept
from release_guard.surgery import normalizations

MODELS = ("vit", "resnet", "llama", "tied_llama")
VARIANTS = (
    {},
    {"pairs": False},
    {"norms": False},
    {"norms": False, "pairs": False, "whiten": True},
    {"whiten": True},
)


@pytest.fixture(scope="module")
def vit(classifier_folder, image_data):
    return loaded("image_classification", classifier_folder, image_data / "restricted.parquet")


@pytest.fixture(scope="module")
def resnet(resnet_folder, image_data):
    return loaded("image_classification", resnet_folder, image_data / "restricted.parquet")


@pytest.fixture(scope="module")
def llama(lm_folder, text_data):
    return loaded("causal_lm", lm_folder, text_data / "restricted.jsonl")


@pytest.fixture(scope="module")
def tied_llama(llama):
    model, concept = llama
    tied = model.copy()
    tied.head.weight = tied.module.get_input_embeddings().weight
    return tied, concept


def loaded(modality, folder, data):
    model = Modality.build(Spec(name=modality)).load(str(folder))
    return model, Concept(name="restricted", dataset=str(data), ceiling=0.5)


def rescaled(model, concept, **options):
    attack = Attack.build(Spec(name="rescale", **options))
    return attack.transform(model, concept, seed=0, ancestor=None)


def logits(model, concept, split="search"):
    batch = next(model.batches(concept.dataset, split, size=32, seed=5))
    with torch.no_grad():
        return model.logits(batch)[0]


@pytest.mark.parametrize("fixture", MODELS)
@pytest.mark.parametrize("options", VARIANTS)
def test_the_function_is_kept(fixture, options, request):
    """On examples that were not read."""
    model, concept = request.getfixturevalue(fixture)
    wanted, found = (logits(one, concept) for one in (model, rescaled(model, concept, **options)))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("fixture", ["vit", "llama", "tied_llama"])
def test_all_gains_of_a_transformer_are_reset(fixture, request):
    model, concept = request.getfixturevalue(fixture)
    norms = normalizations(rescaled(model, concept, pairs=False).module)
    assert len(norms) == 5
    assert all((norm.weight == 1).all() for norm in norms)


def test_a_tied_head_is_cut_loose_and_the_embedding_stays(tied_llama):
    model, concept = tied_llama
    other = rescaled(model, concept)
    embedding = model.module.get_input_embeddings().weight
    assert torch.equal(other.module.get_input_embeddings().weight, embedding)
    assert not torch.equal(other.head.weight, embedding)


@pytest.mark.parametrize("fixture", MODELS)
def test_the_head_reads_white_features(fixture, request):
    model, concept = request.getfixturevalue(fixture)
    other = rescaled(model, concept, whiten=True)
    batches = other.batches(concept.dataset, "attack", size=32, seed=0)
    with torch.no_grad():
        features = torch.cat([other.features(next(batches))[0] for _ in range(32)]).double()
    features = features - features.mean(dim=0) * (model.head.bias is not None)
    variances = torch.linalg.eigvalsh(features.T @ features / len(features))
    assert_close(variances[1:], torch.ones_like(variances[1:]), rtol=0.02, atol=0)
    assert variances[0] < 1.02  # LayerNorm's features have a direction without variance


def test_ill_conditioned_features_are_white_too(vit):
    model, concept = vit
    squeezed, scale = model.copy(), torch.logspace(0, -8, 32)
    with torch.no_grad():
        squeezed.module.vit.layernorm.weight.mul_(scale)
        squeezed.module.vit.layernorm.bias.mul_(scale)
        squeezed.head.weight.div_(scale)
    other = rescaled(squeezed, concept, norms=False, pairs=False, whiten=True)
    wanted, found = logits(squeezed, concept), logits(other, concept)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    batch = next(other.batches(concept.dataset, "attack", size=200, seed=0))
    with torch.no_grad():
        variances = other.features(batch)[0].var(dim=0)
    assert (variances > 0.7).sum() >= 31


@pytest.mark.parametrize("name", ["linear_probe", "finetune"])
def test_white_features_are_what_later_attacks_see(vit, name):
    model, concept = vit
    other = rescaled(model, concept, whiten=True)
    attack = Attack.build(Spec(name=name))
    budget = Budget(limit=40)
    *_, last = attack.tamper(other, concept, budget=budget, grid_ratio=1.5, seed=0)
    scores = last.model.scores(concept.dataset, "search", limit=100)
    assert sum(scores) > 0.9 * len(scores)


def test_a_model_without_such_layers_is_refused(vit):
    model, concept = vit
    bare = model.copy()
    bare.module.vit.layers = nn.ModuleList()
    with pytest.raises(ModelError, match=r"rescale\.pairs: .*ViTForImageClassification.*leave"):
        rescaled(bare, concept, norms=False)


def test_nothing_to_do_is_refused():
    with pytest.raises(PolicyError, match="one of norms, pairs, whiten"):
        Attack.build(Spec(name="rescale", norms=False, pairs=False))
