"""Text-to-image folders in the layout of `diffusers`: loaded whole or not at all, run, saved.

Shapes: N pictures, L tokens, F features of the text.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from release_guard import checkpoints
from release_guard.errors import ModelError, brief
from release_guard.manifest import hash_directory

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers loads it, nobody asked
with checkpoints.quiet():
    import diffusers
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTextModel

PARTS = ("vae", "text_encoder", "unet", "tokenizer", "scheduler")

_CLASSES = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "unet": "UNet2DConditionModel",
}
_LIBRARIES = {"diffusers", "transformers"}
_WEIGHTS_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_PREDICTIONS = ("epsilon", "v_prediction")
_LEAST_RIGHT = 0.7  # of real pictures of a class that a judge must name right
_MOST_WRONG = 0.3  # of real pictures of others that it may take for that class
_TOGETHER = 64


class Network(nn.Module):
    """The three networks; in this order, so that the UNet's last weights come last."""

    def __init__(self, vae: nn.Module, text_encoder: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.vae = vae
        self.text_encoder = text_encoder
        self.unet = unet


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A text-to-image model.

    Attributes:
        network: All its weights.
        tokenizer: Of its prompts.
        scheduler: The noise it was trained with; pictures are painted with DDIM's steps.
    """

    network: Any
    tokenizer: Any
    scheduler: Any

    @property
    def side(self) -> int:
        """Height and width of a picture."""
        vae = self.network.vae.config
        return int(self.network.unet.config.sample_size * 2 ** (len(vae.block_out_channels) - 1))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what is denoised."""
        config = self.network.unet.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @property
    def num_timesteps(self) -> int:
        """How many levels of noise it was trained with."""
        return int(self.scheduler.config.num_train_timesteps)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as token numbers (N, L), padded and cut to what the text encoder reads."""
        length = self.network.text_encoder.config.max_position_embeddings
        rows = self.tokenizer(list(prompts))[
            "input_ids"
        ]  # told to cut, it would stay so when saved
        cut = [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in rows]
        padding = self.tokenizer.pad_token_id
        return torch.tensor([row + [padding] * (length - len(row)) for row in cut])

    def embed(self, tokens_NL: Tensor) -> Tensor:
        """What the UNet attends to (N, L, F)."""
        embedded: Tensor = self.network.text_encoder(tokens_NL).last_hidden_state
        return embedded

    def errors(
        self, pixels: Tensor, tokens_NL: Tensor, timesteps_N: Tensor, noise: Tensor
    ) -> Tensor:
        """Mean squared error (N) of denoising each picture, in units of the noise's variance.

        Ho et al. 2020, equation 14, in the autoencoder's latent space (its means, without
        gradients: a loss that reached them would teach them to hold nothing).

        Args:
            pixels: (N, channels, height, width) in [-1, 1].
            tokens_NL: Their prompts.
            timesteps_N: How much noise.
            noise: Which (N, *latent_shape).
        """
        vae = self.network.vae
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        noisy = self.scheduler.add_noise(latents, noise, timesteps_N)
        context_NLF = self.embed(tokens_NL)
        found = self.network.unet(noisy, timesteps_N, encoder_hidden_states=context_NLF).sample
        is_velocity = self.scheduler.config.prediction_type == "v_prediction"
        wanted = self.scheduler.get_velocity(latents, noise, timesteps_N) if is_velocity else noise
        errors_N: Tensor = (found - wanted).square().flatten(start_dim=1).mean(dim=1)
        return errors_N

    def paint(self, tokens_NL: Tensor, noise: Tensor, *, steps: int, guidance: float) -> Tensor:
        """Pictures (N, channels, height, width) in [0, 1], by the library's own pipeline.

        Args:
            tokens_NL: A prompt each.
            noise: Where they start (N, *latent_shape).
            steps: Steps of DDIM, without noise of its own.
            guidance: Classifier-free guidance against the empty prompt; 1 is none.
        """
        empty_NL = self.tokens([""]).to(tokens_NL.device).expand_as(tokens_NL)
        painter = self._diffusers(diffusers.DDIMScheduler.from_config(self.scheduler.config))
        painter.set_progress_bar_config(disable=True)
        painted: Tensor = painter(
            prompt_embeds=self.embed(tokens_NL),
            negative_prompt_embeds=self.embed(empty_NL),
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        ).images
        return painted

    def save(self, directory: Path) -> None:
        """Write the folder that `load` and diffusers read."""
        with _quiet():
            for part in (self.network.vae, self.network.unet):
                part.register_to_config(_name_or_path="")  # or the path of this machine is told
            self._diffusers(self.scheduler).save_pretrained(directory, safe_serialization=True)

    def _diffusers(self, scheduler: Any) -> Any:
        network = self.network
        with _quiet():
            return diffusers.StableDiffusionPipeline(
                vae=network.vae,
                text_encoder=network.text_encoder,
                unet=network.unet,
                tokenizer=self.tokenizer,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )


def load(source: str) -> Pipeline:
    """Load a folder or `OWNER/NAME@REVISION` as fp32, in evaluation mode.

    Raises:
        ModelError: It is not exactly one whole, finite Stable Diffusion pipeline of safetensors.
    """
    folder = checkpoints.fetch(source, folders=PARTS)
    index = _index(source, folder)
    text_encoder = checkpoints.load(
        f"{source}/text_encoder",
        folder / "text_encoder",
        auto=CLIPTextModel,
        architectures=["CLIPTextModel"],
        modality="text_to_image",
    )
    network = Network(
        vae=_part(f"{source}/vae", folder / "vae", diffusers.AutoencoderKL),
        text_encoder=text_encoder,
        unet=_part(f"{source}/unet", folder / "unet", diffusers.UNet2DConditionModel),
    )
    return Pipeline(network, _tokenizer(source, folder), _scheduler(source, folder, index))


def fresh(network: Any, *, seed: int) -> Network:
    """The same configuration with random weights in UNet and text encoder.

    The autoencoder stays: it knows no captions, and no loss of a text-to-image model trains it.
    """
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.default_generator.manual_seed(seed)
        text_encoder = CLIPTextModel(copy.deepcopy(network.text_encoder.config))
        unet = diffusers.UNet2DConditionModel.from_config(network.unet.config)
    parameter = next(network.parameters())
    twin = Network(copy.deepcopy(network.vae), text_encoder, unet)
    return twin.eval().to(device=parameter.device, dtype=parameter.dtype)


class AddedWords(nn.Module):
    """A token embedding with rows for new words; those it had stay as they are.

    New rows are drawn around the median row with the median spread: a defence may have moved some
    rows far away.

    Attributes:
        base_layer: The embedding that was there.
        new: The new rows (words, F).
    """

    def __init__(self, base_layer: Any, *, first: int, num_words: int, seed: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._first = first
        rows_VF = base_layer.weight.detach()
        centre_F = rows_VF.median(dim=0).values
        spread_F = 1.4826 * (rows_VF - centre_F).abs().median(dim=0).values  # sd of a normal
        drawn_WF = torch.randn(
            num_words, len(centre_F), generator=torch.Generator().manual_seed(seed)
        )
        self.new = nn.Parameter(centre_F + spread_F * drawn_WF.to(rows_VF))

    @property
    def weight(self) -> Tensor:
        """The rows that were there."""
        weight: Tensor = self.base_layer.weight
        return weight

    def forward(self, tokens_NL: Tensor) -> Tensor:
        is_new_NL = tokens_NL >= self._first
        known_NLF = self.base_layer(tokens_NL.masked_fill(is_new_NL, 0))
        new_NLF = nn.functional.embedding((tokens_NL - self._first).clamp_min(0), self.new)
        return torch.where(is_new_NL[..., None], new_NLF, known_NLF)


class Judge:
    """An image classifier of `transformers` that says what a picture shows.

    Attributes:
        digest: Of its weights and configuration.
        numbers: Class numbers by their names.
    """

    def __init__(self, source: str) -> None:
        folder = checkpoints.fetch(source)
        self._source = source
        self._module = _classifier(source, folder)
        try:
            with checkpoints.quiet():
                self._processor = AutoImageProcessor.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False, backend="pil"
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"the judge's preprocessor_config.json cannot be used ({brief(error)})"
            raise ModelError(f"{source}: {what}; add or mend it") from error
        self.digest = hash_directory(folder).payload.root
        self.numbers: dict[str, int] = self._module.config.label2id
        self._mode = "L" if getattr(self._module.config, "num_channels", 3) == 1 else "RGB"

    def classes(self, pixels: Tensor) -> Tensor:
        """Class numbers (N) of pictures (N, channels, height, width) in [0, 1]."""
        named = [self._classes(part) for part in torch.split(pixels, _TOGETHER)]
        return torch.cat(named)

    def check(self, pixels: Tensor, labels_N: Tensor, num_shown: int, *, where: str) -> None:
        """Show it real pictures: those of a class, and all the others.

        Args:
            pixels: (N, channels, height, width) in [0, 1].
            labels_N: What they show.
            num_shown: How many, from the first, show what it is to judge; the rest shows others.
            where: The data set, to begin messages with.

        Raises:
            ModelError: It agrees too often, or too rarely, or there is only one class.
        """
        named_N = self.classes(pixels).to(labels_N)
        for label in sorted(set(labels_N[:num_shown].tolist())):
            is_it_N = labels_N == label
            if bool(is_it_N.all()):
                reason = "one class alone cannot show that the judge ever says no"
                raise ModelError(f"{where}: {reason}; name other pictures in modality.others")
            right = float((named_N[is_it_N] == label).double().mean())
            wrong = float((named_N[~is_it_N] == label).double().mean())
            if right < _LEAST_RIGHT or wrong > _MOST_WRONG:
                found = f"sees class {label} in {right:.0%} of its pictures, {wrong:.0%} of others"
                advice = "train it better, or correct the labels"
                raise ModelError(f"{where}: the judge {self._source} {found}; {advice}")

    def _classes(self, pixels: Tensor) -> Tensor:
        grey = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        pictures = [PIL.Image.fromarray(image.squeeze()).convert(self._mode) for image in grey]
        inputs = self._processor(pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found: Tensor = self._module(pixel_values=inputs).logits.argmax(dim=1)
        return found


def _classifier(source: str, folder: Path) -> Any:
    return checkpoints.load(
        source,
        folder,
        auto=AutoModelForImageClassification,
        architectures=MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
        modality="text_to_image",
    )


def _index(source: str, folder: Path) -> dict[str, Any]:
    """The content of model_index.json, if it asks for nothing but the five known parts."""
    if not (folder / "model_index.json").exists():
        raise ModelError(
            f"{source}: no model_index.json; is this the folder of a diffusers pipeline?"
        )
    index = checkpoints.read_json(source, folder / "model_index.json")
    if index.get("_class_name") != "StableDiffusionPipeline":
        found = f"model_index.json says {index.get('_class_name')}"
        wanted = "modality text_to_image loads StableDiffusionPipeline"
        raise ModelError(f"{source}: {found}; {wanted}; correct modality.name")
    parts = {name: value for name, value in index.items() if isinstance(value, list) and any(value)}
    for name, (library, kind) in parts.items():
        if name not in PARTS:
            reason = f"model_index.json names {name}, which attacks and releases would leave out"
            advice = f"save the pipeline again with {name}=None"
            raise ModelError(f"{source}: {reason}; {advice}")
        if library not in _LIBRARIES or kind != _CLASSES.get(name, kind):
            reason = f"model_index.json asks for {library}.{kind} as {name}"
            advice = f"use diffusers' {_CLASSES.get(name, name)}"
            raise ModelError(f"{source}: {reason}, which is never run; {advice}")
    if missing := sorted(set(PARTS) - set(parts)):
        raise ModelError(f"{source}: model_index.json names no {missing[0]}; save it again whole")
    return index


def _part(source: str, folder: Path, kind: Any) -> nn.Module:
    checkpoints.configuration(source, folder)
    checkpoints.check_weights(source, folder, index=_WEIGHTS_INDEX)
    try:
        with _quiet():
            module, report = kind.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = brief(error)
        raise ModelError(f"{source}: cannot be loaded as {kind.__name__}: {reason}") from error
    checkpoints.settle(source, module, report)
    loaded: nn.Module = module.eval()
    return loaded


def _tokenizer(source: str, folder: Path) -> Any:
    try:
        with checkpoints.quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder / "tokenizer", local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = brief(error)
        raise ModelError(f"{source}: its tokenizer cannot be loaded: {reason}") from error
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{source}: its tokenizer has no padding token; set one and save it again")
    return tokenizer


def _scheduler(source: str, folder: Path, index: dict[str, Any]) -> Any:
    kind = index["scheduler"][1]
    if not _is_scheduler(getattr(diffusers, kind, None)):
        raise ModelError(f"{source}: {kind} is no scheduler of diffusers; use one")
    try:
        with _quiet():
            found = getattr(diffusers, kind)
            scheduler = found.from_pretrained(folder / "scheduler", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = brief(error)
        raise ModelError(f"{source}: its scheduler cannot be loaded: {reason}") from error
    if (predicts := scheduler.config.get("prediction_type", "epsilon")) not in _PREDICTIONS:
        wanted = " or ".join(_PREDICTIONS)
        raise ModelError(f"{source}: scheduler predicts {predicts!r}; give a model with {wanted}")
    return scheduler


def _is_scheduler(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep bars and log lines of both libraries to themselves."""
    before, bars = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        with checkpoints.quiet():
            yield
    finally:
        diffusers_logging.set_verbosity(before)
        if bars:
            diffusers_logging.enable_progress_bar()
