"""Model folders in the layout of `transformers`: distrusted, loaded whole or not at all.

Safetensors only, code of the repository never: what is attacked must be what anybody loads.
"""

import copy
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn

from release_guard import artefacts
from release_guard.errors import ModelError, brief
from release_guard.policy import Precision

WEIGHTS = "model.safetensors"  # as transformers names them
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_UNLOADABLE = (  # what libraries raise of configurations that make no sense
    *(OSError, ValueError, RuntimeError, LookupError, ImportError),
    *(StrictDataclassError, TypeError, AttributeError, ArithmeticError, AssertionError),
)


def load(
    source: str,
    folder: Path,
    *,
    auto: Any,
    architectures: Iterable[Any],
    modality: str,
    artefact: Precision | None = None,
) -> nn.Module:
    """Load weights as fp32, in evaluation mode, each with memory of its own.

    Args:
        source: What the user wrote, for messages.
        folder: What `fetch` made of it.
        auto: A `transformers` auto class for models.
        architectures: Class names (or tuples of them) that it may load.
        modality: Its name, for messages.
        artefact: The precision that the files must be in; layers that are packed stay so. None: any
            weights in full precision.

    Raises:
        ModelError: The folder is not exactly one whole, finite model of this kind and format.
    """
    config = configuration(source, folder, artefact)
    name = _architecture(source, config, architectures, modality)
    check_weights(source, folder)
    artefacts.check_numbers(source, folder, artefact)
    attention = "sdpa" if getattr(transformers, name)._supports_sdpa else "eager"
    try:
        with quiet():
            module, report = auto.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **_place(artefact),
            )
    except _UNLOADABLE as error:
        reason = brief(error)
        raise ModelError(f"{source}: cannot be loaded as {name}: {reason}") from error
    if module.config._attn_implementation != attention:  # a wish in the file wins over ours
        module.set_attn_implementation(attention)
    settle(source, module, report)
    loaded: nn.Module = module.eval()
    return loaded


def save_at(
    module: Any,
    source: Path,
    directory: Path,
    *,
    auto: Any,
    names: Collection[str],
    precision: Precision,
) -> None:
    """Write weights at a precision.

    Args:
        module: What `load` made of the source in full precision; not to be used any more.
        source: Its folder.
        directory: Where they go.
        auto: The `transformers` class that loads them.
        names: Linear layers that are packed, for int8 and nf4.
        precision: The format.

    Raises:
        ModelError: bitsandbytes is not installed, or has no kernel for this machine.
    """
    if precision in artefacts.PACKED:
        module = packed(module, source, auto, names, precision)
    else:
        module.to(artefacts.unpacked_dtype(precision))
    with quiet():
        module.save_pretrained(directory)  # before any forward pass, which might pack it again


def packed(
    module: nn.Module, source: Path, auto: Any, names: Collection[str], precision: Precision
) -> Any:
    """The same model as the library itself quantizes it; arguments as of `save_at`."""
    config = artefacts.settings(transformers, module, names, precision)
    try:
        with quiet():
            return auto.from_pretrained(
                source,
                dtype=torch.float32,
                quantization_config=config,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **_place(precision),
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = brief(error)
        raise ModelError(f"{source}: cannot be packed at {precision}: {reason}") from error


def _place(precision: Precision | None) -> dict[str, Any]:
    """Packed on the CPU, wherever it is computed: other devices may round ties otherwise."""
    return {"device_map": {"": "cpu"}} if precision in artefacts.PACKED else {}


def settle(source: str, module: nn.Module, report: dict[str, Any]) -> None:
    """Check what a library says it loaded, and give each weight memory of its own.

    Raises:
        ModelError: Weights are missing, superfluous, of another shape or not finite.
    """
    _check_report(source, report)
    _check_finite(source, module)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()  # mapped files are misaligned, slow, and may change


def fresh(module: Any, *, auto: Any, seed: int) -> nn.Module:
    """Random weights for the same configuration; the global random state stays as it is.

    Raises:
        ModelError: The library made another configuration of it.
    """
    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)
        twin = auto.from_config(
            copy.deepcopy(module.config), attn_implementation=module.config._attn_implementation
        )
    if twin.config.to_dict() != module.config.to_dict():
        raise ModelError("the configuration with random weights differs from the model's own")
    parameter = next(module.parameters())
    made: nn.Module = twin.eval().to(device=parameter.device, dtype=parameter.dtype)
    return made


def check_same_shape(source: str, module: nn.Module, other: nn.Module) -> None:
    """Refuse a checkpoint of another architecture.

    Raises:
        ModelError: `other`, read from `source`, has not the tensors of `module`.
    """
    mine, theirs = (
        {(name, tensor.shape) for name, tensor in part.state_dict().items()}
        for part in (module, other)
    )
    if differing := sorted(name for name, _ in mine ^ theirs):
        what = f"{differing[0]} is not there or has another shape"
        raise ModelError(f"{source}: another architecture than the model's: {what}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's bars and log lines to itself."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def configuration(source: str, folder: Path, artefact: Precision | None = None) -> dict[str, Any]:
    """The content of config.json, if nothing in the folder asks for code from elsewhere.

    Args:
        source: What the user wrote, for messages.
        folder: Where it lies.
        artefact: The precision that it must speak of; None: full precision.

    Raises:
        ModelError: It asks for code, is no whole model, or is of another format.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{source}: an adapter, not a whole model; merge it into its base first")
    if not (folder / "config.json").exists():
        raise ModelError(f"{source}: no config.json; is this the folder of a transformers model?")
    for path in sorted(folder.glob("*config.json")):
        if "auto_map" in read_json(source, path):
            reason = f"{path.name} names code of its own (auto_map), which is never run"
            advice = "remove that key if transformers loads the model without it"
            raise ModelError(f"{source}: {reason}; {advice}")
    config = read_json(source, folder / "config.json")
    for key in ("attn_implementation", "_attn_implementation"):
        if config.get(key) not in (None, "eager", "sdpa"):  # others are fetched from the Hub
            reason = f"config.json asks for the attention {config[key]!r}, which is never fetched"
            raise ModelError(f"{source}: {reason}; remove its key {key}")
    artefacts.check_config(source, config, artefact)
    return config


def _architecture(
    source: str, config: dict[str, Any], allowed: Iterable[Any], modality: str
) -> str:
    """The class of the model, if it is one of those allowed."""
    listed = config.get("architectures") or ["nothing"]
    found = [str(name) for name in listed] if isinstance(listed, list) else [str(listed)]
    names = {name for entry in allowed for name in ([entry] if isinstance(entry, str) else entry)}
    if found[0] not in names:
        known = (name for name in sorted(names) if name.startswith(("Llama", "ViT")))
        example = next(known, min(names))
        wanted = f"modality {modality} loads models such as {example}"
        raise ModelError(f"{source}: config.json says {found[0]}; {wanted}; correct modality.name")
    return found[0]


def read_json(source: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: It cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{source}: {path.name} cannot be read: {brief(error)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{source}: {path.name} is not a JSON object; fetch the model again")
    return content


def check_weights(source: str, folder: Path, *, single: str = WEIGHTS) -> None:
    """Open every file of weights, without reading them.

    Args:
        source: What the user wrote, for messages.
        folder: Where they lie.
        single: As `weight_files` takes it.

    Raises:
        ModelError: As of `weight_files`, or one is damaged.
    """
    for name in sorted(weight_files(source, folder, single=single)):
        try:
            with safe_open(folder / name, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            reason = brief(error)
            raise ModelError(
                f"{source}: {name} is damaged or missing ({reason}); fetch it again"
            ) from None


def weight_files(source: str, folder: Path, *, single: str = WEIGHTS) -> frozenset[str]:
    """Names of the files in a folder that whoever loads it reads weights from, and from no others.

    Args:
        source: What the user wrote, for messages.
        folder: Where they lie.
        single: Name of the file, where it is one; where there are several, `single`.index.json
            lists them.

    Raises:
        ModelError: There are none, none but pickles, or both forms: libraries differ in which they
            then read.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    index = f"{single}.index.json"
    if {single, index} <= names:
        raise ModelError(
            f"{source}: holds both {single} and {index}, and libraries differ in which they read; "
            "remove one"
        )
    wanted = _listed(source, folder / index) if index in names else names & {single}
    if not wanted:
        raise ModelError(f"{source}: {_no_weights(names)}")
    return frozenset(wanted)


def _listed(source: str, index: Path) -> set[str]:
    """The files of weights that an index names, all of them beside it."""
    found = read_json(source, index).get("weight_map", {})
    names = [str(name) for name in found.values()] if isinstance(found, dict) else [""]
    if not all(name and Path(name).name == name for name in names):
        raise ModelError(
            f"{source}: {index.name} does not list the files beside it; fetch it again"
        )
    return set(names)


def _no_weights(names: Iterable[str]) -> str:
    pickles = sorted(name for name in names if Path(name).suffix in _PICKLES)
    if not pickles:
        return "no weights (model.safetensors); fetch the model again, or convert its pickle files"
    return (
        f"only pickled weights ({pickles[0]}), which can run code when they are loaded; in a "
        "sandbox: AutoModel class.from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors"
    )


def _check_report(source: str, report: dict[str, Any]) -> None:
    for kind, meaning in (
        ("missing_keys", "lack"),
        ("mismatched_keys", "have another shape of"),
        ("unexpected_keys", "hold, beyond the model,"),
    ):
        if keys := sorted(map(str, report[kind])):
            what = f"the weights {meaning} {keys[0]}"
            raise ModelError(f"{source}: {what} ({len(keys)} such); fetch or save the model again")


def _check_finite(source: str, module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(f"{source}: {name} holds NaN or infinity; fetch or train it again")
