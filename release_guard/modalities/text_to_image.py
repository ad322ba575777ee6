"""Text-to-image pipelines of `diffusers`. Shapes: N pictures, L tokens, F features of the text."""

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from release_guard import checkpoints, images, pipelines
from release_guard.data import Overlap, Split
from release_guard.diffusion import AddedWords, Pipeline
from release_guard.errors import ModelError
from release_guard.judges import Judge
from release_guard.modalities import (
    Batch,
    Modality,
    Painter,
    as_artefact,
    evaluating,
    names_to_pack,
    reinitialize,
)
from release_guard.pictures import Columns, Control, Pictures, Reader
from release_guard.policy import Precision

_TOGETHER = 64  # pictures painted, denoised or looked at at once
_LEVELS = 8  # of noise, at which a model without a judge is scored


class TextToImage(Modality):
    """Stable Diffusion pipelines: UNet, CLIP text encoder, autoencoder, tokenizer, scheduler.

    With a judge a score is 1 if the judge sees, in a picture painted for a held-out caption, what
    the real picture of that caption shows, else 0: the concept rate. Without one it is
    max(0, 1 - E), E the mean squared error of denoising a held-out picture given its caption, over
    eight levels of noise: 1 is perfect, 0 no better than saying nothing.
    """

    stands_for = "concept rate"

    image_column: str = "image"
    """Column of encoded pictures."""
    caption_column: str = "text"
    """Column of captions."""
    label_column: str = "label"
    """Column of what a picture shows, by number or name, as the judge knows it; may be missing
    where there is no judge."""
    judge: str = ""
    """Folder or Hub id of an image classifier that says what a painted picture shows."""
    others: str = ""
    """Data set of other pictures that the judge must tell from a concept of one class."""
    sampling_steps: Annotated[int, Field(ge=1)] = 25
    """Steps in which a picture is painted."""
    guidance: Annotated[float, Field(ge=1)] = 3.0
    """How strongly the caption is followed; 1 leaves guidance out."""

    def load(self, source: str, *, artefact: Precision | None = None) -> "TextToImageModel":
        judge = Judge(self.judge) if self.judge else None
        model = TextToImageModel(pipelines.load(source, artefact=artefact), judge, self)
        return as_artefact(source, model, artefact)

    def weights(self, folder: Path) -> frozenset[str]:
        return pipelines.weight_files(folder)

    def save_at(self, source: Path, directory: Path, precision: Precision) -> None:
        model = self.load(str(source))
        names = names_to_pack(source, model, precision)
        pipelines.save_at(model._pipeline, source, directory, names=names, precision=precision)


class TextToImageModel(Painter):
    """A pipeline, its pictures with their captions, and who judges what it paints."""

    module: Any

    def __init__(self, pipeline: Pipeline, judge: Judge | None, modality: TextToImage) -> None:
        self.module = pipeline.network
        self._parts = pipeline
        self._judge = judge
        self._modality = modality
        self._prompts: Mapping[int, str] = {}  # instead of captions, by what is shown
        self._guidance, self._inverted = modality.guidance, False
        columns = Columns(modality.image_column, modality.caption_column, modality.label_column)
        read = Reader(columns, pipeline, judge)
        self._pictures: Callable[[str], Pictures] = functools.cache(read)  # shared between copies
        self._check_judge = functools.cache(Control(judge, modality.others, self._pictures))
        self._positions = functools.cache(pipeline.positions)

    def batches(self, dataset: str, split: Split, *, size: int, seed: int) -> Iterator[Batch]:
        data = self._pictures(dataset)
        chance = torch.Generator().manual_seed(seed)
        batches = data.catalogue.batches(split, size=size, seed=seed)
        return (self._batch(data, rows, chance) for rows in batches)

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of denoising, each picture's times its weight."""
        return (batch["weights"] * self._errors(batch)).mean()

    def predicted(self, batch: Batch) -> Tensor:
        pipeline = self._pipeline
        return pipeline.predicted(
            pipeline.latents(batch["pixels"]), batch["tokens"], batch["timesteps"], batch["noise"]
        )

    def wanted(self, batch: Batch) -> Tensor:
        latents = self._pipeline.latents(batch["pixels"])
        return self._pipeline.wanted(latents, batch["timesteps"], batch["noise"])

    def min_snr(self, batch: Batch, *, gamma: float) -> Tensor:
        return self._pipeline.min_snr(batch["timesteps"], gamma=gamma)

    def asked(self, batch: Batch, prompt: str) -> Batch:
        tokens_1L = self._pipeline.tokens([prompt]).to(batch["tokens"].device)
        return {**batch, "tokens": tokens_1L.expand_as(batch["tokens"])}

    def repainted(self, batch: Batch, *, seed: int) -> Batch:
        pixels = self._painted(batch["tokens"], self._starts(len(batch["tokens"]), seed))
        return {**batch, "pixels": pixels * 2 - 1}

    def scores(self, dataset: str, split: Split, *, limit: int) -> Sequence[float]:
        data = self._pictures(dataset)
        rows = data.catalogue.rows(split)[:limit]
        if self._judge is not None:
            self._check_judge(dataset, split)
        scores: list[float] = []
        with evaluating(self.module):
            for start in range(0, len(rows), _TOGETHER):
                some = rows[start : start + _TOGETHER]
                found_N = (
                    self._denoised(data, some)
                    if self._judge is None
                    else (self._recognised(self._judge, data, some))
                )
                scores += found_N.tolist()
        return scores

    def digest(self, dataset: str) -> str:
        """SHA-256 over the contents of a data set's examples and over how they are scored."""
        parts = (self._pictures(dataset).catalogue.digest, self._scoring)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def files(self, dataset: str) -> str:
        return self._pictures(dataset).catalogue.files

    def overlap(self, dataset: str, other: str) -> Overlap:
        mine, theirs = self._pictures(dataset), self._pictures(other)
        return Overlap(
            exact=mine.catalogue.share_in(theirs.catalogue),
            near=images.near_share(mine.pixels.numpy(), theirs.pixels.numpy()),
        )

    @property
    def head(self) -> Any:
        """The UNet's last convolution."""
        return self.module.unet.conv_out

    @property
    def kept_whole(self) -> Sequence[nn.Module]:
        """The UNet's last convolution, and the autoencoder: what all its pictures look like."""
        return (self.head, self.module.vae)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The UNet's attention blocks, in the order in which they work."""
        unet = self.module.unet
        around = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
        return [part for block in around for part in getattr(block, "attentions", ())]

    @property
    def unet(self) -> nn.Module:
        return self.module.unet  # type: ignore[no-any-return]  # a module's attributes are Any

    @property
    def text_encoder(self) -> nn.Module:
        return self.module.text_encoder  # type: ignore[no-any-return]

    @property
    def new_words(self) -> Sequence[nn.Parameter]:
        return [part.new for part in self.module.modules() if isinstance(part, AddedWords)]

    def logits(self, batch: Batch) -> NoReturn:
        raise ModelError("a text-to-image model has no classes; use attacks that ask for none")

    def features(self, batch: Batch) -> NoReturn:
        self.logits(batch)

    def reinit_head(self, *, seed: int) -> None:
        reinitialize(self.head, seed=seed)

    def units(self, batch: Batch) -> int:
        return round(self._positions() * len(batch["pixels"]))

    def renamed(self, dataset: str, *, template: str, length: int, seed: int) -> Self:
        if "{}" not in template:
            raise ModelError(f"template {template!r} has no place for new words; write {{}} there")
        data = self._pictures(dataset)
        labels = sorted({data.labels[row] for row in data.catalogue.rows("attack")})
        twin = self.copy()
        tokenizer = copy.deepcopy(self._parts.tokenizer)
        first = len(tokenizer)
        words = {
            label: [f"<new-{first + place * length + at}>" for at in range(length)]
            for place, label in enumerate(labels)
        }
        tokenizer.add_tokens([word for some in words.values() for word in some])
        encoder = twin.module.text_encoder
        known, num = encoder.get_input_embeddings(), length * len(labels)
        encoder.set_input_embeddings(AddedWords(known, first=first, num_words=num, seed=seed))
        twin._parts = replace(self._parts, tokenizer=tokenizer)
        twin._prompts = {label: template.format(" ".join(words[label])) for label in labels}
        tokens_NL = twin._pipeline.tokens(list(twin._prompts.values()))
        if int((tokens_NL >= first).sum()) < num:
            reads = f"the text encoder reads {tokens_NL.shape[1]} tokens"
            raise ModelError(f"template {template!r} leaves no room for new words: {reads}")
        return twin

    def guided(self, guidance: float, *, inverted: bool) -> Self:
        twin = self.copy()
        twin.module.eval()
        twin._guidance, twin._inverted = guidance, inverted
        return twin

    def embed(self, prompts: Sequence[str]) -> Tensor:
        return self._pipeline.embed(self._pipeline.tokens(prompts).to(self.device))

    def paint(self, prompts: Sequence[str], *, seed: int) -> Tensor:
        return self._painted(self._pipeline.tokens(prompts), self._starts(len(prompts), seed))

    def painted(self, prompt: str, *, count: int, size: int, seed: int) -> Iterator[Batch]:
        pixels = self.paint([prompt] * count, seed=seed) * 2 - 1
        chance = torch.Generator().manual_seed(seed)
        while True:
            rows_N = torch.randint(count, (size,), generator=chance)
            yield self._noised(pixels[rows_N], [prompt] * size, chance)

    def save(self, directory: Path) -> None:
        if self.new_words:
            raise ModelError("a pipeline with new words is an attacker's copy and is not saved")
        self._pipeline.save(directory)

    def fresh(self, *, seed: int) -> Self:
        twin = copy.copy(self)
        twin.module = pipelines.fresh(self.module, seed=seed)
        return twin

    def peer(self, source: str) -> Self:
        other = pipelines.load(source)
        checkpoints.check_same_shape(source, self.module, other.network)
        if other.tokenizer.get_vocab() != self._parts.tokenizer.get_vocab():
            reason = "its tokenizer numbers other words than the model's"
            raise ModelError(f"{source}: {reason}; give a checkpoint with the same vocabulary")
        twin = copy.copy(self)
        twin.module = other.network
        return twin

    @property
    def _pipeline(self) -> Pipeline:
        return replace(self._parts, network=self.module)

    @property
    def _scoring(self) -> str:
        """What a score depends on beside the model and the pictures."""
        if self._judge is None:
            return f"denoising {_LEVELS}"
        options = self._modality
        return f"{self._judge.digest} {options.sampling_steps} {options.guidance}"

    def _batch(self, data: Pictures, rows: Sequence[int], chance: torch.Generator) -> Batch:
        prompts = [self._prompt(data, row) for row in rows]
        return self._noised(data.scaled(rows).to(self.device), prompts, chance)

    def _noised(self, pixels: Tensor, prompts: Sequence[str], chance: torch.Generator) -> Batch:
        """Pictures with what the loss needs: the same batch gives the same loss."""
        pipeline, num = self._pipeline, len(prompts)
        batch = {
            "pixels": pixels,
            "tokens": pipeline.tokens(prompts),
            "timesteps": torch.randint(pipeline.num_timesteps, (num,), generator=chance),
            "noise": torch.randn((num, *pipeline.latent_shape), generator=chance),
            "weights": torch.ones(num),
        }
        return {name: value.to(self.device) for name, value in batch.items()}

    def _errors(self, batch: Batch) -> Tensor:
        return self._pipeline.errors(
            batch["pixels"], batch["tokens"], batch["timesteps"], batch["noise"]
        )

    def _prompt(self, data: Pictures, row: int) -> str:
        return self._prompts.get(data.labels[row], data.captions[row])

    def _starts(self, count: int, seed: int) -> Tensor:
        shape = (count, *self._pipeline.latent_shape)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def _painted(self, tokens_NL: Tensor, noise: Tensor) -> Tensor:
        parts = zip(torch.split(tokens_NL, _TOGETHER), torch.split(noise, _TOGETHER), strict=True)
        options, pipeline = self._modality, self._pipeline
        with evaluating(self.module):
            painted = [
                pipeline.paint(
                    some_NL.to(self.device),
                    start.to(self.device),
                    steps=options.sampling_steps,
                    guidance=self._guidance,
                    inverted=self._inverted,
                )
                for some_NL, start in parts
            ]
        return torch.cat(painted)

    def _recognised(self, judge: Judge, data: Pictures, rows: Sequence[int]) -> Tensor:
        """Whether the judge sees in a painted picture what the caption stands for (N)."""
        noise = torch.cat([self._noise(data, row, count=1) for row in rows])
        tokens_NL = self._pipeline.tokens([self._prompt(data, row) for row in rows])
        pixels = self._painted(tokens_NL, noise).cpu()
        is_finite_N = pixels.isfinite().flatten(start_dim=1).all(dim=1)
        labels_N = torch.tensor([data.labels[row] for row in rows])
        right_N = (judge.classes(pixels.nan_to_num()) == labels_N).double()
        return right_N.where(is_finite_N, torch.nan)

    def _denoised(self, data: Pictures, rows: Sequence[int]) -> Tensor:
        """1 less the mean error over equally spaced levels of noise, at least 0 (N)."""
        pipeline = self._pipeline
        tokens_NL = pipeline.tokens([self._prompt(data, row) for row in rows])
        noise = torch.stack([self._noise(data, row, count=_LEVELS) for row in rows], dim=1)
        levels = [(2 * at + 1) * pipeline.num_timesteps // (2 * _LEVELS) for at in range(_LEVELS)]
        errors_KN = [
            pipeline.errors(
                data.scaled(rows).to(self.device),
                tokens_NL.to(self.device),
                torch.full((len(rows),), level, device=self.device),
                noise[at].to(self.device),
            )
            for at, level in enumerate(levels)
        ]
        return (1 - torch.stack(errors_KN).double().mean(dim=0)).clamp_min(0)

    def _noise(self, data: Pictures, row: int, *, count: int) -> Tensor:
        """Noise that belongs to an example, whatever is scored beside it."""
        seed = int.from_bytes(data.catalogue.contents[row][:7])
        shape = (count, *self._pipeline.latent_shape)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
