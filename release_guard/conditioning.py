"""Condition numbers of features, and what makes them better or worse (arXiv 2505.23760).

Gradient descent on a linear probe with squared loss contracts its error by the condition number of
the features' Gram matrix. `well` lowers that number where it is minimised and `ill` raises it.
Everything is computed in double precision, from singular values, and never from a ridged matrix.

Shapes: N rows, F features; M x N a matrix of any shape. Singular values descend.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_PER_FEATURE = 4  # with fewer the smallest singular value says more of the sample than of F
QUANTILES = (0.05, 0.5)
FLOOR = 1e-9
_CODE_RIDGE = 1e-6


def gram(features_NF: Tensor) -> Tensor:
    """Mean product of features with features (F, F): the Hessian of a probe's squared loss."""
    rows_NF = features_NF.double()
    found: Tensor = rows_NF.T @ rows_NF / len(rows_NF)
    return found


def well(matrix_MN: Tensor) -> Tensor:
    """R_well = s_1^2 / 2 - norm(S)_F^2 / 2p, p the smaller side; zero iff all values are equal.

    Source: arXiv 2505.23760, section 4. log cond(S) <= p / s_p^2 R_well(S).
    """
    scale_P = torch.linalg.svdvals(matrix_MN)
    found: Tensor = scale_P[0].square() / 2 - scale_P.square().mean() / 2
    return found


def ill(matrix_MN: Tensor, *, rank: int | None = None) -> Tensor:
    """R_ill = 1 / (norm(S)_F^2 / 2k - s_k^2 / 2), k the rank; infinite where all values are equal.

    Source: arXiv 2505.23760, section 4. 1 / log cond(S) <= s_1^2 R_ill(S). The released code puts
    the width of the input in the place of the rank.

    Args:
        matrix_MN: S.
        rank: Its rank, if it is known better than from S in double precision.
    """
    scale_P = torch.linalg.svdvals(matrix_MN)
    scale_K = scale_P[: rank or numerical_rank(scale_P, max(matrix_MN.shape))]
    found: Tensor = 2 / (scale_K.square().mean() - scale_K[-1].square())
    return found


def well_gradient(gram_FF: Tensor) -> Tensor:
    """Gradient of `well` at a symmetric matrix without negative eigenvalues."""
    values_F, vectors_FF = torch.linalg.eigh(gram_FF)
    top_F = vectors_FF[:, -1]
    found: Tensor = values_F[-1] * top_F.outer(top_F) - gram_FF / len(gram_FF)
    return found


def ill_gradient(gram_FF: Tensor, *, rank: int | None = None) -> Tensor:
    """The same of `ill`."""
    values_F, vectors_FF = torch.linalg.eigh(gram_FF)
    rank = rank or numerical_rank(values_F.flip(0), len(gram_FF))
    values_K, last_F = values_F[-rank:], vectors_FF[:, -rank]
    gap = (values_K.square().mean() - values_K[0].square()) / 2
    found: Tensor = (values_K[0] * last_F.outer(last_F) - gram_FF / rank) / gap.square()
    return found


def spread(gram_FF: Tensor, *, floor: float = FLOOR) -> Tensor:
    """Mean over i of log(lam_1 / lam_i): the logarithm of the condition number by every quantile.

    Unlike `well` and `ill` it does not change with the size of S. Eigenvalues below `floor` times
    the largest hardly count, so that it is not all about the smallest one.
    """
    values_F = torch.linalg.eigvalsh(gram_FF)
    found: Tensor = -(values_F / values_F[-1] + floor).log().mean()
    return found


def spread_gradient(gram_FF: Tensor, *, floor: float = FLOOR) -> Tensor:
    """Gradient of `spread` in S."""
    values_F, vectors_FF = torch.linalg.eigh(gram_FF)
    each_F = -1 / (values_F + floor * values_F[-1]) / len(values_F)
    each_F[-1] -= (each_F * values_F).sum() / values_F[-1]
    found: Tensor = (vectors_FF * each_F) @ vectors_FF.T
    return found


def ill_step_bound(gram_FF: Tensor) -> float:
    """Below this step size, descent on `ill` in S itself raises cond(S): q^2 k / (k - 1)."""
    values_F = torch.linalg.eigvalsh(gram_FF)
    rank = numerical_rank(values_F.flip(0), len(gram_FF))
    values_K = values_F[-rank:]
    gap = (values_K.square().mean() - values_K[0].square()) / 2
    return float(gap.square() * rank / (rank - 1)) if rank > 1 else math.inf


def numerical_rank(values_P: Tensor, size: int, *, eps: float | None = None) -> int:
    """How many of these descending singular values are more than rounding.

    Args:
        values_P: The values.
        size: The larger side of the matrix.
        eps: Relative precision of the numbers it was made of; that of `values_P` if none.
    """
    floor = size * (eps or torch.finfo(values_P.dtype).eps) * values_P[0]
    return max(1, int((values_P > floor).sum()))


@dataclass(frozen=True)
class Spectrum:
    """Singular values of features.

    Attributes:
        values: All of them (P), descending, in double precision.
        rank: How many are more than rounding.
        rows: Of how many rows.
    """

    values: Tensor
    rank: int
    rows: int

    @classmethod
    def of(cls, features_NF: Tensor) -> "Spectrum":
        """Of features; their own precision says what is rounding."""
        values_P = torch.linalg.svdvals(features_NF.double())
        eps = torch.finfo(features_NF.dtype).eps
        rank = numerical_rank(values_P, max(features_NF.shape), eps=eps)
        return cls(values_P, rank, len(features_NF))

    def cond(self, *, rank: int | None = None) -> float:
        """Condition number of the Gram matrix on its range: (s_1 / s_r)^2.

        Args:
            rank: Down to this singular value instead, to compare features of which some have lost
                a direction: then one that vanished counts with what rounding left of it.
        """
        least = torch.finfo(torch.double).eps * self.values[0]
        last = self.values[(rank or self.rank) - 1].clamp_min(least)
        return float((self.values[0] / last).square())

    def cond_quantile(self, share: float) -> float:
        """(s_1 / s)^2 with s a quantile of s_1 .. s_r: what `cond` is when one value is off."""
        low = torch.quantile(self.values[: self.rank], share)
        return float((self.values[0] / low).square())

    @property
    def norm(self) -> float:
        """Frobenius norm of F^T F / N: it grows where features are merely inflated."""
        return float(self.values.pow(4).sum().sqrt() / self.rows)


Change = tuple[Spectrum, Spectrum]


def cond_code(features_NF: Tensor) -> float:
    """The released code's figure, for comparison with published ones only.

    It adds 1e-6 to the Gram matrix and divides by the least eigenvalue above 1e-6: the rounding
    of zeros counts there, so that features without full rank get some 1e9, whatever they are.
    """
    rows_NF = features_NF.double()
    ridge_FF = _CODE_RIDGE * torch.eye(rows_NF.shape[1], dtype=torch.double)
    values_F = torch.linalg.eigvalsh(rows_NF.T @ rows_NF + ridge_FF.to(rows_NF.device))
    kept_F = values_F[values_F > _CODE_RIDGE]
    return float(kept_F[-1] / kept_F[0])


@dataclass(frozen=True)
class Halves:
    """Relative immunization ratios, a number for each group of rows.

    Attributes:
        harm: (i): condition number on the restricted data, after by before; wanted above 1.
        keep: (ii): the same on the retained data; wanted at most 1.
    """

    harm: tuple[float, ...]
    keep: tuple[float, ...]

    @property
    def ratio(self) -> tuple[float, ...]:
        """(i) / (ii), group by group: ten can be a restricted task that became easier."""
        return tuple(harm / keep for harm, keep in zip(self.harm, self.keep, strict=True))

    @property
    def hold(self) -> bool:
        """Whether both halves hold in the mean: (i) > 1 and (ii) <= 1."""
        return mean(self.harm) > 1 and mean(self.keep) <= 1


def halves(restricted: Sequence[Change], retained: Sequence[Change]) -> dict[str, Halves]:
    """(i) and (ii) by estimator: `rank`, and a quantile of the spectrum each.

    Source: arXiv 2505.23760, section 5.1, with condition numbers that know the rank.

    Args:
        restricted: Spectra of the restricted features before and after, of each group of rows.
        retained: The same of retained features, as many groups.
    """
    domains = (restricted, retained)
    harm, keep = ([now.cond(rank=was.rank) / was.cond() for was, now in each] for each in domains)
    found = {"rank": Halves(tuple(harm), tuple(keep))}
    for share in QUANTILES:
        harm, keep = (
            [now.cond_quantile(share) / was.cond_quantile(share) for was, now in each]
            for each in domains
        )
        found[f"q{share:g}"] = Halves(tuple(harm), tuple(keep))
    return found


def mean(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)
