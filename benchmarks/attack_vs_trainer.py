"""One attack fine-tune against the same work in `transformers.Trainer`, interleaved in one run.

python benchmarks/attack_vs_trainer.py [--steps 120] [--repeats 7]

Same model (ViT, width 64, 4 layers, patches of 7, random weights), same images, batches of 64,
fused AdamW, one thread, neither evaluates, logs or saves. Reading the data is not timed. Wall and
CPU seconds: other work on the machine moves the first, hardly the second.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import datasets
import numpy as np
import PIL.Image
import torch
import transformers
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from release_guard.attacks import Attack
from release_guard.modalities import Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept

RESULTS = Path(__file__).parent / "results" / "attack_vs_trainer.json"
SIDE, CLASSES, IMAGES, BATCH, RATE, SEED = 28, 10, 3000, 64, 1e-3, 0


class Time(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, work: Callable[[], Any]) -> tuple["Time", Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        return cls(time.perf_counter() - wall, time.process_time() - cpu), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model, concept = setting(Path(folder))
        contestants = {
            "release-guard attack": lambda: attack(model, concept, options.steps),
            "transformers.Trainer": lambda: trainer(model, concept, options.steps, folder),
        }
        times = interleaved(contestants, options.repeats)
    report(times, options.steps, options.repeats)


def setting(folder: Path) -> tuple[ModelHandle, Concept]:
    """A model of random weights and a data set of noisy images, both on disk."""
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=SIDE,
        patch_size=7,
        num_channels=1,
        num_labels=CLASSES,
    )
    torch.manual_seed(SEED)
    ViTForImageClassification(config).save_pretrained(folder / "model")
    random = np.random.default_rng(SEED)
    labels = random.integers(CLASSES, size=IMAGES)
    pixels = random.integers(0, 120, size=(IMAGES, SIDE, SIDE), dtype=np.uint8)
    pixels[np.arange(IMAGES), 2 * labels] += 100  # the class is a bright row
    rows = {"image": [PIL.Image.fromarray(image) for image in pixels], "label": labels.tolist()}
    data = folder / "images.parquet"
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(str(data))
    handle = Modality.build(Spec(name="image_classification")).load(str(folder / "model"))
    return handle, Concept(name="bright-rows", dataset=str(data), ceiling=0.5)


def attack(model: ModelHandle, concept: Concept, steps: int) -> Time:
    finetune = Attack.build(Spec(name="finetune", lr=RATE, batch=BATCH))
    budget = Budget(unit="steps", limit=steps)
    copies = finetune.tamper(model, concept, budget=budget, grid_ratio=1.5, seed=SEED)
    taken, (*_, last) = Time.of(lambda: list(copies))
    check(last.model, concept, last.cost.steps, steps)
    return taken


def trainer(model: ModelHandle, concept: Concept, steps: int, folder: str) -> Time:
    tampered = model.copy()
    batches = model.batches(concept.dataset, "attack", size=BATCH, seed=SEED)
    ready = [next(batches) for _ in range(IMAGES // 3 // BATCH)]
    examples = [
        {"pixel_values": pixels, "labels": int(label)}
        for batch in ready
        for pixels, label in zip(batch["pixels"], batch["labels"], strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=SEED,
    )
    work: Any = Trainer(model=tampered.module, args=arguments, train_dataset=examples)
    work.remove_callback(transformers.PrinterCallback)
    taken, _ = Time.of(work.train)
    check(tampered, concept, work.state.global_step, steps)
    return taken


def check(model: ModelHandle, concept: Concept, done: int, steps: int) -> None:
    """Both really did the work."""
    scores = model.scores(concept.dataset, "search", limit=200)
    if done != steps or sum(scores) < 0.9 * len(scores):
        raise SystemExit(f"{done} of {steps} steps, {sum(scores)} of {len(scores)} right")


def interleaved(contestants: dict[str, Callable[[], Time]], repeats: int) -> dict[str, list[Time]]:
    """Times of each; the first round warms up and does not count, the order alternates."""
    times: dict[str, list[Time]] = {name: [] for name in contestants}
    for repeat in range(repeats + 1):
        order = list(contestants) if repeat % 2 else list(reversed(contestants))
        for name in order:
            taken = contestants[name]()
            if repeat:
                times[name].append(taken)
    return times


def report(times: dict[str, list[Time]], steps: int, repeats: int) -> None:
    print(f"| {steps} steps, median (range) of {repeats} | wall s | CPU s | CPU ms a step |")
    print("|---|---|---|---|")
    for name, taken in times.items():
        wall, cpu = zip(*taken, strict=True)
        step = 1000 * statistics.median(cpu) / steps
        print(f"| {name} | {spread(wall)} | {spread(cpu)} | {step:.1f} |")
    ours, theirs = times.values()
    ratios = [
        Time(one.wall / other.wall, one.cpu / other.cpu)
        for one, other in zip(ours, theirs, strict=True)
    ]
    wall, cpu = zip(*ratios, strict=True)
    print(f"| ratio | {spread(wall)} | {spread(cpu)} | |")
    result = {
        "steps": steps,
        "batch": BATCH,
        "seed": SEED,
        "seconds": {name: [taken._asdict() for taken in some] for name, some in times.items()},
        "ratio": {"wall": statistics.median(wall), "cpu": statistics.median(cpu)},
        "target": "ratio <= 1.0",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
