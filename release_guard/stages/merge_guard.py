"""MergeGuard and its hardened form: a model whose merges are worth nothing to whoever merges.

What is trained against averages (traps, repulsion, density), what is taken back afterwards
(negation), what hides the weights while keeping the function (gauges), and the published recipes as
presets of these parts.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from release_guard.adaptation import Randomness
from release_guard.anatomy import anatomy
from release_guard.errors import ImmunizationError, ModelError
from release_guard.gauge import Change, Key, Style, farthest_orders
from release_guard.gauging import (
    FILE,
    TOLERANCE,
    gauge_for,
    gauged,
    legal_changes,
    logit_change,
    record_of,
    secret_of,
)
from release_guard.immunization import Training, update
from release_guard.ingredients import head_names
from release_guard.merging import distance
from release_guard.modalities import Batch, ModelHandle
from release_guard.policy import MergeTarget, Policy
from release_guard.quantization import emulated
from release_guard.stages import TrainedStage, Workspace
from release_guard.task_vectors import (
    Importance,
    Masked,
    Taken,
    by_family,
    cosine,
    matrix_names,
    merged_loss,
    merged_names,
    near_base,
    public_base,
    share_unmoved,
)
from release_guard.trapping import (
    along,
    apart,
    density,
    loss_with,
    repulsion,
    scaled,
    stranger,
    trap_share,
    trapped,
)

Way = Literal["along", "apart", "mixed"]
Preset = Literal["mergeguard", "params", "mergelock", "trap2", "arf", "hardened"]

_IDLE = {
    "train_steps": 0, "start": "undefended", "trap": 0.0, "ways": ("along",), "repel": 0.0,
    "alpha": 0.0, "beta": 0.0,
    "gauge": (), "style": "orthogonal", "farthest": False,
}  # fmt: skip
_PRESETS: Mapping[str, Mapping[str, Any]] = {
    # arXiv 2511.11851: density-aware fine-tuning, then adversarial weight negation.
    "mergeguard": _IDLE | {"train_steps": 500, "lr": 3e-4, "alpha": 0.01, "beta": 1.0},
    # arXiv 2503.07661: neurons moved far from the base's, heads scaled.
    "params": _IDLE
    | {"gauge": ("neurons", "queries", "values"), "style": "diagonal", "farthest": True},
    # arXiv 2509.01548: heads mixed by invertible matrices.
    "mergelock": _IDLE | {"gauge": ("queries", "values"), "style": "general"},
    # arXiv 2601.21898: a trap along the way from the base.
    "trap2": _IDLE | {"train_steps": 700, "start": "base", "trap": 0.005, "cap": 1e9},
    # arXiv 2606.30360: attention away from the base, then a gauge.
    "arf": _IDLE
    | {"train_steps": 700, "start": "base", "repel": 1.0, "rho": 0.05}
    | {"gauge": ("neurons", "queries", "values")},
    # Ours: both, traps for merges layer by layer and with strangers, every legal gauge on top.
    "hardened": _IDLE
    | {"train_steps": 900, "start": "base", "trap": 0.05, "ways": ("along", "apart", "mixed")}
    | {"repel": 1.0}
    | {"gauge": ("neurons", "scales", "heads", "queries", "values", "stream")},
}
_LEAST_RHO, _BEYOND = 0.05, 1.5  # rho: at least the paper's, and beyond what a task moves by itself
_WARM_UP = 0.3  # share of the steps in which the learning rate rises
_PROBED = 32  # examples on which figures are taken


class MergeGuard(TrainedStage):
    """Make a task that was trained into a public base useless to whoever merges the release.

    The model given is the fine-tune; `merge_targets` name its task, the public base and a donor.
    The last layer is left as it is, since merges keep each task's own.
    """

    paper = "https://arxiv.org/abs/2511.11851"
    modalities = ("image_classification", "causal_lm")
    variants = _PRESETS
    variant_option = "preset"

    preset: Preset = "hardened"
    """Sets every option that is not given. mergeguard: as published. params, mergelock, trap2, arf:
    what others published, to compare with; the first two are gauges only, and undone by whoever has
    the base. hardened: trap, repulsion and gauge together."""
    train_steps: int = Field(ge=0)
    """How many steps it trains; 0: it does not."""
    start: Literal["base", "undefended"]
    """Whose weights training begins with: the public base's, or those of the model itself."""
    lr: float = Field(7e-4, gt=0)
    """Highest learning rate, AdamW; it rises for 3 tenths of the steps, then falls to 0."""
    batch: int = Field(64, ge=1)
    """Examples of a step."""
    trap: float = Field(ge=0)
    """Weight of the loss of merges, which is made large: TRAP2's lambda."""
    cap: float = Field(8.0, gt=0)
    """A merge that loses as much is ruined enough."""
    ways: tuple[Way, ...] = Field(min_length=1)
    """Merges that a step looks at. along: base and model, at one share (TRAP2); apart: at a share
    for each tensor; mixed: at such shares around one, and with a part of a stranger's task vector,
    which is what the task changed with its rows and columns shuffled."""
    repel: float = Field(ge=0)
    """Weight of the distance from the base that attention matrices lack: ARF's lambda_dist."""
    rho: float | None = Field(None, gt=0)
    """That distance, relative to the base's norm; none: one and a half times what the undefended
    model moved, and .05 at least."""
    alpha: float = Field(ge=0)
    """Weight of the squared weights in MergeGuard's first stage."""
    beta: float = Field(ge=0)
    """How much of the task is taken back where MergeGuard's second stage looks; 1: all of it, more
    negates it; 0: none."""
    share: float = Field(0.1, gt=0, le=1)
    """Share of the entries it looks at (k; the paper's unit is not public, a fraction is our
    reading)."""
    critical: float = Field(0.1, ge=0, lt=1)
    """Share of the linear layers that stay as they are: those whose loss costs most (k')."""
    masked_by: Masked = "base"
    """How a layer is taken away to see what it costs: the base's weights, or none (our reading)."""
    importance: Importance = "tau"
    """Which entries matter most in a matrix: by what the task changed, by that times the gradient,
    or by their size (our reading)."""
    gauge: tuple[Change, ...]
    """Changes that keep the function, put on last; those that are not legal on a model are left
    out, which the card says."""
    style: Style
    """Their matrices: orthogonal (safe to quantize), diagonal in [1/2, 2], or general of condition
    4 at most."""
    farthest: bool
    """Neurons are ordered to lie far from the base's (PaRaMS), not at random."""

    @property
    def steps(self) -> int:
        return self.train_steps

    def check(self, model: ModelHandle, policy: Policy) -> None:
        if not policy.merge_targets:
            raise ImmunizationError(
                "merge_guard: the policy names no merge target; add one, or leave the stage out"
            )
        if [stage.name for stage in policy.stages].count(self.name) > 1:
            raise ImmunizationError("merge_guard: list it once; only one gauge can be taken back")
        anchor = public_base(model, policy).state()
        if distance(model.state(), anchor, merged_names(model)) == 0:
            raise ImmunizationError(
                "merge_guard: the model is the base of its merge target; there is no task to guard"
            )
        for target in policy.merge_targets:
            wanted = max(self.batch, _PROBED)
            model.batches(target.dataset, "immunize", size=wanted, seed=policy.seed)
        is_idle = not self.train_steps and not self.beta
        if is_idle and not self._legal(model, policy)[0]:
            raise ImmunizationError("merge_guard: no part of its gauge is legal on this model")

    def immunize(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> ModelHandle:
        guarded = model.copy()
        if self.train_steps:
            guarded = super().immunize(model, policy, workspace)
        if self.beta:
            guarded = self._negated(model, guarded, policy)
        if self.gauge:
            guarded = self._gauged(model, guarded, policy, workspace)
        return guarded

    def training(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> Training:
        return _Guarding(self, model, policy)

    def caveats(self, model: ModelHandle, policy: Policy) -> Sequence[str]:
        sentences = list(self._legal(model, policy)[1]) if self.gauge else []
        if self.gauge and policy.stages and policy.stages[-1].name != self.name:
            sentences.append("A later stage changed the gauged weights: `ungauge` refuses them.")
        return sentences

    def effect(self, base: ModelHandle, immunized: ModelHandle, policy: Policy) -> float:
        """By how much merges of the release with the public base alone lose more on the task.

        Task arithmetic with .3 and .6 of the task vector, plain and realigned, in nats.
        """
        anchor = public_base(base, policy).state()
        batch = _probe(base, policy.merge_targets[0])
        before, after = (
            merged_loss(model, model.state(), anchor, batch)
            + merged_loss(model, *near_base(model, anchor), batch)
            for model in (base, immunized)
        )
        return (after - before) / 2

    def measure(
        self, base: ModelHandle, immunized: ModelHandle, policy: Policy
    ) -> Mapping[str, float]:
        """How far and where to the weights moved, and what rounding them costs the logits."""
        anchor, names = public_base(base, policy).state(), merged_names(base)
        own, _ = near_base(base, anchor)
        plain, anchor = near_base(immunized, anchor)
        figures = {
            "cosine of the task vectors, defended and undefended": cosine(
                plain, own, anchor, names
            ),
            "entries equal to the base's": share_unmoved(plain, anchor, names),
        }
        for family, matrices in by_family(base).items():
            for what, state in (("undefended", own), ("defended", plain)):
                name = f"distance from the base, {family}, {what}"
                figures[name] = distance(state, anchor, matrices)
        batch = _probe(base, policy.merge_targets[0])
        if legal := self._legal(immunized, policy)[0] if self.gauge else ():
            gauge = gauge_for(immunized, Key(b"measured"), legal, self.style)
            twin = gauged(immunized, gauge.keeping(immunized.state()))
            figures["change of the logits by such a gauge"] = logit_change(immunized, twin, batch)
        for form in ("int8", "nf4"):
            for what, one in (("undefended", base), ("defended", immunized)):
                figures[f"change of the logits at {form}, {what}"] = logit_change(
                    one, emulated(one, form), batch
                )
        return {name: float(f"{value:.4g}") for name, value in figures.items()}

    def _negated(self, model: ModelHandle, guarded: ModelHandle, policy: Policy) -> ModelHandle:
        """MergeGuard's second stage: training-free."""
        taken = Taken(self.beta, self.share, self.critical, self.importance, self.masked_by)
        batch = _probe(guarded, policy.merge_targets[0])
        guarded = taken.back(guarded, public_base(model, policy).state(), batch)
        lost = _retained(model, policy, self.probed) - _retained(guarded, policy, self.probed)
        if lost > policy.retain.margin:
            raise ImmunizationError(
                f"merge_guard: taking back the largest changes cost {lost:.3f} of the retained "
                "score, more than retain.margin; lower `share`, or raise the margin"
            )
        return guarded

    def _legal(
        self, model: ModelHandle, policy: Policy
    ) -> tuple[tuple[Change, ...], Sequence[str]]:
        try:
            wanted = gauge_for(model, Key(b""), self.gauge, self.style)
        except ModelError as error:
            return (), [f"There is no gauge: {error}."]
        return legal_changes(model, _probe(model, policy.merge_targets[0]), wanted)

    def _gauged(
        self, model: ModelHandle, guarded: ModelHandle, policy: Policy, workspace: Workspace
    ) -> ModelHandle:
        legal, _ = self._legal(guarded, policy)
        if not legal:
            return guarded
        path, before = workspace.private / FILE, guarded.state()
        kept: dict[str, list[float]] = {}
        if self.farthest:
            anchor = public_base(model, policy).state()
            kept = farthest_orders(before, anchor, anatomy(model.module))
        gauge = gauge_for(guarded, Key(secret_of(path)), legal, self.style, kept).keeping(before)
        hidden = gauged(guarded, gauge)
        moved = logit_change(guarded, hidden, _probe(model, policy.merge_targets[0]))
        if moved > TOLERANCE:
            raise ImmunizationError(
                f"merge_guard: the gauge as a whole moves the logits by {moved:.1g}; leave one of "
                f"{', '.join(legal)} out of `gauge`"
            )
        record_of(gauge, policy.modality, before, hidden.state(), model.state()).save(path)
        return hidden


class _Guarding(Training):
    """Training against merges; from the public base, or on from the model itself."""

    def __init__(self, options: MergeGuard, model: ModelHandle, policy: Policy) -> None:
        super().__init__(options.name, options.model_dump_json(), model, policy)
        self._options = options
        self._anchor = public_base(model, policy).state()
        if options.start == "base":
            heads = head_names(model)
            own = {name: value for name, value in model.state().items() if name in heads}
            self.theta.load_state(self._anchor | own)
        self._names = merged_names(model)
        before = model.state()
        self._vector = {name: before[name] - self._anchor[name] for name in self._names}
        self._weights = dict(self.theta.module.named_parameters())
        self._matrices = matrix_names(model)
        self._repelled = next(iter(by_family(model).values()))
        moved = distance(model.state(), self._anchor, self._repelled)
        self._rho = options.rho or max(_LEAST_RHO, _BEYOND * moved)
        self._chosen = [self._weights[name] for name in self._names]
        self._optimizer = torch.optim.AdamW(self._chosen, lr=options.lr, weight_decay=0)

    def advance(self) -> Mapping[str, float]:
        options, targets = self._options, self.policy.merge_targets
        target = targets[self.step % len(targets)]
        batch = self.batch(
            target.dataset,
            "immunize",
            size=options.batch,
            purpose="task",
            passes=1 + len(options.ways) if options.trap else 1,
        )
        own = self._loss(self._weights, batch)
        loss, losses = own, {"task": own.item()}
        chance = random.Random(self.seed("share"))  # noqa: S311
        for way in options.ways if options.trap else ():
            share, weights = self._merged(way, chance)
            merged = self._loss(weights, batch)
            loss = trapped(loss, merged, share=share, strength=options.trap, cap=options.cap)
            losses[f"merged {way}"] = merged.item()
        if options.repel:
            gap = repulsion(self._anchor, self._weights, self._repelled, self._rho)
            loss = loss + options.repel * gap
            losses["too near"] = gap.item()
        if options.alpha:
            loss = loss + options.alpha * density(self._weights, self._matrices)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        torch.nn.utils.clip_grad_norm_(self._chosen, 1.0)
        update(self._optimizer, options.lr * self._pace())
        return losses

    def changing(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict()}

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(kept["optimizer"])

    def _merged(self, way: Way, chance: random.Random) -> tuple[float, Mapping[str, Tensor]]:
        """What the loss of such a merge is divided by, and its weights."""
        if way == "along":
            share = trap_share(chance)
            return share, along(self._anchor, self._weights, dict.fromkeys(self._names, share))
        if way == "apart":
            return 1.0, along(self._anchor, self._weights, apart(self._names, chance))
        merged = along(self._anchor, self._weights, scaled(self._names, chance))
        parts, other = apart(self._names, chance), stranger(self._vector, chance)
        return 1.0, merged | {name: merged[name] + parts[name] * other[name] for name in other}

    def _loss(self, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Every pass of a step draws the same random numbers (TRAP2)."""
        with Randomness(self.seed("dropout"), self.theta.device).used():
            return loss_with(self.theta, weights, batch)

    def _pace(self) -> float:
        done = (self.step + 1) / self._options.train_steps
        if done < _WARM_UP:
            return done / _WARM_UP
        return (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))) / 2


def _probe(model: ModelHandle, target: MergeTarget) -> Batch:
    """The examples on which figures are taken."""
    return next(model.batches(target.dataset, "immunize", size=_PROBED, seed=0))


def _retained(model: ModelHandle, policy: Policy, limit: int) -> float:
    scores = model.scores(policy.retain.dataset, "guard", limit=limit)
    return sum(scores) / len(scores)
