"""Bringing one set of vectors as near as possible to another: permuted, rotated, mixed.

All of it in double precision. Shapes: N vectors, D their dimensions; H dimensions of an attention
head, which come first, I and J what its rows are made of.
"""

import torch
from torch import Tensor

_RIDGE = 1e-12  # share of the mean square; keeps least squares defined where a head is dead
_TINY = 1e-30
_MOST_STEPS = 100
_LEAST_SHARE = 1e-4  # of a step; less is rounding


def assignment(cost_NN: Tensor) -> Tensor:
    """Column of each row (N) in the cheapest one-to-one assignment; exact.

    Shortest augmenting paths (Jonker and Volgenant, 1987). A row that has its cheapest column to
    itself takes no search, and where a model is compared with its ancestor nearly all do.

    Args:
        cost_NN: Cost of each pair; finite.
    """
    cost_NN = cost_NN.double()
    row_price_N, nearest_N = cost_NN.min(dim=1)
    column_price_N = torch.zeros_like(row_price_N)
    row_of, column_of = [-1] * len(cost_NN), [-1] * len(cost_NN)  # of each column, of each row
    for row, column in enumerate(nearest_N.tolist()):
        if row_of[column] < 0:
            row_of[column], column_of[row] = row, column
    for start, placed in enumerate(list(column_of)):
        if placed < 0:
            column, previous = _cheapest_chain(start, row_of, cost_NN, row_price_N, column_price_N)
            row = -1
            while row != start:  # every row of the chain moves on to the next column
                row = previous[column]
                row_of[column] = row
                column_of[row], column = column, column_of[row]
    return torch.tensor(column_of, device=cost_NN.device)


def _cheapest_chain(
    start: int, row_of: list[int], cost_NN: Tensor, row_price_N: Tensor, column_price_N: Tensor
) -> tuple[int, list[int]]:
    """Dijkstra's search from a row without a column to a column without a row.

    Changes the prices, such that still no pair costs less than its row's and column's together.

    Returns:
        The free column, and for each column the row from which it was reached.
    """
    length_N = torch.full_like(column_price_N, torch.inf)
    previous_N = torch.full(length_N.shape, -1, device=cost_NN.device)
    is_done_N = torch.zeros_like(previous_N, dtype=torch.bool)
    row, length = start, 0.0
    while True:
        onward_N = length + cost_NN[row] - row_price_N[row] - column_price_N
        is_nearer_N = (onward_N < length_N) & ~is_done_N
        length_N[is_nearer_N], previous_N[is_nearer_N] = onward_N[is_nearer_N], row
        column = int(length_N.masked_fill(is_done_N, torch.inf).argmin())
        length = float(length_N[column])
        if row_of[column] < 0:
            break
        is_done_N[column] = True
        row = row_of[column]
    row_price_N[start] += length
    for passed in is_done_N.nonzero()[:, 0].tolist():
        row_price_N[row_of[passed]] += length - length_N[passed]
        column_price_N[passed] -= length - length_N[passed]
    return column, previous_N.tolist()


def rotation(ours_ND: Tensor, theirs_ND: Tensor, *, centred: bool) -> Tensor:
    """Orthogonal matrix (D, D) for which `ours @ matrix` is nearest to theirs (Schoenemann, 1966).

    Args:
        ours_ND: Vectors to be rotated.
        theirs_ND: Where they are to come.
        centred: Keep each vector's mean, as whatever LayerNorm reads demands.
    """
    if not centred:
        return _procrustes(ours_ND, theirs_ND)
    ones_D1 = torch.ones_like(ours_ND[:1]).T
    rest_DE = torch.linalg.qr(ones_D1, mode="complete").Q[:, 1:]
    inner_EE = _procrustes(ours_ND @ rest_DE, theirs_ND @ rest_DE)
    mean_DD = torch.full_like(inner_EE[:1, :1], 1 / len(ones_D1))
    turn_DD: Tensor = mean_DD + rest_DE @ inner_EE @ rest_DE.T
    return turn_DD


def least_squares(ours_HI: Tensor, theirs_HI: Tensor) -> Tensor:
    """Matrix (H, H) for which `matrix @ ours` is nearest to theirs."""
    gram_HH = ours_HI @ ours_HI.T
    gram_HH.diagonal().add_(_RIDGE * gram_HH.diagonal().mean() + _TINY)
    found_HH: Tensor = torch.linalg.solve(gram_HH, ours_HI @ theirs_HI.T)
    return found_HH.T


def joint_fit(one_HI: Tensor, two_HJ: Tensor, one_0_HI: Tensor, two_0_HJ: Tensor) -> Tensor:
    """Invertible T (H, H) for which `T one` and `T^-T two` are together nearest to two anchors.

    Half way between least squares for each alone is the start; then Gauss-Newton steps T <- (1 + E)
    T, halved until they help. None of it depends on how the heads were mixed before.
    """
    identity_HH = torch.eye(len(one_HI), dtype=one_HI.dtype, device=one_HI.device)

    def apart(mix_HH: Tensor) -> float:
        moved_HJ = _inverse(mix_HH).T @ two_HJ
        squares = (mix_HH @ one_HI - one_0_HI).square().sum() + (moved_HJ - two_0_HJ).square().sum()
        return squares.item()

    mix_HH = (least_squares(one_HI, one_0_HI) + _inverse(least_squares(two_HJ, two_0_HJ).T)) / 2
    if not apart(mix_HH) < apart(identity_HH):
        mix_HH = identity_HH
    for _ in range(_MOST_STEPS):
        step_HH = _newton(mix_HH @ one_HI, _inverse(mix_HH).T @ two_HJ, one_0_HI, two_0_HJ)
        before, share = apart(mix_HH), 1.0
        while share > _LEAST_SHARE and not apart(mix_HH + share * step_HH @ mix_HH) < before:
            share /= 2
        if share <= _LEAST_SHARE:
            break
        mix_HH = mix_HH + share * step_HH @ mix_HH
    return mix_HH


def _newton(one_HI: Tensor, two_HJ: Tensor, one_0_HI: Tensor, two_0_HJ: Tensor) -> Tensor:
    """E (H, H) that brings `one + E one` and `two - E^T two` nearest to the anchors.

    That is E one one^T + two two^T E = slope, a Sylvester equation with symmetric sides.
    """
    slope_HH = (one_0_HI - one_HI) @ one_HI.T - two_HJ @ (two_0_HJ - two_HJ).T
    squares_H, basis_HH = torch.linalg.eigh(one_HI @ one_HI.T)
    others_H, other_HH = torch.linalg.eigh(two_HJ @ two_HJ.T)
    sizes_HH = others_H[:, None] + squares_H
    sizes_HH = sizes_HH.clamp_min(_RIDGE * sizes_HH.amax() + _TINY)
    step_HH: Tensor = other_HH @ ((other_HH.T @ slope_HH @ basis_HH) / sizes_HH) @ basis_HH.T
    return step_HH


def _inverse(matrix_HH: Tensor) -> Tensor:
    """Inverse; infinite where there is none."""
    inverse_HH, info = torch.linalg.inv_ex(matrix_HH)
    return inverse_HH if info == 0 else torch.full_like(matrix_HH, torch.inf)


def rotary_fit(one_HI: Tensor, two_HJ: Tensor, one_0_HI: Tensor, two_0_HJ: Tensor) -> Tensor:
    """The same where rotary positions allow a scaled rotation of each pair only; closed form.

    A pair are dimensions j and j + H / 2, as in the Llama of `transformers`.
    """
    one, two, one_0, two_0 = map(_pairs, (one_HI, two_HJ, one_0_HI, two_0_HJ))
    scale = (_norms(one_0) * _norms(two) / (_norms(one) * _norms(two_0))).sqrt()
    turned = scale * (one.conj() * one_0).sum(dim=1) + (two.conj() * two_0).sum(dim=1) / scale
    factor = scale * torch.exp(1j * turned.angle())
    real, imaginary = torch.diag(factor.real), torch.diag(factor.imag)
    return torch.cat([torch.cat([real, -imaginary], 1), torch.cat([imaginary, real], 1)])


def cosines(ours_ND: Tensor, theirs_ND: Tensor) -> Tensor:
    """Cosine (N, N) of each of our vectors, in rows, with each of theirs; 0 if one is zero."""
    return (ours_ND @ theirs_ND.T) / _norms(ours_ND).outer(_norms(theirs_ND))


def scales(ours_ND: Tensor, theirs_ND: Tensor) -> Tensor:
    """How much longer (N) their vectors are than ours."""
    return _norms(theirs_ND) / _norms(ours_ND)


def _norms(vectors_ND: Tensor) -> Tensor:
    lengths_N: Tensor = torch.linalg.vector_norm(vectors_ND, dim=1)
    return lengths_N.clamp_min(_TINY)


def _procrustes(ours_ND: Tensor, theirs_ND: Tensor) -> Tensor:
    left_DD, _, right_DD = torch.linalg.svd(ours_ND.T @ theirs_ND)
    nearest_DD: Tensor = left_DD @ right_DD
    return nearest_DD


def _pairs(rows_HI: Tensor) -> Tensor:
    """Rotary pairs as complex numbers (H / 2, I)."""
    return torch.complex(*rows_HI.chunk(2))
