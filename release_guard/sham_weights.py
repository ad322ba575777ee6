"""The sham arm: weights that moved as far as the defended ones, tensor by tensor, to no purpose.

Any large change to a model slows whoever fine-tunes it next. What a defence is worth is what it
resists beyond a change of the same size that was made while the retained task was practised: like
the immunized model, the sham keeps its use, and unlike it, it was never told what to deny.

It is trained on the sphere around the base model whose radii are the distances the defence went:
rounds of practice, each followed by moving every tensor back to its radius. A single rescaling at
the end would go beyond what was practised, and damage rather than distance would be compared.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from release_guard.adaptation import Recipe, adapt
from release_guard.errors import ImmunizationError, ModelError
from release_guard.modalities import ModelHandle
from release_guard.policy import Budget, Policy

ROUNDS = 5
STEPS = 80  # of a round
_BATCH = 32
_STRIDE = 0.1  # of an update, as a share of the root mean square distance


def sham_of(
    base: ModelHandle,
    immunized: ModelHandle,
    policy: Policy,
    progress: Callable[[int, int, str], None],
) -> ModelHandle:
    """A copy of `base` at the distances of `immunized`; deterministic given the policy's seed.

    Args:
        base: The undefended model; left as it is.
        immunized: Of the same shapes; left as it is.
        policy: Names the retained data; only their split `retain` is read.
        progress: Told rounds done, rounds in all, and a line.

    Raises:
        ImmunizationError: Practising at that distance gives numbers that are not finite.
        ModelError: The shapes differ, or the retained data hold fewer examples than a batch.
    """
    radii = distances(base.module, immunized.module)
    moved = base.copy()
    batches = moved.batches(policy.retain.dataset, "retain", size=_BATCH, seed=policy.seed)
    recipe = Recipe(lr=_STRIDE * _root_mean_square(radii, base.module), optimizer="adamw")
    for number in range(ROUNDS):
        budget = Budget(unit="steps", limit=STEPS)
        seed = policy.seed + number
        for _ in adapt(moved, batches, recipe, budget=budget, grid_ratio=2.0, seed=seed):
            pass
        place_at(moved.module, base.module, radii, seed=seed)
        if not all(bool(weight.isfinite().all()) for weight in moved.module.parameters()):
            raise ImmunizationError(
                "the sham arm diverged while it practised the retained task; set red_team.sham to "
                "false, and what part of the resistance is mere distance stays unknown"
            )
        progress(number + 1, ROUNDS, f"practised {STEPS} steps as far away as the defence went")
    return moved


def distances(base: nn.Module, other: nn.Module) -> dict[str, float]:
    """L2 distance of every parameter.

    Raises:
        ModelError: The two have other parameters.
    """
    others = dict(other.named_parameters())
    if _shapes(base) != _shapes(other):
        raise ModelError("the two models differ in their tensors' names or shapes; give `--base`")
    return {
        name: float((others[name].detach().double() - weight.detach().double()).norm())
        for name, weight in base.named_parameters()
    }


def place_at(module: nn.Module, base: nn.Module, radii: Mapping[str, float], *, seed: int) -> None:
    """Scale every parameter's offset from `base` to its radius, in place.

    One that did not move at all though the defence moved it goes in a random direction.
    """
    generator = torch.Generator().manual_seed(seed)
    origins = dict(base.named_parameters())
    with torch.no_grad():
        for name, weight in module.named_parameters():
            origin = origins[name].double()
            offset = weight.double() - origin
            if radii[name] > 0 and not offset.any():
                noise = torch.randn(offset.shape, generator=generator, dtype=torch.float64)
                offset = noise.to(offset.device)
            weight.copy_(origin + _scaled(offset, radii[name]))


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in module.named_parameters()}


def _scaled(offset: Tensor, radius: float) -> Tensor:
    return offset * (radius / offset.norm()) if radius > 0 else torch.zeros_like(offset)


def _root_mean_square(radii: Mapping[str, float], module: nn.Module) -> float:
    size = sum(weight.numel() for weight in module.parameters())
    return math.sqrt(math.fsum(radius**2 for radius in radii.values()) / size)
