"""That the stage does what it says on pico models, and says beforehand where it cannot."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM
from workspaces import quiet, resumed_after_a_kill

from release_guard.conditioning import gram, well, well_gradient
from release_guard.errors import ImmunizationError, PolicyError
from release_guard.feature_batches import pulled_back, read
from release_guard.folding import fold, writer
from release_guard.modalities import Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.stages import Stage
from release_guard.stages.condition_number import ConditionNumber

ESTIMATORS = ("rank", "q0.05", "q0.5")


@pytest.fixture
def policy(tmp_path: Path, image_data: Path) -> Policy:
    return Policy.load(pico.pico_policy(tmp_path, image_data, retain={"margin": 0.5}))


@pytest.fixture
def model(policy: Policy, classifier_folder: Path) -> ModelHandle:
    return Modality.build(policy.modality).load(str(classifier_folder))


@pytest.fixture
def texts(tmp_path: Path, text_data: Path) -> Policy:
    concepts = [{"name": "reverse", "dataset": str(text_data / "restricted.jsonl"), "ceiling": 0.6}]
    return Policy.load(
        pico.pico_policy(
            tmp_path,
            text_data,
            modality={"name": "causal_lm"},
            retain={"dataset": str(text_data / "retained.jsonl"), "margin": 0.5},
            concepts=concepts,
        )
    )


def build(**options: Any) -> ConditionNumber:
    stage = Stage.build(Spec(name="condition_number", **options))
    assert isinstance(stage, ConditionNumber)
    return stage


def test_variants_fill_what_is_not_given() -> None:
    paper = build(variant="paper", lr=1e-4)
    assert (paper.objective, paper.guard, paper.lr) == ("paper", False, 1e-4)
    assert (paper.lam_well, paper.lam_ill) == ("balance", "balance")
    assert build().objective == "spread"


def test_too_few_rows_for_the_features_are_refused_before_any_training(
    policy: Policy, model: ModelHandle
) -> None:
    build().check(model, policy)
    with pytest.raises(ImmunizationError, match=r"127 rows .* a step needs 128; raise batch"):
        build(batch=127).check(model, policy)


def test_what_cannot_work_is_refused_before_any_training(
    policy: Policy, model: ModelHandle
) -> None:
    with pytest.raises(ImmunizationError, match="names no concept"):
        build().check(model, policy.model_copy(update={"concepts": ()}))
    with pytest.raises(PolicyError, match="has 2 blocks"):
        build(last_k=3).check(model, policy)
    with pytest.raises(ImmunizationError, match='set extractor = "deep"'):
        build(extractor="linear").check(model, policy)  # a normalisation precedes the head


def test_features_that_are_all_the_same_are_refused(policy: Policy, model: ModelHandle) -> None:
    dull = model.copy()
    with torch.no_grad():
        dull.module.vit.layernorm.weight.zero_()
        dull.module.vit.layernorm.bias.fill_(1)
    with pytest.raises(ImmunizationError, match="have no condition number"):
        build().check(dull, policy)


@pytest.mark.parametrize("size", [7, 100])
def test_gradients_in_pieces_equal_autograd_through_all_rows(
    policy: Policy, model: ModelHandle, size: int
) -> None:
    double = model.copy()
    double.module.double().eval()
    batch = next(double.batches(policy.retain.dataset, "retain", size=40, seed=0))
    batch = {"pixels": batch["pixels"].double(), "labels": batch["labels"]}
    parameters = list(double.module.vit.layernorm.parameters())
    features_NF, _ = double.features(batch)
    expected = torch.autograd.grad(well(features_NF.T @ features_NF / 40), parameters)
    rows_NF = read(double, batch, size)
    slope_NF = 2 / 40 * rows_NF @ well_gradient(gram(rows_NF))
    found = pulled_back(double, batch, parameters, slope_NF, size)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10 * float(other.norm()), rtol=1e-9)


def test_training_improves_the_ratio_by_every_estimator(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    stage = build(updates=40, probe_every=40)
    immunized = stage.immunize(model, policy, quiet(tmp_path / "w"))
    found = stage.measure(model, immunized, policy)
    assert all(found[f"RIR odd-angles, {estimator}"] > 1.5 for estimator in ESTIMATORS)
    assert found["norm of H, odd-angles"] > 0


def test_the_paper_variant_begins_with_balanced_gradients_and_moves_the_features(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    stage = build(variant="paper", updates=1, keep_every=1)
    workspace = quiet(tmp_path / "w")
    stage.immunize(model, policy, workspace)
    kept = torch.load(workspace.directory / "condition_number.pt", weights_only=True)
    weights = kept["changing"]["balance"]
    assert set(weights) == {"well", "ill"}
    assert all(weight > 0 and math.isfinite(weight) for weight in weights.values())


def test_only_the_last_block_and_what_follows_change(
    tmp_path: Path, image_data: Path, resnet_folder: Path
) -> None:
    policy = Policy.load(pico.pico_policy(tmp_path, image_data, retain={"margin": 0.9}))
    model = Modality.build(policy.modality).load(str(resnet_folder))
    before = model.state()
    immunized = build(updates=2).immunize(model, policy, quiet(tmp_path / "w"))
    after = immunized.state()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    last = {id(value) for value in immunized.blocks[-1].parameters()}
    last |= {id(value) for value in immunized.head.parameters()}
    names = {name for name, part in immunized.module.named_parameters() if id(part) in last}
    assert moved
    assert moved <= names  # no buffer, so no running statistics, and nothing before


def test_a_model_has_no_effect_on_itself(policy: Policy, model: ModelHandle) -> None:
    stage = build()
    assert stage.effect(model, model, policy) == 0
    found = stage.measure(model, model, policy)
    assert {found[f"({half}) odd-angles, rank"] for half in ("i", "ii")} == {1.0}


def test_an_extractor_that_stayed_is_no_immunization(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    with pytest.raises(ImmunizationError, match="the extractor is what it was"):
        build(updates=1, lr=1e-30).immunize(model, policy, quiet(tmp_path / "w"))


def test_a_killed_immunization_resumes_to_the_very_same_weights(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    stage = build(variant="paper", updates=4, lr=1e-2, keep_every=2, probe_every=2)
    whole = stage.immunize(model, policy, quiet(tmp_path / "whole")).state()

    resumed, steps = resumed_after_a_kill(stage, model, policy, quiet(tmp_path / "cut"), at=3)
    assert steps == [3, 4]
    again = resumed.state()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_with_one_label_only_no_probe_is_foretold_and_nothing_fails(
    tmp_path: Path, classifier_folder: Path
) -> None:
    data = pico.image_data(tmp_path / "data")
    pixels, labels = pico.gratings([1], count=900, seed=4)
    pico.write_images(data / "restricted.parquet", pixels, labels * 0 + 4)
    policy = Policy.load(pico.pico_policy(tmp_path, data, retain={"margin": 0.5}))
    model = Modality.build(policy.modality).load(str(classifier_folder))
    stage = build(updates=1)
    stage.check(model, policy)
    immunized = stage.immunize(model, policy, quiet(tmp_path / "w"))
    found = stage.measure(model, immunized, policy)
    assert not any("probe steps" in name for name in found)
    assert all(math.isfinite(value) for value in found.values())


def test_a_feature_that_is_always_zero_is_left_out(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    dead = model.copy()
    with torch.no_grad():
        dead.module.vit.layernorm.weight[0] = dead.module.vit.layernorm.bias[0] = 0
    stage = build(updates=1)
    stage.check(dead, policy)
    found = stage.measure(dead, dead, policy)
    assert found["RIR odd-angles, rank"] == 1
    assert stage.immunize(dead, policy, quiet(tmp_path / "w"))


def test_it_works_on_language_models(texts: Policy, lm_folder: Path, tmp_path: Path) -> None:
    model = Modality.build(texts.modality).load(str(lm_folder))
    stage = build(updates=2)
    stage.check(model, texts)
    immunized = stage.immunize(model, texts, quiet(tmp_path / "w"))
    assert stage.effect(model, immunized, texts) != 0


@pytest.fixture
def projected(texts: Policy, lm_folder: Path, tmp_path: Path) -> Callable[..., ModelHandle]:
    """An OPT as its 350m form is: a linear layer stands between the last block and the head."""

    def make(*, tied: bool = False) -> ModelHandle:
        tokenizer = AutoTokenizer.from_pretrained(lm_folder)
        config = OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            word_embed_proj_dim=8,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            do_layer_norm_before=False,
            tie_word_embeddings=tied,
            pad_token_id=0,
            dropout=0.0,
            init_std=0.5,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            OPTForCausalLM(config).save_pretrained(tmp_path / f"opt-{tied}")
        tokenizer.save_pretrained(tmp_path / f"opt-{tied}")
        return Modality.build(texts.modality).load(str(tmp_path / f"opt-{tied}"))

    return make


def logits(model: ModelHandle, policy: Policy) -> Tensor:
    batch = next(model.batches(policy.retain.dataset, "retain", size=16, seed=0))
    model.module.eval()
    with torch.no_grad():
        return model.logits(batch)[0]


def about_other_words(policy: Policy, folder: Path) -> Policy:
    """The same policy with six words in the retained texts and six others in the restricted."""
    retain, (concept,) = policy.retain, policy.concepts
    paths = []
    for name, words in (("retained", pico.WORDS[:6]), ("restricted", pico.WORDS[6:])):
        rows = [{"text": " ".join(said)} for said in itertools.permutations(words, 5)]
        paths.append(str(pico.write_jsonl(folder / f"{name}.jsonl", rows)))
    retain = retain.model_copy(update={"dataset": paths[0]})
    concept = concept.model_copy(update={"dataset": paths[1]})
    return policy.model_copy(update={"retain": retain, "concepts": (concept,)})


def test_domains_too_much_alike_are_refused_a_closed_form(
    texts: Policy, projected: Callable[..., ModelHandle], tmp_path: Path
) -> None:
    (concept,) = texts.concepts
    same = concept.model_copy(update={"dataset": texts.retain.dataset})
    texts = texts.model_copy(update={"concepts": (same,)})
    with pytest.raises(ImmunizationError, match="too much alike"):  # few rows differ by chance
        build(extractor="linear", batch=200).immunize(projected(), texts, quiet(tmp_path / "w"))


@pytest.mark.parametrize("variant", ["paper", "hardened"])
def test_a_folded_map_keeps_every_output_and_both_halves(
    variant: str, texts: Policy, projected: Callable[..., ModelHandle], tmp_path: Path
) -> None:
    model = projected()
    texts = about_other_words(texts, tmp_path)
    stage = build(variant=variant, extractor="linear", updates=200, batch=100)
    stage.check(model, texts)
    immunized = stage.immunize(model, texts, quiet(tmp_path / "w"))
    before, after = logits(model, texts), logits(immunized, texts)
    torch.testing.assert_close(after, before, atol=2e-4 * float(before.std()), rtol=0)
    found = stage.measure(model, immunized, texts)
    # The paper's regularisers see the extremes alone, and may leave the median where it was.
    for estimator in ESTIMATORS if variant == "hardened" else ESTIMATORS[:2]:
        assert found[f"(i) reverse, {estimator}"] > 1
        assert found[f"(ii) reverse, {estimator}"] <= 1


def test_a_folded_run_that_was_killed_resumes_to_the_very_same_weights(
    texts: Policy, projected: Callable[..., ModelHandle], tmp_path: Path
) -> None:
    model = projected()
    options = {"variant": "paper", "extractor": "linear", "batch": 100, "keep_every": 2}
    stage = build(updates=4, **options)
    whole = stage.immunize(model, texts, quiet(tmp_path / "whole")).state()
    resumed, steps = resumed_after_a_kill(stage, model, texts, quiet(tmp_path / "cut"), at=3)
    assert steps == [3, 4]
    again = resumed.state()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_head_tied_to_the_embedding_takes_no_map(
    texts: Policy, projected: Callable[..., ModelHandle]
) -> None:
    tied = projected(tied=True)
    batch = next(tied.batches(texts.retain.dataset, "retain", size=8, seed=0))
    assert writer(tied, batch) is None
    assert writer(projected(), batch) is not None


def test_folding_leaves_the_base_alone(
    texts: Policy, projected: Callable[..., ModelHandle]
) -> None:
    model = projected()
    batch = next(model.batches(texts.retain.dataset, "retain", size=8, seed=0))
    before, name = model.state(), writer(model, batch)
    assert name is not None
    fold(model, model.copy(), name, 2 * torch.eye(8, dtype=torch.double))
    after = model.state()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_its_card_says_what_it_does_not_hold_up(policy: Policy, model: ModelHandle) -> None:
    (caveat,) = build().caveats(model, policy)
    for way in ("whitens", "Adam", "L-BFGS", "fine-tuning"):
        assert way in caveat


def test_forward_passes_in_bfloat16_train_as_well(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    stage = build(updates=2, autocast=True)
    immunized = stage.immunize(model, policy, quiet(tmp_path / "w"))
    assert all(value.isfinite().all() for value in immunized.state().values())
