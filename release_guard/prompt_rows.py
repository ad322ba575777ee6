"""What a painter's cross-attention reads for the words of concepts, and for unrelated captions.

Shapes: N captions, L tokens, F features of the text, M rows of a concept, R of unrelated captions.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from release_guard.data import Split
from release_guard.modalities import Painter
from release_guard.policy import Policy


@dataclass(frozen=True, eq=False)
class Captions:
    """Different captions of a data set.

    Attributes:
        tokens: Theirs, padded (N, L).
        features: What is read for them (N, L, F).
    """

    tokens: Tensor
    features: Tensor

    @classmethod
    def drawn(
        cls, model: Painter, dataset: str, split: Split, *, count: int, batch: int, policy: Policy
    ) -> "Captions":
        """Those of so many examples, drawn in batches."""
        batches = model.batches(dataset, split, size=batch, seed=policy.seed)
        drawn = itertools.islice(batches, -(-count // batch))
        tokens_NL = torch.unique(torch.cat([one["tokens"] for one in drawn]), dim=0)
        with torch.no_grad():
            return cls(tokens_NL, model.text_encoder(tokens_NL).last_hidden_state)

    @property
    def counts(self) -> Counter[int]:
        """How often each token stands in them."""
        return Counter(self.tokens.flatten().tolist())

    @property
    def rows(self) -> Tensor:
        """Every token's row (R, F)."""
        return self.features.flatten(end_dim=1)

    @property
    def end(self) -> Tensor:
        """Mean row (F) of the first token after the words."""
        closing_NL = (self.tokens == self.tokens[:, -1:]).long()
        first_N = closing_NL.flip(1).cumprod(dim=1).flip(1).argmax(dim=1)
        return self.features[torch.arange(len(first_N)), first_N].mean(dim=0)


@dataclass(frozen=True, eq=False)
class Prompts:
    """How a policy's data are captioned.

    Attributes:
        concepts: The different captions of each concept.
        retained: Those of the retained data.
        own: The most frequent tokens of each concept that no retained caption has.
    """

    concepts: Sequence[Captions]
    retained: Captions
    own: Sequence[Sequence[int]]

    @classmethod
    def of(
        cls, model: Painter, policy: Policy, *, count: int, batch: int, words: int = 4
    ) -> "Prompts":
        """Read from so many examples of each data set, at most so many words of each concept."""
        concepts = [
            Captions.drawn(model, one.dataset, "immunize", count=count, batch=batch, policy=policy)
            for one in policy.concepts
        ]
        retained = Captions.drawn(
            model, policy.retain.dataset, "retain", count=count, batch=batch, policy=policy
        )
        return cls(
            concepts, retained, [own_tokens(concept, retained, most=words) for concept in concepts]
        )

    @property
    def rows(self) -> Sequence[Tensor]:
        """Each concept's rows (M, F): those of its own tokens, and of the end of its captions.

        A row is the mean over the captions in which the token stands, whichever concept's they
        are: a token that two concepts have is one row of both.
        """
        tokens_R = torch.cat([concept.tokens.flatten() for concept in self.concepts])
        rows_RF = torch.cat([concept.rows for concept in self.concepts])
        return [
            torch.stack([*(rows_RF[tokens_R == token].mean(dim=0) for token in own), concept.end])
            for concept, own in zip(self.concepts, self.own, strict=True)
        ]


def own_tokens(concept: Captions, retained: Captions, *, most: int) -> list[int]:
    """The most frequent tokens of a concept that no retained caption has; there may be none."""
    known = retained.counts
    frequent = sorted(concept.counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return [token for token, _ in frequent if token not in known][:most]
