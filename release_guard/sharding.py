"""A model whose weights, gradients and optimizer states lie in parts in several processes (FSDP2).

Every process holds its part of each weight and runs its share of every batch. What comes out is
gathered, so that each takes any loss of the whole batch, and the weights move as they would in one
process, to rounding. Source of the partition: PyTorch's `fully_shard`.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from release_guard.data import Split
from release_guard.errors import ModelError
from release_guard.modalities import Batch, ModelHandle, Painter, State
from release_guard.shards import gathered, leads, like, mesh, share, whole, world

_Handle = TypeVar("_Handle", bound=ModelHandle)


def settled(handle: ModelHandle) -> ModelHandle:
    """The model where it is to be trained: a copy on a GPU, or as it is.

    With several processes it is parted in place, so that none of them holds it twice.

    Raises:
        ModelError: It cannot be trained in parts.
    """
    if world() > 1:
        return _shard(handle)
    if not torch.cuda.is_available():
        return handle
    twin = handle.copy()
    twin.module.to("cuda")
    return twin


def gather(handle: ModelHandle) -> ModelHandle | None:
    """The model in one piece, in the leading process; None in the others, which must ask too."""
    return handle.gather() if isinstance(handle, _Sharded) else handle


def forms(handle: ModelHandle) -> Sequence[nn.Module]:
    """The network, and what its copies are made after: options of the former go to both."""
    if isinstance(handle, _Sharded):
        return handle.module, handle.skeleton
    return (handle.module,)


class _Sharded(ModelHandle):
    """Stands before a handle's own class.

    FSDP leaves the outermost weights in one piece after a forward pass that no backward pass
    follows; `hide` parts them again before anything reads, changes or uses them.

    Attributes:
        skeleton: The network without weights, on the device `meta`.
    """

    skeleton: nn.Module

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._of_whole_batch(super().logits, batch)  # type: ignore[safe-super]

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._of_whole_batch(super().features, batch)  # type: ignore[safe-super]

    def scores(self, dataset: str, split: Split, *, limit: int) -> Sequence[float]:
        found = super().scores(dataset, split, limit=limit)  # type: ignore[safe-super]
        self.hide()
        return found

    def state(self) -> State:
        self.hide()
        return super().state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.hide()
        own = self.module.state_dict()
        super().load_state({name: like(value, own[name]) for name, value in state.items()})

    def copy(self) -> Self:
        self.hide()
        twin = copy.copy(self)
        twin.skeleton = copy.deepcopy(self.skeleton)
        twin.module = _partition(twin, copy.deepcopy(self.skeleton))
        _fill(twin.module, self.module)
        return twin

    def reinit_head(self, *, seed: int) -> None:
        self.hide()
        super().reinit_head(seed=seed)  # type: ignore[safe-super]

    def save(self, directory: Path) -> None:
        if (model := self.gather()) is not None:
            model.save(directory)

    def fresh(self, *, seed: int) -> Self:
        return _shard(super().fresh(seed=seed))  # type: ignore[safe-super]

    def peer(self, source: str) -> Self:
        return _shard(super().peer(source))  # type: ignore[safe-super]

    def hide(self) -> None:
        """Let go of whatever weights this process holds beside its part."""
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def gather(self) -> ModelHandle | None:
        """In one piece, in the leading process."""
        self.hide()
        pairs = zip(self.skeleton.parameters(), self.module.parameters(), strict=True)
        memo = {}
        for bare, parameter in pairs:
            values = whole(parameter.detach())
            memo[id(bare)] = nn.Parameter(values, parameter.requires_grad) if leads() else bare
        if not leads():
            return None
        twin = copy.copy(self)
        twin.__class__ = type(self).__mro__[2]  # the handle's own
        twin.module = copy.deepcopy(self.skeleton, memo)
        _copy_rest(twin.module, self.module)
        return twin

    def _of_whole_batch(
        self, run: Callable[[Batch], tuple[Tensor, Tensor]], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Rows (N, ...) and labels (N) of the whole batch, of which this process runs its share."""
        self.hide()
        num = len(next(iter(batch.values())))
        rows_N, labels_N = run({name: value[share(num)] for name, value in batch.items()})
        if num >= world():
            rows_N, labels_N = gathered(rows_N), gathered(labels_N)
        if not torch.is_grad_enabled():
            self.hide()
        return rows_N, labels_N


def _shard(handle: _Handle) -> _Handle:
    """The same handle, its module parted in place.

    Raises:
        ModelError: What it does depends on more of a batch than its rows, one by one.
    """
    if isinstance(handle, Painter):
        raise ModelError("text-to-image models cannot be immunized in several processes; use one")
    parts = handle.module.modules()
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts):
        raise ModelError(
            "a model with batch normalisation cannot be immunized in several processes; use one"
        )
    bare = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), one.requires_grad)
        for one in handle.module.parameters()
    }
    parted: Any = handle
    parted.skeleton = copy.deepcopy(handle.module, bare)
    parted.__class__ = _kind(type(handle))
    handle.module = _partition(handle, handle.module.to(mesh().device_type))
    return handle


@functools.cache
def _kind(own: Any) -> Any:
    return own if issubclass(own, _Sharded) else type(f"Sharded{own.__name__}", (_Sharded, own), {})


def _partition(handle: ModelHandle, module: nn.Module) -> nn.Module:
    """Part a module in place: each block by itself, the head too if nothing shares its weights."""
    handle.module = module
    for block in handle.blocks:
        fully_shard(block, mesh=mesh())
    weight = handle.head.weight
    uses = [part for part in module.modules() if getattr(part, "weight", None) is weight]
    if len(uses) == 1:
        fully_shard(handle.head, mesh=mesh())
    fully_shard(module, mesh=mesh())
    return module


def _fill(twin: nn.Module, source: nn.Module) -> None:
    """Give a parted module without weights those of another one of its kind."""
    made = {
        id(bare): nn.Parameter(_own_part(parameter), parameter.requires_grad)
        for bare, parameter in zip(twin.parameters(), source.parameters(), strict=True)
    }
    for part in twin.modules():
        for name, bare in part._parameters.items():
            if bare is not None:
                part._parameters[name] = made[id(bare)]
    _copy_rest(twin, source)


def _own_part(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        raise TypeError("a weight is in one piece where all must be in parts")
    return parameter.detach().clone()


def _copy_rest(twin: nn.Module, source: nn.Module) -> None:
    """Buffers, and the mode of every part."""
    device = next(source.parameters()).device
    for name, buffer in source.named_buffers():
        owner, _, last = name.rpartition(".")
        twin.get_submodule(owner)._buffers[last] = buffer.detach().clone().to(device)
    for one, other in zip(twin.modules(), source.modules(), strict=True):
        one.training = other.training
