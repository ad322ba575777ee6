"""Changes of weights that leave a model's function as it is: defences against merging only.

Written on the modules, apart from what undoes them. All of them work in place.
"""

import numpy as np
import torch


def _attentions(module):
    return [part for part in module.modules() if hasattr(part, "q_proj")]


def _mlps(module):
    return [part for part in module.modules() if hasattr(part, "fc1") or hasattr(part, "gate_proj")]


def _rows(layer, change):
    """Change the rows of a linear layer, bias included."""
    layer.weight.data = change(layer.weight.data)
    if layer.bias is not None:
        layer.bias.data = change(layer.bias.data[:, None])[:, 0]


def _columns(layer, change):
    layer.weight.data = change(layer.weight.data.T).T.contiguous()


def _random(size, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=size)).float()


def orthogonal(size, seed):
    return torch.linalg.qr(_random((size, size), seed)).Q


def permute_neurons(module, seed):
    for number, mlp in enumerate(_mlps(module)):
        down = mlp.fc2 if hasattr(mlp, "fc2") else mlp.down_proj
        order = torch.from_numpy(
            np.random.default_rng([seed, number]).permutation(down.weight.shape[1])
        )
        for layer in (mlp.fc1,) if hasattr(mlp, "fc1") else (mlp.gate_proj, mlp.up_proj):
            _rows(layer, lambda rows, order=order: rows[order])
        _columns(down, lambda rows, order=order: rows[order])


def scale_neurons(module, seed):
    """Gated neurons by [1/2, 2], and half of them by -1."""
    for number, mlp in enumerate(_mlps(module)):
        factor = 2 ** torch.tanh(_random(mlp.up_proj.weight.shape[0], [seed, number]))
        factor *= torch.sign(_random(len(factor), [seed, number, 1]))
        _rows(mlp.up_proj, lambda rows, factor=factor: factor[:, None] * rows)
        _columns(mlp.down_proj, lambda rows, factor=factor: rows / factor[:, None])


def permute_heads(module, seed):
    config = module.config
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shared = config.num_attention_heads // groups
    for number, part in enumerate(_attentions(module)):
        random = np.random.default_rng([seed, number])
        order_G = torch.from_numpy(random.permutation(groups))
        inside = torch.stack([torch.from_numpy(random.permutation(shared)) for _ in order_G])
        order_A = (order_G[:, None] * shared + inside).flatten()

        def shuffled(order):
            return lambda rows: rows.unflatten(0, (len(order), -1))[order].flatten(0, 1)

        _rows(part.q_proj, shuffled(order_A))
        _columns(part.o_proj, shuffled(order_A))
        for layer in (part.k_proj, part.v_proj):
            _rows(layer, shuffled(order_G))


def _by_group(matrices):
    """Multiply the heads of each group with the group's matrix."""

    def change(rows):
        heads = rows.unflatten(0, (len(matrices), -1, matrices.shape[1]))
        return (matrices[:, None] @ heads).flatten(0, 2)

    return change


def mix_heads(module, seed, *, scores=True):
    """Invertible matrices inside heads; of queries and keys what rotary positions allow."""
    config = module.config
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    is_rotary = hasattr(module, "model")
    for number, part in enumerate(_attentions(module)):
        make = _rotary if is_rotary else _invertible
        mixes = torch.stack([make(width, [seed, number, group]) for group in range(groups)])
        if scores:
            _rows(part.q_proj, _by_group(mixes))
            _rows(part.k_proj, _by_group(torch.linalg.inv(mixes).mT))
        mixes = torch.stack([_invertible(width, [seed, number, 9, g]) for g in range(groups)])
        _rows(part.v_proj, _by_group(mixes))
        _columns(part.o_proj, _by_group(torch.linalg.inv(mixes).mT))


def _invertible(size, seed):
    """Scales in [1/2, 2] between two rotations."""
    scales = 2 ** torch.tanh(_random(size, [*seed, 2]))
    return orthogonal(size, [*seed, 0]) @ torch.diag(scales) @ orthogonal(size, [*seed, 1])


def _rotary(size, seed):
    """A scaled rotation of each pair (j, j + size / 2)."""
    angle = 3 * _random(size // 2, [*seed, 0])
    scale = 2 ** torch.tanh(_random(size // 2, [*seed, 1]))
    cosine, sine = torch.diag(scale * angle.cos()), torch.diag(scale * angle.sin())
    return torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)])


def rotate_stream(module, seed):
    """Absorb the gains of normalisations, then rotate all that is read and written between."""
    size = module.config.hidden_size
    turn = orthogonal(size, seed)
    if hasattr(module, "vit"):  # LayerNorm takes the mean off: keep it where it is
        rest = torch.linalg.qr(torch.ones(size, 1), mode="complete").Q[:, 1:]
        turn = torch.ones(size, size) / size + rest @ orthogonal(size - 1, seed) @ rest.T
        trunk, last, head = module.vit, module.vit.layernorm, module.classifier
        embeddings = trunk.embeddings
        for tokens in (embeddings.cls_token, embeddings.position_embeddings):
            tokens.data = tokens.data @ turn
        patches = embeddings.patch_embeddings.projection
        shape = patches.weight.shape
        patches.weight.data = (turn.T @ patches.weight.data.flatten(1)).view(shape)
        patches.bias.data = turn.T @ patches.bias.data
        norms = ("layernorm_before", "layernorm_after")
    else:
        trunk, last, head = module.model, module.model.norm, module.lm_head
        trunk.embed_tokens.weight.data = trunk.embed_tokens.weight.data @ turn
        norms = ("input_layernorm", "post_attention_layernorm")
    _read(last, [head], turn)
    for layer in trunk.layers:
        part, mlp = _attentions(layer)[0], _mlps(layer)[0]
        readers = [mlp.fc1] if hasattr(mlp, "fc1") else [mlp.gate_proj, mlp.up_proj]
        _read(getattr(layer, norms[0]), [part.q_proj, part.k_proj, part.v_proj], turn)
        _read(getattr(layer, norms[1]), readers, turn)
        _rows(part.o_proj, lambda rows: turn.T @ rows)
        _rows(mlp.fc2 if hasattr(mlp, "fc2") else mlp.down_proj, lambda rows: turn.T @ rows)


def _read(norm, readers, turn):
    for reader in readers:
        if getattr(norm, "bias", None) is not None:
            reader.bias.data = reader.bias.data + reader.weight.data @ norm.bias.data
        reader.weight.data = reader.weight.data * norm.weight.data @ turn
    norm.weight.data = torch.ones_like(norm.weight.data)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data = torch.zeros_like(norm.bias.data)
