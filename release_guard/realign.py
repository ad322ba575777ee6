"""Undo what leaves a model's function as it is, so that it merges again.

A defence may permute heads and neurons, scale them, mix the dimensions inside heads, and rotate the
residual stream: the model answers as before, and its weights no longer average with anybody's. The
public ancestor gives it away: fine-tuning moves weights little, so the form nearest to the ancestor
is almost the one before.

Shapes: D residual stream, G groups of heads with one key and value each, S query heads of a group,
H dimensions of a head, I inputs and the bias as a last one, N neurons.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from release_guard.alignment import (
    assignment,
    cosines,
    joint_fit,
    least_squares,
    rotary_fit,
    rotation,
    scales,
)
from release_guard.anatomy import Anatomy, Attention, Mlp, Stream
from release_guard.errors import ModelError
from release_guard.merging import State, put_rows, with_bias

Method = Literal["anchored", "joint", "rotated"]
Role = Literal["query", "key", "value", "output"]
Fit = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_ROUNDS = 4  # of rotating and matching: each sees more once the other is nearly right
_TINY = 1e-30
_ROLES = get_args(Role)


def realign(state: State, base: State, body: Anatomy, method: Method) -> State:
    """The same model in the form nearest to its ancestor, computed in double precision.

    Args:
        state: Weights of the release.
        base: Weights of the public ancestor; for `rotated` those that `absorbed` gives.
        body: Where the parts are.
        method: anchored: least squares for each projection of each head, and neurons matched, as
            the anchor-guided attack of arXiv 2606.30360 does; it bends the function a little and
            gives up a part of what was learnt. joint: exact on the function; neurons and heads
            matched and scaled, queries fitted together with keys, values with outputs. rotated:
            before that, gains of normalisations absorbed and the residual stream rotated back.

    Raises:
        ModelError: `rotated`, and it is not known where the residual stream of this model is.
    """
    work, anchor = (
        {name: value.double() for name, value in one.items() if value.is_floating_point()}
        for one in (state, base)
    )
    if method == "rotated":
        work = absorbed(work, body)
        for number in range(_ROUNDS):
            _rotate(work, anchor, body, finely=number > 0)
            _match_all_neurons(work, anchor, body)
    else:
        _match_all_neurons(work, anchor, body)
    for attention in body.attentions:
        if method == "anchored":
            _anchor_heads(work, anchor, attention)
        else:
            _match_heads(work, anchor, attention)
            _fit_heads(work, anchor, attention)
    return {
        name: work[name].to(value.dtype) if name in work else value for name, value in state.items()
    }


def absorbed(state: State, body: Anatomy) -> State:
    """Gains and biases of normalisations moved into the linear layers that read them.

    Raises:
        ModelError: It is not known where the residual stream of this model is.
    """
    done = dict(state)
    for norm, readers in _stream(body).norms:
        gain_D, bias_D = state[f"{norm}.weight"], state.get(f"{norm}.bias")
        for reader in readers:
            weight_OD = state[f"{reader}.weight"]
            done[f"{reader}.weight"] = weight_OD * gain_D
            if bias_D is not None:
                done[f"{reader}.bias"] = state[f"{reader}.bias"] + weight_OD @ bias_D
        done[f"{norm}.weight"] = torch.ones_like(gain_D)
        if bias_D is not None:
            done[f"{norm}.bias"] = torch.zeros_like(bias_D)
    return done


def can_be_turned(body: Anatomy, state: State) -> bool:
    """Whether its residual stream is known, and whatever reads a bias can take it over."""
    return body.stream is not None and all(
        f"{norm}.bias" not in state or f"{reader}.bias" in state
        for norm, readers in body.stream.norms
        for reader in readers
    )


def swapped(state: State, base: State, body: Anatomy, part: Literal["attention", "mlp"]) -> State:
    """The model with all of its attention, or all of its neurons, from the base."""
    parts = body.attentions if part == "attention" else body.mlps
    prefixes = tuple(f"{layer}." for one in parts for layer in one.layers)
    return {name: base[name] if name.startswith(prefixes) else state[name] for name in state}


def _rotate(work: State, anchor: State, body: Anatomy, *, finely: bool) -> None:
    """Rotate the residual stream in place: by the embeddings, and finely by the neurons too."""
    stream = _stream(body)

    def vectors(state: State) -> Tensor:
        parts = [_along(state[name], axis) for name, axis in stream.inputs]
        if finely:
            parts += [state[f"{mlp.down}.weight"].T for mlp in body.mlps]
            parts += [state[f"{layer}.weight"] for mlp in body.mlps for layer in mlp.readers]
        return torch.cat(parts)

    turn_stream(work, stream, rotation(vectors(work), vectors(anchor), centred=stream.centred))


def turn_stream(work: State, stream: Stream, turn_DD: Tensor) -> None:
    """Rotate, in place, all that is written to the residual stream and read from it.

    Keeps the function where normalisations have no gains and, if they are centred, the matrix keeps
    the mean.
    """
    for name, axis in stream.inputs:
        work[name] = (work[name].movedim(axis, -1) @ turn_DD).movedim(-1, axis)
    for output in stream.outputs:
        put_rows(work, output, turn_DD.T @ with_bias(work, output))
    for _, readers in stream.norms:
        for reader in readers:
            work[f"{reader}.weight"] = work[f"{reader}.weight"] @ turn_DD


def _along(tensor: Tensor, axis: int) -> Tensor:
    """All vectors of a tensor (N, D) that lie in the residual stream."""
    return tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis])


def _match_all_neurons(work: State, anchor: State, body: Anatomy) -> None:
    for mlp in body.mlps:
        _match_neurons(work, anchor, mlp)


def _match_neurons(work: State, anchor: State, mlp: Mlp) -> None:
    """Bring neurons, in place, into the ancestor's order and scale."""
    down = f"{mlp.down}.weight"
    likeness_NN = cosines(with_bias(anchor, mlp.gate), with_bias(work, mlp.gate))
    outward_NN = cosines(anchor[down].T, work[down].T)
    if mlp.up:  # both may have changed their sign
        likeness_NN += cosines(with_bias(anchor, mlp.up), with_bias(work, mlp.up)).abs()
        outward_NN = outward_NN.abs()
    order_N = assignment(-likeness_NN - outward_NN)
    for layer in mlp.readers:
        put_rows(work, layer, with_bias(work, layer)[order_N])
    work[down] = work[down][:, order_N]
    if mlp.scaling == "none":
        return
    layer = mlp.up or mlp.gate
    ours_NI, theirs_NI = with_bias(work, layer), with_bias(anchor, layer)
    scale_N = (scales(ours_NI, theirs_NI) * scales(anchor[down].T, work[down].T)).sqrt()
    if mlp.scaling == "signed":
        scale_N[(ours_NI * theirs_NI).sum(dim=1) < 0] *= -1
    put_rows(work, layer, scale_N[:, None] * ours_NI)
    work[down] = work[down] / scale_N


def _match_heads(work: State, anchor: State, attention: Attention) -> None:
    """Bring heads, in place, into the ancestor's order: by what each writes for what it reads.

    The product of a head's outputs with its values stays as it is if the head is mixed inside.
    """
    likeness_GGSS = _head_cosines(anchor, work, attention).movedim(2, 1)
    pairs = [[assignment(-block_SS) for block_SS in row_GSS] for row_GSS in likeness_GGSS]
    inside_GGS = torch.stack([torch.stack(row) for row in pairs])
    order_G = assignment(-likeness_GGSS.gather(3, inside_GGS[..., None]).sum(dim=(2, 3)))
    here_G = torch.arange(attention.groups, device=order_G.device)
    order_GS = inside_GGS[here_G, order_G]
    for role in _ROLES:
        heads_GSHI = heads_of(work, attention, role)[order_G]
        if role in {"query", "output"}:
            heads_GSHI = heads_GSHI[here_G[:, None], order_GS]
        put_heads(work, attention, role, heads_GSHI)


def _head_cosines(one: State, other: State, attention: Attention) -> Tensor:
    """Cosines (G, S, G, S) of the products of outputs with values, of one and the other model."""

    def inner(one: State, other: State) -> Tensor:
        outputs = (heads_of(state, attention, "output") for state in (one, other))
        values = (heads_of(state, attention, "value")[:, 0] for state in (one, other))
        outward = torch.einsum("gshd,ftkd->gsfthk", *outputs)
        inward = torch.einsum("ghi,fki->gfhk", *values)
        return torch.einsum("gsfthk,gfhk->gsft", outward, inward)

    def norms(state: State) -> Tensor:
        squares_GSGS = inner(state, state)
        lengths = squares_GSGS.flatten(0, 1).flatten(1).diagonal().clamp_min(_TINY).sqrt()
        return lengths.view(squares_GSGS.shape[:2])

    return inner(one, other) / torch.einsum("gs,ft->gsft", norms(one), norms(other))


def _fit_heads(work: State, anchor: State, attention: Attention) -> None:
    """Unmix heads, in place: queries together with keys, values together with outputs."""
    if attention.mixing != "none":
        fit = rotary_fit if attention.mixing == "rotary" else joint_fit
        _fit_pair(work, anchor, attention, ("query", "key"), fit)
    _fit_pair(work, anchor, attention, ("value", "output"), joint_fit)


def _fit_pair(
    work: State, anchor: State, attention: Attention, roles: tuple[Role, Role], fit: Fit
) -> None:
    parts = [
        heads_of(state, attention, role).movedim(1, 2).flatten(2)  # heads of a group side by side
        for state in (work, anchor)
        for role in roles
    ]
    mixes_GHH = torch.stack([fit(*group) for group in zip(*parts, strict=True)])
    for role, mix_GHH in zip(roles, (mixes_GHH, torch.linalg.inv(mixes_GHH).mT), strict=True):
        put_heads(work, attention, role, mix_GHH[:, None] @ heads_of(work, attention, role))


def _anchor_heads(work: State, anchor: State, attention: Attention) -> None:
    """Bring each projection of each head near its ancestor's, in place, whatever that bends."""
    for role in _ROLES:
        ours, theirs = (heads_of(state, attention, role) for state in (work, anchor))
        pairs = zip(ours.flatten(0, 1), theirs.flatten(0, 1), strict=True)
        mixes_AHH = torch.stack([least_squares(*pair) for pair in pairs])
        put_heads(work, attention, role, (mixes_AHH @ ours.flatten(0, 1)).view_as(ours))


def heads_of(state: State, attention: Attention, role: Role) -> Tensor:
    """Rows of a projection, or columns of the output layer, by head (G, S, H, I)."""
    layer = getattr(attention, role)
    rows = state[f"{layer}.weight"].T if role == "output" else with_bias(state, layer)
    width = len(state[f"{attention.key}.weight"]) // attention.groups
    return rows.reshape(attention.groups, -1, width, rows.shape[1])


def put_heads(state: State, attention: Attention, role: Role, heads_GSHI: Tensor) -> None:
    """Put back, in place, what `heads_of` gave."""
    layer, rows = getattr(attention, role), heads_GSHI.flatten(0, 2)
    if role == "output":
        state[f"{layer}.weight"] = rows.T
    else:
        put_rows(state, layer, rows)


def _stream(body: Anatomy) -> Stream:
    if body.stream is None:
        reason = "it is not known how its residual stream may be turned"
        raise ModelError(f"this model cannot be realigned with rotations: {reason}; use joint")
    return body.stream
