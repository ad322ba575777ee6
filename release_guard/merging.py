"""Merging models of one architecture: arithmetic on their weights, and nothing else.

A state maps the names of weights to tensors, as `state_dict` does. All states of a merge have the
same names and shapes; none is changed. What is not floating-point comes from the first of them.
Everything is differentiable in the states' weights and in what weighs them.

Shapes: I inputs of a linear layer (and a 1 where it has a bias), O outputs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]
Weights = Sequence[float] | Tensor

_PARALLEL = 0.9995  # cosine above which an arc is a straight line
_RIDGE = 1e-8  # share of the mean variance given to every input; those never seen are averaged
_TINY = 1e-30
_NOTHING = 1e-12  # squared norm of tensors that are all zero


def linear(states: Sequence[State], weights: Weights) -> State:
    """Weighted mean, the weights scaled to a sum of 1 (Wortsman et al., arXiv 2203.05482, eq. 1).

    Raises:
        ValueError: States differ in names or shapes, or the weights have no sum to divide by.
    """
    if not (total := sum(weights)):
        raise ValueError("weights of a mean must not add up to 0")
    return _each(states, lambda tensors: _sum(tensors, [weight / total for weight in weights]))


def task_arithmetic(base: State, states: Sequence[State], weights: Weights) -> State:
    """Base plus weighted differences from it (Ilharco et al., arXiv 2212.04089, section 2)."""
    return _add(base, states, lambda deltas: _sum(deltas, weights))


def ties(
    base: State, states: Sequence[State], weights: Weights, *, density: float, scale: float = 1.0
) -> State:
    """Trim, elect a sign, average those who agree (Yadav et al., arXiv 2306.01708, algorithm 1).

    Args:
        base: The common ancestor.
        states: Models that came from it.
        weights: How much each says, in the election and in the mean.
        density: Share of the largest differences that is kept, in each tensor.
        scale: Factor of what is added to the base (the paper's lambda).
    """

    def agree(deltas: Sequence[Tensor]) -> Tensor:
        return scale * elected_mean([trimmed(delta, density) for delta in deltas], weights)

    return _add(base, states, agree)


def dare(base: State, state: State, *, density: float, seed: int) -> State:
    """Drop differences at random and scale up the others (Yu et al., arXiv 2311.03099, eq. 3).

    What comes out is merged like any other model: added up, or with `ties` at density 1.

    Args:
        base: The ancestor.
        state: A model that came from it.
        density: Share of the differences that is kept; what is kept is divided by it.
        seed: Which ones.
    """
    random = torch.Generator(next(iter(base.values())).device).manual_seed(seed)

    def thin(deltas: Sequence[Tensor]) -> Tensor:
        kept = torch.bernoulli(torch.full_like(deltas[0], density), generator=random)
        return deltas[0] * kept / density

    return _add(base, [state], thin)


def slerp(one: State, other: State, share: float) -> State:
    """Each tensor moved along the arc between two (Shoemake, 1985); linear if nearly parallel.

    Args:
        one: What a share of 0 gives.
        other: What a share of 1 gives.
        share: How far along the arc.
    """
    return _each((one, other), lambda tensors: _arc(tensors[0], tensors[1], share))


def layerwise(base: State, states: Sequence[State], weights: Mapping[str, Weights]) -> State:
    """Task arithmetic with weights for each tensor (AdaMerging, arXiv 2310.02575, eq. 4).

    Args:
        base: The common ancestor.
        states: Models that came from it.
        weights: By the tensor's name, one for each model; a tensor without stays the base's.
    """
    check_alike((base, *states))
    return {
        name: tensor + _sum([state[name] - tensor for state in states], weights[name])
        if name in weights
        else tensor
        for name, tensor in base.items()
    }


def distance(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor], names: Iterable[str]
) -> float:
    """How far some tensors are from a base's, relative to the norm of those (L2)."""
    chosen = list(names)
    moved, known = (
        math.fsum(part.detach().double().square().sum().item() for part in parts)
        for parts in (
            (state[name] - base[name] for name in chosen),
            (base[name] for name in chosen),
        )
    )
    return math.sqrt(moved / max(known, _NOTHING))


def regmean(
    states: Sequence[State], grams: Sequence[Mapping[str, Tensor]], weights: Weights, *, keep: float
) -> State:
    """Linear layers that answer as each model does on its own inputs; all else is averaged.

    The closed form of Jin et al., arXiv 2212.09849, eq. 2, in double precision.

    Args:
        states: The models.
        grams: For each model, by the layer's name, the mean product (I, I) of its inputs; a layer
            with a bias has a last input that is always 1.
        weights: How much each says.
        keep: Share of the products of different inputs that counts (the paper's alpha); less
            makes the solution more stable.
    """
    merged = linear(states, weights)
    for layer in grams[0]:
        rows_OI = [with_bias(state, layer).double() for state in states]
        means_II = [_shrunk(gram[layer].double(), keep) for gram in grams]
        put_rows(merged, layer, _weighed_by(rows_OI, means_II, weights))
    return merged


def fisher(
    states: Sequence[State],
    information: Sequence[Mapping[str, Tensor]],
    weights: Weights,
    *,
    floor: float,
) -> State:
    """Each weight averaged by how much each model needs it (arXiv 2111.09832, eq. 2 and 4).

    Args:
        states: The models.
        information: For each model, the diagonal of its Fisher information by the tensor's name;
            here scaled to a mean of 1 over the model. What is not named is averaged.
        weights: How much each says.
        floor: Added to the scaled information, so that what nobody needs is averaged.
    """
    merged = linear(states, weights)
    sizes = [sum(part.numel() for part in one.values()) for one in information]
    means = [
        sum(part.sum() for part in one.values()) / size
        for one, size in zip(information, sizes, strict=True)
    ]
    for name in information[0]:
        needs = [
            weight * (one[name] / mean + floor)
            for one, mean, weight in zip(information, means, weights, strict=True)
        ]
        tensors = [state[name] for state in states]
        merged[name] = sum(map(torch.mul, needs, tensors)) / sum(needs)
    return merged


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The largest entries by size, at least one; the others, and ties at the edge aside, are 0."""
    if density >= 1 or not delta.numel():
        return delta
    sizes = delta.detach().abs()
    dropped = delta.numel() - max(1, int(density * delta.numel()))
    if not dropped:
        return delta
    return delta * (sizes > sizes.flatten().kthvalue(dropped).values)


def elected_mean(deltas: Sequence[Tensor], weights: Weights) -> Tensor:
    """Weighted mean, entry by entry, of those whose sign is that of the weighted sum."""
    weighed = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    is_positive = torch.stack(weighed).sum(dim=0) >= 0
    agree = [torch.where(is_positive, part > 0, part < 0) for part in weighed]
    total = sum(part * agrees for part, agrees in zip(weighed, agree, strict=True))
    votes = sum(weight * agrees for weight, agrees in zip(weights, agree, strict=True))
    mean: Tensor = total / torch.where(votes == 0, 1, votes)
    return mean


def with_bias(state: State, layer: str) -> Tensor:
    """Weights of a linear layer with its bias, if it has one, as a last column (O, I)."""
    weight_OI, bias_O = state[f"{layer}.weight"], state.get(f"{layer}.bias")
    return weight_OI if bias_O is None else torch.cat([weight_OI, bias_O[:, None]], dim=1)


def put_rows(state: State, layer: str, rows_OI: Tensor) -> None:
    """Put back, in place, what `with_bias` gave."""
    weight = state[f"{layer}.weight"]
    if f"{layer}.bias" in state:
        state[f"{layer}.bias"] = rows_OI[:, -1].to(weight.dtype)
        rows_OI = rows_OI[:, :-1]
    state[f"{layer}.weight"] = rows_OI.to(weight.dtype)


def check_alike(states: Sequence[State]) -> None:
    """Refuse states that cannot be merged.

    Raises:
        ValueError: There is none, or they differ in a name or a shape.
    """
    if not states:
        raise ValueError("nothing to merge")
    first, *others = ({name: value.shape for name, value in state.items()} for state in states)
    for other in others:
        if differing := sorted(name for name, _ in first.items() ^ other.items()):
            raise ValueError(f"{differing[0]} is not in every model, or has another shape")


def check_finite(state: State) -> None:
    """Refuse a merge that is broken: it would look like a perfect defence.

    Raises:
        ValueError: A weight is NaN or infinite.
    """
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite after the merge")


def _each(states: Sequence[State], rule: Callable[[Sequence[Tensor]], Tensor]) -> State:
    check_alike(states)
    return {
        name: rule([state[name] for state in states]) if first.is_floating_point() else first
        for name, first in states[0].items()
    }


def _add(base: State, states: Sequence[State], rule: Callable[[Sequence[Tensor]], Tensor]) -> State:
    """What a rule makes of the differences from the base, added to it."""

    def moved(tensors: Sequence[Tensor]) -> Tensor:
        origin, *others = tensors
        return origin + rule([other - origin for other in others])

    return _each((base, *states), moved)


def _sum(tensors: Sequence[Tensor], weights: Weights) -> Tensor:
    """Weighted sum."""
    first, *others = zip(tensors, weights, strict=True)
    total: Tensor = first[0] * first[1]
    for tensor, weight in others:
        if isinstance(weight, Tensor):
            total = total + weight * tensor
        else:
            total = total.add(tensor, alpha=weight)
    return total


def _arc(one: Tensor, other: Tensor, share: float) -> Tensor:
    lengths = one.norm() * other.norm()
    cosine = ((one * other).sum() / lengths.clamp_min(_TINY)).clamp(-1, 1)
    if cosine.abs() > _PARALLEL:
        return torch.lerp(one, other, share)
    angle = torch.acos(cosine)
    parts = torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other
    arc: Tensor = parts / torch.sin(angle)
    return arc


def _shrunk(gram_II: Tensor, keep: float) -> Tensor:
    variance_I = gram_II.diagonal()
    ridge = _RIDGE * variance_I.mean() + _TINY
    return keep * gram_II + torch.diag((1 - keep) * variance_I + ridge)


def _weighed_by(rows_OI: Sequence[Tensor], means_II: Sequence[Tensor], weights: Weights) -> Tensor:
    """Mean of matrices, each weighed by a positive definite one."""
    system_II = _sum(means_II, weights)
    sides_IO = [mean @ rows.T for mean, rows in zip(means_II, rows_OI, strict=True)]
    solved_IO: Tensor = torch.linalg.solve(system_II, _sum(sides_IO, weights))
    return solved_IO.T
