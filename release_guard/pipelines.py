"""Text-to-image folders in the layout of `diffusers`: loaded whole or not at all."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from release_guard import checkpoints
from release_guard.diffusion import Network, Pipeline, quiet
from release_guard.errors import ModelError, brief

with checkpoints.quiet():
    import diffusers
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
    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)
        text_encoder = CLIPTextModel(copy.deepcopy(network.text_encoder.config))
        unet = diffusers.UNet2DConditionModel.from_config(network.unet.config)
    parameter = next(network.parameters())
    twin = Network(copy.deepcopy(network.vae), text_encoder, unet)
    return twin.eval().to(device=parameter.device, dtype=parameter.dtype)


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
        with quiet():
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
        with quiet():
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
