"""Artefacts of every precision: the same numbers as in memory, read back, loadable by anyone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from release_guard.engines import Job, run_trial
from release_guard.errors import ModelError
from release_guard.manifest import hash_directory
from release_guard.modalities import Modality, ModelHandle, names_to_pack
from release_guard.phases import SEARCH, Folders, Ground
from release_guard.plugins import Spec
from release_guard.policy import Policy, Precision
from release_guard.quantization import at, plain

ROUNDED: tuple[Precision, ...] = ("bf16", "int8", "nf4")
PACKED: tuple[Precision, ...] = ("int8", "nf4")
DATA = {
    "causal_lm": ("text_data", ".jsonl"),
    "image_classification": ("image_data", ".parquet"),
    "text_to_image": ("picture_data", ".parquet"),
}
KINDS = {"causal_lm": "wide_lm", "image_classification": "wide_vit", "text_to_image": "pipeline"}


@pytest.fixture(scope="module")
def wide_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its rows are whole blocks."""
    return pico.pico_lm(tmp_path_factory.mktemp("wide"), steps=20, width=64)


@pytest.fixture(scope="module")
def wide_vit(classifier_folder: Path) -> Path:
    """Some of its rows are half a block."""
    return classifier_folder


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> Path:
    return pipeline_folder


@pytest.fixture(scope="module")
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Master, its folder and its artefacts, each written once."""
    name = request.param
    folder = request.getfixturevalue(KINDS[name])
    modality = Modality.build(Spec(name=name))
    home = tmp_path_factory.mktemp("artefacts")
    for precision in ROUNDED:
        modality.save_at(folder, home / precision, precision)
    return {
        "name": name,
        "modality": modality,
        "folder": folder,
        "master": modality.load(str(folder)),
        "home": home,
    }


every_kind = pytest.mark.parametrize("made", list(KINDS), indirect=True)


def test_no_kind_of_model_is_forgotten() -> None:
    assert set(KINDS) == set(Modality.available())


def linear(model: ModelHandle) -> dict[str, str]:
    return {
        name: type(layer).__name__
        for name, layer in model.module.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }


@every_kind
@pytest.mark.parametrize("precision", ROUNDED)
def test_an_artefact_is_bit_by_bit_what_is_attacked_in_memory(
    made: dict[str, Any], precision: Precision
) -> None:
    loaded = made["modality"].load(str(made["home"] / precision), artefact=precision)
    rounded = at(made["master"], precision)
    assert linear(loaded) == linear(rounded)
    mine, theirs = plain(loaded).state(), plain(rounded).state()
    assert mine.keys() == theirs.keys()
    differing = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert differing == []
    assert any(not torch.equal(value, mine[name]) for name, value in made["master"].state().items())


@every_kind
@pytest.mark.parametrize("precision", ROUNDED)
def test_it_computes_what_is_attacked_in_memory(
    made: dict[str, Any], precision: Precision, request: pytest.FixtureRequest
) -> None:
    name, suffix = DATA[made["name"]]
    data = str(request.getfixturevalue(name) / f"retained{suffix}")
    loaded = made["modality"].load(str(made["home"] / precision), artefact=precision)
    models = [loaded, loaded.copy(), at(made["master"], precision)]
    batch = next(loaded.batches(data, "attack", size=8, seed=0))
    for evaluated in (False, True):  # bitsandbytes packs anew at the first evaluation
        losses = [model.loss(batch).item() for model in models]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
        assert evaluated or losses[0] != made["master"].loss(batch).item()
        for model in models:
            model.scores(data, "utility", limit=20)


@every_kind
def test_the_same_bytes_are_written_every_time(made: dict[str, Any], tmp_path: Path) -> None:
    for precision in ROUNDED:
        made["modality"].save_at(made["folder"], tmp_path / precision, precision)
    assert hash_directory(tmp_path) == hash_directory(made["home"])


@every_kind
def test_no_path_of_this_machine_is_written(made: dict[str, Any]) -> None:
    written = [path for path in made["home"].rglob("*") if path.suffix in {".json", ".txt"}]
    assert written
    assert not [path for path in written if str(made["folder"]) in path.read_text()]
    assert not [path for path in written if str(made["home"]) in path.read_text()]


@every_kind
@pytest.mark.parametrize("asked", ROUNDED)
def test_another_precision_than_asked_for_is_refused(
    made: dict[str, Any], asked: Precision
) -> None:
    load = made["modality"].load
    for precision in set(ROUNDED) - {asked}:
        with pytest.raises(ModelError):
            load(str(made["home"] / precision), artefact=asked)
    with pytest.raises(ModelError):
        load(str(made["folder"]), artefact=asked)
    if asked in PACKED:
        with pytest.raises(ModelError, match="quantized already"):
            load(str(made["home"] / asked))


def configured(folder: Path, target: Path, **changes: Any) -> str:
    """A copy whose config.json says something else of its format."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"].update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


only_texts = pytest.mark.parametrize("made", ["causal_lm"], indirect=True)


@only_texts
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type = 'fp4', and nf4 needs 'nf4'"),
        ({"bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant = True"),
        ({"bnb_4bit_compute_dtype": "float16"}, "bnb_4bit_compute_dtype = 'float16'"),
        ({"quant_method": "gptq"}, "quant_method = 'gptq', and nf4 needs 'bitsandbytes'"),
    ],
)
def test_a_configuration_of_another_format_is_refused(
    made: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = configured(made["home"] / "nf4", tmp_path / "other", **changes)
    with pytest.raises(ModelError, match=said):
        made["modality"].load(folder, artefact="nf4")


@only_texts
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "holds fp4 in blocks of 64; nf4 in blocks of 64 was"),
        ({"bnb_4bit_use_double_quant": True}, "nf4 in blocks of 64, scales quantized again"),
        ({"llm_int8_skip_modules": ["lm_head", "up_proj"]}, "up_proj is Linear, and nf4 was"),
    ],
)
def test_files_of_another_format_are_refused_whatever_config_json_says(
    made: dict[str, Any], tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    """bitsandbytes makes fp4 if nobody says nf4, and leaves out what it is told to."""
    given = {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head"], **options}
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, **given)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        made["folder"], dtype=torch.float32, quantization_config=settings
    )
    theirs.save_pretrained(tmp_path / "theirs")
    shutil.copytree(made["home"] / "nf4", tmp_path / "nf4")
    shutil.copy(tmp_path / "theirs" / "model.safetensors", tmp_path / "nf4")
    skipped = given["llm_int8_skip_modules"]
    folder = configured(tmp_path / "nf4", tmp_path / "made", llm_int8_skip_modules=skipped)
    with pytest.raises(ModelError, match=said):
        made["modality"].load(folder, artefact="nf4")


@only_texts
def test_a_table_of_other_levels_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    """Some kernels read it and others do not: such a file is two models."""
    shutil.copytree(made["home"] / "nf4", tmp_path / "nf4")
    path = tmp_path / "nf4" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".quant_map"))
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="nf4 in blocks of 64 was asked for"):
        made["modality"].load(str(tmp_path / "nf4"), artefact="nf4")


@only_texts
@pytest.mark.parametrize("precision", PACKED)
def test_a_missing_library_is_said_in_one_line(
    made: dict[str, Any], precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    said = rf"^{precision}: bitsandbytes cannot be imported; pip install .*, or leave .* out$"
    with pytest.raises(ModelError, match=said):
        made["modality"].load(str(made["home"] / precision), artefact=precision)
    with pytest.raises(ModelError, match=said):
        made["modality"].save_at(made["folder"], tmp_path, precision)


def test_a_model_with_nothing_to_pack_is_refused(resnet_folder: Path, tmp_path: Path) -> None:
    modality = Modality.build(Spec(name="image_classification"))
    for precision in PACKED:
        with pytest.raises(ModelError, match=f"nothing would be rounded; leave {precision} out"):
            modality.save_at(resnet_folder, tmp_path / precision, precision)


def test_the_autoencoder_stays_whole(pipeline_folder: Path) -> None:
    model = Modality.build(Spec(name="text_to_image")).load(str(pipeline_folder))
    model.module.vae.decoder.more = torch.nn.Linear(64, 64)
    for precision in PACKED:
        names = names_to_pack(pipeline_folder, model, precision)
        packed = [name for name, kind in linear(at(model, precision)).items() if kind != "Linear"]
        assert sorted(names) == sorted(packed)
        assert names
        assert not [name for name in names if name.startswith("vae.")]


THEIRS = """
import sys
import {library}

found = {library}.{loader}.from_pretrained(sys.argv[1], **{options})
network = getattr(found, "unet", found)
kinds = {{type(layer).__name__ for layer in network.modules()}}
print(sorted(kind for kind in kinds if kind.startswith("Linear")))
assert not [name for name in sys.modules if name.startswith("release_guard")]
"""
LOADERS = {
    "causal_lm": ("transformers", "AutoModelForCausalLM"),
    "text_to_image": ("diffusers", "StableDiffusionPipeline"),
}


@pytest.mark.parametrize("made", list(LOADERS), indirect=True)
def test_anybody_loads_it_without_us(made: dict[str, Any]) -> None:
    if made["name"] == "text_to_image" and not torch.cuda.is_available():
        pytest.skip("diffusers itself loads packed layers on a GPU only")
    library, loader = LOADERS[made["name"]]
    options = {} if library == "diffusers" else {"subfolder": "nf4"}
    source = made["home"] if options else made["home"] / "nf4"
    script = THEIRS.format(library=library, loader=loader, options=options)
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script, str(source)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['Linear', 'Linear4bit']"


@pytest.mark.parametrize("attack", ["finetune", "lora"])
@pytest.mark.parametrize("precision", ROUNDED)
def test_attacks_do_to_it_what_they_do_to_the_same_in_memory(
    precision: Precision, attack: str, image_data: Path, classifier_folder: Path, tmp_path: Path
) -> None:
    red_team = {"budget": {"unit": "steps", "limit": 3}, "search_examples": 40}
    changes = {"attacks": [{"name": attack, "lr": 0.003}], "gate": {"mandatory": [attack]}}
    path = pico.pico_policy(tmp_path, image_data, red_team=red_team, **changes)
    policy, folder = Policy.load(path), tmp_path / precision
    modality = Modality.build(policy.modality)
    modality.save_at(classifier_folder, folder, precision)
    model = modality.load(str(classifier_folder))
    ground = Ground.of(model, Folders(classifier_folder, classifier_folder), policy)
    (target,), attacks = policy.targets, policy.attacks
    (trial,) = ground.trials(SEARCH, "defended", target, attacks, [precision], 0.9)
    outcomes = [
        run_trial(Job(trial, str(classifier_folder), policy)),
        run_trial(Job(trial, str(folder), policy, is_artefact=True)),
        run_trial(Job(trial, str(folder), policy, is_artefact=True)),  # a worker keeps the model
    ]
    assert {outcome.ending for outcome in outcomes} == {"survived"}
    assert len({tuple(point.score for point in each.curve) for each in outcomes}) == 1
