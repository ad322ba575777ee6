"""Weights changed without training: low rank, masks, whitening, scales moved between layers.

Shapes: O outputs and I inputs of a layer, C channels, H attention heads, F features, N rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from release_guard.modalities import Batch, ModelHandle, evaluating

Layer = nn.Linear | nn.Conv2d

_DEAD = 1e-12  # norm of a channel that no scale brings to life
_NEGLIGIBLE = 1e-10  # share of the largest variance below which fp32 features hold noise only
_NO_VARIANCE = 1e-30
_LAYERS = (nn.Linear, nn.Conv2d)
_HOMOGENEOUS = (nn.ReLU, nn.MaxPool2d)  # f(s x) = s f(x) for every s > 0
_KERNEL_DIMENSIONS = 4  # of a convolution's weight
_FILTER_NORM = math.sqrt(2)  # what He initialisation gives a filter


def low_rank(weight: Tensor, rank: int) -> Tensor:
    """The nearest weight of this rank (Eckart and Young): its `rank` largest singular directions.

    A convolution is the matrix of its outputs against all else; a vector has rank one.
    """
    matrix_OI = (
        weight.flatten(1)
        if weight.ndim == _KERNEL_DIMENSIONS
        else weight.reshape(-1, weight.shape[-1])
    )
    left_OR, scale_R, right_RI = torch.linalg.svd(matrix_OI, full_matrices=False)
    nearest_OI: Tensor = (left_OR[:, :rank] * scale_R[:rank]) @ right_RI[:rank]
    return nearest_OI.view_as(weight)


def smallest(score: Tensor, share: float) -> Tensor:
    """Mask of the smallest share of the last dimension's entries, rounded down."""
    order = score.argsort(dim=-1, stable=True)[..., : int(share * score.shape[-1])]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, value=True)


def whitening(covariance_FF: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (F, F) that gives centred rows, times it, unit variance everywhere; its inverse.

    Directions without variance are scaled as if they had a little, so that the inverse exists.
    """
    own_F = covariance_FF.diagonal().sqrt()
    # Each feature in its own unit first: they may differ by more than eigenvalues can tell.
    scale_F = torch.where(own_F > 0, own_F, 1.0)
    correlation_FF = covariance_FF / scale_F.outer(scale_F)
    variances_F, directions_FF = torch.linalg.eigh(correlation_FF)
    floor = (_NEGLIGIBLE * variances_F[-1]).clamp_min(_NO_VARIANCE)
    deviations_F = variances_F.clamp_min(floor).sqrt()
    whitening_FF = directions_FF / deviations_F / scale_F.unsqueeze(1)
    return whitening_FF, deviations_F.unsqueeze(1) * directions_FF.T * scale_F


def normalizations(module: nn.Module) -> list[nn.Module]:
    """The normalisation layers that have weights, known by the name of their class."""
    return [part for part in module.modules() if _is_norm(part)]


def layers_of(module: nn.Module) -> list[Layer]:
    """All linear and convolution layers inside."""
    return [part for part in module.modules() if isinstance(part, _LAYERS)]


@dataclass(frozen=True)
class Move:
    """A change of some parts that should leave the function of the whole alone.

    Attributes:
        parts: All that it changes.
        make: Changes them.
    """

    parts: tuple[nn.Module, ...]
    make: Callable[[], None]


@torch.no_grad()
def settle(moves: Sequence[Move], is_same: Callable[[], bool]) -> int:
    """Make those moves that leave the function alone; returns how many.

    All at once where that works, else each half by itself: what else reads a layer, such as a
    residual sum, shows in no list of layers, but always in the function.
    """
    touched = (tensor for move in moves for part in move.parts for tensor in _tensors(part))
    before = [(tensor, tensor.clone()) for tensor in touched]
    for move in moves:
        move.make()
    if is_same():
        return len(moves)
    for tensor, value in before:
        tensor.copy_(value)
    if len(moves) <= 1:
        return 0
    half = len(moves) // 2
    return settle(moves[:half], is_same) + settle(moves[half:], is_same)


def norm_moves(model: ModelHandle, batch: Batch) -> list[Move]:
    """Set the gains of normalisations to one: the layers that read them take them over.

    Linear layers take gain and shift. Behind a ReLU the next layer takes the gain's size.
    """
    moves = []
    for reading in _readings(model, batch):
        norm, readers = reading.writer, reading.readers
        if not _is_norm(norm) or not all(isinstance(part, _LAYERS) for part in readers):
            continue
        if reading.rectified:
            moves.append(Move((norm, *readers), partial(_hand_on, norm, readers)))
        elif _bias(norm) is None or all(_takes_shift(part) for part in readers):
            moves.append(Move((norm, *readers), partial(_absorb, norm, readers)))
    return moves


def pair_moves(model: ModelHandle, batch: Batch) -> list[Move]:
    """Give both sides of every pair of layers the same norm.

    Values and output projection, up and down projection of a gated block, and layers with a ReLU
    between them: channel by channel. Queries and keys: head by head, as positions rotate the
    channels of a head into each other. A convolution before a batch normalisation, whose
    statistics follow: each filter as if it were freshly made.
    """
    moves = [move for part in model.module.modules() for move in _named_pairs(part)]
    for reading in _readings(model, batch):
        for reader in reading.readers:
            pair = (reading.writer, reader)
            if isinstance(reading.writer, nn.Conv2d) and isinstance(reader, nn.BatchNorm2d):
                moves.append(Move(pair, partial(_renew_filters, reading.writer, reader)))
            elif reading.rectified and len(reading.readers) == 1 and not _is_norm(reading.writer):
                moves.append(Move(pair, partial(_equalize, *pair)))
    return moves


def _is_norm(part: nn.Module) -> bool:
    return "Norm" in type(part).__name__ and part._parameters.get("weight") is not None


def _takes_shift(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and part.bias is not None


def _tensors(part: nn.Module) -> Iterator[Tensor]:
    """Live weights and buffers."""
    yield from part.parameters(recurse=False)
    yield from part.buffers(recurse=False)


@dataclass(frozen=True)
class _Reading:
    """A layer or normalisation, those that read its output, and whether a ReLU stands between."""

    writer: nn.Module
    readers: tuple[nn.Module, ...]
    rectified: bool


def _readings(model: ModelHandle, batch: Batch) -> Iterator[_Reading]:
    """Who reads whose output, seen in a forward pass. Only layers and normalisations show."""
    parts = [part for part in model.module.modules() if _is_norm(part) or isinstance(part, _LAYERS)]
    passing = [part for part in model.module.modules() if isinstance(part, _HOMOGENEOUS)]
    trace = _Trace()
    hooks = [part.register_forward_pre_hook(trace.read) for part in parts]
    hooks += [part.register_forward_hook(trace.write) for part in parts]
    hooks += [part.register_forward_hook(trace.hand_on) for part in passing]
    with evaluating(model.module):
        model.logits(batch)
    for hook in hooks:
        hook.remove()
    if not any(model.head in readers for readers in trace.found.values()):
        # A language model's scored rows are copied out before the head reads them.
        last = [writer for writer, _ in trace.written.values() if _is_norm(writer)][-1:]
        trace.found |= {(norm, False): [model.head] for norm in last}
    for (writer, rectified), readers in trace.found.items():
        if all(_width(part) == len(_weight(writer)) for part in readers):
            yield _Reading(writer, tuple(dict.fromkeys(readers)), rectified)


class _Trace:
    """Hooks that know an output by the memory it lies in."""

    def __init__(self) -> None:
        self.written: dict[int, tuple[nn.Module, bool]] = {}
        self.found: dict[tuple[nn.Module, bool], list[nn.Module]] = {}
        self._alive: list[Tensor] = []  # memory that is used again would be taken for theirs

    def read(self, part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if source := self.written.get(_memory(inputs[0])):
            self.found.setdefault(source, []).append(part)

    def write(self, part: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        self._alive.append(output)
        self.written[_memory(output)] = (part, False)

    def hand_on(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._alive.append(output)
        if source := self.written.get(_memory(inputs[0])):
            self.written[_memory(output)] = (source[0], True)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _weight(part: nn.Module) -> Tensor:
    return part.get_parameter("weight")


def _bias(part: nn.Module) -> Tensor | None:
    return part._parameters.get("bias")


def _width(reader: nn.Module) -> int:
    """Channels it reads."""
    return _weight(reader).shape[0 if _is_norm(reader) else 1]


def _named_pairs(part: nn.Module) -> Iterator[Move]:
    """Pairs inside an attention or a gated block, as `transformers` names their layers."""
    layers = {name: layer for name, layer in part.named_children() if isinstance(layer, nn.Linear)}
    size = getattr(part, "head_dim", None)
    if size is not None and layers.keys() >= {"q_proj", "k_proj", "v_proj", "o_proj"}:
        queries, keys, values, output = (layers[f"{name}_proj"] for name in "qkvo")
        yield Move((queries, keys), partial(_equalize_heads, queries, keys, size))
        yield Move((values, output), partial(_equalize, values, output, size))
    if layers.keys() >= {"gate_proj", "up_proj", "down_proj"}:
        pair = (layers["up_proj"], layers["down_proj"])
        yield Move(pair, partial(_equalize, *pair))


def _absorb(norm: nn.Module, readers: Sequence[nn.Module]) -> None:
    """W (g x + b) + c = (W g) x + (W b + c)."""
    gain_C, shift_C = _weight(norm), _bias(norm)
    for reader in readers:
        if shift_C is not None:
            reader.get_parameter("bias").add_(_weight(reader) @ shift_C)
        _scale_inputs(reader, gain_C)
    gain_C.fill_(1)
    if shift_C is not None:
        shift_C.zero_()


def _hand_on(norm: nn.Module, readers: Sequence[nn.Module]) -> None:
    """W relu(g x + b) = (W |g|) relu((g x + b) / |g|)."""
    size_C = _weight(norm).abs()
    scale_C = torch.where(size_C > _DEAD, size_C, 1.0)
    for tensor in norm.parameters(recurse=False):
        tensor.div_(scale_C)
    for reader in readers:
        _scale_inputs(reader, scale_C)


def _equalize(writer: nn.Module, reader: nn.Module, head_size: int = 1) -> None:
    """Scale outputs by s and inputs by 1 / s; where heads share their values, all who read them."""
    readers = _width(reader) // len(_weight(writer))
    shape = (-1, readers, head_size)
    read_C = (
        _weight(reader).transpose(0, 1).flatten(1).norm(dim=1).view(shape).norm(dim=1).flatten()
    )
    scale_C = _balance(_weight(writer).flatten(1).norm(dim=1), read_C)
    _scale_outputs(writer, scale_C)
    shared = scale_C.reciprocal().view(-1, 1, head_size).expand(shape)
    _scale_inputs(reader, shared.flatten())


def _equalize_heads(queries: nn.Linear, keys: nn.Linear, head_size: int) -> None:
    """A head's scores are q k = (s q) (k / s); heads that share their keys share the scale."""
    num_heads = keys.out_features // head_size
    norms = (part.weight.reshape(num_heads, -1).norm(dim=1) for part in (queries, keys))
    scale_H = _balance(*norms)
    _scale_outputs(queries, scale_H.repeat_interleave(queries.out_features // num_heads))
    _scale_outputs(keys, scale_H.reciprocal().repeat_interleave(head_size))


def _renew_filters(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """(s y - s m) / sqrt(s^2 v + s^2 e) = (y - m) / sqrt(v + e), e = `norm.eps`."""
    norm_C = convolution.weight.flatten(1).norm(dim=1)
    scale_C = torch.where(norm_C > _DEAD, _FILTER_NORM / norm_C, 1.0)
    _scale_outputs(convolution, scale_C)
    mean_C, variance_C = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    mean_C.mul_(scale_C)
    variance_C.add_(norm.eps).mul_(scale_C.square()).sub_(norm.eps)


def _balance(written_C: Tensor, read_C: Tensor) -> Tensor:
    """What makes both sides of a channel equally large."""
    alive_C = (written_C > _DEAD) & (read_C > _DEAD)
    return torch.where(alive_C, (read_C / written_C).sqrt(), 1.0)


def _scale_outputs(layer: nn.Module, scale_C: Tensor) -> None:
    _weight(layer).mul_(scale_C.view(-1, *[1] * (_weight(layer).ndim - 1)))
    if (bias_C := _bias(layer)) is not None:
        bias_C.mul_(scale_C)


def _scale_inputs(layer: nn.Module, scale_C: Tensor) -> None:
    _weight(layer).mul_(scale_C.view(1, -1, *[1] * (_weight(layer).ndim - 2)))
