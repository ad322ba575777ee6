"""Changes of the weights that leave the function as it is, and the way back from them.

A gauge permutes heads and neurons, mixes the dimensions inside heads, moves the gains of
normalisations and rotates the residual stream: plain averages with anybody's weights become
worthless. Whoever holds the public base undoes all of it (`realign`), so a gauge is obfuscation and
no defence by itself. Computed in double precision from full-precision weights, then cast once.

Shapes: D residual stream, G groups of heads with one key and value each, S query heads of a group,
H dimensions of a head, N neurons.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from release_guard.alignment import assignment
from release_guard.anatomy import Anatomy, Attention, Mlp, Stream
from release_guard.merging import State, put_rows, with_bias
from release_guard.realign import Role, absorbed, heads_of, put_heads, turn_stream

Change = Literal["neurons", "scales", "heads", "queries", "values", "norms", "stream"]
Style = Literal["orthogonal", "diagonal", "general"]
Kept = Mapping[str, Sequence[float]]

_ROLES = get_args(Role)
_BYTES, _UNIT = 8, 2.0**-64


@dataclass(frozen=True)
class Key:
    """A secret from which every number of a gauge follows, whatever the versions of libraries.

    SHAKE-256 of the secret and of what a number is for.
    """

    secret: bytes

    def uniform(self, purpose: str, count: int) -> Tensor:
        """Numbers in (0, 1), double precision."""
        stream = hashlib.shake_256(self.secret + purpose.encode()).digest(_BYTES * count)
        drawn = torch.frombuffer(bytearray(stream), dtype=torch.int64).double()
        return (drawn * _UNIT + 0.5).clamp(_UNIT, 1 - 2.0**-53)

    def order(self, purpose: str, count: int) -> Tensor:
        """A permutation."""
        return self.uniform(purpose, count).argsort(stable=True)

    def scales(self, purpose: str, count: int) -> Tensor:
        """Factors in [1/2, 2], log-uniform."""
        drawn: Tensor = 2 ** (2 * self.uniform(purpose, count) - 1)
        return drawn

    def signs(self, purpose: str, count: int) -> Tensor:
        """Factors 1 and -1."""
        return (self.uniform(purpose, count) - 0.5).sign()

    def orthogonal(self, purpose: str, size: int) -> Tensor:
        """A uniformly drawn orthogonal matrix (size, size)."""
        one, two = self.uniform(purpose, 2 * size * size).view(2, size, size)
        normal = (-2 * one.log()).sqrt() * (2 * math.pi * two).cos()
        found, upper = torch.linalg.qr(normal)
        turn: Tensor = found * upper.diagonal().sign()
        return turn

    def mix(self, purpose: str, size: int, style: Style) -> Tensor:
        """An invertible matrix (size, size) of condition 4 at most; orthogonal ones have 1."""
        if style == "orthogonal":
            return self.orthogonal(purpose, size)
        stretch = torch.diag(self.scales(f"{purpose} scales", size))
        if style == "diagonal":
            return stretch
        left, right = (self.orthogonal(f"{purpose} {side}", size) for side in ("left", "right"))
        return left @ stretch @ right

    def rotary(self, purpose: str, size: int, style: Style) -> Tensor:
        """A scaled rotation of each rotary pair (j, j + size / 2)."""
        half = size // 2
        angle = 2 * math.pi * self.uniform(f"{purpose} angles", half)
        scale = self.scales(f"{purpose} scales", half)
        scale = torch.ones_like(scale) if style == "orthogonal" else scale
        angle = torch.zeros_like(angle) if style == "diagonal" else angle
        cosine, sine = torch.diag(scale * angle.cos()), torch.diag(scale * angle.sin())
        return torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)])

    def flips(self, purpose: str, size: int) -> Tensor:
        """Rotary pairs turned by half a circle: all that norms on queries and keys allow."""
        return torch.diag(self.signs(purpose, size // 2).repeat(2))


@dataclass(frozen=True)
class Gauge:
    """Which changes are made, and what is needed to take them back.

    Attributes:
        key: Where its numbers come from.
        changes: In the order in which they are made.
        style: Matrices inside heads, and factors: orthogonal ones (and signs), diagonal ones in
            [1/2, 2], or products of both.
        body: Where the model's parts are.
        tied: The last layer is the input embedding.
        kept: What the key does not give: orders of neurons that depend on the weights, gains of
            normalisations that were absorbed.
    """

    key: Key
    changes: tuple[Change, ...]
    style: Style
    body: Anatomy
    tied: bool = False
    kept: Kept = field(default_factory=dict)

    def applied(self, state: State) -> State:
        """The same function in other weights."""
        return self._changed(state, self.changes, back=False)

    def undone(self, state: State) -> State:
        """The weights before, up to rounding."""
        return self._changed(state, self.changes[::-1], back=True)

    def keeping(self, state: State) -> "Gauge":
        """The same, with the gains that it absorbs written down."""
        if "stream" not in self.changes:
            return self
        before = [change for change in self.changes if change != "stream"]
        moved = self._changed(state, before[: self.changes.index("stream")], back=False)
        gains = {
            name: moved[name].double().tolist()
            for norm, _ in self.stream.norms
            for name in (f"{norm}.weight", f"{norm}.bias")
            if name in moved
        }
        return Gauge(
            self.key, self.changes, self.style, self.body, self.tied, {**self.kept, **gains}
        )

    @property
    def stream(self) -> Stream:
        """The residual stream; only where it is known."""
        if self.body.stream is None:
            raise ValueError("it is not known how the residual stream may be turned")
        return self.body.stream

    def _changed(self, state: State, changes: Sequence[Change], *, back: bool) -> State:
        work = {
            name: value.double() if value.is_floating_point() else value
            for name, value in state.items()
        }
        for change in changes:
            work = _MAKE[change](self, work, back)
        return {name: work[name].to(value.dtype) for name, value in state.items()}


def _neurons(gauge: Gauge, work: State, back: bool) -> State:  # T1
    for number, mlp in enumerate(gauge.body.mlps):
        name, down = f"neurons {number}", f"{mlp.down}.weight"
        count = work[down].shape[1]
        known = gauge.kept.get(name)
        order_N = gauge.key.order(name, count) if known is None else torch.tensor(known).long()
        order_N = order_N.argsort() if back else order_N
        for layer in mlp.readers:
            put_rows(work, layer, with_bias(work, layer)[order_N])
        work[down] = work[down][:, order_N]
    return work


def _scales(gauge: Gauge, work: State, back: bool) -> State:  # T2
    for number, mlp in enumerate(gauge.body.mlps):
        down, layer = f"{mlp.down}.weight", mlp.up or mlp.gate
        factor_N = _factors(gauge, mlp, f"scales {number}", work[down].shape[1])
        factor_N = (1 / factor_N if back else factor_N).to(work[down])
        put_rows(work, layer, factor_N[:, None] * with_bias(work, layer))
        work[down] = work[down] / factor_N
    return work


def _factors(gauge: Gauge, mlp: Mlp, name: str, count: int) -> Tensor:
    factor_N = torch.ones(count, dtype=torch.float64)
    if mlp.scaling != "none" and gauge.style != "orthogonal":
        factor_N = factor_N * gauge.key.scales(name, count)
    if mlp.scaling == "signed":
        factor_N = factor_N * gauge.key.signs(f"{name} signs", count)
    return factor_N


def _head_order(gauge: Gauge, work: State, back: bool) -> State:  # T3
    for number, attention in enumerate(gauge.body.attentions):
        shared = attention.heads // attention.groups
        order_G = gauge.key.order(f"heads {number}", attention.groups)
        order_GS = torch.stack(
            [gauge.key.order(f"heads {number} {at}", shared) for at in range(attention.groups)]
        )
        if back:  # head order_GS[g, s] of group order_G[g] went to place (g, s)
            order_G, order_GS = order_G.argsort(), order_GS[order_G.argsort()].argsort(dim=1)
        for role in _ROLES:
            heads_GSHI = heads_of(work, attention, role)[order_G]
            if role in {"query", "output"}:
                here_G1 = torch.arange(attention.groups)[:, None]
                heads_GSHI = heads_GSHI[here_G1, order_GS]
            put_heads(work, attention, role, heads_GSHI)
    return work


def _queries(gauge: Gauge, work: State, back: bool) -> State:  # T4, T4r, or signs
    for number, attention in enumerate(gauge.body.attentions):
        name = f"queries {number}"
        make: Callable[[str, int], Tensor] = {
            "any": lambda purpose, size: gauge.key.mix(purpose, size, gauge.style),
            "rotary": lambda purpose, size: gauge.key.rotary(purpose, size, gauge.style),
            "none": gauge.key.flips,
        }[attention.mixing]
        _mix_pair(work, attention, ("query", "key"), name, make, back=back)
    return work


def _values(gauge: Gauge, work: State, back: bool) -> State:  # T5
    for number, attention in enumerate(gauge.body.attentions):

        def make(purpose: str, size: int) -> Tensor:
            return gauge.key.mix(purpose, size, gauge.style)

        _mix_pair(work, attention, ("value", "output"), f"values {number}", make, back=back)
    return work


def _mix_pair(
    work: State,
    attention: Attention,
    roles: tuple[Role, Role],
    name: str,
    make: Callable[[str, int], Tensor],
    *,
    back: bool,
) -> None:
    """One matrix a group, in place; its inverse transposed for what it is multiplied with."""
    heads_GSHI = heads_of(work, attention, roles[0])
    groups, size = heads_GSHI.shape[0], heads_GSHI.shape[2]
    mix_GHH = torch.stack([make(f"{name} {group}", size) for group in range(groups)])
    mix_GHH = mix_GHH.to(heads_GSHI)
    mix_GHH = torch.linalg.inv(mix_GHH) if back else mix_GHH
    for role, matrix_GHH in zip(roles, (mix_GHH, torch.linalg.inv(mix_GHH).mT), strict=True):
        put_heads(work, attention, role, matrix_GHH[:, None] @ heads_of(work, attention, role))


def _norms(gauge: Gauge, work: State, back: bool) -> State:  # T6
    last = gauge.stream.norms[0][0]
    for norm, readers in gauge.stream.norms:
        if gauge.tied and norm == last:
            continue  # its reader is the input embedding too
        gain_D = work[f"{norm}.weight"]
        factor_D = gauge.key.scales(f"norms {norm}", len(gain_D)).to(gain_D)
        factor_D = 1 / factor_D if back else factor_D
        for name in (f"{norm}.weight", f"{norm}.bias"):
            if name in work:
                work[name] = work[name] * factor_D
        for reader in readers:
            work[f"{reader}.weight"] = work[f"{reader}.weight"] / factor_D
    return work


def _turned(gauge: Gauge, work: State, back: bool) -> State:  # T7
    stream, size = gauge.stream, len(work[f"{gauge.stream.norms[0][0]}.weight"])
    like = work[f"{stream.norms[0][0]}.weight"]
    turn_DD = _turn(gauge.key, size, centred=stream.centred).to(like)
    if not back:
        work = absorbed(work, gauge.body)
        turn_stream(work, stream, turn_DD)
        return work
    turn_stream(work, stream, turn_DD.T)
    for norm, readers in stream.norms:
        gain_D = torch.tensor(gauge.kept[f"{norm}.weight"]).to(like)
        work[f"{norm}.weight"] = gain_D
        for reader in readers:
            work[f"{reader}.weight"] = work[f"{reader}.weight"] / gain_D
        if (bias := gauge.kept.get(f"{norm}.bias")) is not None:
            bias_D = work[f"{norm}.bias"] = torch.tensor(bias).to(like)
            for reader in readers:
                work[f"{reader}.bias"] = work[f"{reader}.bias"] - work[f"{reader}.weight"] @ bias_D
    return work


def _turn(key: Key, size: int, *, centred: bool) -> Tensor:
    """A rotation; one that keeps every vector's mean where normalisations take it off."""
    if not centred:
        return key.orthogonal("stream", size)
    ones_D1 = torch.ones(size, 1, dtype=torch.float64)
    rest_DE = torch.linalg.qr(ones_D1, mode="complete").Q[:, 1:]
    turn_DD: Tensor = rest_DE @ key.orthogonal("stream", size - 1) @ rest_DE.T + 1 / size
    return turn_DD


_MAKE: Mapping[Change, Callable[[Gauge, State, bool], State]] = {
    "neurons": _neurons,
    "scales": _scales,
    "heads": _head_order,
    "queries": _queries,
    "values": _values,
    "norms": _norms,
    "stream": _turned,
}


def farthest_orders(state: State, base: State, body: Anatomy) -> dict[str, list[float]]:
    """Orders of neurons that bring them as far from the base's as can be (PaRaMS, 2503.07661)."""
    orders = {}
    for number, mlp in enumerate(body.mlps):
        ours, theirs = (
            torch.cat([with_bias(one, layer).double() for layer in mlp.readers], dim=1)
            for one in (state, base)
        )
        down = f"{mlp.down}.weight"
        ours, theirs = (
            torch.cat([rows, one[down].double().T], dim=1)
            for rows, one in ((ours, state), (theirs, base))
        )
        orders[f"neurons {number}"] = assignment(theirs @ ours.T).tolist()
    return orders
