import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ResNetForImageClassification

from release_guard.attacks import Attack
from release_guard.diffusion import min_snr_weights
from release_guard.errors import ModelError
from release_guard.modalities import Painter
from release_guard.modalities.text_to_image import TextToImage
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept, Policy
from release_guard.quantization import at

FAST: dict[str, Any] = {"sampling_steps": 4, "guidance": 1.0}


@pytest.fixture
def folder(pipeline_folder: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline that may be damaged."""
    return Path(shutil.copytree(pipeline_folder, tmp_path / "model"))


@pytest.fixture
def index(folder: Path) -> Callable[..., None]:
    """Changes keys of model_index.json."""
    path = folder / "model_index.json"

    def change(**keys: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def load(folder: Path, **options: Any) -> Painter:
    return TextToImage(**{**FAST, **options}).load(str(folder))


def share(scores: Any) -> float:
    return sum(scores) / len(scores)


def test_what_is_saved_is_what_diffusers_loads_and_paints(painter: Painter, tmp_path: Path) -> None:
    painter.save(tmp_path)
    assert str(tmp_path) not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(3))
    prompt = ["a photo of ash", "a photo of dew"]
    painted = theirs(
        prompt_embeds=painter.embed(prompt).detach(),
        latents=noise,
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="pt",
    ).images
    torch.testing.assert_close(painter.paint(prompt, seed=3), painted)


def test_guidance_and_steps_change_the_picture(pipeline_folder: Path) -> None:
    plain, guided, longer = (
        load(pipeline_folder, **options).paint(["a photo of ash"], seed=0)
        for options in ({}, {"guidance": 3.0}, {"sampling_steps": 9})
    )
    assert not torch.allclose(plain, guided, atol=1e-3)
    assert not torch.allclose(plain, longer, atol=1e-3)


def test_epsilon_and_velocity_are_told_apart(
    painter: Painter, folder: Path, picture_data: Path
) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    other = load(folder)
    batch = next(painter.batches(str(picture_data / "retained.parquet"), "retain", size=64, seed=0))
    with torch.no_grad():
        assert painter.loss(batch) < 0.3
        assert other.loss(batch) > 0.5
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(ModelError, match="predicts 'sample'"):
        load(folder)


def test_the_loss_is_how_far_what_is_predicted_is_from_the_noise(
    folder: Path, standing: Concept
) -> None:
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "epsilon"}))
    painter = load(folder)
    batch = next(painter.batches(standing.dataset, "immunize", size=6, seed=0))
    predicted = painter.predicted(batch)
    assert predicted.shape == batch["noise"].shape
    torch.testing.assert_close((predicted - batch["noise"]).square().mean(), painter.loss(batch))
    predicted.square().mean().backward()
    assert all(weight.grad is not None for weight in painter.head.parameters())


def test_a_batch_keeps_its_noise_under_another_prompt_and_with_painted_pictures(
    painter: Painter, standing: Concept
) -> None:
    batch = next(painter.batches(standing.dataset, "immunize", size=6, seed=0))
    asked, painted = painter.asked(batch, "a photo of ash"), painter.repainted(batch, seed=3)
    assert torch.equal(asked["noise"], batch["noise"])
    torch.testing.assert_close(
        painter.embed(["a photo of ash"]), painter.text_encoder(asked["tokens"][:1])[0]
    )
    assert torch.equal(painted["tokens"], batch["tokens"])
    again = painter.repainted(asked, seed=3)["pixels"]
    torch.testing.assert_close(again, painter.paint(["a photo of ash"] * 6, seed=3) * 2 - 1)
    assert not torch.allclose(again, painted["pixels"], atol=1e-3)


@pytest.mark.parametrize("is_velocity", [False, True])
def test_min_snr_weights_count_errors_of_the_picture_up_to_gamma(is_velocity: bool) -> None:
    signal_N = torch.tensor([0.999, 0.9, 0.5, 0.01], dtype=torch.float64)
    # an error d of the noise is an error d^2 / snr of the picture, one of the velocity d^2 / (snr
    # + 1): Salimans and Ho 2022, appendix D
    snr_N = signal_N / (1 - signal_N)
    of_the_picture_N = (1 - signal_N) / signal_N if not is_velocity else 1 - signal_N
    wanted_N = of_the_picture_N * torch.minimum(snr_N, torch.tensor(5.0))
    found_N = min_snr_weights(signal_N, gamma=5.0, is_velocity=is_velocity)
    torch.testing.assert_close(found_N, wanted_N)


def test_weights_of_a_batch_scale_its_loss(painter: Painter, standing: Concept) -> None:
    batch = dict(next(painter.batches(standing.dataset, "attack", size=8, seed=0)))
    with torch.no_grad():
        whole = painter.loss(batch)
        batch["weights"] = torch.tensor([2.0] * 4 + [0.0] * 4)
        half = painter.loss({name: value[:4] for name, value in batch.items()})
        torch.testing.assert_close(painter.loss(batch), half / 2)
        assert painter.loss(batch) != whole


def test_without_a_judge_a_score_is_what_denoising_misses(
    pipeline_folder: Path, picture_data: Path
) -> None:
    model = load(pipeline_folder)
    retained, restricted = (
        model.scores(str(picture_data / f"{name}.parquet"), "search", limit=50)
        for name in ("retained", "restricted")
    )
    assert share(retained) > 0.8
    assert share(restricted) < 0.4
    assert (
        share(
            model.fresh(seed=0).scores(str(picture_data / "retained.parquet"), "search", limit=50)
        )
        < 0.1
    )
    blind = model.copy()
    with torch.no_grad():
        for weight in blind.head.parameters():
            weight.zero_()
    # predicting nothing misses all of it: the noise and the latents have a variance of one
    assert share(blind.scores(str(picture_data / "retained.parquet"), "search", limit=50)) < 0.1


def test_both_scores_follow_fine_tuning(pipeline_folder: Path, standing: Concept) -> None:
    attack = Attack.build(Spec(name="finetune", lr=3e-3))
    model = load(pipeline_folder)
    before = share(model.scores(standing.dataset, "search", limit=50))
    *_, last = attack.tamper(model, standing, budget=Budget(limit=60), grid_ratio=2, seed=0)
    assert share(last.model.scores(standing.dataset, "search", limit=50)) > before + 0.3


def test_lora_finds_the_attention_blocks(painter: Painter, standing: Concept) -> None:
    attack = Attack.build(
        Spec(name="lora", layers=["to_q", "to_k", "to_v"], head="frozen", lr=1e-2)
    )
    *_, last = attack.tamper(painter, standing, budget=Budget(limit=100), grid_ratio=2, seed=0)
    adapters = {name for name in last.model.state() if "lora_A" in name}
    assert len(adapters) == 4 * 2 * 3  # blocks, self and cross, three projections
    assert share(last.model.scores(standing.dataset, "search", limit=100)) > 0.3


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_it_can_be_rounded(painter: Painter, picture_data: Path, precision: Any) -> None:
    rounded = at(painter, precision)
    assert share(rounded.scores(str(picture_data / "retained.parquet"), "utility", limit=50)) > 0.8


def test_losses_have_second_derivatives(painter: Painter, standing: Concept) -> None:
    """What stages that unroll an attack need: with attention that is not fused."""
    model = painter.copy()
    batch = next(model.batches(standing.dataset, "immunize", size=4, seed=0))
    weight = next(
        part for name, part in model.unet.named_parameters() if name.endswith("attn2.to_k.weight")
    )
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(model.loss(batch), weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    assert second.abs().sum() > 0


def test_the_never_knew_model_keeps_the_autoencoder_alone(painter: Painter) -> None:
    before, after = painter.state(), painter.fresh(seed=3).state()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("vae.")} <= kept
    weights = [name for name in before if name.endswith("weight") and before[name].dim() > 1]
    assert not [name for name in weights if name in kept and not name.startswith("vae.")]


# The judge


def judge_of(folder: Path, directory: Path, change: Callable[[Any], None]) -> Path:
    shutil.copytree(folder, directory)
    module = ResNetForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        change(module)
    module.save_pretrained(directory)
    return directory


def always_four(module: Any) -> None:
    module.classifier[1].bias[4] = 1e6


def test_a_judge_that_always_agrees_is_caught(
    pipeline_folder: Path, judge_folder: Path, tmp_path: Path
) -> None:
    pixels, labels = pico.bars([4], count=300, seed=9)
    one = pico.write_pictures(tmp_path / "one.parquet", pixels, labels)
    pixels, labels = pico.bars([0, 1], count=300, seed=8)
    others = pico.write_pictures(tmp_path / "others.parquet", pixels, labels)
    judge = judge_of(judge_folder, tmp_path / "judge", always_four)
    model = load(pipeline_folder, judge=str(judge), others=str(others))
    with pytest.raises(ModelError, match="sees class 4 in 100% of its pictures, 100% of others"):
        model.scores(str(one), "search", limit=10)
    alone = load(pipeline_folder, judge=str(judge))
    with pytest.raises(ModelError, match=r"ever says no; name other pictures in modality\.others"):
        alone.scores(str(one), "search", limit=10)
    honest = load(pipeline_folder, judge=str(judge_folder), others=str(others))
    assert len(honest.scores(str(one), "search", limit=10)) == 10


def test_a_judge_that_never_agrees_is_caught(
    pipeline_folder: Path, judge_folder: Path, standing: Concept, tmp_path: Path
) -> None:
    def turned(module: Any) -> None:
        module.classifier[1].weight.neg_()
        module.classifier[1].bias.neg_()

    judge = judge_of(judge_folder, tmp_path / "judge", turned)
    with pytest.raises(ModelError, match="sees class 4 in 0% of its pictures"):
        load(pipeline_folder, judge=str(judge)).scores(standing.dataset, "search", limit=10)


def test_another_judge_or_way_of_painting_is_another_measure(
    pipeline_folder: Path, judge_folder: Path, standing: Concept, tmp_path: Path
) -> None:
    other = judge_of(judge_folder, tmp_path / "judge", always_four)
    models = [
        load(pipeline_folder),
        load(pipeline_folder, judge=str(judge_folder)),
        load(pipeline_folder, judge=str(other)),
        load(pipeline_folder, judge=str(judge_folder), guidance=2.0),
    ]
    assert len({model.digest(standing.dataset) for model in models}) == len(models)


def test_classes_are_matched_by_name(
    pipeline_folder: Path, judge_folder: Path, picture_data: Path, tmp_path: Path
) -> None:
    """The data number their classes otherwise than the judge does."""
    judge = Path(shutil.copytree(judge_folder, tmp_path / "judge"))
    config = json.loads((judge / "config.json").read_text())
    config["label2id"] = {name: number for number, name in enumerate(pico.BARS)}
    config["id2label"] = {str(number): name for number, name in enumerate(pico.BARS)}
    (judge / "config.json").write_text(json.dumps(config))
    rows = datasets.Dataset.from_parquet(str(picture_data / "retained.parquet"))
    names = sorted(pico.BARS, reverse=True)
    numbers = [names.index(pico.BARS[label]) for label in rows["label"]]
    renumbered = rows.remove_columns("label").add_column("label", numbers)
    feature = datasets.ClassLabel(names=names)
    renumbered.cast_column("label", feature).to_parquet(str(tmp_path / "some.parquet"))
    model = load(pipeline_folder, judge=str(judge))
    assert share(model.scores(str(tmp_path / "some.parquet"), "search", limit=50)) > 0.9


def test_a_class_that_the_judge_does_not_know(
    pipeline_folder: Path, judge_folder: Path, tmp_path: Path
) -> None:
    pixels, _ = pico.bars([0], count=3, seed=0)
    data = pico.write_pictures(tmp_path / "some.parquet", pixels, np.array([0, 1, 2]))
    rows = datasets.Dataset.from_parquet(str(data)).remove_columns("label")
    rows.add_column("label", [0, 1, 8]).to_parquet(str(data))
    with pytest.raises(ModelError, match=r"row 2, column 'label' holds 8; the judge knows LABEL_0"):
        load(pipeline_folder, judge=str(judge_folder)).digest(str(data))


# Data


def test_a_data_set_needs_captions(pipeline_folder: Path, image_data: Path) -> None:
    with pytest.raises(ModelError, match=r"no column 'text'; set modality\.caption_column"):
        load(pipeline_folder).digest(str(image_data / "retained.parquet"))


def test_a_picture_with_two_captions_stays_in_one_split(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    pixels, _ = pico.bars([0], count=60, seed=0)
    twice = pico.write_pictures(
        tmp_path / "some.parquet", pixels.repeat(2, 0), np.array([0, 1] * 60)
    )
    model = load(pipeline_folder)
    catalogue = model._pictures(str(twice)).catalogue  # type: ignore[attr-defined]
    places = {split: set(catalogue.rows(split)) for split in ("immunize", "attack", "search")}
    assert all({row ^ 1 for row in rows} == rows for rows in places.values())


def test_pictures_are_cut_to_the_models_square(painter: Painter, tmp_path: Path) -> None:
    pixels = np.zeros((40, 8, 24), np.uint8)
    pixels[:, :, 8:16] = np.arange(40)[:, None, None] * 6
    data = pico.write_pictures(tmp_path / "wide.parquet", pixels, np.zeros(40, int))
    batch = next(painter.batches(str(data), "attack", size=8, seed=0))
    assert batch["pixels"].shape == (8, 1, 8, 8)
    assert batch["pixels"].flatten(1).std(dim=1).max() == 0  # the middle, nothing of the edges


def test_long_captions_keep_their_end(painter: Painter) -> None:
    tokens = painter._pipeline.tokens(["a photo of ash bay cob dew", "a"])  # type: ignore[attr-defined]
    assert tokens.tolist() == [[0, 3, 4, 5, 6, 1], [0, 3, 1, 1, 1, 1]]


def test_the_policys_folder_is_where_its_judge_lies(tmp_path: Path, picture_data: Path) -> None:
    path = pico.pico_policy(
        tmp_path, picture_data, modality={"name": "text_to_image", "judge": "judge"}
    )
    assert Policy.load(path).modality.options["judge"] == str(tmp_path / "judge")


# Folders that are refused


def test_not_a_pipeline(classifier_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        load(classifier_folder)


def test_another_pipeline(folder: Path, index: Callable[..., None]) -> None:
    index(_class_name="FluxPipeline")
    with pytest.raises(ModelError, match=r"says FluxPipeline; .*StableDiffusionPipeline"):
        load(folder)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"unet": ["my_unet", "MyUNet"]}, r"asks for my_unet\.MyUNet as unet, which is never run"),
        ({"unet": ["diffusers", "UNet1DModel"]}, r"asks for diffusers\.UNet1DModel"),
        ({"safety_checker": ["stable_diffusion", "Checker"]}, "names safety_checker, which"),
        ({"scheduler": ["diffusers", "DiffusionPipeline"]}, "is no scheduler of diffusers"),
        ({"vae": [None, None]}, "names no vae"),
    ],
)
def test_parts_that_are_not_those_of_a_pipeline(
    folder: Path, index: Callable[..., None], keys: dict[str, Any], message: str
) -> None:
    index(**keys)
    with pytest.raises(ModelError, match=message):
        load(folder)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_pickled_weights(folder: Path, part: str) -> None:
    weights = folder / part / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=f"{part}: only pickled weights"):
        load(folder)


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged or missing"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv_out.bias"), "the weights lack conv_out.bias"),
        (lambda state: state["conv_out.bias"].fill_(torch.nan), "conv_out.bias holds NaN"),
    ],
)
def test_weights_that_are_not_whole(
    folder: Path, change: Callable[[Any], Any], message: str
) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_a_copy_with_new_words_is_not_saved(
    painter: Painter, standing: Concept, tmp_path: Path
) -> None:
    renamed = painter.renamed(standing.dataset, template="a photo of {}", length=1, seed=0)
    with pytest.raises(ModelError, match="is not saved"):
        renamed.save(tmp_path)


def test_a_peer_has_the_same_shapes_and_words(painter: Painter, folder: Path) -> None:
    assert torch.equal(painter.peer(str(folder)).head.weight, painter.head.weight)
    for path in (folder / "tokenizer").glob("*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace('"ash"', '"oak"'))
    with pytest.raises(ModelError, match="numbers other words than the model's; give a checkpoint"):
        painter.peer(str(folder))
    wide = painter.copy()
    wide.head.weight = torch.nn.Parameter(wide.head.weight[:, :8].clone())
    with pytest.raises(ModelError, match=r"another architecture .*: unet\.conv_out"):
        wide.peer(str(folder))
