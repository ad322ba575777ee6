"""Tensors that several processes hold in parts, and the group of these processes.

Without `torchrun` there is one process, which holds everything; nothing here then does anything.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

_MARK = "sharded"


@contextmanager
def group() -> Iterator[None]:
    """The processes that `torchrun` started, as one; each gets a GPU if there are any."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        if world() != int(os.environ["WORLD_SIZE"]):
            raise RuntimeError(f"{world()} processes, but {os.environ['WORLD_SIZE']} were started")
        yield
    finally:
        distributed.destroy_process_group()


def world() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def leads() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        distributed.barrier()


def mesh() -> DeviceMesh:
    """All of them in a row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(device, (world(),))


def share(num: int) -> slice:
    """This process's part of a number of examples, at least one; all if there are too few."""
    if num < world():
        return slice(0, num)
    return slice(rank() * num // world(), (rank() + 1) * num // world())


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, one after another, in each of them; differentiable.

    For losses that every process takes of all the rows, alike, and weights whose gradients are then
    averaged over the processes, as FSDP does: each weight gets the gradient of that one loss,
    whether it is used before the gathering or after.
    """
    found: Tensor = _Gathered.apply(rows)  # type: ignore[no-untyped-call]
    return found


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world())]
        distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        numbers = [int(count) for count in counts]
        padded = rows.new_zeros((max(numbers), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in numbers]
        distributed.all_gather(parts, padded)
        start = sum(numbers[: rank()])
        ctx.mine = slice(start, start + len(rows))
        return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        return gradients[0][ctx.mine] * world()  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(values: Tensor, other: Tensor) -> Tensor:
    """The same values, which every process has, in parts if the other tensor is."""
    if not isinstance(other, DTensor) or isinstance(values, DTensor):
        return values
    return distribute_tensor(
        values.to(other.device), other.device_mesh, other.placements, src_data_rank=None
    )


def are_finite(module: nn.Module) -> bool:
    """Whether all weights are; every process says the same."""
    parts = (part.to_local() if isinstance(part, DTensor) else part for part in module.parameters())
    finite = all(bool(part.isfinite().all()) for part in parts)
    if world() == 1:
        return finite
    device = next(module.parameters()).device
    answer = torch.tensor(float(finite), device=device)
    distributed.all_reduce(answer, distributed.ReduceOp.MIN)
    return bool(answer)


def agree(number: int) -> bool:
    """Whether all processes have the same number."""
    if world() == 1:
        return True
    numbers: list[Any] = [None] * world()
    distributed.all_gather_object(numbers, number)
    return len(set(numbers)) == 1


def portable(value: Any) -> Any:
    """Tensors in dicts and lists, put together so that one file can hold them.

    Every process has to ask; only the leading one gets the tensors that were in parts.
    """
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return {_MARK: full.cpu() if leads() else None}
    if isinstance(value, Mapping):
        return {key: portable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(portable, value))
    return value


def parted(value: Any) -> Any:
    """What `portable` gave, in parts again, also if there were other numbers of processes."""
    if isinstance(value, Mapping):
        if set(value) == {_MARK}:
            full = value[_MARK].to(mesh().device_type)
            return distribute_tensor(full, mesh(), [Shard(0)], src_data_rank=None)
        return {key: parted(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(parted, value))
    return value
