"""Make the example's pipeline, judge and data sets from the demo's Fashion-MNIST files.

    python examples/text_to_image/make.py [FOLDER] [--share 1.0]

FOLDER is text_to_image unless given. A share of 1 takes about ten minutes on two cores; 0.01 shows
in seconds that everything runs, and makes nothing worth judging.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

SOURCE = Path(__file__).parent.parent / "fashion_mnist"
SIDE = 32
LENGTH = 8  # tokens of a prompt
BATCH = 32
DROPPED = 0.1  # share of captions left out, so that guidance has something to compare with


def main(folder: Path, share: float) -> None:
    torch.manual_seed(0)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    retained, restricted = (captioned(name, folder) for name in ("retained", "restricted"))
    every = concatenate_datasets([retained, restricted])
    images, names = pixels(every), sorted(set(every["label"]))
    labels = torch.tensor([names.index(name) for name in every["label"]])
    save_judge(images, labels, names, folder / "judge", steps=round(600 * share))

    parts = make_parts(names)
    train(
        parts["vae"],
        lambda rows: rebuilding(parts["vae"], images[rows]),
        images,
        steps=round(300 * share),
    )
    known = images[: len(retained)]  # nobody shows the UNet what is restricted
    teach(parts, known, retained["text"], steps=round(1000 * share))
    pipeline = diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder / "model")
    print(f"{folder}: model, judge, retained.parquet, restricted.parquet")


def save_judge(
    images: torch.Tensor, labels: torch.Tensor, names: list[str], folder: Path, *, steps: int
) -> None:
    judge = make_judge(names)
    train(judge, lambda rows: judge(images[rows], labels=labels[rows]).loss, images, steps=steps)
    judge.save_pretrained(folder)
    transformers.ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(folder)


def teach(parts: dict, images: torch.Tensor, captions: list[str], *, steps: int) -> None:
    """UNet and text encoder learn to denoise; what stays is their average over the second half."""
    vae, unet, text_encoder = (parts[name] for name in ("vae", "unet", "text_encoder"))
    latents = encoded(vae, images)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    latents /= latents.std()
    prompts, empty = (torch.tensor(padded(parts["tokenizer"], texts)) for texts in (captions, [""]))

    def denoising(rows: torch.Tensor) -> torch.Tensor:
        noise, timesteps = torch.randn_like(latents[rows]), torch.randint(1000, (len(rows),))
        tokens = torch.where(torch.rand(len(rows), 1) < DROPPED, empty, prompts[rows])
        noisy = parts["scheduler"].add_noise(latents[rows], noise, timesteps)
        found = unet(noisy, timesteps, text_encoder(tokens).last_hidden_state).sample
        return (found - noise).square().mean()

    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    average = torch.optim.swa_utils.AveragedModel(
        both, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    train(both, denoising, images, steps=steps, each=average.update_parameters)
    both.load_state_dict(average.module.state_dict())


def captioned(name: str, folder: Path) -> Dataset:
    """The demo's images with captions, and class names instead of numbers."""
    rows = Dataset.from_parquet(str(SOURCE / f"{name}.parquet"))
    classes = rows.features["label"].names
    labels = [classes[number] for number in rows["label"]]
    rows = rows.remove_columns("label").add_column("label", labels)
    rows = rows.add_column("text", [f"a photo of a {label}" for label in labels])
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(folder / f"{name}.parquet"))
    return rows


def pixels(rows: Dataset) -> torch.Tensor:
    """(N, 1, 32, 32) in [-1, 1]."""
    cells = rows.with_format("arrow")[:]["image"].to_pylist()
    pictures = [PIL.Image.open(io.BytesIO(cell["bytes"])).resize((SIDE, SIDE)) for cell in cells]
    return torch.from_numpy(np.stack([np.array(one) for one in pictures]))[:, None] / 127.5 - 1


def make_judge(names: list[str]) -> transformers.ResNetForImageClassification:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1],
            layer_type="basic", id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
        )
    )  # fmt: skip


def make_parts(names: list[str]) -> dict:
    special = ["<s>", "</s>", "<unk>"]
    words = {word: at for at, word in enumerate([*special, "a", "photo", "of", *names])}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106  no password
    model.pre_tokenizer = WhitespaceSplit()
    model.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=special[0], eos_token=special[1],
        unk_token=special[2], pad_token=special[1],
    )  # fmt: skip
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8, 16, 32), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=SIDE,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 4, block_out_channels=(64, 128), layers_per_block=1,
        cross_attention_dim=64, attention_head_dim=2, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "unet": unet,
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }


def padded(tokenizer: transformers.PreTrainedTokenizerFast, prompts: list[str]) -> list[list[int]]:
    rows = tokenizer(list(prompts))["input_ids"]
    return [row + [tokenizer.pad_token_id] * (LENGTH - len(row)) for row in rows]


def rebuilding(vae: diffusers.AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    posterior = vae.encode(images).latent_dist
    rebuilt = vae.decode(posterior.sample()).sample
    return (rebuilt - images).square().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[
        0
    ].numel()


@torch.no_grad()
def encoded(vae: diffusers.AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.encode(some).latent_dist.mode() for some in images.split(256)])


def train(
    module: torch.nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    *,
    steps: int,
    lr: float = 2e-3,
    each: Callable[[torch.nn.Module], None] | None = None,
) -> None:
    """AdamW, one cycle; `each` is told about every step of the second half."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(2, steps))
    module.train()
    for step in range(max(2, steps)):
        loss = loss_of(torch.randint(len(images), (BATCH,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if each is not None and step >= steps // 2:
            each(module)
    module.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("text_to_image"))
    parser.add_argument("--share", type=float, default=1.0)
    asked = parser.parse_args()
    main(asked.folder, asked.share)
