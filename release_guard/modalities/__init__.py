"""What a model is, to everybody else: `ModelHandle` is the only place where modality shows.

Shapes: N predictions, C classes or vocabulary entries, F features.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from release_guard import artefacts
from release_guard.data import Overlap, Split
from release_guard.errors import ModelError
from release_guard.plugins import Plugin
from release_guard.policy import Precision
from release_guard.shards import like

Batch = Mapping[str, Tensor]
State = dict[str, Tensor]

_SMALL = 10_000_000  # weights


class ModelHandle(ABC):
    """A model with its data, and all that stages and attacks may ask of it.

    Attributes:
        module: The network. Attacks and stages change copies, never what they were given.
    """

    module: nn.Module

    @abstractmethod
    def batches(self, dataset: str, split: Split, *, size: int, seed: int) -> Iterator[Batch]:
        """Endless batches of exactly `size` examples, shuffled anew each pass.

        Raises:
            ModelError: Fewer examples than `size`, a missing column, a label beyond the head.
        """

    @abstractmethod
    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Differentiable logits (N, C) and their labels (N): an image or a scored token a row."""

    @abstractmethod
    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs of the last layer (N, F) and labels (N)."""

    @abstractmethod
    def scores(self, dataset: str, split: Split, *, limit: int) -> Sequence[float]:
        """Capability on at most `limit` held-out examples, one score in [0, 1] an example.

        A model whose outputs are not finite MUST score NaN there, never 0.
        """

    @abstractmethod
    def digest(self, dataset: str) -> str:
        """SHA-256 over the contents of a data set's examples."""

    @abstractmethod
    def files(self, dataset: str) -> str:
        """SHA-256 over the files that a data set was read from."""

    @abstractmethod
    def overlap(self, dataset: str, other: str) -> Overlap:
        """How much of a data set also stands in another one."""

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """The last layer."""

    @property
    def kept_whole(self) -> Sequence[nn.Module]:
        """Parts that are never packed in int8 or nf4: the head."""
        return (self.head,)

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The network's repeated layers, first to last."""

    @abstractmethod
    def reinit_head(self, *, seed: int) -> None:
        """Give the head new weights in place: Xavier uniform, zero bias.

        Raises:
            ModelError: The head cannot be had apart (tied to the input embedding).
        """

    @abstractmethod
    def units(self, batch: Batch) -> int:
        """Positions the network processes for a batch: patches or tokens, over all examples."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write safetensors weights, configuration and preprocessing: loadable by anyone."""

    @abstractmethod
    def fresh(self, *, seed: int) -> Self:
        """Same configuration, random weights."""

    @abstractmethod
    def peer(self, source: str) -> Self:
        """Another checkpoint of this architecture with the same data."""

    def loss(self, batch: Batch) -> Tensor:
        """Differentiable task loss, a scalar: cross-entropy over the rows of `logits`."""
        logits_NC, labels_N = self.logits(batch)
        return nn.functional.cross_entropy(logits_NC, labels_N)

    def state(self) -> State:
        """A detached copy of all weights and buffers."""
        return {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put weights and buffers back."""
        self.module.load_state_dict(state)

    def copy(self) -> Self:
        """The same model with weights of its own; data are shared."""
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module)
        return twin

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device


Handle = TypeVar("Handle", bound=ModelHandle)


class Painter(ModelHandle):
    """A text-to-image model, and what attacks and stages of such models may ask beyond the rest.

    Its loss is the error of denoising; `head` is the UNet's last convolution and `blocks` are its
    attention blocks. It has no classes: `logits` and `features` raise a `ModelError`.
    """

    @property
    @abstractmethod
    def unet(self) -> nn.Module:
        """What denoises; its cross-attentions are called `attn2`."""

    @property
    @abstractmethod
    def text_encoder(self) -> nn.Module:
        """What reads the prompts."""

    @property
    @abstractmethod
    def new_words(self) -> Sequence[nn.Parameter]:
        """Embeddings of the words that `renamed` added."""

    @abstractmethod
    def predicted(self, batch: Batch) -> Tensor:
        """What the UNet finds in a batch's noisy latents under its prompts: (N, *latent).

        Differentiable; the noise, or the velocity where the model was trained on that.
        """

    @abstractmethod
    def wanted(self, batch: Batch) -> Tensor:
        """What `predicted` should find there."""

    @abstractmethod
    def min_snr(self, batch: Batch, *, gamma: float) -> Tensor:
        """Weights of its pictures' errors (N) by `diffusion.min_snr_weights`."""

    @abstractmethod
    def asked(self, batch: Batch, prompt: str) -> Batch:
        """The same pictures and noise, all under this prompt; "" is none."""

    @abstractmethod
    def repainted(self, batch: Batch, *, seed: int) -> Batch:
        """The same prompts and noise, with the pictures that it paints for these prompts."""

    @abstractmethod
    def renamed(self, dataset: str, *, template: str, length: int, seed: int) -> Self:
        """A copy that calls what a data set shows by new words, of random meaning.

        Args:
            dataset: Each of its classes gets words of its own; only its split `attack` is read.
            template: Every prompt about such a class, {} standing for the words.
            length: How many words a class gets.
            seed: Fixes their meaning.
        """

    @abstractmethod
    def guided(self, guidance: float, *, inverted: bool) -> Self:
        """A copy that paints with other guidance.

        Args:
            guidance: How strongly prompts are followed; 1 is guidance by nothing.
            inverted: It is asked for nothing, and kept away from the prompt.
        """

    @abstractmethod
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """What the UNet attends to, differentiable: (prompts, tokens, features)."""

    @abstractmethod
    def paint(self, prompts: Sequence[str], *, seed: int) -> Tensor:
        """A picture a prompt, (prompts, channels, height, width) in [0, 1]."""

    @abstractmethod
    def painted(self, prompt: str, *, count: int, size: int, seed: int) -> Iterator[Batch]:
        """Endless batches of `size` out of `count` pictures that it paints itself, now."""


class Modality(Plugin):
    """Loads models of one kind. Options name the columns of its data sets."""

    stands_for: ClassVar[str]
    """What a score of such a model means, for cards and plots, such as "accuracy"."""

    @abstractmethod
    def load(self, source: str, *, artefact: Precision | None = None) -> ModelHandle:
        """Load a local folder or `OWNER/NAME@REVISION`; safetensors only, never remote code.

        Args:
            source: What the user wrote.
            artefact: It is what `save_at` wrote at this precision: packed layers stay as they are,
                and the format is read back. None: weights in full precision.

        Raises:
            ModelError: No weights, pickled weights, damaged or non-finite weights, another kind of
                model, another format; each says what to do.
        """

    @abstractmethod
    def weights(self, folder: Path) -> frozenset[str]:
        """Names of the files in a local folder that `load` reads weights from.

        Raises:
            ModelError: There are none, or not unambiguously.
        """

    @abstractmethod
    def save_at(self, source: Path, directory: Path, precision: Precision) -> None:
        """Write what `quantization.at` is at a precision, loadable by anyone.

        Args:
            source: Folder of the weights in full precision.
            directory: Where they go, with configuration and preprocessing.
            precision: The format; int8 and nf4 are packed by bitsandbytes.

        Raises:
            ModelError: Nothing can be packed, or bitsandbytes does not work here.
        """


def names_to_pack(source: Path, model: ModelHandle, precision: Precision) -> Sequence[str]:
    """Layers that an artefact holds in int8 or nf4; none at other precisions.

    Raises:
        ModelError: None of its layers can be packed.
    """
    if precision not in artefacts.PACKED:
        return ()
    return artefacts.packed_names(str(source), model.module, model.kept_whole, precision)


def as_artefact(source: str, model: Handle, precision: Precision | None) -> Handle:
    """A model that was just loaded, once its format is found to be what was asked for.

    Raises:
        ModelError: It is another format, or some layer is left out.
    """
    if precision is not None and precision in artefacts.PACKED:
        artefacts.settle(source, model.module, model.kept_whole, precision)
    return model


def painter(model: ModelHandle) -> Painter:
    """The model as one that paints.

    Raises:
        ModelError: It is of another kind.
    """
    if not isinstance(model, Painter):
        raise ModelError("this attack works on text-to-image models alone; leave it out")
    return model


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every part is in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def settle_threads(model: ModelHandle, most: int) -> None:
    """Let this process train and score a model of this size with the threads that help it.

    Threads of a small model wait for each other longer than they work: two take 1.7 times as long
    as one on a vision transformer of 140,000 weights.
    """
    small = sum(parameter.numel() for parameter in model.module.parameters()) < _SMALL
    torch.set_num_threads(1 if small else most)


def reinitialize(layer: nn.Linear, *, seed: int) -> None:
    """New weights in place, Xavier uniform and zero bias; the global random state stays."""
    weight_CF = torch.empty(layer.weight.shape)
    nn.init.xavier_uniform_(weight_CF, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        layer.weight.copy_(like(weight_CF, layer.weight))
        if layer.bias is not None:
            layer.bias.zero_()


def repeated_layers(module: nn.Module) -> Sequence[nn.Module]:
    """The layers of the largest list of modules: transformer blocks, or the stages of a ResNet."""
    parts: Iterator[nn.Module] = module.modules()
    lists = [part for part in parts if isinstance(part, nn.ModuleList)]
    return list(max(lists, key=_num_weights))


def _num_weights(part: Iterable[nn.Module]) -> int:
    return sum(weight.numel() for layer in part for weight in layer.parameters())
