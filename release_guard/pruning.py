"""Smaller UNets out of large ones: what a text-to-image model is distilled into.

A pruner is a function from a UNet to a pruned copy that the stock class can load; any other one may
stand in its place. Shapes: O outputs, I inputs of a layer, U units that are kept or cut together.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from release_guard import pipelines
from release_guard.diffusion import quiet
from release_guard.errors import ModelError

with quiet():
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention import FeedForward
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

Pruner = Callable[[Any], Any]

_UP_LAYER = re.compile(r"(up_blocks\.\d+\.(?:resnets|attentions)\.)(\d+)(\..*)")


def prune(source: str, target: Path, pruner: Pruner) -> tuple[int, int]:
    """Write a pipeline's folder with its UNet pruned; all else is copied.

    Args:
        source: A folder or `OWNER/NAME@REVISION`.
        target: Where to; diffusers loads what lies there.
        pruner: Such as `depth`.

    Returns:
        Multiplications of a UNet pass before and after, for a picture.

    Raises:
        ModelError: The source cannot be loaded, or not be pruned this way.
    """
    pipeline = pipelines.load(source)
    before = macs(pipeline.network.unet)
    pipeline.network.unet = pruner(pipeline.network.unet)
    pipeline.save(target)
    return before, macs(pipeline.network.unet)


def depth(unet: Any) -> Any:
    """A UNet with one layer a block instead of several, every weight copied from there.

    A down block keeps its first layer, an up block its first and its last, as only these read what
    the kept layers hand over (Kim et al. 2023, arXiv 2305.15798, section 3.1, without their cut of
    the middle block).

    Raises:
        ModelError: Its blocks have one layer already, or different numbers of them.
    """
    layers = unet.config.layers_per_block
    if not isinstance(layers, int) or layers == 1:
        raise ModelError(f"layers_per_block is {layers}: there is no layer to cut; prune its width")
    with torch.random.fork_rng(devices=[]), quiet():
        cut = UNet2DConditionModel.from_config({**unet.config, "layers_per_block": 1})
    known, source = unet.state_dict(), _last_up_layer(layers)
    cut.load_state_dict({name: known[source(name)] for name in cut.state_dict()})  # all, or raises
    return cut.to(next(unet.parameters())).eval()


def width(unet: Any, *, share: float = 0.25) -> Any:
    """The same UNet without a share of its inner units, the smallest; they are stored as zeros.

    Units are groups of channels between a residual block's convolutions (whole groups of its
    normalisation, so that what stays is computed as before), heads of attention, and gated pairs of
    feed-forward layers. Their size is the product of the norms of what writes and what reads them.
    """
    cut = copy.deepcopy(unet)
    with torch.no_grad():
        for part in cut.modules():
            for writers, reader in _units(part):
                norms = [view.flatten(1).norm(dim=1) for view in (*writers, reader)]
                size_U = torch.stack(norms[:-1]).norm(dim=0) * norms[-1]
                cut_U = size_U.argsort()[: int(share * len(size_U))]
                for view in (*writers, reader):
                    view[cut_U] = 0
    return cut


PRUNERS: Mapping[str, Pruner] = {"depth": depth, "width": width}


def holes(module: nn.Module) -> dict[str, Tensor]:
    """What a pruner left of matrices that it cut, by name: 0 where training must leave a zero."""
    return {
        name: (weight != 0).to(weight)
        for name, weight in module.named_parameters()
        if weight.dim() > 1 and 0 < weight.count_nonzero() < weight.numel()
    }


def macs(unet: Any) -> int:
    """Multiplications by weights that are not zero, of one pass over one picture.

    Attention's own products are left out.
    """
    work = 0

    def count(layer: Any, _: Any, output: Tensor) -> None:
        nonlocal work
        places = output.numel() // layer.weight.shape[0]
        work += places * int(layer.weight.count_nonzero())

    layers = [part for part in unet.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    config, like = unet.config, next(unet.parameters())
    side = config.sample_size
    with torch.no_grad():
        unet(
            like.new_zeros((1, config.in_channels, side, side)),
            torch.zeros(1, dtype=torch.long, device=like.device),
            encoder_hidden_states=like.new_zeros((1, 1, config.cross_attention_dim)),
        )
    for hook in hooks:
        hook.remove()
    return work


def _last_up_layer(layers: int) -> Callable[[str], str]:
    """Where a tensor of a UNet of one layer a block came from: up blocks have one layer more."""

    def source(name: str) -> str:
        match = _UP_LAYER.fullmatch(name)
        return f"{match[1]}{layers}{match[3]}" if match and match[2] == "1" else name

    return source


def _units(part: nn.Module) -> Sequence[tuple[Sequence[Tensor], Tensor]]:
    """Views, units first, of the weights that write and that read them, if a part has such."""
    if isinstance(part, ResnetBlock2D):
        groups = part.norm2.num_groups
        return [([_rows(part.conv1, groups)], _columns(part.conv2, groups))]
    if isinstance(part, Attention):
        writers = [_rows(layer, part.heads) for layer in (part.to_q, part.to_k, part.to_v)]
        return [(writers, _columns(part.to_out[0], part.heads))]
    if isinstance(part, FeedForward):
        gated, reader = part.net[0].proj, part.net[2]
        pairs = reader.weight.shape[1]
        return [([gated.weight.unflatten(0, (-1, pairs)).transpose(0, 1)], reader.weight.T)]
    return []


def _rows(layer: Any, units: int) -> Tensor:
    rows: Tensor = layer.weight.unflatten(0, (units, -1))
    return rows


def _columns(layer: Any, units: int) -> Tensor:
    columns: Tensor = layer.weight.transpose(0, 1).unflatten(0, (units, -1))
    return columns
