"""Features of many rows, a few examples in memory at once: read, and what pulls at them passed on.

A Gram matrix is of all rows, so a loss of it needs them together; its gradient in each row is known
once they were read. They then go forward again, a piece at a time, and take their share back.

Shapes: N rows, F features.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from release_guard.modalities import Batch, ModelHandle, evaluating


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in parts of at most so many examples."""
    examples = len(next(iter(batch.values())))
    for start in range(0, examples, size):
        yield {name: value[start : start + size] for name, value in batch.items()}


def read(model: ModelHandle, batch: Batch, size: int) -> Tensor:
    """Features (N, F) in evaluation mode and without gradients."""
    with evaluating(model.module):
        return torch.cat([model.features(part)[0] for part in pieces(batch, size)])


def pulled_back(
    model: ModelHandle, batch: Batch, parameters: Sequence[Tensor], slope_NF: Tensor, size: int
) -> list[Tensor]:
    """Gradient in the parameters of a loss whose gradient in the features is known.

    Args:
        model: In the mode in which the features were read.
        batch: The examples.
        parameters: Those wanted.
        slope_NF: Gradient of the loss in each row of features.
        size: Examples at once.
    """
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for part in pieces(batch, size):
        features_NF, _ = model.features(part)
        here_NF, slope_NF = slope_NF[: len(features_NF)], slope_NF[len(features_NF) :]
        found = gradients(features_NF, parameters, here_NF.to(features_NF))
        torch._foreach_add_(total, found)
    return total


def gradients(
    output: Tensor, parameters: Sequence[Tensor], slope: Tensor | None = None
) -> list[Tensor]:
    """Gradients of an output, zero for what it does not depend on."""
    found = torch.autograd.grad(
        output, parameters, slope, allow_unused=True, materialize_grads=True
    )
    return list(found)
