"""Losses that are small where a model is of no use for a task, whoever has trained it how far.

Shapes: N examples (or scored tokens), C classes or vocabulary entries, F features.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from release_guard.modalities import Batch, ModelHandle, Painter

_PROBE_RIDGE = 0.1  # relative to the mean variance of the features


def ice(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Inverse cross-entropy -log(1 - p_label), mean; finite at any margin.

    Source: arXiv 2404.12699; as logsumexp(z) - logsumexp(z without the label), since the literal
    form is infinite in fp32 from a margin near 20. Its gradient vanishes as p_label -> 0.
    """
    others_NC = logits_NC.scatter(1, labels_N[:, None], float("-inf"))
    return (logits_NC.logsumexp(dim=1) - others_NC.logsumexp(dim=1)).mean()


def ice_released(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy of the negated logits: what the authors' code minimises for `ice`.

    With q = softmax(-z) its gradient at the logits is 1 - q_label at the label and -q_i elsewhere,
    so it goes on until the label's logit is by far the lowest.
    """
    return nn.functional.cross_entropy(-logits_NC, labels_N)


def klu(logits_NC: Tensor) -> Tensor:
    """KL(uniform || p), mean: zero iff every prediction is uniform.

    Source: arXiv 2404.12699. Gradient at the logits: p_i - 1/C.
    """
    num_classes = logits_NC.shape[1]
    log_p_NC: Tensor = logits_NC.log_softmax(dim=1)
    return -(log_p_NC.mean(dim=1) + math.log(num_classes)).mean()


def dos(predicted: Tensor) -> Tensor:
    """Squared norm of what a denoiser predicts, mean over the examples: zero iff it says nothing.

    Source: arXiv 2404.12699, denial of service.

    Args:
        predicted: Noise or velocity, (N, channels, height, width).
    """
    return predicted.square().flatten(start_dim=1).sum(dim=1).mean()


def probe_explains(features_NF: Tensor, labels_N: Tensor, *, num_classes: int) -> Tensor:
    """Share in [0, 1) of the labels' variance that a ridge probe on the features explains.

    The closed-form linear-probe attacker, differentiable in the features; invariant to their scale
    and rotation. With one label only there is nothing to explain: zero.
    """
    centred_NF = features_NF - features_NF.mean(dim=0)
    labels_NC = nn.functional.one_hot(labels_N, num_classes).to(features_NF.dtype)
    labels_NC = labels_NC - labels_NC.mean(dim=0)
    total = labels_NC.square().sum()
    if total == 0:
        return (features_NF * 0).sum()
    gram_FF = centred_NF.T @ centred_NF
    ridge = _PROBE_RIDGE * gram_FF.diagonal().mean() + torch.finfo(gram_FF.dtype).tiny
    cross_FC = centred_NF.T @ labels_NC
    identity_FF = torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    solved_FC: Tensor = torch.linalg.solve(gram_FF + ridge * identity_FF, cross_FC)
    return (cross_FC * solved_FC).sum() / total


def probes_explain(model: ModelHandle, batch: Batch) -> Tensor:
    """What `probe_explains` says, mean over the outputs of all blocks and the head's input.

    Outputs are averaged over places (pixels or tokens) first.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        seen.append(out.mean(dim=(2, 3)) if out.ndim == 4 else out.mean(dim=1))  # noqa: PLR2004

    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.register_forward_hook(keep))
        features_NF, labels_N = model.features(batch)
    num_classes = model.head.out_features
    read = [probe_explains(one, labels_N, num_classes=num_classes) for one in [*seen, features_NF]]
    return torch.stack(read).mean()


def suppression(
    model: ModelHandle, batch: Batch, weights: Mapping[str, float]
) -> tuple[Tensor, int]:
    """The weighted sum of these losses on a batch, and the number of rows it is a mean over.

    Args:
        model: As it is; one that paints knows `dos` alone, the others all but `dos`.
        batch: Of a restricted data set.
        weights: By the name of the loss; one at least.
    """
    if isinstance(model, Painter):
        predicted = model.predicted(batch)
        return weights["dos"] * dos(predicted), len(predicted)
    features_NF, labels_N = model.features(batch)
    logits_NC = model.head(features_NF)
    losses = [
        weight * _classified(name, logits_NC, features_NF, labels_N)
        for name, weight in weights.items()
    ]
    return torch.stack(losses).sum(), len(labels_N)


def _classified(name: str, logits_NC: Tensor, features_NF: Tensor, labels_N: Tensor) -> Tensor:
    match name:
        case "ice":
            return ice(logits_NC, labels_N)
        case "ice_released":
            return ice_released(logits_NC, labels_N)
        case "klu":
            return klu(logits_NC)
        case _:
            return probe_explains(features_NF, labels_N, num_classes=logits_NC.shape[1])
