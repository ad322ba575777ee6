"""A linear map of a model's features, folded into the layers on either side: the outputs stay.

Features x become x theta where a linear layer right before the head writes them: it takes theta,
and the head takes the inverse. Behind a normalisation or an activation no such map is legal.

Shapes: F features, I inputs of a layer, C outputs of the head.
"""

import torch
from torch import Tensor, nn

from release_guard.modalities import Batch, ModelHandle, evaluating

_SAME = 1e-3  # of the spread of the logits: what rounding may do to them


@torch.no_grad()
def fold(base: ModelHandle, model: ModelHandle, name: str, map_FF: Tensor) -> None:
    """Write a layer and the head of the base, with the map between them, into another model.

    Args:
        base: Left as it is.
        model: A copy of it, changed in place.
        name: Of the linear layer that writes the features.
        map_FF: theta, invertible.
    """
    old, new = _layer(base, name), _layer(model, name)
    new.weight.copy_(map_FF.T @ old.weight.double())
    if old.bias is not None:
        new.bias.copy_(map_FF.T @ old.bias.double())
    model.head.weight.copy_(torch.linalg.solve(map_FF, base.head.weight.double().T).T)


def writer(model: ModelHandle, batch: Batch) -> str | None:
    """The linear layer that writes the features, if the outputs stay when a map is folded there.

    A head that is tied to the input embedding cannot take the inverse, nor can what else reads the
    layer: both show in the outputs.
    """
    name = _last_linear(model, batch)
    if name is None:
        return None
    width = model.head.in_features
    chance = torch.Generator().manual_seed(0)
    map_FF = torch.eye(width, dtype=torch.double)
    map_FF += 0.5 * torch.rand(width, width, generator=chance, dtype=torch.double) / width
    tried = model.copy()
    fold(model, tried, name, map_FF.to(model.device))
    with evaluating(model.module), evaluating(tried.module):
        before_NC, after_NC = model.logits(batch)[0], tried.logits(batch)[0]
    apart = (after_NC - before_NC).abs().max()
    return name if bool(apart <= _SAME * before_NC.std()) else None


def _last_linear(model: ModelHandle, batch: Batch) -> str | None:
    """The last linear layer to run before the head that has as many outputs as it has inputs."""
    ran: list[str] = []
    hooks = [
        part.register_forward_hook(lambda _, __, ___, name=name: ran.append(name))
        for name, part in model.module.named_modules()
        if isinstance(part, nn.Linear)
        and part is not model.head
        and part.out_features == model.head.in_features
    ]
    with evaluating(model.module):
        model.features(batch)
    for hook in hooks:
        hook.remove()
    return ran[-1] if ran else None


def _layer(model: ModelHandle, name: str) -> nn.Linear:
    layer = model.module.get_submodule(name)
    assert isinstance(layer, nn.Linear)  # noqa: S101  `_last_linear` saw to it
    return layer
