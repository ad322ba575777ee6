"""Causal language models of `transformers`.

Shapes: B sequences, T positions, N scored tokens, V vocabulary entries, F features.
"""

import copy
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from jinja2 import TemplateError
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from release_guard import checkpoints, texts
from release_guard.data import Catalogue, Overlap, Split, Table
from release_guard.errors import ModelError, brief
from release_guard.modalities import (
    Batch,
    Modality,
    ModelHandle,
    as_artefact,
    evaluating,
    names_to_pack,
    reinitialize,
    repeated_layers,
)
from release_guard.policy import Precision
from release_guard.sources import local_folder

_IGNORED = -100  # label of a position that does not count, as in transformers
_MOST_LOGITS = 2**26  # scored at once: 256 MB
_MOST_SEQUENCES = 32


class CausalLm(Modality):
    """Language models that continue text, with their tokenizer.

    A data set takes the first of these forms whose columns it has; texts are used as they are
    written, without a chat template, and a completion begins with its own space:

    - prompt, choices, answer (the right choice or its number): trained on the right choice; an
      example's score is 1 if that choice has the highest log-likelihood per token (a tie: 1 / n).
    - prompt, completion: loss on the completion and the end of text; the score is the share of the
      completion's tokens that are the model's first guess, given those before it.
    - text: loss on every token; the score is the share of first guesses that are right.

    Beyond `max_length` the beginning of a prompt and the end of a text are cut.
    """

    stands_for = "share of right answers or tokens"

    text_column: str = "text"
    """Column of plain text."""
    prompt_column: str = "prompt"
    """Column of the text before a completion or a choice."""
    completion_column: str = "completion"
    """Column of the text to be learnt."""
    choices_column: str = "choices"
    """Column of lists of texts, one of them right."""
    answer_column: str = "answer"
    """Column of the right choice: its number from 0, or its text."""
    max_length: int = Field(256, ge=8)
    """Most tokens of an example."""

    def load(self, source: str, *, artefact: Precision | None = None) -> "LanguageModel":
        folder = local_folder(source)
        module = checkpoints.load(
            source,
            folder,
            auto=AutoModelForCausalLM,
            architectures=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
            modality=self.name,
            artefact=artefact,
        )
        model = LanguageModel(module, _tokenizer(source, folder), self)
        return as_artefact(source, model, artefact)

    def weights(self, folder: Path) -> frozenset[str]:
        return checkpoints.weight_files(str(folder), folder)

    def save_at(self, source: Path, directory: Path, precision: Precision) -> None:
        model = self.load(str(source))
        checkpoints.save_at(
            model.module,
            source,
            directory,
            auto=AutoModelForCausalLM,
            names=names_to_pack(source, model, precision),
            precision=precision,
        )
        model.save_preprocessing(directory)


class LanguageModel(ModelHandle):
    """A language model, its tokenizer and its texts."""

    module: Any

    def __init__(self, module: Any, tokenizer: Any, modality: CausalLm) -> None:
        self.module = module
        self._tokenizer = tokenizer
        self._modality = modality
        columns = texts.Columns(**modality.model_dump(exclude={"max_length"}))
        self._longest = modality.max_length  # a frame may make its own prompts longer
        self._reader = _Reader(columns, modality.max_length, tokenizer, module.config)
        # shared between copies
        self._texts: Callable[[str], _Texts] = functools.cache(self._reader)

    def batches(self, dataset: str, split: Split, *, size: int, seed: int) -> Iterator[Batch]:
        data = self._texts(dataset)
        batches = data.catalogue.batches(split, size=size, seed=seed)
        return (self._batch([data.examples[row].learnt for row in rows]) for rows in batches)

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits_NV, _ = self._run(batch)
        return logits_NV, batch["labels"][:, 1:][_counted(batch)]

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        _, features_NF = self._run(batch)
        return features_NF, batch["labels"][:, 1:][_counted(batch)]

    def scores(self, dataset: str, split: Split, *, limit: int) -> Sequence[float]:
        data = self._texts(dataset)
        rows = data.catalogue.rows(split)[:limit]
        examples = [data.examples[row] for row in rows]
        with evaluating(self.module):
            return [score for some in self._together(examples) for score in self._scores(some)]

    def digest(self, dataset: str) -> str:
        """SHA-256 over the contents of a data set's examples and over how much of each is read."""
        parts = (self._texts(dataset).catalogue.digest, str(self._longest))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def files(self, dataset: str) -> str:
        return self._texts(dataset).catalogue.files

    def overlap(self, dataset: str, other: str) -> Overlap:
        mine, theirs = self._texts(dataset), self._texts(other)
        return Overlap(
            exact=mine.catalogue.share_in(theirs.catalogue),
            near=texts.near_share(mine.contents, theirs.contents),
        )

    @property
    def head(self) -> nn.Linear:
        head: nn.Linear | None = self.module.get_output_embeddings()
        if head is None:
            kind = type(self.module).__name__
            raise ModelError(f"{kind}: it has no last layer of its own; it cannot be probed")
        return head

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return repeated_layers(self.module)

    def reinit_head(self, *, seed: int) -> None:
        if self.head.weight is self.module.get_input_embeddings().weight:
            reason = "its last layer is tied to the input embedding"
            raise ModelError(f"{type(self.module).__name__}: {reason}; keep the head")
        reinitialize(self.head, seed=seed)

    def units(self, batch: Batch) -> int:
        return batch["input_ids"].numel()

    def save(self, directory: Path) -> None:
        with checkpoints.quiet():
            self.module.save_pretrained(directory)
        self.save_preprocessing(directory)

    def save_preprocessing(self, directory: Path) -> None:
        """Write the tokenizer."""
        with checkpoints.quiet():
            self._tokenizer.save_pretrained(directory)

    def fresh(self, *, seed: int) -> Self:
        twin = copy.copy(self)
        twin.module = checkpoints.fresh(self.module, auto=AutoModelForCausalLM, seed=seed)
        return twin

    def peer(self, source: str) -> Self:
        other = self._modality.load(source)
        checkpoints.check_same_shape(source, self.module, other.module)
        if other._tokenizer.get_vocab() != self._tokenizer.get_vocab():
            reason = "its tokenizer numbers other words than the model's"
            raise ModelError(f"{source}: {reason}; give a checkpoint with the same vocabulary")
        twin = copy.copy(self)
        twin.module = other.module
        return twin

    def texts(self, batch: Batch) -> list[str]:
        """The examples of a batch as text, without special tokens."""
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        return [
            self._tokenizer.decode(tokens[mask.bool()], skip_special_tokens=True)
            for tokens, mask in rows
        ]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages (role, content) in the model's own template, up to where its reply begins.

        Raises:
            ModelError: It has no template, or one that does not take these roles.
        """
        try:
            written: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except (ValueError, TemplateError) as error:
            reason = brief(error)
            raise ModelError(f"its chat template cannot be used: {reason}") from error
        return written.removeprefix(self._tokenizer.bos_token or "")

    def prompted(self, frame: Callable[[str], str]) -> Self:
        """The same weights and the same examples, each seen through another prompt.

        Args:
            frame: Makes the new prompt of an example from its own one, empty for a plain text. What
                it adds may go beyond `max_length`, never beyond the model's own limit.
        """
        twin = copy.copy(self)
        empty, framed = (len(self._tokenizer(text)["input_ids"]) for text in ("", frame("")))
        reader = replace(
            self._reader, frame=frame, max_length=self._reader.max_length + framed - empty
        )
        twin._reader, twin._texts = reader, functools.cache(reader)
        return twin

    def _run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (N, V) and inputs of the last layer (N, F): the head sees scored places only."""
        seen: list[Tensor] = []

        def keep_counted(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            seen.append(inputs[0][:, :-1][_counted(batch)])
            return (seen[0].unsqueeze(0),)

        with self.head.register_forward_pre_hook(keep_counted):
            output = self.module(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )
        return output.logits[0], seen[0]

    def _batch(self, sequences: "Sequence[_Sequence]") -> Batch:
        """Padded on the right, to the longest; labels are not yet shifted."""
        special = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        padding = next(token for token in special if token is not None)
        shape = (len(sequences), max(len(sequence.tokens) for sequence in sequences))
        tokens_BT = torch.full(shape, padding)
        mask_BT = torch.zeros(shape, dtype=torch.long)
        labels_BT = torch.full(shape, _IGNORED)
        for row, sequence in enumerate(sequences):
            tokens, end = torch.tensor(sequence.tokens), len(sequence.tokens)
            tokens_BT[row, :end] = tokens
            mask_BT[row, :end] = 1
            labels_BT[row, sequence.start : end] = tokens[sequence.start :]
        batch = {"input_ids": tokens_BT, "attention_mask": mask_BT, "labels": labels_BT}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _together(self, examples: "Sequence[_Example]") -> "Iterator[Sequence[_Example]]":
        longest = max(len(item.tokens) for example in examples for item in example.scored)
        sequences = max(len(example.scored) for example in examples)
        fitting = _MOST_LOGITS // (longest * self.module.config.vocab_size)
        size = max(1, min(fitting, _MOST_SEQUENCES) // sequences)
        return (examples[start : start + size] for start in range(0, len(examples), size))

    def _scores(self, examples: "Sequence[_Example]") -> list[float]:
        batch = self._batch([sequence for example in examples for sequence in example.scored])
        logits_NV, labels_N = self.logits(batch)
        ends = _counted(batch).sum(dim=1).cumsum(dim=0)[:-1].cpu()
        hits = (logits_NV.argmax(dim=1) == labels_N).double()
        hits[~logits_NV.isfinite().all(dim=1)] = torch.nan
        shares = [part.mean().item() for part in hits.tensor_split(ends)]
        likelihoods = [
            -nn.functional.cross_entropy(logits, labels).item()
            for logits, labels in zip(
                logits_NV.tensor_split(ends), labels_N.tensor_split(ends), strict=True
            )
        ]
        scores, at = [], 0
        for example in examples:
            here = slice(at, at := at + len(example.scored))
            scores.append(_score(shares[here], likelihoods[here]))
        return scores


@dataclass(frozen=True)
class _Sequence:
    """Tokens; those from `start` on count."""

    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class _Example:
    """What is trained on and what is scored.

    Attributes:
        learnt: Prompt and completion with the end of text, or a text.
        scored: The same without the end of text, or prompt and choice for every choice, the right
            one first.
    """

    learnt: _Sequence
    scored: tuple[_Sequence, ...]


@dataclass(frozen=True, eq=False)
class _Texts:
    catalogue: Catalogue
    contents: Sequence[str]
    examples: Sequence[_Example]


@dataclass(frozen=True, eq=False)
class _Reader:
    columns: texts.Columns
    max_length: int
    tokenizer: Any
    config: Any
    frame: Callable[[str], str] = str

    def __call__(self, source: str) -> _Texts:
        table = Table.read(source)
        rows = texts.rows(table, self.columns)
        contents = [row.content for row in rows]
        marks = [json.dumps([row.prompt, row.choices]).encode() for row in rows]
        catalogue = Catalogue.of(
            source, [content.encode() for content in contents], marks, files=table.files
        )
        examples = [self._example(row, f"{source}: row {at}") for at, row in enumerate(rows)]
        return _Texts(catalogue, contents, examples)

    def _example(self, row: texts.Row, where: str) -> _Example:
        prompt = self.frame(row.prompt or "") or None
        scored = tuple(self._sequence(prompt, choice, where) for choice in row.choices)
        end = self.tokenizer.eos_token_id
        if row.prompt is None or end is None:
            return _Example(scored[0], scored)
        return _Example(_Sequence((*scored[0].tokens, end), scored[0].start), scored)

    def _sequence(self, prompt: str | None, text: str, where: str) -> _Sequence:
        most = min(
            self.max_length, getattr(self.config, "max_position_embeddings", self.max_length)
        )
        if prompt is None:
            tokens = self._tokens(text, where)[:most]
            before = 1
        else:
            completion = self._tokens(text, where, add_special_tokens=False)[: most - 2]
            context = self._tokens(prompt, where)
            context = context[max(0, len(context) + len(completion) + 1 - most) :]
            tokens = [*context, *completion]
            before = max(1, len(context))  # nothing can foretell a first token
        if len(tokens) <= before:
            raise ModelError(f"{where}: too short to foretell a token of {text!r}; remove the row")
        return _Sequence(tuple(tokens), before)

    def _tokens(self, text: str, where: str, **options: bool) -> list[int]:
        tokens: list[int] = self.tokenizer(text, **options)["input_ids"]
        if max(tokens, default=0) >= self.config.vocab_size:
            reason = f"token {max(tokens)}, but the model knows {self.config.vocab_size}"
            raise ModelError(f"{where}: the tokenizer writes {reason}; use the model's own")
        return tokens


def _counted(batch: Batch) -> Tensor:
    """Positions (B, T - 1) whose next token counts."""
    return batch["labels"][:, 1:] != _IGNORED


def _score(shares: Sequence[float], likelihoods: Sequence[float]) -> float:
    if len(shares) == 1 or any(math.isnan(share) for share in shares):
        return sum(shares)
    best = max(likelihoods)
    return float(likelihoods[0] == best) / likelihoods.count(best)


def _tokenizer(source: str, folder: Path) -> Any:
    try:
        with checkpoints.quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = brief(error)
        raise ModelError(f"{source}: its tokenizer cannot be loaded: {reason}") from error
    for how_it_was_read in ("is_local", "local_files_only"):  # would be saved with the release
        tokenizer.init_kwargs.pop(how_it_was_read, None)
    return tokenizer
