"""The laws of the suppression losses, and that the stage does what it says on pico models."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pico
import pytest
import torch
from torch import Tensor, nn
from workspaces import quiet

from release_guard.errors import ImmunizationError
from release_guard.modalities import Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.stages import Stage
from release_guard.stages.sophon import Sophon
from release_guard.suppression import ice, klu, probe_explains

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


@pytest.fixture
def policy(tmp_path: Path, image_data: Path) -> Policy:
    return Policy.load(pico.pico_policy(tmp_path, image_data, retain={"margin": 0.5}))


@pytest.fixture
def model(policy: Policy, classifier_folder: Path) -> ModelHandle:
    return Modality.build(policy.modality).load(str(classifier_folder))


def gradient(loss: Callable[[Tensor], Tensor], logits: list[float]) -> Tensor:
    logits_1C = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(logits_1C), logits_1C)
    return found[0]


LABEL = torch.tensor([0])


def test_ice_is_the_inverse_cross_entropy() -> None:
    logits_NC = torch.randn(64, 5, dtype=torch.float64)
    labels_N = torch.randint(0, 5, (64,))
    p_N = logits_NC.softmax(dim=1).gather(1, labels_N[:, None])[:, 0]
    torch.testing.assert_close(ice(logits_NC, labels_N), -(1 - p_N).log().mean())


def test_ice_stays_finite_where_its_literal_form_is_not() -> None:
    logits_NC = torch.tensor([[200.0, 0.0, 0.0]])
    assert float(ice(logits_NC, LABEL)) == pytest.approx(200 - math.log(2))


@pytest.mark.parametrize(("true_logit", "norm"), [(8.0, 1.051), (0.0, 0.105), (-8.0, 0.000)])
def test_gradient_of_ice(true_logit: float, norm: float) -> None:
    found = gradient(lambda z: ice(z, LABEL), [true_logit] + [0.0] * 9)
    assert float(found.norm()) == pytest.approx(norm, abs=2e-3)
    p = torch.tensor([true_logit] + [0.0] * 9).softmax(dim=0).double()
    torch.testing.assert_close(float(found[0]), float(p[0]), atol=1e-6, rtol=0)


def test_klu_is_zero_exactly_at_uniform_and_its_gradient_is_p_minus_uniform() -> None:
    assert float(klu(torch.full((3, 7), 4.0))) == pytest.approx(0, abs=1e-6)
    assert float(klu(torch.randn(64, 7))) > 0
    logits = [2.0, -1.0, 0.5, 0.0]
    expected = torch.tensor(logits, dtype=torch.float64).softmax(dim=0) - 0.25
    torch.testing.assert_close(gradient(klu, logits), expected)


def test_klu_is_not_satisfied_by_a_confident_wrong_answer_but_ice_is() -> None:
    wrong = [0.0, 8.0] + [0.0] * 8
    assert float(gradient(lambda z: ice(z, LABEL), wrong).norm()) < 2e-3
    assert float(gradient(klu, wrong).norm()) == pytest.approx(0.946, abs=2e-3)


def test_a_probe_explains_what_features_tell_and_nothing_else() -> None:
    torch.manual_seed(0)
    labels_N = torch.randint(0, 3, (600,))
    telling_NF = nn.functional.one_hot(labels_N, 3).double() + 0.01 * torch.randn(600, 3)
    silent_NF = torch.randn(600, 3, dtype=torch.float64)
    explains = probe_explains(telling_NF, labels_N, num_classes=3)
    assert float(explains) > 0.8
    assert float(probe_explains(silent_NF, labels_N, num_classes=3)) < 0.05
    rotation_FF, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    moved = probe_explains(7 * telling_NF @ rotation_FF + 3, labels_N, num_classes=3)
    torch.testing.assert_close(moved, explains)


def test_a_probe_has_nothing_to_explain_with_one_label() -> None:
    features_NF = torch.randn(8, 4, requires_grad=True)
    loss = probe_explains(features_NF, torch.zeros(8, dtype=torch.long), num_classes=3)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(features_NF.grad, torch.zeros(8, 4))


def test_probe_gradient_equals_finite_differences() -> None:
    torch.manual_seed(0)
    features_NF = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    labels_N = torch.arange(12) % 3
    assert torch.autograd.gradcheck(
        lambda features: probe_explains(features, labels_N, num_classes=3), (features_NF,)
    )


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

    class Killed(Exception):  # noqa: N818
        pass

    def kill(done: int, steps: int, line: str) -> None:
        if done == 5:
            raise Killed

    workspace = quiet(tmp_path / "cut")
    with pytest.raises(Killed):
        stage.immunize(model, policy, replace(workspace, progress=kill))
    steps = []
    workspace = replace(workspace, progress=lambda done, steps_, line: steps.append(done))
    resumed = stage.immunize(model, policy, workspace).state()
    assert steps == [5, 6]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


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
    options = {**SMALL, "outer_steps": 60, "batch": 32, "query": 64, "probe_every": 60}
    stage = Stage.build(Spec(name="sophon", **options))
    immunized = stage.immunize(model, policy, quiet(tmp_path / "w"))
    measures = stage.measure(model, immunized, policy)
    name = "klu on odd-angles"
    assert measures[f"{name}, immunized"] < measures[f"{name}, base"]


def test_a_probe_on_a_vocabulary_is_refused_before_any_training(
    policy: Policy, lm_folder: Path, text_data: Path, tmp_path: Path
) -> None:
    source = pico.pico_policy(tmp_path, text_data, modality={"name": "causal_lm"})
    model = Modality.build(Policy.load(source).modality).load(str(lm_folder))
    wide = nn.Linear(model.head.in_features, 1_001)
    model.module.set_output_embeddings(wide)
    with pytest.raises(ImmunizationError, match="set probe = 0"):
        Stage.build(Spec(name="sophon")).check(model, policy)
