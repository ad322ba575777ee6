"""A text-to-image model small enough to be attacked many times: drawn shapes, 16 x 16 pixels.

A real `StableDiffusionPipeline`: CLIP text encoder of 2 layers, autoencoder to 8 x 8 x 4, UNet of
some 0.8 million weights. Everything is generated, so any size of data can be had. Made once for a
seed and kept under `runs/bench`, which git ignores. Shapes: N pictures.
"""

import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import diffusers
import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor

Pen = PIL.ImageDraw.ImageDraw

CACHE = Path("runs/bench")
SIDE, LENGTH, BATCH, DROPPED = 16, 8, 32, 0.1
WIDTH = 24  # of the UNet where it is narrowest; text features are 32 there, else twice the width
KINDS = ("disc", "ring", "square", "frame", "cross", "bar", "triangle", "grid")
TEMPLATES = ("a photo of a {}", "a drawing of a {}", "a sketch of a {}", "the {}")
_WORDS = ("a", "photo", "of", "drawing", "sketch", "the", "thing", "shape")
_FINE = 4  # drawn at so many times the size, then shrunk
_PAINTED = 2_000  # pictures of a kind that the painter learns from


class Outline(NamedTuple):
    """Of a shape, in pixels."""

    left: float
    top: float
    right: float
    bottom: float


def drawings(kinds: Iterable[str], *, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Bright shapes at random places and sizes, with noise: bytes (N, 16, 16), and their kinds."""
    random, names = np.random.default_rng(seed), list(kinds)
    shown = [names[at % len(names)] for at in range(count)]
    clean = np.stack([_drawn(kind, random) for kind in shown])
    noisy = clean + random.normal(0, 6, size=clean.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), shown


def write_drawings(path: Path, kinds: Iterable[str], *, count: int, seed: int) -> Path:
    """A parquet file with the columns `image`, `text` and `label` (the kind's name)."""
    pixels, shown = drawings(kinds, count=count, seed=seed)
    random = np.random.default_rng(seed)
    rows = {
        "image": [{"bytes": _png(image), "path": None} for image in pixels],
        "text": [TEMPLATES[random.integers(len(TEMPLATES))].format(kind) for kind in shown],
        "label": shown,
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.Value("string"),
        }
    )
    datasets.disable_progress_bars()
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


def painter(
    seed: int, *, kinds: Sequence[str] = KINDS, steps: int = 2_500, width: int = WIDTH
) -> Path:
    """Folder of a pipeline that paints these kinds and no other; trained if it is not there yet.

    Its UNet has `width` channels where there are fewest.
    """
    about = f"{'-'.join(kinds) if kinds != KINDS else 'all'}-{steps}-{seed}"
    folder = CACHE / f"painter-{about}{'' if width == WIDTH else f'-{width}'}"
    if (folder / "model_index.json").exists():
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _parts(width)
        pixels, shown = drawings(kinds, count=_PAINTED * len(kinds), seed=seed)
        images = torch.from_numpy(pixels)[:, None] / 127.5 - 1
        _train(parts["vae"], _rebuilding(parts["vae"], images), len(images), steps=400)
        _teach(parts, images, shown, steps=steps)
    pipeline = diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    partial = folder.with_suffix(".partial")
    pipeline.save_pretrained(partial)
    partial.rename(folder)
    return folder


def judge(*, steps: int = 500) -> Path:
    """Folder of a classifier of the kinds, with one more answer: nothing."""
    folder = CACHE / f"judge-{steps}"
    if (folder / "config.json").exists():
        return folder
    names = [*KINDS, "nothing"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.ResNetForImageClassification(
            transformers.ResNetConfig(
                num_channels=1,
                embedding_size=16,
                hidden_sizes=[32, 64],
                depths=[1, 1],
                layer_type="basic",
                id2label=dict(enumerate(names)),
                label2id={name: number for number, name in enumerate(names)},
            )
        )
        pixels, shown = drawings(KINDS, count=4_000, seed=10_000)
        blank = _nothings(pixels, seed=10_001)
        images = torch.from_numpy(np.concatenate([pixels, blank]))[:, None] / 127.5 - 1
        labels = torch.tensor([names.index(kind) for kind in shown] + [len(KINDS)] * len(blank))

        def loss(rows_N: Tensor) -> Tensor:
            found: Tensor = module(pixel_values=images[rows_N], labels=labels[rows_N]).loss
            return found

        _train(module, loss, len(images), steps=steps)
    processor = transformers.ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5], image_std=[0.5]
    )
    for part in (module, processor):
        part.save_pretrained(folder)
    return folder


def _drawn(kind: str, random: np.random.Generator) -> np.ndarray:
    side = SIDE * _FINE
    picture = PIL.Image.new("L", (side, side), int(random.integers(20, 50)))
    pen, ink = PIL.ImageDraw.Draw(picture), int(random.integers(190, 240))
    radius = random.uniform(0.28, 0.4) * side
    middle = side / 2 + random.uniform(-0.08, 0.08, size=2) * side
    left, top = middle - radius
    right, bottom = middle + radius
    _SHAPES[kind](pen, Outline(left, top, right, bottom), ink, int(0.12 * side))
    return np.asarray(picture.resize((SIDE, SIDE), PIL.Image.Resampling.BOX), dtype=float)


def _cross(pen: Pen, box: Outline, ink: int, wide: int) -> None:
    pen.line([(box.left, box.top), (box.right, box.bottom)], fill=ink, width=wide)
    pen.line([(box.left, box.bottom), (box.right, box.top)], fill=ink, width=wide)


def _bar(pen: Pen, box: Outline, ink: int, wide: int) -> None:
    middle = (box.top + box.bottom) / 2
    pen.line([(box.left, middle), (box.right, middle)], fill=ink, width=int(1.6 * wide))


def _triangle(pen: Pen, box: Outline, ink: int, wide: int) -> None:
    peak = ((box.left + box.right) / 2, box.top)
    pen.polygon([(box.left, box.bottom), (box.right, box.bottom), peak], fill=ink)


def _grid(pen: Pen, box: Outline, ink: int, wide: int) -> None:
    for share in (0.275, 0.725):
        across = box.left + share * (box.right - box.left)
        down = box.top + share * (box.bottom - box.top)
        pen.line([(across, box.top), (across, box.bottom)], fill=ink, width=wide)
        pen.line([(box.left, down), (box.right, down)], fill=ink, width=wide)


_SHAPES: Mapping[str, Callable[[Pen, Outline, int, int], None]] = {
    "disc": lambda pen, box, ink, wide: pen.ellipse(box, fill=ink),
    "ring": lambda pen, box, ink, wide: pen.ellipse(box, outline=ink, width=wide),
    "square": lambda pen, box, ink, wide: pen.rectangle(box, fill=ink),
    "frame": lambda pen, box, ink, wide: pen.rectangle(box, outline=ink, width=wide),
    "cross": _cross,
    "bar": _bar,
    "triangle": _triangle,
    "grid": _grid,
}


def _nothings(pixels: np.ndarray, *, seed: int) -> np.ndarray:
    """Grounds, noise, and mixtures of two shapes: what a judge must not take for a kind."""
    random, some = np.random.default_rng(seed), len(pixels) // 3
    plain = np.repeat(random.uniform(0, 255, (some, 1, 1)), SIDE, axis=1).repeat(SIDE, axis=2)
    plain = plain + random.normal(0, 6, plain.shape)
    noise = random.normal(random.uniform(40, 200, (some, 1, 1)), 60, (some, SIDE, SIDE))
    pairs = [pixels[random.integers(len(pixels), size=some)].astype(float) for _ in range(3)]
    return np.clip(np.concatenate([plain, noise, sum(pairs) / 3]), 0, 255).astype(np.uint8)


def _parts(width: int) -> dict:
    said = 32 if width == WIDTH else 2 * width
    special = ["<s>", "</s>", "<unk>"]
    words = {word: at for at, word in enumerate([*special, *_WORDS, *KINDS])}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106  no password
    model.pre_tokenizer = WhitespaceSplit()
    model.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=special[0], eos_token=special[1], unk_token=special[2],
        pad_token=special[1],
    )  # fmt: skip
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=said, intermediate_size=2 * said,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=SIDE, mid_block_add_attention=False,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=(width, 2 * width), layers_per_block=2,
        cross_attention_dim=said, attention_head_dim=2, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "unet": unet,
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }


def _teach(parts: dict, images: Tensor, shown: Sequence[str], *, steps: int) -> None:
    """UNet and text encoder learn to denoise; what stays is their average over the second half."""
    vae, unet, text_encoder = (parts[name] for name in ("vae", "unet", "text_encoder"))
    with torch.no_grad():
        latents = torch.cat([vae.encode(some).latent_dist.mode() for some in images.split(256)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    latents /= latents.std()
    prompts, empty = (
        torch.tensor(_padded(parts["tokenizer"], texts))
        for texts in ([form.format(kind) for form in TEMPLATES for kind in KINDS], [""])
    )
    kinds_N = torch.tensor([KINDS.index(kind) for kind in shown])

    def denoising(rows_N: Tensor) -> Tensor:
        noise, timesteps = torch.randn_like(latents[rows_N]), torch.randint(1000, (len(rows_N),))
        forms_N = torch.randint(len(TEMPLATES), (len(rows_N),))
        tokens = prompts[forms_N * len(KINDS) + kinds_N[rows_N]]
        tokens = torch.where(torch.rand(len(rows_N), 1) < DROPPED, empty, tokens)
        noisy = parts["scheduler"].add_noise(latents[rows_N], noise, timesteps)
        found = unet(noisy, timesteps, text_encoder(tokens).last_hidden_state).sample
        return (found - noise).square().mean()  # type: ignore[no-any-return]  # diffusers' Any

    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    average = torch.optim.swa_utils.AveragedModel(
        both, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    _train(both, denoising, len(images), steps=steps, each=average.update_parameters)
    both.load_state_dict(average.module.state_dict())


def _train(
    module: torch.nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    *,
    steps: int,
    lr: float = 2e-3,
    each: Callable[[torch.nn.Module], None] | None = None,
) -> None:
    """AdamW, one cycle; `each` is told about every step of the second half."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    module.train()
    for step in range(steps):
        loss = loss_of(torch.randint(count, (BATCH,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if each is not None and step >= steps // 2:
            each(module)
        if step % (steps // 5) == 0 or math.isnan(loss.item()):
            print(f"{type(module).__name__} {step}/{steps} {loss.item():.4f}", file=sys.stderr)
    module.eval()


def _rebuilding(vae: diffusers.AutoencoderKL, images: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(rows_N: Tensor) -> Tensor:
        latents = vae.encode(images[rows_N]).latent_dist.mode()
        error: Tensor = (vae.decode(latents).sample - images[rows_N]).square().mean()
        return error + 1e-4 * latents.square().mean()

    return loss


def _padded(tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]) -> list:
    rows = tokenizer(list(texts))["input_ids"]
    return [row + [tokenizer.pad_token_id] * (LENGTH - len(row)) for row in rows]


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    judge()
    for number in map(int, sys.argv[1:] or ["0"]):
        painter(number)
