"""The two levels of concept suppression: what a student learns from its teacher, and what not.

Shapes: N pictures.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from release_guard.modalities import Batch, Painter


@dataclass(frozen=True, eq=False)
class Levels:
    """Both losses, beside one teacher.

    Attributes:
        teacher: In evaluation mode, without gradients.
        kd_weights: Of the distance to its output, and of that to its blocks' outputs.
        snr_gamma: Largest signal-to-noise ratio that counts in the denoising loss.
        eta: How far beyond no prompt at all, away from the concept, the target lies.
        anchor: Prompt towards whose prediction the target lies, instead of away from the concept.
        reach: How far, in distances from no prompt at all to that prediction: 1 is there.
    """

    teacher: Painter
    kd_weights: tuple[float, float]
    snr_gamma: float
    eta: float
    anchor: str | None
    reach: float = 1.0

    def lower(self, student: Painter, batch: Batch) -> Tensor:
        """L_ft = L_diff + a L_out + b L_feat on retained pictures (arXiv 2412.15341, section 3).

        L_diff is weighted by min-SNR, L_feat the mean over the down, mid and up blocks.
        """
        with block_outputs(student.unet) as mine:
            found = student.predicted(batch)
        with torch.no_grad(), block_outputs(self.teacher.unet) as theirs:
            taught = self.teacher.predicted(batch)
        weights_N = student.min_snr(batch, gamma=self.snr_gamma)
        errors_N = (found - student.wanted(batch)).square().flatten(1).mean(dim=1)
        output, features = self.kd_weights
        apart = [mean_square(one - other) for one, other in zip(mine, theirs, strict=True)]
        return (
            (weights_N * errors_N).mean()
            + output * mean_square(found - taught)
            + features * torch.stack(apart).mean()
        )

    def target(self, batch: Batch) -> Tensor:
        """What is to be predicted for the concept: beyond no prompt, away from it or to the anchor.

        Turned round (the concept as negative prompt), away from it is the concept; towards the
        anchor is the anchor's opposite.
        """
        with torch.no_grad():
            without = self._said(batch, "")
            if self.anchor is None:
                return away(without, self.teacher.predicted(batch), eta=self.eta)
            return away(without, self._said(batch, self.anchor), eta=-self.reach)

    def upper(self, student: Painter, batch: Batch, target: Tensor) -> Tensor:
        """L_CU: distance of the prediction for the concept to the target."""
        return mean_square(student.predicted(batch) - target)

    def pull(self, student: Painter, batch: Batch) -> float:
        """`pull` of the concept on a student's prediction."""
        with torch.no_grad():
            found, asked = student.predicted(batch), self.teacher.predicted(batch)
            return float(pull(found, self._said(batch, self.anchor or ""), asked))

    def distance(self, student: Painter, batch: Batch) -> float:
        """L_out: mean squared distance to the teacher's prediction."""
        with torch.no_grad():
            return float(mean_square(student.predicted(batch) - self.teacher.predicted(batch)))

    def _said(self, batch: Batch, prompt: str) -> Tensor:
        """What the teacher predicts for a batch's pictures under another prompt."""
        return self.teacher.predicted(self.teacher.asked(batch, prompt))


def away(without: Tensor, with_concept: Tensor, *, eta: float) -> Tensor:
    """ESD's target e_0 - eta (e_c - e_0): arXiv 2303.07345, equation 7.

    Args:
        without: Prediction e_0 under no prompt.
        with_concept: Prediction e_c under the concept's, of the same shape.
        eta: 0: as if nothing had been asked for; more: away from the concept.
    """
    return without - eta * (with_concept - without)


def pull(found: Tensor, without: Tensor, with_concept: Tensor) -> Tensor:
    """How far a prediction goes from `without` (0) towards `with_concept` (1); `away`'s: -eta.

    What a damaged model predicts beside that line does not count.
    """
    concept = with_concept - without
    return ((found - without) * concept).sum() / concept.square().sum()


def mean_square(difference: Tensor) -> Tensor:
    """Mean over everything."""
    return difference.square().mean()


@contextmanager
def block_outputs(unet: Any) -> Iterator[list[Tensor]]:
    """What the down, mid and up blocks give while inside, in the order in which they work."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
