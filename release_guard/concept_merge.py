"""Weights that know one concept each, merged in closed form; and concepts erased in closed form.

Shapes: O outputs and I inputs of a linear layer, M rows that a merge must keep, R rows of unrelated
captions, K rows that are erased or preserved. A row is what the layer reads for one token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WORST_CONDITION = 1e4  # of A; beyond, nearly equal rows make the solution explode
_SINGULAR = 1e-12  # smallest eigenvalue of G by its largest


@dataclass(frozen=True, eq=False)
class ConceptMerge:
    """The merge layer of MIMA (arXiv 2412.15320), solved for one set of rows.

    Each concept's adapted weight keeps what it makes of its own rows, and unrelated rows are moved
    as little as may be:

        minimise ||(W - B) C_reg^T||_F^2  subject to  W C^T = V,
        W* = B + (V - B C^T) A^-1 C G^-1,  G = C_reg^T C_reg,  A = C G^-1 C^T.

    The rows are the same for every layer that reads them, so one solution serves all.

    Attributes:
        rows: C, the different rows of all concepts (M, I).
        lift: A^-1 C G^-1, what a change at each row does to the weight (M, I).
        places: For each concept, which of `rows` are its own.
    """

    rows: Tensor
    lift: Tensor
    places: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        rows: Sequence[Tensor],
        regular_RI: Tensor,
        *,
        regular_ridge: float = 0.0,
        ridge: float = 0.0,
    ) -> "ConceptMerge":
        """Solve for these rows, in double precision.

        Args:
            rows: Each concept's rows (M_n, I); a row that several have counts once.
            regular_RI: Rows of unrelated captions.
            regular_ridge: Added to G, as a share of its mean diagonal; the constraint stays exact.
            ridge: Added to A, as a share of its mean diagonal; softens the constraint.

        Raises:
            ValueError: As many different rows as inputs, so nothing is left to choose; G is
                singular; or rows so alike that A is too badly conditioned.
        """
        rows_MI, inverse = torch.unique(torch.cat(list(rows)).double(), dim=0, return_inverse=True)
        num_rows, num_inputs = rows_MI.shape
        if num_rows >= num_inputs:
            raise ValueError(
                f"the concepts' words are {num_rows} rows, the layers read {num_inputs} features; "
                "nothing is left to choose: name fewer concepts at once"
            )
        regular = regular_RI.double()
        factor_II = _factor(_ridged(regular.T @ regular, regular_ridge))
        white_IM = torch.linalg.solve_triangular(factor_II, rows_MI.T, upper=False)
        a_MM = white_IM.T @ white_IM
        if not ridge and torch.linalg.cond(a_MM) > _WORST_CONDITION:
            raise ValueError(
                "two concepts' words mean nearly the same to the model, which no merge can keep "
                "apart: join the concepts, or set ridge, such as 1e-3"
            )
        d_MI = torch.linalg.solve_triangular(factor_II.T, white_IM, upper=True).T
        lift_MI = torch.cholesky_solve(d_MI, torch.linalg.cholesky(_ridged(a_MM, ridge)))
        return cls(rows_MI, lift_MI, inverse.split([len(part) for part in rows]))

    def __call__(self, adapted: Sequence[Tensor], base_OI: Tensor) -> Tensor:
        """W* (O, I), differentiable in the adapted weights and the base.

        Args:
            adapted: Each concept's weight (O, I), in the order of its rows. Where several have a
                row, the mean of what they make of it is kept.
            base_OI: B, what unrelated rows are kept at.
        """
        pairs = zip(adapted, self.places, strict=True)
        made_MO = torch.cat([self.rows[place] @ weight.double().T for weight, place in pairs])
        place_M = torch.cat(self.places)
        total_MO = made_MO.new_zeros(len(self.rows), made_MO.shape[1])
        counts_M = torch.bincount(place_M, minlength=len(self.rows))
        wanted_MO = total_MO.index_add(0, place_M, made_MO) / counts_M[:, None]
        missing_MO = wanted_MO - self.rows @ base_OI.double().T
        return (base_OI.double() + missing_MO.T @ self.lift).to(base_OI.dtype)

    @property
    def projector(self) -> Tensor:
        """C^T A^-1 C G^-1 (I, I): an oblique projector onto the rows; its trace is M."""
        return self.rows.T @ self.lift


def erased(
    weight_OI: Tensor,
    erased_KI: Tensor,
    instead_KI: Tensor,
    preserved_KI: Tensor,
    *,
    preserve: float = 0.1,
    ridge: float = 0.5,
) -> Tensor:
    """A weight that answers erased rows as it answered others, by unified concept editing.

    W* = (r W + sum v k^T) (r I + sum k k^T)^-1 with v = W k' for an erased row k and what stands in
    its place, k', and v = W k for a preserved one. Source: arXiv 2308.14761.

    Args:
        weight_OI: W.
        erased_KI: What is erased.
        instead_KI: What stands in the place of each, such as the empty prompt's rows.
        preserved_KI: What is to stay.
        preserve: How much a preserved row counts beside an erased one.
        ridge: r, how much the weight itself counts.
    """
    weight = weight_OI.double()
    forget, instead, keep = (part.double() for part in (erased_KI, instead_KI, preserved_KI))
    identity_II = ridge * torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    kept_II = identity_II + preserve * keep.T @ keep
    wanted_OI = weight @ (kept_II + instead.T @ forget)
    solved_IO: Tensor = torch.linalg.solve(kept_II + forget.T @ forget, wanted_OI.T)
    return solved_IO.T.to(weight_OI.dtype)


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)


def _factor(gram_II: Tensor) -> Tensor:
    values_I = torch.linalg.eigvalsh(gram_II)
    if values_I[0] <= _SINGULAR * values_I[-1]:
        raise ValueError(
            f"the unrelated captions span fewer than the {len(gram_II)} features that the layers "
            "read: draw more captions, or set regular_ridge, such as 1e-3"
        )
    factor_II: Tensor = torch.linalg.cholesky(gram_II)
    return factor_II
