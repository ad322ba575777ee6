"""That SOPHON does what it says, line by line of the paper's step and on pico models."""

from dataclasses import replace
from pathlib import Path

import pico
import pytest
import torch
from torch import nn
from workspaces import quiet, resumed_after_a_kill

from release_guard.errors import ImmunizationError
from release_guard.evidence import Cost
from release_guard.immunization import divided
from release_guard.modalities import Modality, ModelHandle, Painter
from release_guard.plugins import Spec
from release_guard.policy import Concept, Policy
from release_guard.simulation import Attacker, Drawn
from release_guard.stages import Stage
from release_guard.stages.sophon import Sophon
from release_guard.suppression import ice, probes_explain, suppression

SMALL = {
    "outer_steps": 4,
    "attackers": 2,
    "batch": 16,
    "query": 16,
    "renew_share": 0.5,
    "ntr_steps": 1,
    "ntr_batch": 16,
    "tail_steps": 2,
    "probe_every": 2,
    "keep_every": 2,
}


PAPER = {
    "variant": "paper",
    "outer_steps": 2,
    "horizon": (3, 3),
    "advance": 3,
    "batch": 27,
    "query": 3,
    "ntr_batch": 20,
}


def language_policy(folder: Path, data: Path) -> Policy:
    concept = {"name": "reversing", "dataset": str(data / "restricted.jsonl"), "ceiling": 0.6}
    source = pico.pico_policy(
        folder,
        data,
        modality={"name": "causal_lm"},
        retain={"dataset": str(data / "retained.jsonl"), "margin": 0.9},
        concepts=[concept],
    )
    return Policy.load(source)


@pytest.fixture
def policy(tmp_path: Path, image_data: Path) -> Policy:
    return Policy.load(pico.pico_policy(tmp_path, image_data, retain={"margin": 0.5}))


@pytest.fixture
def model(policy: Policy, classifier_folder: Path) -> ModelHandle:
    return Modality.build(policy.modality).load(str(classifier_folder))


def test_variants_fill_what_is_not_given() -> None:
    paper = Stage.build(Spec(name="sophon", variant="paper", alpha=1e-5))
    assert isinstance(paper, Sophon)
    assert (paper.horizon, paper.advance, paper.ntr_steps, paper.alpha) == ((50, 50), 50, 1, 1e-5)
    hardened = Stage.build(Spec(name="sophon"))
    assert isinstance(hardened, Sophon)
    assert hardened.attackers > 1


def test_what_an_attacker_begins_anew_is_no_function_of_the_released_weights(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    anew = {"reinit_share": 1.0, "renew_share": 1.0, "horizon": (9, 9), "attackers": 1}
    options = {**SMALL, **anew, "ntr_steps": 0, "tail_steps": 0}
    immunized = Stage.build(Spec(name="sophon", **options)).immunize(
        model, policy, quiet(tmp_path / "w")
    )
    last, head = model.blocks[-1].state_dict(), model.head.state_dict()
    assert all(torch.equal(v, last[n]) for n, v in immunized.blocks[-1].state_dict().items())
    assert all(torch.equal(v, head[n]) for n, v in immunized.head.state_dict().items())
    before, after = model.state(), immunized.state()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_killed_immunization_resumes_to_the_very_same_weights(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    stage = Stage.build(Spec(name="sophon", **SMALL))
    whole = stage.immunize(model, policy, quiet(tmp_path / "whole")).state()

    resumed, steps = resumed_after_a_kill(stage, model, policy, quiet(tmp_path / "cut"), at=5)
    assert steps == [5, 6]
    again = resumed.state()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attackers_that_step_at_once_change_nothing(
    policy: Policy, model: ModelHandle, tmp_path: Path, dropout: float
) -> None:
    for part in model.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = dropout
    stage = Stage.build(Spec(name="sophon", **{**SMALL, "attackers": 3, "advance": 3}))
    found = []
    for workers in (1, 3):
        workspace = replace(quiet(tmp_path / str(workers)), workers=workers)
        found.append(stage.immunize(model, policy, workspace).state())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_checkpoint_of_other_options_is_not_resumed(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    workspace = quiet(tmp_path / "w")
    Stage.build(Spec(name="sophon", **SMALL)).immunize(model, policy, workspace)
    steps = []
    again = replace(workspace, progress=lambda done, steps_, line: steps.append(done))
    Stage.build(Spec(name="sophon", **{**SMALL, "alpha": 1e-4})).immunize(model, policy, again)
    assert steps[0] == 1


def test_a_ruined_retained_score_is_rolled_back_or_refused(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    strict = policy.model_copy(
        update={"retain": policy.retain.model_copy(update={"margin": 0.001})}
    )
    stage = Stage.build(Spec(name="sophon", **{**SMALL, "alpha": 0.3, "beta": 0.3}))
    with pytest.raises(ImmunizationError, match=r"retained score within retain\.margin"):
        stage.immunize(model, strict, quiet(tmp_path / "w"))


def test_attackers_that_ruin_themselves_do_not_ruin_the_model(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    stage = Stage.build(Spec(name="sophon", **{**SMALL, "adam_share": 0, "sgd_lr": (1e30, 1e30)}))
    immunized = stage.immunize(model, policy, quiet(tmp_path / "w"))
    assert all(value.isfinite().all() for value in immunized.state().values())


def test_immunizing_lowers_the_suppression_loss_an_attacker_meets(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    options = {**SMALL, "outer_steps": 60, "batch": 32, "query": 64, "probe_every": 80}
    stage = Stage.build(Spec(name="sophon", **{**options, "ntr_steps": 2, "tail_steps": 20}))
    immunized = stage.immunize(model, policy, quiet(tmp_path / "w"))
    assert met_by_attackers(immunized, policy) < met_by_attackers(model, policy) - 0.2


def met_by_attackers(model: ModelHandle, policy: Policy) -> float:
    """KL(uniform || p) on held-out examples after 16 steps with new heads; mean of four."""
    source, found = policy.concepts[0].dataset, []
    held_out = next(model.batches(source, "search", size=96, seed=0))
    for seed in range(4):
        drawn = Drawn(adam=True, lr=1e-3, new_head=True, life=16)
        attacker = Attacker.of(model, drawn, seed=seed)
        batches = model.batches(source, "attack", size=32, seed=seed)
        while not attacker.is_done:
            attacker.step(next(batches))
        found.append(suppression(attacker.model, held_out, {"klu": 1.0})[0].item())
    return sum(found) / len(found)


def test_a_probe_on_a_vocabulary_is_refused_where_it_was_asked_for(
    lm_folder: Path, text_data: Path, tmp_path: Path
) -> None:
    policy = language_policy(tmp_path, text_data)
    model = Modality.build(policy.modality).load(str(lm_folder))
    wide = nn.Linear(model.head.in_features, 1_001)
    model.module.set_output_embeddings(wide)
    Stage.build(Spec(name="sophon")).check(model, policy)
    with pytest.raises(ImmunizationError, match="set probe = 0"):
        Stage.build(Spec(name="sophon", probe=1.0)).check(model, policy)


def test_a_tied_head_stays_and_the_card_is_told(text_data: Path, tmp_path: Path) -> None:
    policy = language_policy(tmp_path, text_data)
    tied = pico.pico_lm(tmp_path / "tied", steps=1, tied=True)
    model = Modality.build(policy.modality).load(str(tied))
    stage = Stage.build(Spec(name="sophon", **{**SMALL, "reinit_share": 1.0}))
    (caveat,) = stage.caveats(model, policy)
    assert "tied to an embedding" in caveat
    immunized = stage.immunize(model, policy, quiet(tmp_path / "w"))
    assert not stage.effect(model, model, policy)
    assert immunized.head.weight is immunized.module.get_input_embeddings().weight


def test_a_step_of_the_paper_is_first_order_maml(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    options = {**PAPER, "ntr_steps": 0, "sgd_lr": (0.05, 0.05)}
    stage = Stage.build(Spec(name="sophon", **options))
    training = stage.training(model, policy, quiet(tmp_path))
    by_hand = model.copy()
    wanted = [torch.zeros_like(parameter) for parameter in by_hand.module.parameters()]
    fast = by_hand.copy()
    fast.reinit_head(seed=training.seed("head/0"))
    assert not torch.equal(fast.head.weight, by_hand.head.weight)
    parameters = list(fast.module.parameters())
    head = {id(parameter) for parameter in fast.head.parameters()}
    fast.module.train()
    for turn in range(3):
        seed = training.seed(f"restricted/{turn}")
        dataset = policy.concepts[0].dataset
        batch = next(fast.batches(dataset, "immunize", size=30, seed=seed))
        inner, query = divided(batch, 27)
        gradients = torch.autograd.grad(fast.loss(inner), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(0.05 * gradient)
        gradients = torch.autograd.grad(ice(*fast.logits(query)), parameters)
        for total, parameter, gradient in zip(wanted, parameters, gradients, strict=True):
            total.add_((id(parameter) not in head) * gradient / 3)
    released = list(by_hand.module.parameters())
    for parameter, gradient in zip(released, wanted, strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(released, 0.5)
    torch.optim.Adam(released, lr=3e-4, fused=True).step()
    training.advance()
    ours = training.theta.module.parameters()
    for one, other, gradient in zip(ours, released, wanted, strict=True):
        real = gradient.abs() > 1e-6  # Adam makes a full step of a rounding error
        torch.testing.assert_close(one[real], other[real])


def test_exactly_k_steps_and_as_many_outer_steps_as_asked_for_are_run_and_paid(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    paid: list[Cost] = []
    workspace = replace(quiet(tmp_path), spend=paid.append)
    Stage.build(Spec(name="sophon", **PAPER)).immunize(model, policy, workspace)
    (cost,) = paid
    assert cost.steps == 2
    assert cost.samples == 2 * (3 * 30 + 20)


def test_running_statistics_are_released_as_they_were(
    tmp_path: Path, image_data: Path, resnet_folder: Path
) -> None:
    policy = Policy.load(pico.pico_policy(tmp_path, image_data, retain={"margin": 0.9}))
    model = Modality.build(policy.modality).load(str(resnet_folder))
    before = model.state()
    for options in PAPER, SMALL:
        stage = Stage.build(Spec(name="sophon", **options))
        immunized = stage.immunize(model, policy, quiet(tmp_path / str(options["outer_steps"])))
        after = immunized.state()
        statistics = {name for name, _ in model.module.named_buffers()}
        assert statistics
        assert all(torch.equal(before[name], after[name]) for name in statistics)
        assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(before[name], value) for name, value in model.state().items())


def test_suppression_alone_lowers_the_loss_that_an_attacker_then_meets(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    options = {**PAPER, "outer_steps": 20, "ntr_steps": 0, "sgd_lr": (0.02, 0.02), "query": 27}
    training = Stage.build(Spec(name="sophon", **options)).training(model, policy, quiet(tmp_path))
    met = []
    for _ in range(20):
        met.append(training.advance()["suppression"])
        training.step += 1
    assert sum(met[-5:]) < sum(met[:5]) - 1e-3


def test_the_effect_is_nothing_on_the_base_and_grows_with_immunization(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    options = {**SMALL, "outer_steps": 50, "batch": 32, "query": 32, "probe_every": 50}
    stage = Stage.build(Spec(name="sophon", **options))
    immunized = stage.immunize(model, policy, quiet(tmp_path / "w"))
    before = [one.state() for one in (model, immunized)]
    assert stage.effect(model, model, policy) == 0
    assert stage.effect(model, immunized, policy) > 0.02
    for one, state in zip((model, immunized), before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in one.state().items())


def test_how_far_each_layer_moved_is_measured(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    moved = model.copy()
    with torch.no_grad():
        for parameter in moved.blocks[1].parameters():
            parameter.mul_(1.5)
        moved.head.weight *= 3
        moved.head.bias *= 3
    measures = Stage.build(Spec(name="sophon", **SMALL)).measure(model, moved, policy)
    found = {name: far for name, far in measures.items() if name.startswith("relative change")}
    assert found == {
        "relative change, block 0": 0,
        "relative change, block 1": 0.5,
        "relative change, head": 2,
        "relative change, the rest": 0,
    }


@pytest.mark.parametrize("variant", ["paper", "hardened"])
def test_a_language_model_is_brought_to_uniform_tokens(
    variant: str, lm_folder: Path, text_data: Path, tmp_path: Path
) -> None:
    policy = language_policy(tmp_path, text_data)
    model = Modality.build(policy.modality).load(str(lm_folder))
    options = {**SMALL, "variant": variant, "outer_steps": 20, "advance": 2, "alpha": 3e-3}
    stage = Stage.build(Spec(name="sophon", **options))
    assert isinstance(stage, Sophon)
    assert stage.weights(policy) == {"klu": 1.0}
    stage.check(model, policy)
    immunized = stage.immunize(model, policy, quiet(tmp_path / "w"))
    measures = stage.measure(model, immunized, policy)
    assert measures["klu on reversing, immunized"] < measures["klu on reversing, base"]


def test_a_painter_is_brought_to_predict_less_and_keeps_its_autoencoder(
    painter: Painter, standing: Concept, picture_data: Path, tmp_path: Path
) -> None:
    source = pico.pico_policy(
        tmp_path,
        picture_data,
        modality={"name": "text_to_image", "sampling_steps": 4},
        retain={"margin": 0.9},
    )
    policy = Policy.load(source).model_copy(update={"concepts": (standing,)})
    options = {**SMALL, "variant": "paper", "outer_steps": 12, "advance": 2, "alpha": 3e-3}
    stage = Stage.build(Spec(name="sophon", **options))
    assert isinstance(stage, Sophon)
    assert stage.weights(policy) == {"dos": 1.0}
    assert stage.caveats(painter, policy) == ()
    immunized = stage.immunize(painter, policy, quiet(tmp_path / "w"))
    before, after = painter.state(), immunized.state()
    fixed = [name for name in before if name.startswith("vae.")]
    assert all(torch.equal(before[name], after[name]) for name in fixed)
    measures = stage.measure(painter, immunized, policy)
    assert measures["dos on standing-bars, immunized"] < measures["dos on standing-bars, base"]
    assert stage.effect(painter, immunized, policy) > 0


def test_holding_keeps_features_from_being_repaired(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    """Without suppression: reinforcement alone, with and without what probes may read."""
    options = {**SMALL, "outer_steps": 1, "alpha": 1e-9, "tail_steps": 40, "batch": 64}
    batch = next(model.batches(policy.concepts[0].dataset, "immunize", size=128, seed=9))
    read = []
    for hold in (0.0, 3.0):
        stage = Stage.build(Spec(name="sophon", **options, hold=hold))
        immunized = stage.immunize(model, policy, quiet(tmp_path / str(hold)))
        read.append(probes_explain(immunized, batch).item())
    assert read[1] < read[0] - 0.02


def test_holding_is_refused_where_there_are_no_images_to_class(
    lm_folder: Path, text_data: Path, tmp_path: Path
) -> None:
    policy = language_policy(tmp_path, text_data)
    model = Modality.build(policy.modality).load(str(lm_folder))
    with pytest.raises(ImmunizationError, match="`hold` reads classes"):
        Stage.build(Spec(name="sophon", hold=1.0)).check(model, policy)


@pytest.mark.parametrize("loss", ["ice", "ice_released", "klu", "probe"])
def test_losses_that_need_classes_are_refused_for_a_painter(
    painter: Painter, picture_data: Path, tmp_path: Path, loss: str
) -> None:
    modality = {"name": "text_to_image"}
    policy = Policy.load(pico.pico_policy(tmp_path, picture_data, modality=modality))
    with pytest.raises(ImmunizationError, match=f"`{loss}` is no loss of text_to_image models"):
        Stage.build(Spec(name="sophon", **{loss: 1.0})).check(painter, policy)


def test_dos_is_refused_for_a_classifier(policy: Policy, model: ModelHandle) -> None:
    with pytest.raises(ImmunizationError, match="`dos` is no loss of image_classification models"):
        Stage.build(Spec(name="sophon", dos=1.0)).check(model, policy)
