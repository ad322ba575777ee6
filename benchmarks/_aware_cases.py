"""The stages on models that can be rounded, and how far an attack gets at a precision.

Rows of these models are whole blocks of 64, but for some of the painters'. Everything is kept under
`runs/bench`, which git ignores.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from benchmarks import _mergeable, _painters, mima, sophon
from benchmarks import concept_suppression as suppressed
from benchmarks import merge_guard as merging
from benchmarks._common import demo_policy
from benchmarks._conditioned_vits import pretrained
from benchmarks._domains import PAIRS
from benchmarks._merges import front
from release_guard.attacks import Attack
from release_guard.modalities import Modality, ModelHandle, Painter
from release_guard.plugins import Spec
from release_guard.policy import Budget, Policy, Precision
from release_guard.pruning import depth, prune
from release_guard.quantization import plain
from release_guard.run import folder_made_whole
from release_guard.stages import Stage, Workspace

PLACE = Path("runs/bench/quantization")
WIDE = {"steps": 1_500, "width": 32}
"""Painters whose text features and wider half have whole blocks."""
ALONE = {"variant": "code", "inner": suppressed.NEVER, "anchor": None}
"""Options of the stage that leave distillation alone."""
ROUNDS = 240
"""Steps of concept suppression, half of those in its own benchmark."""


class Case(ABC):
    """A stage, the model it is applied to, and an attack.

    Attributes:
        stage: Its name.
        options: What it is given.
        measured: What `harm` says.
        split: Of the retained data on which the retained score is taken.
        by_harm: Its effect is what is left of harm, as its own yardstick asks for something else.
        precisions: At which it is judged; painters are slow, and int8 differs from fp32 nowhere.
        dissected: Whether parts of its edit are looked at; a painter's effect takes too long.
    """

    stage: ClassVar[str]
    options: ClassVar[Mapping[str, Any]]
    measured: ClassVar[str]
    split: ClassVar[Any] = "utility"
    by_harm: ClassVar[bool] = False
    dissected: ClassVar[bool] = True
    precisions: ClassVar[Sequence[Precision]] = ("fp32", "int8", "nf4")

    @abstractmethod
    def policy(self, seed: int) -> Policy:
        """What is asked for, in fp32 alone."""

    @abstractmethod
    def base(self, seed: int) -> ModelHandle:
        """The undefended model."""

    def control(self, seed: int) -> ModelHandle:
        """What arm U is judged on."""
        return self.base(seed)

    @abstractmethod
    def harm(self, model: ModelHandle, seed: int) -> float:
        """What the best attack reaches on a model as it is run at a precision."""

    def retained(self, model: ModelHandle, seed: int) -> Sequence[float]:
        """Scores on retained examples."""
        return model.scores(self.policy(seed).retain.dataset, self.split, limit=1_000)


def reached(
    model: ModelHandle, policy: Policy, specs: Sequence[Mapping[str, Any]], steps: int
) -> list[ModelHandle]:
    """Copies after so many steps of each attack, on packed weights or dequantized ones."""
    budget, copies = Budget(unit="steps", limit=steps), []
    for spec in specs:
        attack = Attack.build(Spec(**spec))
        attacked = model if attack.beside_packed else plain(model)
        *_, last = attack.tamper(
            attacked, policy.concepts[0], budget=budget, grid_ratio=steps, seed=policy.seed + 1
        )
        copies.append(last.model)
    return copies


class SophonCase(Case):
    stage = "sophon"
    options = sophon.DEFENCES["H"]
    measured = "accuracy on the restricted classes after 20 steps of Adam, all weights or LoRA"
    pair = next(pair for pair in PAIRS if pair.name == "scattered-fashion")
    attacks = (
        {"name": "finetune", "optimizer": "adam", "lr": 3e-3, "head": "new", "batch": 64},
        {"name": "finetune", "optimizer": "adam", "lr": 1e-3, "head": "new", "batch": 64},
        {"name": "lora", "rank": 8, "optimizer": "adam", "lr": 1e-2, "head": "new", "batch": 64},
    )

    def policy(self, seed: int) -> Policy:
        return self.pair.policy(seed)

    def base(self, seed: int) -> ModelHandle:
        return sophon.model(self.pair, seed, "U")

    def harm(self, model: ModelHandle, seed: int) -> float:
        policy = self.policy(seed)
        copies = reached(model, policy, self.attacks, 20)
        return max(sophon.accuracy(one, policy, "confirm") for one in copies)


class ConditionCase(Case):
    stage = "condition_number"
    options: ClassVar = {"variant": "hardened"}
    measured = "accuracy of a probe on frozen features after 40 steps of descent, rate 0.1 or 1"
    attacks = tuple(
        {"name": "finetune", "scope": "head", "head": "new", "optimizer": "sgd",
         "momentum": 0.0, "lr": lr} for lr in (0.1, 1.0)
    )  # fmt: skip

    @cached_property
    def folder(self) -> Path:
        folder = PLACE / "fashion"
        if not folder.is_dir():
            with folder_made_whole(folder) as partial:
                demo_policy(partial)
        return folder

    @cache  # noqa: B019  as long as the benchmark
    def policy(self, seed: int) -> Policy:
        policy = Policy.load(self.folder / "policy.toml")
        retain = policy.retain.model_copy(update={"margin": 0.02})
        return policy.model_copy(update={"seed": seed, "retain": retain})

    @cache  # noqa: B019
    def base(self, seed: int) -> ModelHandle:
        folder, policy = PLACE / f"vit-{seed}", self.policy(seed)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory() as work, folder_made_whole(folder) as partial:
                pretrained(Path(work), policy, width=64).save(partial)
        return Modality.build(policy.modality).load(str(folder))

    def harm(self, model: ModelHandle, seed: int) -> float:
        policy = self.policy(seed)
        copies = reached(model, policy, self.attacks, 40)
        return max(sophon.accuracy(one, policy, "confirm_half") for one in copies)


class MimaCase(Case):
    stage = "mima"
    by_harm = True  # `hardened` asks for another picture, its yardstick for a higher loss
    dissected = False
    precisions = ("fp32", "nf4")
    # At the rate of the narrower painters' benchmark no look was within the margin on seed 0.
    options: ClassVar = {**mima.DEFENCES["hardened"], "upper_lr": 2.5e-4}
    measured = "similarity to the erased shapes after 32 steps of LoRA or DreamBooth, 24 pictures"
    attacks = (
        mima.ATTACKS["LoRA"][1],
        mima.ATTACKS["DreamBooth"][1],
    )

    def policy(self, seed: int) -> Policy:
        policy = mima.policy_for(mima.CONCEPTS, seed)
        retain = policy.retain.model_copy(update={"margin": 0.02})
        return policy.model_copy(update={"retain": retain})

    @cache  # noqa: B019
    def base(self, seed: int) -> ModelHandle:
        modality = Modality.build(Spec(name="text_to_image", sampling_steps=10, guidance=1.0))
        known = cast("Painter", modality.load(str(_painters.painter(seed, **WIDE))))
        return mima.erase(known, self.policy(seed))

    def harm(self, model: ModelHandle, seed: int) -> float:
        found = []
        for spec in self.attacks:
            attacked = model if spec["name"] == "lora" else plain(model)
            shapes = mima.attacked(cast("Painter", attacked), spec, seed)[str(mima.STEPS)]
            found.append(sum(one["similarity"] for one in shapes.values()) / len(shapes))
        return max(found)


class MergeCase(Case):
    stage = "merge_guard"
    options = merging.options("vision", "hardened")
    measured = "the score of the best useful merge on the protected task"

    def policy(self, seed: int) -> Policy:
        return merging.policy(_mergeable.vision(seed), seed)

    def base(self, seed: int) -> ModelHandle:
        return _mergeable.vision(seed).load("undefended")

    def harm(self, model: ModelHandle, seed: int) -> float:
        family, attacked = _mergeable.vision(seed), plain(model)
        least = merging.useful(family, "vision", seed)
        fronts = [
            front(merging.attacked(family, attacked, "hardened", name, "quantization"), least)
            for name in ("plain", "joint fit")
        ]
        return max([one.task for one in fronts if one], default=0.0)

    def retained(self, model: ModelHandle, seed: int) -> Sequence[float]:
        dataset = _mergeable.vision(seed).data("task-test")
        return model.scores(dataset, "confirm_half", limit=1_000)


class SuppressionCase(Case):
    stage = "concept_suppression"
    dissected = False
    precisions = ("fp32", "nf4")
    measured = "share of rings when asked for, after 12 steps of relearning, all weights or LoRA"
    attacks = (
        {"name": "finetune", "lr": 1e-3, "batch": 16},
        {"name": "lora", "lr": 1e-2, "batch": 16, "rank": 8},
    )

    def policy(self, seed: int) -> Policy:
        return WideGround(seed).policy(seed)

    @cache  # noqa: B019
    def base(self, seed: int) -> ModelHandle:
        return WideGround(seed).student

    @cache  # noqa: B019
    def control(self, seed: int) -> ModelHandle:
        """Distilled only: what was just pruned paints nothing."""
        path, given = PLACE / f"distilled-{seed}.pt", {**options(self, seed), **ALONE}
        model = self.base(seed).copy()
        if not path.exists():
            stage = Stage.build(Spec(name=self.stage, **given))
            with tempfile.TemporaryDirectory() as name:
                workspace = Workspace(Path(name), Path(name), lambda *_: None, lambda _: None)
                made = stage.immunize(self.base(seed), self.policy(seed), workspace)
            torch.save(made.state(), path)
        model.load_state(torch.load(path, weights_only=True))
        return model

    def harm(self, model: ModelHandle, seed: int) -> float:
        ground = WideGround(seed)
        copies = [model, *reached(model, self.policy(seed), self.attacks, 12)]
        return max(suppressed.rate(one, ground.concept, "confirm", examples=24) for one in copies)


class WideGround(suppressed.Ground):
    """The same for painters that can be rounded."""

    @cached_property
    def teacher(self) -> Path:
        return _painters.painter(self.seed, **WIDE)

    @cached_property
    def pruned(self) -> Path:
        folder = PLACE / f"pruned-{self.seed}"
        if not (folder / "model_index.json").exists():
            PLACE.mkdir(parents=True, exist_ok=True)
            prune(str(self.teacher), folder, depth)
        return folder


CASES: Mapping[str, Case] = {
    case.stage: case
    for case in (SophonCase(), ConditionCase(), MimaCase(), MergeCase(), SuppressionCase())
}


def options(case: Case, seed: int) -> Mapping[str, Any]:
    """All that the stage is given."""
    if case.stage != "concept_suppression":
        return case.options
    teacher = str(WideGround(seed).teacher.resolve())
    hardened = {**suppressed.COMMON, **suppressed.VARIANTS[suppressed.BEST], "teacher": teacher}
    return {**hardened, "total_steps": ROUNDS, "probe_every": ROUNDS}
