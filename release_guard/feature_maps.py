"""Linear maps of features that make one domain hard to probe and another easy, and probes of both.

A map theta takes features x to x theta. Whatever invertible theta does to the condition number of
two domains, the best probe reaches the same error: only the way there changes. The eigenvalues g of
the pencil (K_H, K_P) do not depend on theta, which bounds what any of them can do:

    cond(theta^T K_H theta) <= cond(g) cond(theta^T K_P theta)

so that no relative immunization ratio exceeds cond(g) cond(K_P) / cond(K_H). `Pencil.map` reaches
that.

Shapes: F features; K_H and K_P (F, F) Gram matrices of the restricted and the retained domain.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from release_guard.conditioning import ill_gradient, spread_gradient, well_gradient

_WIDEST = 0.2  # most that a step changes the size of any direction, relatively
_NARROWEST = 1e-6
_PENALTY = 10.0  # of a half that does not hold
_EASING = 1.5  # how fast steps grow again after one that went well


def seen_through(gram_FF: Tensor, map_FF: Tensor) -> Tensor:
    """H = theta^T K theta: what a Gram matrix becomes behind a map."""
    seen_FF = map_FF.T @ gram_FF @ map_FF
    return (seen_FF + seen_FF.T) / 2


def map_gradient(gram_FF: Tensor, map_FF: Tensor, slope_FF: Tensor) -> Tensor:
    """Gradient in theta of a regulariser whose gradient in H is `slope_FF`: 2 K theta slope.

    Source: arXiv 2505.23760, section 4.2.
    """
    return 2 * gram_FF @ map_FF @ slope_FF


def preconditioned(gram_FF: Tensor, gradient_FF: Tensor) -> Tensor:
    """K^-1 times a gradient in theta, solved: then a step keeps the eigenvectors of H.

    Source: arXiv 2505.23760, algorithm 1. K^-1 belongs on the side of the inputs: for the weight
    (outputs, inputs) of a linear layer it is gradient K^-1, hence `preconditioned(K, grad.T).T`.
    """
    solved_FF: Tensor = torch.linalg.solve(gram_FF, gradient_FF)
    return solved_FF


def condition(gram_FF: Tensor, share: float = 0.0) -> float:
    """Largest eigenvalue by a quantile of all of them; by the smallest if the share is 0."""
    values_F = torch.linalg.eigvalsh(gram_FF)
    low = float(torch.quantile(values_F, share))
    return float(values_F[-1]) / low if low > 0 else math.inf


@dataclass(frozen=True)
class Pencil:
    """What no map of the features changes about two domains.

    Attributes:
        basis: V (F, F) with V^T K_P V = 1 and V^T K_H V = diag(values).
        values: g (F), ascending.
    """

    basis: Tensor
    values: Tensor

    @classmethod
    def of(cls, restricted_FF: Tensor, retained_FF: Tensor) -> "Pencil":
        """Of two Gram matrices; the retained one must have full rank."""
        lower_FF = torch.linalg.cholesky(retained_FF)
        half_FF = torch.linalg.solve_triangular(lower_FF, restricted_FF, upper=False)
        both_FF = torch.linalg.solve_triangular(lower_FF, half_FF.T, upper=False)
        values_F, vectors_FF = torch.linalg.eigh((both_FF + both_FF.T) / 2)
        basis_FF = torch.linalg.solve_triangular(lower_FF.T, vectors_FF, upper=True)
        return cls(basis_FF, values_F)

    def cond(self, share: float = 0.0) -> float:
        """Largest of them by a quantile; by the smallest if the share is 0."""
        return float(self.values[-1] / torch.quantile(self.values, share))

    def map(self, power: float) -> Tensor:
        """V g^(power / 2): cond_P becomes cond(g)^power, and cond_H cond(g)^(1 + power)."""
        return self.basis * self.values.pow(power / 2)

    def power(
        self,
        restricted_FF: Tensor,
        retained_FF: Tensor,
        shares: tuple[float, ...],
        *,
        lean: float = 0.5,
    ) -> float:
        """The power so far on the way from where (i) passes 1 to where (ii) does.

        Of all estimators the narrowest ends count. By the smallest eigenvalue there is room between
        them unless the bound of this module is 1; quantiles have no such bound.
        """
        spans = [math.log(self.cond(share)) for share in shares]
        harm, keep = (
            [math.log(condition(gram_FF, share)) for share in shares]
            for gram_FF in (restricted_FF, retained_FF)
        )
        lowest = max(size / span for size, span in zip(harm, spans, strict=True)) - 1
        highest = min(size / span for size, span in zip(keep, spans, strict=True))
        return (1 - lean) * lowest + lean * highest


def most_ratio(restricted_FF: Tensor, retained_FF: Tensor) -> float:
    """The largest relative immunization ratio that any invertible map can reach."""
    pencil = Pencil.of(restricted_FF, retained_FF)
    return pencil.cond() * condition(retained_FF) / condition(restricted_FF)


def turned(map_FF: Tensor, *, seed: int) -> Tensor:
    """The same map, its outputs turned at random: then Adam's scale for each finds nothing."""
    chance = torch.Generator().manual_seed(seed)
    noise_FF = torch.randn(map_FF.shape, generator=chance, dtype=torch.double).to(map_FF)
    turn_FF, _ = torch.linalg.qr(noise_FF)
    turned_FF: Tensor = map_FF @ turn_FF
    return turned_FF


class GuardedDescent:
    """The paper's step in its preconditioned form, as long as it brings both halves nearer.

    A step is theta (1 - t B), B the gradient in H of R_well on the retained domain, of R_ill on the
    restricted one, or their sum: with K^-1 in front no Gram matrix is left in it (where none of
    these helps, of `spread`, which sees what lies between the extremes). Each is divided
    by its norm, which balances them and takes the scale out. t is halved until the merit grows: the
    logarithm of (i) / (ii) by every estimator, with a penalty where (i) < 1 or (ii) > `room`.

    Attributes:
        map: theta.
        trust: t, where the next step begins to look.
    """

    def __init__(
        self,
        restricted_FF: Tensor,
        retained_FF: Tensor,
        *,
        room: float = 1.0,
        shares: tuple[float, ...] = (0.0,),
    ) -> None:
        """Begin with the identity.

        Args:
            restricted_FF: K_H.
            retained_FF: K_P.
            room: Most that (ii) may be; below 1, so that it also holds on other rows of these data.
            shares: Quantiles by which both halves must hold; 0 is the smallest eigenvalue.
        """
        self.map = torch.eye(len(retained_FF), dtype=torch.double, device=retained_FF.device)
        self.trust = _WIDEST
        self._grams = (restricted_FF, retained_FF)
        self._room, self._shares = room, shares
        self._before = [self._conditions(gram_FF) for gram_FF in self._grams]

    def halves(self, map_FF: Tensor | None = None) -> list[tuple[float, float]]:
        """(i) and (ii) by each estimator."""
        moved_FF = self.map if map_FF is None else map_FF
        now = [self._conditions(seen_through(gram_FF, moved_FF)) for gram_FF in self._grams]
        harm, keep = (
            [after / before for after, before in zip(*domain, strict=True)]
            for domain in zip(now, self._before, strict=True)
        )
        return list(zip(harm, keep, strict=True))

    def step(self) -> bool:
        """One step; whether there was one."""
        restricted_FF, retained_FF = (seen_through(gram_FF, self.map) for gram_FF in self._grams)
        well_FF, ill_FF = _unit(well_gradient(retained_FF)), _unit(ill_gradient(restricted_FF))
        every_FF = _unit(spread_gradient(retained_FF)) - _unit(spread_gradient(restricted_FF))
        reached = self._merit(self.map)
        trust = self.trust
        while trust > _NARROWEST:
            for slope_FF in (well_FF + ill_FF, well_FF, ill_FF, every_FF):
                map_FF = self._moved(slope_FF, trust)
                if self._merit(map_FF) > reached:
                    self.map, self.trust = map_FF, min(_WIDEST, _EASING * trust)
                    return True
            trust /= 2
        return False

    def _moved(self, slope_FF: Tensor, trust: float) -> Tensor:
        map_FF: Tensor = self.map - trust * self.map @ slope_FF
        return map_FF * (math.sqrt(len(map_FF)) / float(map_FF.norm()))  # its size says nothing

    def _conditions(self, gram_FF: Tensor) -> list[float]:
        return [condition(gram_FF, share) for share in self._shares]

    def _merit(self, map_FF: Tensor) -> float:
        return sum(
            math.log(harm / keep)
            + _PENALTY * (min(0.0, math.log(harm)) - max(0.0, math.log(keep / self._room)))
            for harm, keep in self.halves(map_FF)
        )


def _unit(slope_FF: Tensor) -> Tensor:
    """Divided by its largest singular value, if that is not zero."""
    norm = torch.linalg.matrix_norm(slope_FF, 2)
    return slope_FF / norm if norm > 0 else slope_FF
