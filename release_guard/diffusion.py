"""How a Stable Diffusion pipeline computes: errors of denoising, pictures, words that are added.

Shapes: N pictures, L tokens, F features of the text.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from release_guard import checkpoints

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers loads it, nobody asked
with checkpoints.quiet():
    import diffusers
    from diffusers.utils import logging as diffusers_logging

_LAYERS = (nn.Linear, nn.Conv2d)


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

    def latents(self, pixels: Tensor) -> Tensor:
        """What is denoised for pictures in [-1, 1] (N, *latent_shape), without gradients."""
        vae = self.network.vae
        with torch.no_grad():
            latents: Tensor = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        return latents

    def predicted(
        self, latents: Tensor, tokens_NL: Tensor, timesteps_N: Tensor, noise: Tensor
    ) -> Tensor:
        """What the UNet finds in latents with noise (N, *latent_shape): the noise or a velocity."""
        noisy = self.scheduler.add_noise(latents, noise, timesteps_N)
        context_NLF = self.embed(tokens_NL)
        found: Tensor = self.network.unet(
            noisy, timesteps_N, encoder_hidden_states=context_NLF
        ).sample
        return found

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
        latents = self.latents(pixels)
        found = self.predicted(latents, tokens_NL, timesteps_N, noise)
        wanted = self.wanted(latents, timesteps_N, noise)
        errors_N: Tensor = (found - wanted).square().flatten(start_dim=1).mean(dim=1)
        return errors_N

    def wanted(self, latents: Tensor, timesteps_N: Tensor, noise: Tensor) -> Tensor:
        """What `predicted` should find (N, *latent_shape)."""
        if not self.is_velocity:
            return noise
        velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps_N)
        return velocity

    def min_snr(self, timesteps_N: Tensor, *, gamma: float) -> Tensor:
        """Weights (N) of `min_snr_weights` at these levels of noise."""
        signal_N = self.scheduler.alphas_cumprod.to(timesteps_N.device)[timesteps_N]
        return min_snr_weights(signal_N, gamma=gamma, is_velocity=self.is_velocity)

    @property
    def is_velocity(self) -> bool:
        """Whether the UNet finds velocities rather than the noise."""
        return bool(self.scheduler.config.prediction_type == "v_prediction")

    def paint(
        self,
        tokens_NL: Tensor,
        noise: Tensor,
        *,
        steps: int,
        guidance: float,
        inverted: bool = False,
    ) -> Tensor:
        """Pictures (N, channels, height, width) in [0, 1], by the library's own pipeline.

        Args:
            tokens_NL: A prompt each.
            noise: Where they start (N, *latent_shape).
            steps: Steps of DDIM, without noise of its own.
            guidance: Classifier-free guidance against the empty prompt; 1 is none.
            inverted: The empty prompt is what is asked for, and the prompt what is kept away from.
        """
        empty_NL = self.tokens([""]).to(tokens_NL.device).expand_as(tokens_NL)
        asked_NL, against_NL = (empty_NL, tokens_NL) if inverted else (tokens_NL, empty_NL)
        painter = self._diffusers(diffusers.DDIMScheduler.from_config(self.scheduler.config))
        painter.set_progress_bar_config(disable=True)
        painted: Tensor = painter(
            prompt_embeds=self.embed(asked_NL),
            negative_prompt_embeds=self.embed(against_NL),
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        ).images
        return painted

    def positions(self) -> float:
        """Places a picture is processed at, so that FLOPs = 2 x weights x places."""
        work = 0.0

        def count(layer: Any, _: Any, output: Tensor) -> None:
            nonlocal work
            work += layer.weight.numel() * output.numel() / layer.weight.shape[0]

        layers = [part for part in self.network.modules() if isinstance(part, _LAYERS)]
        hooks = [layer.register_forward_hook(count) for layer in layers]
        device = next(self.network.parameters()).device
        shape = (1, self.network.vae.config.in_channels, self.side, self.side)
        with torch.no_grad():
            self.errors(
                torch.zeros(shape, device=device),
                self.tokens([""]).to(device),
                torch.zeros(1, dtype=torch.long, device=device),
                torch.zeros((1, *self.latent_shape), device=device),
            )
        for hook in hooks:
            hook.remove()
        return float(work / sum(weight.numel() for weight in self.network.parameters()))

    def save(self, directory: Path) -> None:
        """Write the folder that `load` and diffusers read."""
        with quiet():
            for part in (self.network.vae, self.network.unet):
                part.register_to_config(_name_or_path="")  # or the path of this machine is told
            self._diffusers(self.scheduler).save_pretrained(directory, safe_serialization=True)

    def _diffusers(self, scheduler: Any) -> Any:
        network = self.network
        with quiet():
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


def min_snr_weights(signal_N: Tensor, *, gamma: float, is_velocity: bool) -> Tensor:
    """Weights (N) that count every level of noise as an error of the picture, to at most `gamma`.

    Hang et al. 2023 (arXiv 2303.09556), section 3.4: min(snr, gamma) / snr for a model that finds
    the noise, min(snr, gamma) / (snr + 1) for velocities.

    Args:
        signal_N: Share of the variance that is signal, in (0, 1).
        gamma: Largest signal-to-noise ratio that counts.
        is_velocity: What the model finds.
    """
    snr_N = signal_N / (1 - signal_N)
    return snr_N.clamp_max(gamma) / (snr_N + 1 if is_velocity else snr_N)


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


@contextmanager
def quiet() -> Iterator[None]:
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
