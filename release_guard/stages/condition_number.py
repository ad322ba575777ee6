"""Condition-number immunization: features on which a probe of restricted data learns slowly.

Two regularisers of the features' Gram matrices: R_ill makes the restricted one ill-conditioned,
R_well keeps the retained one well-conditioned; gradient descent on a linear probe is slow where the
condition number is high. Nothing is removed: who solves for the probe, whitens the features or
trains the extractor does not notice. Shapes: N rows, F features, C classes.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from release_guard.adaptation import select
from release_guard.conditioning import (
    ROWS_PER_FEATURE,
    Change,
    Spectrum,
    gram,
    halves,
    ill_gradient,
    mean,
    spread_gradient,
    well_gradient,
)
from release_guard.data import Split
from release_guard.errors import ImmunizationError
from release_guard.feature_batches import gradients, pieces, pulled_back, read
from release_guard.feature_maps import GuardedDescent, Pencil, turned
from release_guard.folding import fold, writer
from release_guard.immunization import Training, update
from release_guard.modalities import Batch, ModelHandle, evaluating
from release_guard.policy import Concept, Policy
from release_guard.probing import ProbeTask
from release_guard.stages import TrainedStage, Workspace, need_concepts

Weight = Literal["balance"] | float

_GUARDED = (0.0, 0.05, 0.5)  # the smallest eigenvalue, and two quantiles of them
_GROUPS = 5
_LEFT = 0.01  # share of the excess risk at which a predicted probe counts as trained
_FEW = 8  # examples: what rows a batch gives, and whether a map can be folded in
_NOTICED = 1.1  # what a half must come to for a linear map to be worth its name
_READING = 1 / 3  # of a forward and backward pass
_PASSES = 1 + _READING
_NO_PULL = 1e-30
_ONLY_SLOW = """\
Condition numbers slow plain gradient descent on a probe of frozen features. Adam, L-BFGS and \
conjugate gradients are held up much less by them, a probe that is solved for or whitens the \
features first not at all, and in our benchmark fine-tuning was not reliably slower."""

_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    # Section 4.3 of arXiv 2505.23760, with the rate of its vision transformers.
    "paper": {"updates": 380, "lr": 1e-5, "final_lr": 1.0, "objective": "paper", "guard": False},
    # The logarithm of every quantile instead of the square of two: no scale, hence no balance.
    "hardened": {
        "updates": 250,
        "lr": 0.1,
        "final_lr": 0.1,
        "objective": "spread",
        "lam_well": 0.04,
        "lam_ill": 0.04,
        "guard": True,
    },
}


class ConditionNumber(TrainedStage):
    """Make restricted data ill-conditioned in the features, and keep retained data well."""

    paper = "https://arxiv.org/abs/2505.23760"
    modalities = ("image_classification", "causal_lm")
    variants = _VARIANTS

    variant: Literal["paper", "hardened"] = "hardened"
    """Sets every option that is not given."""
    extractor: Literal["deep", "linear"] = "deep"
    """deep: the last blocks are trained. linear: a linear map of the features is folded into the
    layers before and after them, so that the outputs stay; few models have room for it."""
    updates: int = Field(ge=1)
    """Updates of the released weights."""
    last_k: int = Field(1, ge=1)
    """Blocks that are trained, with what comes after them (deep)."""
    lr: float = Field(gt=0)
    """Learning rate of stochastic gradient descent (deep)."""
    final_lr: float = Field(gt=0, le=1)
    """It falls linearly to this share of itself."""
    momentum: float = Field(0.9, gt=0, lt=1)
    """Nesterov's, of that descent."""
    lam_well: Weight = "balance"
    """Weight of R_well on retained data, for S = F^T F / N. balance: its gradient begins with the
    norm of the task loss's."""
    lam_ill: Weight = "balance"
    """The same of R_ill on restricted data."""
    objective: Literal["paper", "spread"]
    """paper: R_well and R_ill, which see the largest and the smallest singular value and the size
    of the features. spread: the mean logarithm of the condition number by every quantile; for a
    linear map, the best one in closed form."""
    guard: bool
    """While one half fails on a step's rows, leave the other half's regulariser out (deep)."""
    batch: int | None = Field(None, ge=1)
    """Examples of each domain in a step; none: as many as give four rows a feature."""
    piece: int = Field(256, ge=1)
    """How many of them are in memory at once. Features are those of evaluation mode, where
    `checkpointing` has no say: this is what saves memory."""
    task_batch: int = Field(128, ge=1)
    """Retained examples of the task loss in a step (deep)."""
    room: float = Field(0.7, gt=0, le=1)
    """A half counts as failing there from (ii) > room and from (i) < 1 / room on."""

    @property
    def steps(self) -> int:
        return 1 if self._is_closed_form else self.updates

    def check(self, model: ModelHandle, policy: Policy) -> None:
        need_concepts(self, policy)
        if self.extractor == "deep":
            select(model.copy(), "last_k", last_k=self.last_k)
        for dataset, split in _domains(policy):
            features_NF = read(model, self.rows(model, dataset, split), self.piece)
            _require_rows(features_NF, dataset)
        if self.extractor == "linear":
            _writer(model, policy)

    def rows(self, model: ModelHandle, dataset: str, split: Split, *, seed: int = 0) -> Batch:
        """Examples that give enough rows for the condition number of their features.

        Raises:
            ModelError: The split has fewer.
        """
        size = self.batch
        if size is None:
            few = next(model.batches(dataset, split, size=_FEW, seed=seed))
            rows_each = len(read(model, few, _FEW)) / _FEW
            size = math.ceil(ROWS_PER_FEATURE * model.head.in_features / rows_each)
        return next(model.batches(dataset, split, size=size, seed=seed))

    @property
    def _is_closed_form(self) -> bool:
        return self.extractor == "linear" and self.objective == "spread"

    def training(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> Training:
        kind = _Deep if self.extractor == "deep" else _Folded
        return kind(self, model, policy)

    def immunize(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> ModelHandle:
        immunized = super().immunize(model, policy, workspace)
        head = {id(part) for part in immunized.head.parameters()}
        pairs = zip(model.module.parameters(), immunized.module.parameters(), strict=True)
        if all(torch.equal(old, new) for old, new in pairs if id(new) not in head):
            raise ImmunizationError(
                "condition_number: the extractor is what it was, so every ratio would be 1; raise "
                "lr or updates"
            )
        return immunized

    def effect(self, base: ModelHandle, immunized: ModelHandle, policy: Policy) -> float:
        """Log (i) by the estimator that gives least, less log (ii) as far as it is above 1."""
        found = self.measure(base, immunized, policy)
        return min(
            math.log(value) - max(0.0, math.log(found[name.replace("(i)", "(ii)")]))
            for name, value in found.items()
            if name.startswith("(i) ")
        )

    def measure(
        self, base: ModelHandle, immunized: ModelHandle, policy: Policy
    ) -> Mapping[str, float]:
        """Both halves of the relative immunization ratio by each estimator, in groups of rows."""
        kept = self._changes(base, immunized, policy.retain.dataset, "retain")
        figures = {"norm of H, retained": _norm_grown(kept)}
        for concept in policy.concepts:
            harmed = self._changes(base, immunized, concept.dataset, "immunize")
            figures[f"norm of H, {concept.name}"] = _norm_grown(harmed)
            for estimator, found in halves(harmed, kept).items():
                about = f"{concept.name}, {estimator}"
                figures[f"(i) {about}"] = mean(found.harm)
                figures[f"(ii) {about}"] = mean(found.keep)
                figures[f"RIR {about}"] = mean(found.ratio)
                figures[f"RIR median {about}"] = statistics.median(found.ratio)
                figures[f"RIR deviation {about}"] = statistics.stdev(found.ratio)
            figures |= self._slowdown(base, immunized, concept)
        return {name: float(f"{value:.5g}") for name, value in figures.items()}

    def caveats(self, model: ModelHandle, policy: Policy) -> Sequence[str]:
        return (_ONLY_SLOW,)

    def _changes(
        self, base: ModelHandle, immunized: ModelHandle, dataset: str, split: Split
    ) -> Sequence[Change]:
        """Spectra before and after, of several groups of rows."""
        groups = (self.rows(base, dataset, split, seed=seed) for seed in range(_GROUPS))
        return [
            (
                Spectrum.of(read(base, batch, self.piece)),
                Spectrum.of(read(immunized, batch, self.piece)),
            )
            for batch in groups
        ]

    def _slowdown(
        self, base: ModelHandle, immunized: ModelHandle, concept: Concept
    ) -> Mapping[str, float]:
        """How many times the steps descent takes to fit a probe, as the spectra foretell."""
        batch = self.rows(base, concept.dataset, "immunize")
        steps = []
        for model in (base, immunized):
            with evaluating(model.module):
                labels = [model.features(part)[1] for part in pieces(batch, self.piece)]
            classes, labels_N = torch.unique(torch.cat(labels), return_inverse=True)
            if len(classes) == 1:
                return {}  # nothing to learn
            targets_NC = nn.functional.one_hot(labels_N).double()
            task = ProbeTask.of(read(model, batch, self.piece), targets_NC)
            steps.append(task.steps(_LEFT))
        return {f"probe steps by descent, {concept.name}": steps[1] / steps[0]}


class _Deep(Training):
    """The last blocks, trained on the task and on both regularisers."""

    def __init__(self, options: ConditionNumber, base: ModelHandle, policy: Policy) -> None:
        super().__init__(options.name, options.model_dump_json(), base, policy)
        self._options = options
        self.theta.module.eval()  # the features that are published: no dropout, statistics at rest
        select(self.theta, "last_k", last_k=options.last_k)
        self._parameters = [part for part in self.theta.module.parameters() if part.requires_grad]
        self._optimizer = torch.optim.SGD(
            self._parameters, lr=options.lr, momentum=options.momentum, nesterov=True
        )
        self._balance: dict[str, float] = {}

    def changing(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "balance": self._balance}

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(kept["optimizer"])
        self._balance = kept["balance"]

    def advance(self) -> Mapping[str, float]:
        options, retained = self._options, self.policy.retain.dataset
        concept = self.policy.concepts[self.step % len(self.policy.concepts)]
        batch = self.batch(retained, "retain", size=options.task_batch, purpose="task")
        loss = self.theta.loss(batch)
        task = gradients(loss, self._parameters)
        rows, rows_H = self._rows(retained, "retain"), self._rows(concept.dataset, "immunize")
        well, kept = self._pull(rows, harm=False)
        ill, harmed = self._pull(rows_H, harm=True)
        pulls = {
            "well": self._weighted("well", options.lam_well, well, task),
            "ill": self._weighted("ill", options.lam_ill, ill, task),
        }
        failing = self._failing((kept, rows), (harmed, rows_H)) if options.guard else set()
        if len(failing) == 1:
            pulls = {name: pull for name, pull in pulls.items() if name in failing}
        for parameter, *parts in zip(self._parameters, task, *pulls.values(), strict=True):
            parameter.grad = torch.stack(parts).sum(dim=0)
        fade = 1 + (options.final_lr - 1) * self.step / options.updates
        update(self._optimizer, options.lr * fade)
        return {
            "retained loss": loss.item(),
            "log cond, retained": math.log(kept.cond()),
            "log cond, restricted": math.log(harmed.cond()),
        }

    def _rows(self, dataset: str, split: Split) -> Batch:
        rows = self._options.rows(self.theta, dataset, split, seed=self.seed(f"rows/{split}"))
        self.pay(rows, passes=_PASSES)
        return rows

    def _pull(self, rows: Batch, *, harm: bool) -> tuple[list[Tensor], Spectrum]:
        """A regulariser's gradient in the weights, and the spectrum where it was taken."""
        piece = self._options.piece
        features_NF = read(self.theta, rows, piece)
        spectrum = Spectrum.of(features_NF)
        slope_FF = self._slope(gram(features_NF), harm=harm, rank=spectrum.rank)
        back_NF = 2 / len(features_NF) * features_NF.double() @ slope_FF
        return pulled_back(self.theta, rows, self._parameters, back_NF, piece), spectrum

    def _slope(self, gram_FF: Tensor, *, harm: bool, rank: int) -> Tensor:
        if self._options.objective == "spread":
            return -spread_gradient(gram_FF) if harm else spread_gradient(gram_FF)
        return ill_gradient(gram_FF, rank=rank) if harm else well_gradient(gram_FF)

    def _weighted(
        self, name: str, weight: Weight, pull: Sequence[Tensor], task: Sequence[Tensor]
    ) -> list[Tensor]:
        if weight == "balance":
            weight = self._balance.setdefault(name, _norm(task) / max(_norm(pull), _NO_PULL))
        return [weight * part for part in pull]

    def _failing(self, kept: tuple[Spectrum, Batch], harmed: tuple[Spectrum, Batch]) -> set[str]:
        """The regularisers whose half fails by any estimator, on the rows of this step."""
        room = self._options.room
        change_P, change_H = (
            [(Spectrum.of(read(self.base, rows, self._options.piece)), now)]
            for now, rows in (kept, harmed)
        )
        found = halves(change_H, change_P).values()
        fails = {
            "well": any(one.keep[0] > room for one in found),
            "ill": any(one.harm[0] < 1 / room for one in found),
        }
        return {name for name, failing in fails.items() if failing}


class _Folded(Training):
    """A linear map of the features, and its inverse in the head; the descent is on the map."""

    def __init__(self, options: ConditionNumber, base: ModelHandle, policy: Policy) -> None:
        super().__init__(options.name, options.model_dump_json(), base, policy)
        self._options, self._writer = options, _writer(base, policy)
        grams = []
        for place, (dataset, split) in enumerate(_domains(policy)):
            rows = options.rows(base, dataset, split, seed=self.seed(f"rows/{place}"))
            self.pay(rows, passes=_READING)
            grams.append(gram(read(base, rows, options.piece)))
        restricted_FF = torch.stack(grams[1:]).mean(dim=0)
        self._descent = GuardedDescent(restricted_FF, grams[0], room=options.room, shares=_GUARDED)
        if options.objective == "spread":
            pencil = Pencil.of(restricted_FF, grams[0])
            best_FF = pencil.map(pencil.power(restricted_FF, grams[0], _GUARDED))
            self._descent.map = turned(best_FF, seed=self.seed("turn"))
            if any(min(harm, 1 / keep) < _NOTICED for harm, keep in self._descent.halves()):
                raise ImmunizationError(
                    "condition_number: in these features both domains are too much alike for any "
                    'linear map to make one worse and not the other; set extractor = "deep"'
                )

    def changing(self) -> dict[str, Any]:
        return {"map": self._descent.map, "trust": self._descent.trust}

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._descent.map, self._descent.trust = kept["map"], kept["trust"]

    def advance(self) -> Mapping[str, float]:
        if self._options.objective == "paper":
            self._descent.step()  # or none is left to take
        fold(self.base, self.theta, self._writer, self._descent.map)
        harm, keep = zip(*self._descent.halves(), strict=True)
        return {"log (i)": math.log(min(harm)), "log (ii)": math.log(max(keep))}


def _writer(model: ModelHandle, policy: Policy) -> str:
    """The layer that can take a map of the features."""
    few = next(model.batches(policy.retain.dataset, "retain", size=_FEW, seed=0))
    if (name := writer(model, few)) is None:
        raise ImmunizationError(
            "condition_number: no linear layer stands right before the head, or the head is tied "
            'to the embedding: no map can be folded in; set extractor = "deep"'
        )
    return name


def _domains(policy: Policy) -> Sequence[tuple[str, Split]]:
    """The retained data, and then each concept's."""
    concepts: list[tuple[str, Split]] = [
        (concept.dataset, "immunize") for concept in policy.concepts
    ]
    return [(policy.retain.dataset, "retain"), *concepts]


def _require_rows(features_NF: Tensor, dataset: str) -> None:
    """Refuse features whose condition number would say nothing."""
    num_rows, width = features_NF.shape
    if num_rows < ROWS_PER_FEATURE * width:
        raise ImmunizationError(
            f"condition_number: {num_rows} rows of {dataset} are too few for {width} features, of "
            f"which a step needs {ROWS_PER_FEATURE * width}; raise batch, or leave it out"
        )
    if Spectrum.of(features_NF).rank == 1:
        raise ImmunizationError(
            f"condition_number: the features of {dataset} are all the same but for their size, so "
            "they have no condition number"
        )


def _norm_grown(changes: Sequence[Change]) -> float:
    """norm(H)_F after by before: what a regulariser gains by mere inflation."""
    return mean([now.norm / was.norm for was, now in changes])


def _norm(gradient: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in gradient))
