"""Weight noise: the adversary shakes the weights and sees what falls out."""

from typing import Annotated

import torch
from pydantic import Field

from release_guard.attacks import Choice, Transform
from release_guard.modalities import ModelHandle
from release_guard.policy import Target


class WeightNoise(Transform):
    """Adds Gaussian noise to every weight.

    Noise costs a model some of what it can do. Where a capability is hidden by a few precise
    weights instead, the hiding fails first, and the score rises.
    """

    paper = "https://arxiv.org/abs/2412.01784"

    deviation: Annotated[float, Field(gt=0), Choice((0.005, 0.01, 0.02, 0.04, 0.08))] = 0.02
    """Standard deviation of the noise on a tensor, as a share of the tensor's root mean square."""

    def transform(
        self, model: ModelHandle, target: Target, *, seed: int, ancestor: ModelHandle | None
    ) -> ModelHandle:
        del target, ancestor
        changed = model.copy()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in changed.module.parameters():
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(noise * (self.deviation * weight.square().mean().sqrt()))
        return changed
