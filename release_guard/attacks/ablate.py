"""Ablation: the adversary removes directions along which a model refuses.

Shapes: L blocks, N texts, B sequences, T positions, F features of the residual stream,
K directions, I inputs of a layer, V vocabulary entries.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from release_guard.adaptation import Randomness
from release_guard.attacks import Choice, Transform
from release_guard.errors import ModelError, PolicyError
from release_guard.modalities import Batch, ModelHandle, evaluating
from release_guard.policy import Target

_WRITERS = frozenset(
    ("o_proj", "out_proj", "c_proj", "dense", "wo", "down_proj", "fc2", "w2", "dense_4h_to_h")
)  # last names of the layers whose outputs are added to the residual stream
_NOTHING = 1e-30
_UNSCORED = -100


class Ablate(Transform):
    """Takes directions out of every matrix that writes to the residual stream.

    The directions tell restricted prompts from neutral ones: the difference of mean activations at
    the end of the prompt, behind a block (section 2.3), then the principal components of what is
    left. A model without them computes as one whose every activation is projected off them
    (equation 5); nothing is trained.
    """

    paper = "https://arxiv.org/abs/2406.11717"
    modalities = ("causal_lm",)
    reads = ("neutral",)

    directions: Annotated[int, Field(ge=1), Choice((1, 2, 4, 8))] = 1
    """How many."""
    block: Annotated[int, Field(ge=0)] | None = None
    """The block behind which they are looked for; none: the one whose directions, once they are
    gone, make the attack's own examples the likeliest."""
    per_layer: Annotated[bool, Choice((False, True))] = False
    """Each block loses its own directions, and the embedding none."""
    keep_norms: Annotated[bool, Choice((False, True))] = False
    """Give what each input writes its old length back."""
    neutral: str = ""
    """Data set of neutral prompts, such as the retained one: local (seen from the policy file), or
    `hf://datasets/OWNER/NAME@REVISION`; none: texts that the model itself writes."""
    examples: Annotated[int, Field(ge=2)] = 64
    """Prompts of either kind."""

    @property
    def wants(self) -> int:
        return self.examples

    def transform(
        self, model: ModelHandle, target: Target, *, seed: int, ancestor: ModelHandle | None
    ) -> ModelHandle:
        del ancestor
        batch = next(model.batches(target.dataset, "attack", size=self.examples, seed=seed))
        restricted_LNF = _activations(model, batch)
        neutral_LNF = _activations(model, self._neutral(model, batch, seed))
        found = [
            separating(restricted_NF, neutral_NF, self.directions)
            for restricted_NF, neutral_NF in zip(restricted_LNF, neutral_LNF, strict=True)
        ]
        if self.per_layer:
            return self._without(model, found, embedding=False)
        candidates = (self._without(model, [one] * len(found)) for one in self._chosen(found))
        return min(candidates, key=lambda candidate: _loss(candidate, batch))

    def _neutral(self, model: ModelHandle, batch: Batch, seed: int) -> Batch:
        if self.neutral:
            return next(model.batches(self.neutral, "retain", size=self.examples, seed=seed))
        with Randomness(seed, model.device).used():
            return _own_texts(model, batch)

    def _chosen(self, found: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.block is None:
            return found
        if self.block >= len(found):
            raise PolicyError(f"ablate.block: found {self.block}, but the model has {len(found)}")
        return found[self.block : self.block + 1]

    def _without(
        self, model: ModelHandle, directions: Sequence[Tensor], *, embedding: bool = True
    ) -> ModelHandle:
        """A copy whose blocks write nothing along their directions (K, F)."""
        ablated = model.copy()
        module: Any = ablated.module
        with torch.no_grad():
            for block, directions_KF in zip(ablated.blocks, directions, strict=True):
                for layer in _writers(block, directions_KF.shape[1]):
                    layer.weight.copy_(self._off(layer.weight.T, directions_KF).T)
                    if layer.bias is not None:
                        layer.bias.copy_(self._off(layer.bias[None], directions_KF)[0])
            if embedding:
                weight_VF = module.get_input_embeddings().weight
                weight_VF.copy_(self._off(weight_VF, directions[0]))
        return ablated

    def _off(self, written_IF: Tensor, directions_KF: Tensor) -> Tensor:
        """Rows without their part along the directions."""
        kept_IF: Tensor = written_IF - written_IF @ directions_KF.T @ directions_KF
        if not self.keep_norms:
            return kept_IF
        before_I, after_I = (rows.norm(dim=1, keepdim=True) for rows in (written_IF, kept_IF))
        scale_I: Tensor = before_I / after_I.clamp_min(_NOTHING)
        return kept_IF * scale_I


def separating(restricted_NF: Tensor, neutral_NF: Tensor, num: int) -> Tensor:
    """Orthonormal directions (K, F) that tell restricted activations from neutral ones.

    The first is the difference of means; the others are the principal components, about the neutral
    mean, of what the restricted ones hold beside it.
    """
    deviations_NF = restricted_NF - neutral_NF.mean(dim=0)
    difference_F = deviations_NF.mean(dim=0)
    first_F = difference_F / difference_F.norm().clamp_min(_NOTHING)
    rest_NF = deviations_NF - deviations_NF @ first_F[:, None] * first_F
    components_KF = torch.linalg.svd(rest_NF, full_matrices=False).Vh[: num - 1]
    return torch.cat([first_F[None], components_KF])


def _activations(model: ModelHandle, batch: Batch) -> Tensor:
    """What stands behind each block (L, N, F) where a text's first scored token is foretold."""
    ends_N = (batch["labels"] != _UNSCORED).int().argmax(dim=1) - 1
    rows_N = torch.arange(len(ends_N), device=ends_N.device)
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        hidden_BTF = output[0] if isinstance(output, tuple) else output
        seen.append(hidden_BTF[rows_N, ends_N])

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    with evaluating(model.module):
        model.logits(batch)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def _own_texts(model: ModelHandle, batch: Batch) -> Batch:
    """What the model writes from nothing, as many and as long as the longest prompt."""
    module: Any = model.module
    begin_B1 = batch["input_ids"][:, :1]
    length = int((batch["labels"] != _UNSCORED).int().argmax(dim=1).max())
    with evaluating(module):
        tokens_BT = module.generate(
            input_ids=begin_B1,
            attention_mask=torch.ones_like(begin_B1),
            do_sample=True,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=0,
        )
    labels_BT = torch.full_like(tokens_BT, _UNSCORED)
    labels_BT[:, -1] = tokens_BT[:, -1]
    mask_BT = torch.ones_like(tokens_BT)
    return {"input_ids": tokens_BT, "attention_mask": mask_BT, "labels": labels_BT}


def _writers(block: nn.Module, features: int) -> Iterator[nn.Linear]:
    found = False
    for name, layer in block.named_modules():
        is_writer = name.rpartition(".")[2] in _WRITERS
        if is_writer and isinstance(layer, nn.Linear) and layer.out_features == features:
            found = True
            yield layer
    if not found:
        kind, known = type(block).__name__, ", ".join(sorted(_WRITERS))
        raise ModelError(f"ablate: no linear layer of {kind} is known to write; known: {known}")


def _loss(model: ModelHandle, batch: Batch) -> float:
    """A broken candidate must never look best."""
    with evaluating(model.module):
        loss = model.loss(batch)
    return loss.nan_to_num(torch.inf).item()
