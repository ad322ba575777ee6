"""How long gradient descent takes to fit a linear probe: told from a spectrum, and run.

The error of a squared loss is a sum over the eigenvalues of the features' Gram matrix, weighted by
how much of the answer lies along each: condition numbers see the first, probes both.

Shapes: N rows, F features, C targets.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ProbeTask:
    """Least squares as gradient descent sees it.

    Attributes:
        values: Eigenvalues (F) of the Gram matrix, ascending.
        missing: The best probe along their eigenvectors (F, C); descent starts from zero.
    """

    values: Tensor
    missing: Tensor

    @classmethod
    def of(cls, features_NF: Tensor, targets_NC: Tensor) -> "ProbeTask":
        """The task of fitting targets; directions that hold nothing but rounding are left out."""
        features_NF, targets_NC = features_NF.double(), targets_NC.double()
        rows_NP, scale_P, _ = torch.linalg.svd(features_NF, full_matrices=False)
        kept = scale_P > max(features_NF.shape) * torch.finfo(torch.double).eps * scale_P[0]
        missing_PC = (rows_NP.T @ targets_NC)[kept] / scale_P[kept].unsqueeze(1)
        return cls((scale_P[kept].square() / len(features_NF)).flip(0), missing_PC.flip(0))

    def excess(self, steps: int) -> float:
        """E(t) / E(0) of descent by 1 / lam_1: what is left of the excess risk after some steps.

        sum lam_i c_i^2 (1 - lam_i / lam_1)^2t / sum lam_i c_i^2.
        """
        energy_F = self.values * self.missing.square().sum(dim=1)
        left_F = (1 - self.values / self.values[-1]).pow(2 * steps)
        return float((energy_F * left_F).sum() / energy_F.sum())

    def steps(self, share: float) -> int:
        """T_eps: the first number of such steps that leaves at most this share of it."""
        high = 1
        while self.excess(high) > share:
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.excess(middle) <= share else (middle, high)
        return high

    def line_search(self) -> Iterator[float]:
        """The same shares, step after step, with the best step size each: steepest descent."""
        missing_FC, values_F1 = self.missing, self.values.unsqueeze(1)
        first = (values_F1 * missing_FC.square()).sum()
        while True:
            slope_FC = values_F1 * missing_FC
            curvature = (values_F1 * slope_FC.square()).sum()
            if curvature == 0:
                return
            missing_FC = missing_FC - slope_FC.square().sum() / curvature * slope_FC
            yield float((values_F1 * missing_FC.square()).sum() / first)


def line_search_steps(task: ProbeTask, share: float, *, most: int) -> float:
    """Steps of steepest descent until at most this share is left; infinity beyond `most`."""
    for step, left in enumerate(task.line_search(), start=1):
        if left <= share:
            return step
        if step == most:
            return math.inf
    return math.inf
