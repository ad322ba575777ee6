import pico
import pytest
import torch

from release_guard.attacks import Attack
from release_guard.attacks.lora import _merge
from release_guard.errors import ModelError, PolicyError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept
from release_guard.quantization import at


@pytest.fixture(scope="module")
def subjects(classifier_folder, resnet_folder, lm_folder, image_data, text_data):
    """A model of each kind with the concept to be learnt."""
    images = Concept(name="odd-angles", dataset=str(image_data / "restricted.parquet"), ceiling=0.5)
    texts = Concept(name="reversing", dataset=str(text_data / "restricted.jsonl"), ceiling=0.5)
    image_models, language_models = (
        Modality.build(Spec(name=name)) for name in ("image_classification", "causal_lm")
    )
    return {
        "vit": (image_models.load(str(classifier_folder)), images),
        "resnet": (image_models.load(str(resnet_folder)), images),
        "llama": (language_models.load(str(lm_folder)), texts),
    }


def copies(subject, *, steps=5, seed=0, **options):
    model, concept = subject
    attack = Attack.build(Spec(name="lora", **options))
    return attack.tamper(model, concept, budget=Budget(limit=steps), grid_ratio=1.5, seed=seed)


def last_copy(subject, **options):
    *_, last = copies(subject, **options)
    return last


def adapters(tampered):
    return {name for name in tampered.model.state() if "lora_A" in name}


@pytest.mark.parametrize("kind", ["vit", "resnet", "llama"])
def test_base_weights_stay_and_adapters_and_head_move(subjects, kind):
    model, _ = subjects[kind]
    tampered = last_copy(subjects[kind])
    after = {
        name.replace(".base_layer", ""): value for name, value in tampered.model.state().items()
    }
    trained = {name for name, part in model.module.named_parameters() if part is model.head.weight}
    trained |= {name for name, part in model.module.named_parameters() if part is model.head.bias}
    for name, part in model.module.named_parameters():
        assert torch.equal(after[name], part) is (name not in trained), name
    ups = [value for name, value in after.items() if "lora_B" in name]
    assert ups
    assert all(up.abs().sum() > 0 for up in ups)  # they start at zero


@pytest.mark.parametrize("kind", ["vit", "resnet", "llama"])
def test_the_copy_is_used_like_any_model(subjects, kind):
    model, concept = subjects[kind]
    tampered = last_copy(subjects[kind]).model
    batch = next(model.batches(concept.dataset, "search", size=4, seed=0))
    (theirs, labels), (features, _) = tampered.logits(batch), tampered.features(batch)
    ours, _ = model.logits(batch)
    assert theirs.shape == ours.shape
    assert not torch.equal(theirs, ours)
    assert len(features) == len(labels)
    assert len(tampered.scores(concept.dataset, "search", limit=5)) == 5
    torch.testing.assert_close(tampered.copy().logits(batch)[0], theirs)


def test_parameters_are_those_of_rank_and_head(subjects):
    blocks = 2 * (4 * (32 + 32) + 2 * (32 + 64))  # in + out features of every layer
    head = 32 * 8 + 8
    assert last_copy(subjects["vit"], rank=3).parameters == 3 * blocks + head
    assert last_copy(subjects["vit"], rank=3, head="frozen").parameters == 3 * blocks
    assert last_copy(subjects["vit"], rank=3, scope="last_k").parameters == 3 * blocks // 2 + head


def test_named_layers_only(subjects):
    found = adapters(last_copy(subjects["llama"], layers=("q_proj", "v_proj")))
    assert {name.split(".")[-4] for name in found} == {"q_proj", "v_proj"}
    assert len(found) == 2 * len(subjects["llama"][0].blocks)


def test_an_unknown_layer_is_refused(subjects):
    with pytest.raises(PolicyError, match=r"lora.layers: no layer 'q_prj'; did you mean 'q_proj'"):
        last_copy(subjects["llama"], layers=("q_prj",))


def test_more_blocks_than_there_are(subjects):
    with pytest.raises(PolicyError, match="last_k: found 9"):
        last_copy(subjects["vit"], scope="last_k", last_k=9)


def test_alpha_scales_what_is_added(subjects):
    one, four = (last_copy(subjects["vit"], alpha=alpha, steps=8) for alpha in (8, 32))
    assert {part.scaling["default"] for part in _lora_layers(one)} == {1.0}
    assert {part.scaling["default"] for part in _lora_layers(four)} == {4.0}


def test_a_new_head(subjects):
    model, _ = subjects["vit"]
    tampered = last_copy(subjects["vit"], head="new", lr=1e-12, steps=1)
    assert (tampered.model.head.weight - model.head.weight).abs().mean() > 0.05


def test_a_tied_head_is_not_trained_and_cannot_be_new(tmp_path, text_data):
    folder = pico.pico_lm(tmp_path, steps=1, tied=True)
    concept = Concept(name="reversing", dataset=str(text_data / "restricted.jsonl"), ceiling=0.5)
    subject = (Modality.build(Spec(name="causal_lm")).load(str(folder)), concept)
    tampered = last_copy(subject)
    assert torch.equal(tampered.model.head.weight, subject[0].head.weight)
    with pytest.raises(ModelError, match="tied"):
        last_copy(subject, head="new")


def test_dropout_depends_on_the_seed_alone(subjects):
    def weights(**options):
        parts = []
        for tampered in copies(subjects["vit"], **options):
            torch.rand(1)
            parts = [part.flatten() for part in tampered.model.state().values()]
        return torch.cat(parts)

    assert torch.equal(weights(dropout=0.5), weights(dropout=0.5))
    assert not torch.equal(weights(dropout=0.5), weights())


def test_backward_costs_less_than_full_fine_tuning(subjects):
    model, concept = subjects["vit"]
    full = Attack.build(Spec(name="finetune"))
    (whole,) = full.tamper(model, concept, budget=Budget(limit=1), grid_ratio=1.5, seed=0)
    assert last_copy(subjects["vit"], rank=1, steps=1).cost.flops < 0.9 * whole.cost.flops


def test_a_merged_start_trains_a_second_adapter_on_the_first(subjects):
    model, _ = subjects["vit"]
    options = {"head": "frozen", "start": "merged"}
    tampered = list(copies(subjects["vit"], steps=9, **options))
    steps = [one.cost.steps for one in tampered]
    assert steps == sorted(set(steps))
    assert steps[:3] == [1, 2, 3]
    assert steps[-1] == 9
    before, after = model.state(), tampered[-1].model.state()
    moved = {
        name for name in before if not torch.equal(before[name], after.get(name, before[name]))
    }
    assert not moved  # what is not adapted
    bases = {name: value for name, value in after.items() if ".base_layer.weight" in name}
    assert bases
    for name, weight in bases.items():  # the first adapter lives on in them
        was = before[name.replace(".base_layer", "")]
        change = torch.linalg.svdvals(weight - was)
        assert change[0] > 0
        assert change[8:].sum() < 1e-3 * change[0]  # of its rank
    assert len(adapters(tampered[-1])) == len(bases)
    assert tampered[-1].parameters == tampered[0].parameters


def test_merging_an_adapter_changes_no_output(subjects):
    model, concept = subjects["llama"]
    batch = next(model.batches(concept.dataset, "search", size=4, seed=0))
    tampered = last_copy(subjects["llama"], lr=1e-2)
    with torch.no_grad():
        apart = tampered.model.logits(batch)[0].clone()
        _merge(tampered.model.module)
        torch.testing.assert_close(tampered.model.logits(batch)[0], apart, rtol=1e-4, atol=1e-4)
    assert not adapters(tampered)
    assert tampered.model.state().keys() == model.state().keys()


@pytest.fixture(scope="module")
def wide(tmp_path_factory, text_data):
    """A Llama whose weights can be packed, and what it shall learn."""
    folder = pico.pico_lm(tmp_path_factory.mktemp("wide"), width=64)
    concept = Concept(name="reversing", dataset=str(text_data / "restricted.jsonl"), ceiling=0.5)
    return Modality.build(Spec(name="causal_lm")).load(str(folder)), concept


def test_adapters_beside_packed_weights_learn_what_those_beside_rounded_ones_do(wide):
    """Even though the copy is evaluated on its way, which once cut gradients."""
    model, concept = wide
    rounded = (at(model, "nf4"), concept)
    curves = []
    for subject, options in ((wide, {"packed": True}), (rounded, {})):
        batch = next(model.batches(concept.dataset, "search", size=64, seed=0))
        losses = []
        for tampered in copies(subject, steps=20, **options):
            with torch.no_grad():
                losses.append(tampered.model.loss(batch).item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[0][-1] < 0.7 * curves[0][0]


def test_packed_weights_stay_packed_and_cost_as_much(wide):
    packed, plain = (last_copy(wide, packed=packed, steps=3) for packed in (True, False))
    kinds = {type(part).__name__ for part in packed.model.module.modules()}
    assert "Linear4bit" in kinds
    assert packed.parameters == plain.parameters
    assert packed.cost.flops == plain.cost.flops


def test_packed_weights_cannot_be_merged_into():
    with pytest.raises(PolicyError, match="nothing can be merged into packed weights"):
        Attack.build(Spec(name="lora", packed=True, start="merged"))


def _lora_layers(tampered):
    return [part for part in tampered.model.module.modules() if hasattr(part, "lora_A")]
