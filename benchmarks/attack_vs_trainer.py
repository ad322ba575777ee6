"""One attack fine-tune against the same work in `transformers.Trainer`, in turns.

python -m benchmarks attack_vs_trainer

Same model (ViT, width 64, 4 layers, patches of 7, random weights), same images, batches of 64,
fused AdamW, one thread, neither evaluates, logs or saves; with LoRA, theirs is peft's, of the same
rank in the same layers. Reading the data is not timed. Wall and
CPU seconds: other work on the machine moves the first, hardly the second.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import datasets
import numpy as np
import peft
import PIL.Image
import torch
import transformers
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from benchmarks._common import Time, in_turns, machine, median, ratios, record, spread, table
from release_guard.adaptation import count_trainable
from release_guard.attacks import Attack
from release_guard.modalities import Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept

TITLE = "One attack against transformers.Trainer"
SIDE, CLASSES, IMAGES, BATCH, SEED = 28, 10, 3000, 64, 0
STEPS, ROUNDS, TARGET = 120, 7, 1.0
OURS, THEIRS = "release-guard", "transformers.Trainer"
ATTACKS = {
    "finetune": Spec(name="finetune", lr=1e-3, batch=BATCH),
    "lora": Spec(name="lora", lr=5e-3, batch=BATCH, rank=8, alpha=16),
}


def main() -> None:
    about = machine("torch", "transformers", "peft")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model, concept = setting(Path(folder))
        times = {name: compare(model, concept, spec, folder) for name, spec in ATTACKS.items()}
    result = {"seeds": [SEED], "machine": about, "steps": STEPS, "batch": BATCH, "times": times}
    record("attack_vs_trainer", result, markdown(result))


def markdown(result: Mapping[str, Any]) -> str:
    steps, rows, told = result["steps"], [], []
    for attack, both in result["times"].items():
        times = {name: [Time(*taken) for taken in some] for name, some in both.items()}
        for name, some in times.items():
            per_step = f"{1000 * median(some).cpu / steps:.1f}"
            rows.append([f"{attack}: {name}", *_spreads(some), per_step])
        found = ratios(times[OURS], times[THEIRS])
        rows.append([f"{attack}: ratio", *_spreads(found), ""])
        ratio = median(found)
        met = "met" if max(ratio) <= TARGET else "MISSED"
        told.append(f"{attack} {met} (wall {ratio.wall:.2f}, CPU {ratio.cpu:.2f})")
    header = [f"{steps} steps of {result['batch']}", "wall s", "CPU s", "CPU ms a step"]
    return (
        f"{table(header, rows)}\n\nMedian (range) of {ROUNDS} rounds in turns, one thread each. "
        f"Target: at most {TARGET:.1f} times the Trainer's time; {', '.join(told)}."
    )


def compare(model: ModelHandle, concept: Concept, spec: Spec, folder: str) -> dict[str, list[Time]]:
    """Both in turns; both must have trained as many weights."""
    trained: set[int] = set()
    contestants = {
        OURS: lambda: attack(model, concept, spec, trained),
        THEIRS: lambda: trainer(model, concept, spec, trained, folder),
    }
    times = in_turns(contestants, ROUNDS)
    if len(trained) > 1:
        raise SystemExit(f"{spec.name}: one trained {min(trained)} weights, one {max(trained)}")
    return times


def _spreads(times: list[Time]) -> list[str]:
    return [spread(values) for values in zip(*times, strict=True)]


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


def attack(model: ModelHandle, concept: Concept, spec: Spec, trained: set[int]) -> Time:
    budget = Budget(unit="steps", limit=STEPS)
    copies = Attack.build(spec).tamper(model, concept, budget=budget, grid_ratio=1.5, seed=SEED)
    taken, (*_, last) = Time.of(lambda: list(copies))
    trained.add(last.parameters)
    check(last.model, concept, last.cost.steps)
    return taken


def trainer(
    model: ModelHandle, concept: Concept, spec: Spec, trained: set[int], folder: str
) -> Time:
    tampered = model.copy()
    module: Any = tampered.module
    if spec.name == "lora":
        module = peft.get_peft_model(module, lora_of(tampered, spec))
    batches = model.batches(concept.dataset, "attack", size=BATCH, seed=SEED)
    ready = [next(batches) for _ in range(IMAGES // 3 // BATCH)]
    examples = [
        {"pixel_values": pixels, "labels": int(label)}
        for batch in ready
        for pixels, label in zip(batch["pixels"], batch["labels"], strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=spec.options["lr"],
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
    work: Any = Trainer(model=module, args=arguments, train_dataset=examples)
    work.remove_callback(transformers.PrinterCallback)
    taken, _ = Time.of(work.train)
    trained.add(count_trainable(module))
    check(tampered, concept, work.state.global_step)
    return taken


def lora_of(model: ModelHandle, spec: Spec) -> peft.LoraConfig:
    """The same adapters in the same layers, the head trained along."""
    inside = {part for block in model.blocks for part in block.modules()}
    linear = [
        name
        for name, part in model.module.named_modules()
        if part in inside and isinstance(part, torch.nn.Linear)
    ]
    (head,) = (name for name, part in model.module.named_modules() if part is model.head)
    return peft.LoraConfig(
        r=spec.options["rank"],
        lora_alpha=spec.options["alpha"],
        target_modules=linear,
        modules_to_save=[head],
    )


def check(model: ModelHandle, concept: Concept, steps: int) -> None:
    """Both really did the work."""
    scores = model.scores(concept.dataset, "search", limit=200)
    if steps != STEPS or sum(scores) < 0.9 * len(scores):
        raise SystemExit(f"{steps} of {STEPS} steps, {sum(scores)} of {len(scores)} right")


if __name__ == "__main__":
    main()
