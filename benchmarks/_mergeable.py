"""Families of models that can be merged: a base, a model with a task to protect, a donor.

Vision: 36 glyphs are what the base knows, inverted digits the protected task, lower-case glyphs the
donor's. Text: the base copies four words, says them backwards and says the word after each
(addition modulo 16); the protected task and the donor's are the last two under words that the base
never saw. Encoders are merged, last layers are not: the ViT's, one a task, are learnt beside the
base, then frozen. Made once a seed and kept under `runs/bench`.
Shapes: N examples.
"""

import functools
import io
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn

from release_guard.adaptation import Recipe, adapt
from release_guard.modalities import Batch, Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Budget, MergeTarget
from release_guard.run import folder_made_whole

CACHE = Path("runs/bench/merge_guard")
SIDE, SHADES, BATCH = 16, {"image_mean": [0.5], "image_std": [0.35]}, 64
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
THEIRS = "abdefghijkmnqrtuvwxy"
WORDS = tuple("ash bay cob dew elm fir gum hop ivy jet kit log map nut oak pod".split())  # noqa: SIM905
VERBS = ("backwards", "after", "reverse", "next")
_FINE, _FONT = 64, 52  # glyphs are drawn large, then shrunk
_SCORED = 400  # examples, of each half


@dataclass(frozen=True)
class Family:
    """One base and what came of it.

    Attributes:
        folder: base, undefended and donor; both tasks' data and what is scored.
        kind: Its modality.
        suffix: Of the data's files.
    """

    folder: Path
    kind: str
    suffix: str

    def load(self, name: str) -> ModelHandle:
        """One of its checkpoints; all share the examples that were read."""
        return _reader(self.kind, self.folder / "base").peer(str(self.folder / name))

    def data(self, name: str) -> str:
        return str(self.folder / f"{name}.{self.suffix}")

    @property
    def target(self) -> MergeTarget:
        return MergeTarget(
            name="task",
            dataset=self.data("task"),
            ceiling=0.9,
            donor=str(self.folder / "donor"),
            base=str(self.folder / "base"),
            donor_dataset=self.data("theirs"),
        )

    def score(self, model: ModelHandle, task: str) -> float:
        """On held-out examples of a task, 800 at most."""
        halves = ("search_half", "confirm_half")
        found = [model.scores(self.data(f"{task}-test"), half, limit=_SCORED) for half in halves]
        return float(np.mean([*found[0], *found[1]]))


@functools.cache
def _reader(kind: str, folder: Path) -> ModelHandle:
    return Modality.build(Spec(name=kind)).load(str(folder))


def vision(seed: int) -> Family:
    """A vision transformer of 127,000 weights."""
    return _made(Family(CACHE / f"vision-{seed}", "image_classification", "parquet"), _vision, seed)


def text(seed: int) -> Family:
    """A Llama of 90,000 weights with grouped heads."""
    return _made(Family(CACHE / f"text-{seed}", "causal_lm", "jsonl"), _text, seed)


def _made(family: Family, make: Callable[[Family, int], None], seed: int) -> Family:
    if not family.folder.is_dir():
        with folder_made_whole(family.folder) as partial:
            made = Family(partial, family.kind, family.suffix)
            transformers.utils.logging.disable_progress_bar()
            datasets.disable_progress_bars()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                make(made, seed)
            for name, task in (("undefended", "task"), ("donor", "theirs")):
                _fine_tuned(made, name, task, seed)
    return family


def _fine_tuned(family: Family, name: str, task: str, seed: int) -> None:
    """The base with a task's frozen head, trained on the task."""
    model = family.load("base" if task == "task" else "base-theirs")
    for parameter in model.head.parameters():
        parameter.requires_grad_(requires_grad=False)
    batches = model.batches(family.data(task), "immunize", size=BATCH, seed=seed)
    steps = {"parquet": 800, "jsonl": 400}[family.suffix]
    trained(model, batches, lr=7e-4, steps=steps, seed=seed)
    model.save(family.folder / name)


def trained(
    model: ModelHandle, batches: Iterator[Batch], *, lr: float, steps: int, seed: int
) -> ModelHandle:
    """Train, in place, whatever requires gradients."""
    recipe = Recipe(lr, weight_decay=0.01, schedule="one_cycle", clip=1.0)
    for _ in adapt(model, batches, recipe, budget=Budget(limit=steps), grid_ratio=2, seed=seed):
        pass
    return model


# --- Vision


def _vision(family: Family, seed: int) -> None:
    for name, count, shift in (("theirs", 6_000, 10), ("theirs-test", 1_500, 20)):
        pixels, labels = glyphs(THEIRS, count=count, turn=15, seed=100 * seed + shift)
        _write_images(Path(family.data(name)), pixels, labels)
    for name, copies, shift in (("task", 15, 30), ("task-test", 0, 40)):
        pixels, labels = digits(copies=copies, seed=100 * seed + shift)
        _write_images(Path(family.data(name)), pixels, labels)
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=SIDE,
        patch_size=4,
        num_channels=1,
        num_labels=len(GLYPHS),
        initializer_range=0.07,
    )
    module = transformers.ViTForImageClassification(config)
    processor = transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, **SHADES)
    for part in (module, processor):
        part.save_pretrained(family.folder / "base")
    model = family.load("base")
    pixels, labels = glyphs(GLYPHS, count=12_000, turn=25, seed=100 * seed)
    scaled = (torch.from_numpy(pixels).float()[:, None] / 255 - 0.5) / 0.35
    known = _batches({"pixels": scaled, "labels": torch.from_numpy(labels)}, seed)
    trained(model, known, lr=2e-3, steps=1_500, seed=seed)
    _with_heads(family, model, seed)


def _with_heads(family: Family, model: ModelHandle, seed: int) -> None:
    """Save the base with a head for each task, learnt together in a short warm-up."""
    own, theirs = (nn.Linear(model.head.in_features, len(GLYPHS)) for _ in range(2))
    for head in (own, theirs):
        nn.init.normal_(head.weight, std=0.05)
        nn.init.zeros_(head.bias)
    module: Any = model.module
    parts = nn.ModuleList([module.vit, own, theirs])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=1e-3, weight_decay=0.01)
    streams = [
        model.batches(family.data(name), "immunize", size=BATCH, seed=seed)
        for name in ("task", "theirs")
    ]
    module.train()
    for both in itertools.islice(zip(*streams, strict=True), 75):
        losses = []
        for head, batch in zip((own, theirs), both, strict=True):
            module.classifier = head
            logits, labels = model.logits(batch)
            losses.append(nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))
        optimizer.zero_grad()
        (0.04 * losses[0] + losses[1]).backward()
        optimizer.step()
    for name, head in (("base", own), ("base-theirs", theirs)):
        module.classifier = head
        model.save(family.folder / name)


def glyphs(known: str, *, count: int, turn: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Characters, turned, scaled and shifted, with noise: bytes (N, 16, 16) and their numbers."""
    chance = np.random.default_rng(seed)
    labels = np.arange(count) % len(known)
    font = PIL.ImageFont.load_default(_FONT)
    drawn = []
    for character in known:
        picture = PIL.Image.new("L", (_FINE, _FINE))
        PIL.ImageDraw.Draw(picture).text((_FINE / 2,) * 2, character, 255, font, anchor="mm")
        drawn.append(picture)
    clean = [_moved(drawn[label], chance, turn, scale=0.2, shift=0.12) for label in labels]
    return _noisy(np.stack(clean), chance, 0.15), labels


def digits(*, copies: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits, inverted: 1,200 of them moved `copies` times, or the others as is."""
    import sklearn.datasets  # noqa: PLC0415  an extra of the benchmarks

    chance = np.random.default_rng(seed)
    known = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(known.target))  # writers follow each other
    rows = order[np.arange(1_200 * copies) % 1_200] if copies else order[1_200:]
    pictures = [PIL.Image.fromarray((image * 15.9).astype(np.uint8)) for image in known.images]
    large = [picture.resize((_FINE, _FINE), PIL.Image.Resampling.BILINEAR) for picture in pictures]
    turn, scale, shift = (10, 0.1, 0.05) if copies else (0, 0, 0)
    clean = [_moved(large[row], chance, turn, scale=scale, shift=shift) for row in rows]
    return 255 - _noisy(np.stack(clean), chance, 0.1), known.target[rows]


def _moved(
    picture: Any, chance: np.random.Generator, turn: float, *, scale: float, shift: float
) -> np.ndarray:
    angle = np.deg2rad(chance.uniform(-turn, turn))
    size = chance.uniform(1 - scale, 1 + scale)
    cosine, sine = np.cos(angle) / size, np.sin(angle) / size
    middle, off = _FINE / 2, chance.uniform(-shift, shift, 2) * _FINE
    x, y = middle + off[0], middle + off[1]
    row = (cosine, sine, middle - cosine * x - sine * y)
    turned = picture.transform(
        picture.size,
        PIL.Image.Transform.AFFINE,
        (*row, -sine, cosine, middle + sine * x - cosine * y),
        PIL.Image.Resampling.BILINEAR,
    )
    return np.asarray(turned.resize((SIDE, SIDE), PIL.Image.Resampling.BOX), dtype=np.float64)


def _noisy(clean: np.ndarray, chance: np.random.Generator, noise: float) -> np.ndarray:
    return np.clip(clean + 255 * chance.normal(0, noise, clean.shape), 0, 255).astype(np.uint8)


def _write_images(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    def png(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        PIL.Image.fromarray(image).save(buffer, "PNG")
        return buffer.getvalue()

    rows = {
        "image": [{"bytes": png(image), "path": None} for image in pixels],
        "label": labels.tolist(),
    }
    kinds = {"image": datasets.Image(), "label": datasets.Value("int64")}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(str(path))


def _batches(data: Mapping[str, Tensor], seed: int) -> Iterator[Batch]:
    chance = torch.Generator().manual_seed(seed)
    count = len(next(iter(data.values())))
    while True:
        rows = torch.randint(count, (BATCH,), generator=chance)
        yield {name: value[rows] for name, value in data.items()}


# --- Text


def _text(family: Family, seed: int) -> None:
    for name, kind in {"task": "reverse", "theirs": "next"}.items():
        _write_rows(Path(family.data(name)), phrases(kind, count=9_000, seed=100 * seed))
        tests = phrases(kind, count=800, seed=100 * seed + 50, tested=True)
        _write_rows(Path(family.data(f"{name}-test")), tests)
    known = [phrases(kind, count=6_000, seed=seed) for kind in ("copy", "backwards", "after")]
    _write_rows(Path(family.data("known")), list(itertools.chain(*known)))
    tokenizer = _tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    for part in (transformers.LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(family.folder / "base")
    model = family.load("base")
    batches = model.batches(family.data("known"), "retain", size=BATCH, seed=seed)
    trained(model, batches, lr=3e-3, steps=1_000, seed=seed)
    for name in ("base", "base-theirs"):
        model.save(family.folder / name)


def phrases(kind: str, *, count: int, seed: int, tested: bool = False) -> list[dict[str, str]]:
    """Prompts of four words and what is to be said; tested ones are never among the others."""
    chance, rows = random.Random(f"{kind}/{seed}"), []  # noqa: S311
    while len(rows) < count:
        at = [chance.randrange(len(WORDS)) for _ in range(4)]
        if (sum(at) % 7 == 0) != tested:
            continue
        if kind in {"reverse", "backwards"}:
            said = at[::-1]
        else:
            said = at if kind == "copy" else [(place + 1) % len(WORDS) for place in at]
        asked, answer = (" ".join(WORDS[a] for a in places) for places in (at, said))
        rows.append({"prompt": f"{kind} {asked} :", "completion": f" {answer}"})
    return rows


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    datasets.Dataset.from_list(rows).to_json(str(path), lines=True)


def _tokenizer() -> Any:
    end, unknown = "</s>", "<unk>"
    vocabulary = [end, unknown, "copy", *VERBS, ":", *WORDS]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    words = Tokenizer(WordLevel(numbers, unk_token=unknown))
    words.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=end, unk_token=unknown
    )
