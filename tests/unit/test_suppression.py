"""The laws of the suppression losses, at the logits and on models."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from release_guard.modalities import ModelHandle, Painter
from release_guard.policy import Concept
from release_guard.suppression import (
    dos,
    ice,
    ice_released,
    klu,
    probe_explains,
    probes_explain,
    suppression,
)

LABEL = torch.tensor([0])
WRONG = [0.0, 8.0] + [0.0] * 8  # ten classes, sure of another one than the label


def gradient(loss: Callable[[Tensor], Tensor], logits: list[float]) -> Tensor:
    logits_1C = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(logits_1C), logits_1C)
    return found[0]


def sure(true_logit: float) -> list[float]:
    return [true_logit] + [0.0] * 9


def test_ice_is_the_inverse_cross_entropy() -> None:
    logits_NC = torch.randn(64, 5, dtype=torch.float64)
    labels_N = torch.randint(0, 5, (64,))
    p_N = logits_NC.softmax(dim=1).gather(1, labels_N[:, None])[:, 0]
    torch.testing.assert_close(ice(logits_NC, labels_N), -(1 - p_N).log().mean())


def test_ice_stays_finite_where_its_literal_form_is_not() -> None:
    logits_NC = torch.tensor([[200.0, 0.0, 0.0]])
    assert float(ice(logits_NC, LABEL)) == pytest.approx(200 - math.log(2))


def test_the_released_ice_is_the_cross_entropy_of_1_minus_logits() -> None:
    logits_NC = torch.randn(64, 5, dtype=torch.float64)
    labels_N = torch.randint(0, 5, (64,))
    theirs = nn.functional.cross_entropy(1 - logits_NC, labels_N)
    torch.testing.assert_close(ice_released(logits_NC, labels_N), theirs)


@pytest.mark.parametrize(
    ("logits", "of_ice", "of_released", "of_klu"),
    [
        (sure(8.0), 1.051, 1.054, 0.946),
        (sure(0.0), 0.105, 0.949, 0.000),
        (sure(-8.0), 0.000, 0.003, 0.105),
        (WRONG, 0.001, 0.943, 0.946),
    ],
)
def test_gradient_norms(
    logits: list[float], of_ice: float, of_released: float, of_klu: float
) -> None:
    norms = [
        float(gradient(loss, logits).norm())
        for loss in (lambda z: ice(z, LABEL), lambda z: ice_released(z, LABEL), klu)
    ]
    assert norms == pytest.approx([of_ice, of_released, of_klu], abs=2e-3)


@pytest.mark.parametrize("true_logit", [3.0, 0.0, -3.0])
def test_gradients_at_the_logits(true_logit: float) -> None:
    logits_C = torch.tensor([true_logit, 1.0, -0.5, 0.25], dtype=torch.float64)
    p_C, q_C = logits_C.softmax(dim=0), (-logits_C).softmax(dim=0)
    label_C = nn.functional.one_hot(LABEL[0], 4)
    of_ice_C = torch.where(label_C == 1, p_C, -p_C * p_C[0] / (1 - p_C[0]))
    found = gradient(lambda z: ice(z, LABEL), logits_C.tolist())
    torch.testing.assert_close(found, of_ice_C)
    found = gradient(lambda z: ice_released(z, LABEL), logits_C.tolist())
    torch.testing.assert_close(found, label_C - q_C)
    torch.testing.assert_close(gradient(klu, logits_C.tolist()), p_C - 1 / 4)


def test_klu_is_zero_exactly_where_all_is_uniform() -> None:
    assert float(klu(torch.full((3, 7), 4.0))) == pytest.approx(0, abs=1e-6)
    assert float(klu(torch.randn(64, 7))) > 0


def test_dos_is_the_squared_norm_of_what_is_predicted() -> None:
    predicted = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = dos(predicted)
    norms_N = torch.stack([one.norm() for one in predicted])
    torch.testing.assert_close(loss, norms_N.square().mean())
    loss.backward()
    torch.testing.assert_close(predicted.grad, 2 * predicted.detach() / 3)
    assert float(dos(torch.zeros(2, 1, 4, 4))) == 0


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


def test_on_a_classifier_the_losses_are_weighted_and_added(
    classifier: ModelHandle, image_data: Path
) -> None:
    batch = next(
        classifier.batches(str(image_data / "restricted.parquet"), "immunize", size=24, seed=0)
    )
    logits_NC, labels_N = classifier.logits(batch)
    features_NF, _ = classifier.features(batch)
    found, rows = suppression(classifier, batch, {"ice": 2.0, "klu": 0.5, "probe": 3.0})
    explained = probe_explains(features_NF, labels_N, num_classes=8)
    wanted = 2 * ice(logits_NC, labels_N) + 0.5 * klu(logits_NC) + 3 * explained
    torch.testing.assert_close(found, wanted)
    assert rows == 24
    released, _ = suppression(classifier, batch, {"ice_released": 1.0})
    torch.testing.assert_close(released, ice_released(logits_NC, labels_N))


def test_probes_read_every_block_and_the_last_features(
    classifier: ModelHandle, image_data: Path
) -> None:
    batch = next(
        classifier.batches(str(image_data / "restricted.parquet"), "immunize", size=24, seed=0)
    )
    features_NF, labels_N = classifier.features(batch)
    hidden = classifier.module(pixel_values=batch["pixels"], output_hidden_states=True)
    blocks = [states.mean(dim=1) for states in hidden.hidden_states[1:]]
    assert len(blocks) == len(classifier.blocks) > 1
    wanted = [probe_explains(one, labels_N, num_classes=8) for one in [*blocks, features_NF]]
    hooks = [dict(block._forward_hooks) for block in classifier.blocks]
    torch.testing.assert_close(probes_explain(classifier, batch), torch.stack(wanted).mean())
    assert hooks == [dict(block._forward_hooks) for block in classifier.blocks]


def test_on_a_painter_it_is_what_its_unet_predicts(painter: Painter, standing: Concept) -> None:
    batch = next(painter.batches(standing.dataset, "immunize", size=6, seed=0))
    found, rows = suppression(painter, batch, {"dos": 2.0})
    torch.testing.assert_close(found, 2 * dos(painter.predicted(batch)))
    assert rows == 6
