import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from release_guard import checkpoints
from release_guard.errors import ModelError
from release_guard.sources import local_folder


def load(source: str | Path) -> torch.nn.Module:
    return checkpoints.load(
        str(source),
        local_folder(str(source)),
        auto=AutoModelForImageClassification,
        architectures=MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
        modality="image_classification",
    )


@pytest.fixture
def folder(classifier_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(classifier_folder, tmp_path / "model")


def configure(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def refused(source: str | Path, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(source)
    text = str(caught.value)
    assert text.startswith(str(source))
    assert "\n" not in text


def test_whole_folder_loads_in_evaluation_mode_as_fp32(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    configure(folder, dtype="bfloat16")
    module = load(folder)
    assert not module.training
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}


def test_loading_leaves_the_random_state_and_prints_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    checkpoints.fresh(load(folder), auto=AutoModelForImageClassification, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")


def test_weights_do_not_follow_the_file(folder: Path) -> None:
    module = load(folder)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-400, 2)
        file.write(b"\x11" * 400)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "no such folder; give a model folder, or OWNER/NAME@REVISION"),
        ("owner/name", "no such folder; give a model folder, or OWNER/NAME@REVISION"),
        ("owner/name@main", "the Hub does not give this model"),
    ],
)
def test_source_that_is_not_there(source: str, message: str) -> None:
    refused(source, message)


@pytest.mark.parametrize("prefix", ["", "hf://"])
def test_revision_of_the_hub_comes_from_its_cache(classifier_folder: Path, prefix: str) -> None:
    commit = "0123456789" * 4
    cached = Path(HF_HUB_CACHE) / "models--owner--cached"
    snapshot = cached / "snapshots" / commit
    if not snapshot.exists():
        shutil.copytree(classifier_folder, snapshot)
        (cached / "refs").mkdir()
        (cached / "refs" / "v1").write_text(commit)
    theirs = load(f"{prefix}owner/cached@v1").state_dict()
    ours = load(classifier_folder).state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    refused(f"{prefix}owner/cached@v2", "the Hub does not give this model")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json (cannot be read|is not a JSON object)")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(folder, r"only pickled weights \(pytorch_model.bin\).*save_pretrained")


def test_pickles_beside_safetensors_do_not_matter(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "model.safetensors is damaged")


def test_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(load_file(folder / "model-00001-of-00002.safetensors"), "one")
    index = {"metadata": {}, "weight_map": names | {"x": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model-00002-of-00002.safetensors is damaged or missing|one is damaged")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_numbers(folder: Path, value: float) -> None:
    rewrite(folder, lambda tensors: tensors["classifier.weight"].fill_(value))
    refused(folder, "classifier.weight holds NaN or infinity")


def test_missing_tensor_is_not_filled_at_random(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("classifier.weight"))
    refused(folder, "the weights lack classifier.weight")


def test_tensor_the_model_does_not_know(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(extra=torch.zeros(3)))
    refused(folder, "the weights hold, beyond the model, extra")


def test_tensor_of_another_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"classifier.bias": torch.zeros(3)}))
    refused(folder, "classifier.bias|cannot be loaded as ViT")


def test_another_kind_of_model(lm_folder: Path) -> None:
    refused(lm_folder, "config.json says LlamaForCausalLM; .*such as ViT.*correct modality.name")


def test_architecture_is_not_given(folder: Path) -> None:
    configure(folder, architectures=None)
    refused(folder, "config.json says nothing")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_code_in_the_repository_is_refused(folder: Path, name: str) -> None:
    configure(folder, name, auto_map={"AutoModel": "evil.Evil"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    refused(folder, rf"{name} names code of its own \(auto_map\), which is never run")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_is_ours_to_choose(folder: Path, key: str) -> None:
    configure(folder, **{key: "eager"})
    assert load(folder).config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    configure(folder, **{key: "somebody/kernel"})
    refused(folder, "asks for the attention 'somebody/kernel', which is never fetched")


def test_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    refused(folder, "an adapter, not a whole model")


def test_quantized_already(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "bitsandbytes"})
    refused(folder, "quantized already")


def test_peer_of_another_shape(folder: Path, resnet_folder: Path) -> None:
    with pytest.raises(ModelError, match="another architecture"):
        checkpoints.check_same_shape("other", load(folder), load(resnet_folder))
