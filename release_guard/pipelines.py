"""Text-to-image folders in the layout of `diffusers`: loaded whole or not at all."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from release_guard import artefacts, checkpoints
from release_guard.diffusion import Network, Pipeline, quiet
from release_guard.errors import ModelError, brief
from release_guard.policy import Precision
from release_guard.sources import local_folder

with checkpoints.quiet():
    import diffusers
    from diffusers.quantizers import auto as quantizers
    from transformers import CLIPTextModel

PARTS = ("vae", "text_encoder", "unet", "tokenizer", "scheduler")

_CLASSES = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "unet": "UNet2DConditionModel",
}
_LIBRARIES = {"diffusers", "transformers"}
_WEIGHTS = "diffusion_pytorch_model.safetensors"  # as diffusers names them
_PREDICTIONS = ("epsilon", "v_prediction")


def load(source: str, *, artefact: Precision | None = None) -> Pipeline:
    """Load a folder or `OWNER/NAME@REVISION` as fp32, in evaluation mode.

    Args:
        source: What the user wrote.
        artefact: The precision that the files must be in; layers that are packed stay so. None: any
            weights in full precision.

    Raises:
        ModelError: It is not exactly one whole, finite Stable Diffusion pipeline of safetensors.
    """
    folder = local_folder(source)
    index = _index(source, folder)
    text_encoder = checkpoints.load(
        f"{source}/text_encoder",
        folder / "text_encoder",
        auto=CLIPTextModel,
        architectures=["CLIPTextModel"],
        modality="text_to_image",
        artefact=_said(folder / "text_encoder", artefact),
    )
    whole = None if artefact in artefacts.PACKED else artefact  # nothing is packed there
    unet, said = folder / "unet", _said(folder / "unet", artefact)
    network = Network(
        vae=_part(f"{source}/vae", folder / "vae", diffusers.AutoencoderKL, whole),
        text_encoder=text_encoder,
        unet=_part(f"{source}/unet", unet, diffusers.UNet2DConditionModel, said),
    )
    return Pipeline(network, _tokenizer(source, folder), _scheduler(source, folder, index))


def save_at(
    pipeline: Pipeline,
    source: Path,
    directory: Path,
    *,
    names: Sequence[str],
    precision: Precision,
) -> None:
    """Write a pipeline at a precision; each network that holds packed layers says so itself.

    Args:
        pipeline: What `load` made of the source in full precision; not to be used any more.
        source: Its folder.
        directory: Where it goes.
        names: Linear layers of its `Network` that are packed, for int8 and nf4.
        precision: The format.

    Raises:
        ModelError: bitsandbytes is not installed, or has no kernel for this machine.
    """
    network = pipeline.network
    if precision not in artefacts.PACKED:
        network.to(artefacts.unpacked_dtype(precision))
    else:
        network.text_encoder = _packed(network, source, "text_encoder", names, precision)
        network.unet = _packed(network, source, "unet", names, precision)
    pipeline.save(directory)


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


def weight_files(folder: Path) -> frozenset[str]:
    """Names of the files of a pipeline that `load` reads weights from.

    Raises:
        ModelError: A part has none, or is not unambiguous.
    """
    parts = {"vae": _WEIGHTS, "text_encoder": checkpoints.WEIGHTS, "unet": _WEIGHTS}
    return frozenset(
        f"{part}/{name}"
        for part, single in parts.items()
        for name in checkpoints.weight_files(str(folder / part), folder / part, single=single)
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
    for name, value in parts.items():
        library, kind = map(str, value if len(value) == 2 else ("nothing", name))  # noqa: PLR2004
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


def _said(folder: Path, artefact: Precision | None) -> Precision | None:
    """What a network of an artefact is to be read as: one without a layer to pack is whole."""
    if artefact not in artefacts.PACKED or not (folder / "config.json").exists():
        return artefact
    config = checkpoints.read_json(str(folder), folder / "config.json")
    return artefact if "quantization_config" in config else None


def _packed(
    network: Network, source: Path, name: str, names: Sequence[str], precision: Precision
) -> nn.Module:
    """One of the networks with those of the layers packed that are its own."""
    part: nn.Module = getattr(network, name)
    mine = [each.removeprefix(f"{name}.") for each in names if each.startswith(f"{name}.")]
    if not mine:
        return part
    if name == "text_encoder":
        encoder: nn.Module = checkpoints.packed(part, source / name, CLIPTextModel, mine, precision)
        return encoder
    try:
        with quiet(), _without_gpu():
            packed: nn.Module = diffusers.UNet2DConditionModel.from_pretrained(
                source / name,
                torch_dtype=torch.float32,
                quantization_config=artefacts.settings(diffusers, part, mine, precision),
                use_safetensors=True,
                local_files_only=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = brief(error)
        raise ModelError(f"{source}: {name} cannot be packed at {precision}: {reason}") from error
    return packed


@contextmanager
def _without_gpu() -> Iterator[None]:
    """Let diffusers read and write packed layers on the CPU: only its own check forbids it.

    transformers has no such check, and bitsandbytes has the kernels.
    """
    before = dict(quantizers.AUTO_QUANTIZER_MAPPING)
    for name, kind in before.items():
        if name.startswith("bitsandbytes"):
            quantizers.AUTO_QUANTIZER_MAPPING[name] = _on_cpu(kind)
    try:
        yield
    finally:
        quantizers.AUTO_QUANTIZER_MAPPING.update(before)


def _on_cpu(kind: Any) -> Any:
    def nothing(self: Any, *_: Any, **__: Any) -> None:
        """Neither is a GPU asked for, nor are weights sent to one."""

    unbound = {"validate_environment": nothing, "update_device_map": nothing}
    return type(kind.__name__, (kind,), unbound)


def _part(source: str, folder: Path, kind: Any, artefact: Precision | None = None) -> nn.Module:
    checkpoints.configuration(source, folder, artefact)
    checkpoints.check_weights(source, folder, single=_WEIGHTS)
    artefacts.check_numbers(source, folder, artefact)
    try:
        with quiet(), _without_gpu():
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
