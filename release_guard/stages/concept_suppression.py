"""Bilevel concept suppression: a pruned painter learns from its teacher all but the concepts.

Distilling a pruned model teaches it anew what its data leave out, and suppressing that afterwards
costs what distillation gave; so both levels are descended together. Shapes: N pictures.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from release_guard import pruning
from release_guard.crew import Crew
from release_guard.distillation import Levels
from release_guard.errors import ImmunizationError
from release_guard.immunization import Training, update
from release_guard.modalities import Batch, Modality, ModelHandle, Painter, evaluating
from release_guard.policy import Policy
from release_guard.stages import TrainedStage, Workspace, need_concepts

_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    # Lower steps, then one on both levels: arXiv 2412.15341, algorithm 1.
    "paper": {
        "mode": "penalty",
        "total_steps": 20_000,
        "inner": 20,
        "weight": 100.0,
        "lr": 1e-6,
        "warmup": 250,
        "final_lr": 1.0,
    },
    # What was released: lower steps, every tenth followed by an upper one with its own AdamW.
    "code": {
        "mode": "alternate",
        "total_steps": 50_000,
        "inner": 9,
        "weight": 1.0,
        "lr": 1e-6,
        "upper_lr": 5e-6,
        "warmup": 250,
        "final_lr": 1.0,
    },
    # Both levels at every step.
    "joint": {
        "mode": "penalty",
        "total_steps": 20_000,
        "inner": 0,
        "weight": 1.0,
        "lr": 1e-5,
        "warmup": 250,
        "final_lr": 1.0,
    },
    # That, met between the released weights and a copy that learns everything, and by relearners.
    "hardened": {
        "mode": "penalty",
        "copies": "two",
        "total_steps": 60_000,
        "inner": 1,
        "weight": 6.0,
        "lr": 1e-5,
        "warmup": 250,
        "final_lr": 0.03,
        "reach": 2.0,
        "anchored": 0.25,
        "merges": (0.3, 0.7),
        "attackers": 3,
    },
}

_Share = Annotated[float, Field(ge=0, lt=1)]


class ConceptSuppression(TrainedStage):
    """Distil a teacher into a pruned text-to-image model and leave the concepts out."""

    paper = "https://arxiv.org/abs/2412.15341"
    modalities = ("text_to_image",)
    variants = _VARIANTS

    variant: Literal["paper", "code", "joint", "hardened"] = "joint"
    """Sets every option that is not given. hardened: name an anchor as well."""
    teacher: str = ""
    """The whole model that the one given was pruned from: a folder or `OWNER/NAME@REVISION`, of the
    same tokenizer, autoencoder and blocks. None: the model itself, as it is given."""
    mode: Literal["penalty", "alternate"]
    """penalty: lower steps, then one on the sum of both levels. alternate: the last lower step of a
    round is followed by an upper step with an optimizer of its own."""
    copies: Literal["shared", "two"] = "shared"
    """Whether penalty's lower steps move the released weights, or a second copy beside them."""
    total_steps: int = Field(ge=1)
    """Lower and upper ones."""
    inner: int = Field(ge=0)
    """Lower steps before each upper one."""
    weight: float = Field(ge=0)
    """Of the lower level in penalty's sum."""
    lr: float = Field(gt=0)
    """Learning rate, AdamW."""
    upper_lr: float = Field(1e-3, gt=0)
    """That of alternate's upper steps. AdamW knows no size of a gradient, so this decides."""
    warmup: int = Field(ge=0)
    """Steps over which the rates rise."""
    final_lr: float = Field(gt=0, le=1)
    """From there on they fall linearly to this share of themselves."""
    batch: int = Field(16, ge=1)
    """Retained pictures of a step."""
    unasked_share: float = Field(0.1, ge=0, lt=1)
    """Share of them that is learnt under no prompt, as guidance needs it."""
    upper_batch: int = Field(16, ge=1)
    """Concept pictures of an upper step."""
    pool: int = Field(64, ge=1)
    """Pictures of each concept that the teacher paints for them, for captions of its data."""
    eta: float = Field(1.0, ge=0)
    """How far beyond no prompt at all, away from the concept, the target lies. Far beyond 1, merges
    and relearning need longer, but whoever puts the concept into the negative prompt gets it."""
    anchor: str | None = None
    """Prompt towards whose prediction the concept's is to go, instead of that target: one that is
    allowed, and whose opposite is not the concept."""
    reach: float = Field(1.0, ge=0)
    """How far towards the anchor, from no prompt at all: 1 is its prediction, more exaggerates."""
    anchored: _Share = 0.0
    """Share of the pool that the teacher paints for the anchor: what then is gone on from."""
    merges: tuple[_Share, _Share] = (0, 0)
    """Shares of the second copy in merges that the upper level is taken at too, drawn anew at each
    upper step. Above 0 it asks for two copies."""
    attackers: int = Field(0, ge=0)
    """Simulated attackers who relearn the concepts and ride on the released weights; at each upper
    step one of them takes one, and the upper level is taken at its weights too."""
    horizon: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (5, 30)
    """Steps after which one begins anew, drawn uniformly."""
    attack_lr: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (5e-4, 4e-3)
    """Range of their learning rates, Adam, drawn log-uniformly."""
    packed_share: float = Field(0.5, ge=0, le=1)
    """Share of those who begin from int8 or nf4 that train adapters beside the rounded weights."""
    attack_weight: float = Field(2.0, ge=0)
    """Of the upper level at an attacker's weights."""
    scope: Literal["all", "cross_attention", "others"] = "all"
    """Which weights the upper level moves."""
    kd_weights: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (2.0, 0.1)
    """Of the distance to the teacher's output and of that to its blocks' outputs."""
    snr_gamma: float = Field(5.0, gt=0)
    """Largest signal-to-noise ratio that counts in the denoising loss."""
    probed: int = Field(64, ge=1)
    """Examples scored at a look, at most; with a judge each of them is painted."""

    @property
    def steps(self) -> int:
        return self.total_steps

    def check(self, model: ModelHandle, policy: Policy) -> None:
        need_concepts(self, policy)
        self._check_options()
        student, teacher = _painter(model), self._teacher(model, policy)
        unets: list[Any] = [student.unet, teacher.unet]
        if unets[0].config.block_out_channels != unets[1].config.block_out_channels:
            raise ImmunizationError(
                "concept_suppression: the teacher's blocks have other widths than the model's; "
                "name the model that it was pruned from"
            )
        batch = next(student.batches(policy.retain.dataset, "retain", size=self.batch, seed=0))
        theirs = next(teacher.batches(policy.retain.dataset, "retain", size=self.batch, seed=0))
        for name, one, other in (
            ("reads captions", batch["tokens"], theirs["tokens"]),
            ("predicts", student.wanted(batch), teacher.wanted(theirs)),
        ):
            if one.shape != other.shape or not torch.equal(one, other):
                raise ImmunizationError(
                    f"concept_suppression: the teacher {name} otherwise than the model; name the "
                    "one that it was pruned from"
                )
        for concept in policy.concepts:
            for size in (self.pool, self.upper_batch):
                student.batches(concept.dataset, "immunize", size=size, seed=0)

    def training(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> Training:
        return _Bilevel(self, _painter(model), self._levels(model, policy), policy)

    def measure(
        self, base: ModelHandle, immunized: ModelHandle, policy: Policy
    ) -> Mapping[str, float]:
        """Both levels' losses and the pull of each concept, before and after; the UNets' sizes."""
        levels = self._levels(base, policy)
        figures = {
            "MACs of the UNet, million": pruning.macs(_painter(immunized).unet) / 1e6,
            "MACs of the teacher's UNet, million": pruning.macs(levels.teacher.unet) / 1e6,
        }
        for name, handle in (("base", base), ("immunized", immunized)):
            student = _painter(handle)
            with evaluating(student.module):
                batch = _fixed(student, policy.retain.dataset, "guard", self.upper_batch)
                lower, apart = float(levels.lower(student, batch)), levels.distance(student, batch)
                figures[f"lower loss on retained pictures, {name}"] = lower
                figures[f"distance to the teacher on retained pictures, {name}"] = apart
                for concept in policy.concepts:
                    batch = _fixed(student, concept.dataset, "immunize", self.upper_batch)
                    upper = float(levels.upper(student, batch, levels.target(batch)))
                    figures[f"upper loss on {concept.name}, {name}"] = upper
                    figures[f"pull of {concept.name}, {name}"] = levels.pull(student, batch)
        return {name: round(value, 4) for name, value in figures.items()}

    def effect(self, base: ModelHandle, immunized: ModelHandle, policy: Policy) -> float:
        """By how much the concepts' pull fell, mean."""
        levels, falls = self._levels(base, policy), []
        before, after = _painter(base), _painter(immunized)
        for concept in policy.concepts:
            batch = _fixed(before, concept.dataset, "immunize", self.upper_batch)
            with evaluating(before.module), evaluating(after.module):
                falls.append(levels.pull(before, batch) - levels.pull(after, batch))
        return sum(falls) / len(falls)

    def caveats(self, model: ModelHandle, policy: Policy) -> Sequence[str]:
        yardstick = (
            "concept_suppression compares its use with the pruned model as it was given, not with "
            "what distillation alone would have made of it"
        )
        return (yardstick,) if self.teacher else ()

    def _check_options(self) -> None:
        for wrong, what in (
            (self.variant == "hardened" and not self.anchor, "hardened asks for an anchor"),
            (self.anchored and not self.anchor, "anchored asks for an anchor"),
            (max(self.merges) and self.copies != "two", 'merges ask for copies = "two"'),
            (self.attackers and self.mode != "penalty", 'attackers ask for mode = "penalty"'),
            (self.merges != tuple(sorted(self.merges)), "merges go from the least share up"),
        ):
            if wrong:
                raise ImmunizationError(f"concept_suppression: {what}")

    def _levels(self, model: ModelHandle, policy: Policy) -> Levels:
        teacher = self._teacher(model, policy)
        return Levels(teacher, self.kd_weights, self.snr_gamma, self.eta, self.anchor, self.reach)

    def _teacher(self, model: ModelHandle, policy: Policy) -> Painter:
        """In evaluation mode, without gradients."""
        teacher = model.copy()
        if self.teacher:
            source = policy.located(self.teacher)
            teacher = Modality.build(policy.modality).load(source)
        teacher.module.to(model.device).eval().requires_grad_(False)
        return _painter(teacher)


def in_scope(name: str, scope: str) -> bool:
    """Whether a UNet's weight is one of its cross-attentions, or one of the others."""
    return scope == "all" or (".attn2." in name) == (scope == "cross_attention")


class _Bilevel(Training):
    """The released weights, perhaps a copy that only learns, and a teacher that stays."""

    def __init__(
        self, options: ConceptSuppression, base: Painter, levels: Levels, policy: Policy
    ) -> None:
        super().__init__(options.name, options.model_dump_json(), base, policy)
        self._options = options
        self._levels = levels
        self._student = _trainable(self.theta)
        self._lower = _adamw(self._student, options.lr)
        self._upper = _adamw(self._student, options.upper_lr)
        self._second = _trainable(self.theta.copy())
        self._second_lower = _adamw(self._second, options.lr)
        self._between = _trainable(self.theta.copy())
        self._crew = Crew(
            options.attackers,
            options.horizon,
            options.attack_lr,
            len(policy.concepts),
            policy.seen_in,
            options.packed_share,
        )
        self._holes = pruning.holes(self._student.unet)
        self._pools = [self._painted(concept.dataset) for concept in policy.concepts]

    def advance(self) -> Mapping[str, float]:
        options = self._options
        self._student.unet.train()  # a look at the score puts it to rest
        is_upper = self.step % (options.inner + 1) == options.inner
        if options.mode == "alternate":
            losses = self._lower_step(self._student, self._lower)
            if is_upper:
                losses |= self._upper_step()
        elif is_upper:
            losses = self._step_on_both()
        elif options.copies == "two":
            losses = self._lower_step(self._second, self._second_lower)
        else:
            losses = self._lower_step(self._student, self._lower)
        return losses

    def changing(self) -> dict[str, Any]:
        return {
            "lower": self._lower.state_dict(),
            "upper": self._upper.state_dict(),
            "second": self._second.state() if self._options.copies == "two" else {},
            "second lower": self._second_lower.state_dict(),
            "crew": self._crew.kept(),
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._lower.load_state_dict(kept["lower"])
        self._upper.load_state_dict(kept["upper"])
        if self._options.copies == "two":
            self._second.load_state(kept["second"])
        self._second_lower.load_state_dict(kept["second lower"])
        self._crew.restore(self.theta, kept["crew"])

    def _lower_step(self, student: Painter, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        loss = self._levels.lower(student, self._retained())
        torch.autograd.backward(loss)
        self._update(student, optimizer, self._options.lr)
        return {"lower loss": loss.item()}

    def _upper_step(self) -> dict[str, float]:
        loss = self._add_upper_gradient()
        self._update(self._student, self._upper, self._options.upper_lr)
        return {"upper loss": loss}

    def _step_on_both(self) -> dict[str, float]:
        """One step on L_CU + weight (L_ft - what the second copy has): the penalty's outer step."""
        options, batch = self._options, self._retained()
        upper = self._add_upper_gradient()
        lower = self._levels.lower(self._student, batch)
        torch.autograd.backward(options.weight * lower)
        with self._crew.riding(self.theta):
            self._update(self._student, self._lower, options.lr)
        losses = {"upper loss": upper, "lower loss": lower.item()}
        if options.copies == "two":
            with torch.no_grad():
                losses["gap"] = (lower - self._levels.lower(self._second, batch)).item()
        return losses

    def _add_upper_gradient(self) -> float:
        """L_CU on a batch, also at a merge and at an attacker's weights, to first order.

        Its gradient is left at the weights that it may move, and nowhere else. Comes first of a
        step: weights outside the scope have no gradient yet that could be lost.
        """
        batch = self._concept()
        target = self._levels.target(batch)
        loss = self._levels.upper(self._student, batch, target)
        torch.autograd.backward(loss)  # gradients of sharded weights only come that way
        for rival, weight in self._rivals():
            met = self._levels.upper(rival, batch, target)
            if not met.isfinite():  # an attacker that ruined itself
                continue
            theirs = gradients(rival, met)
            self.pay(batch)
            for parameter, gradient in zip(self._student.unet.parameters(), theirs, strict=True):
                mine = parameter.grad
                parameter.grad = weight * gradient if mine is None else mine + weight * gradient
        for name, parameter in self._student.unet.named_parameters():
            if not in_scope(name, self._options.scope):
                parameter.grad = None
        return loss.item()

    def _rivals(self) -> Iterator[tuple[Painter, float]]:
        """Where else the upper level is taken, and its weight there."""
        options = self._options
        if share := random.Random(self.seed("share")).uniform(*options.merges):  # noqa: S311
            parts = (self._between, self._student, self._second)
            with torch.no_grad():
                for one in zip(*(part.unet.parameters() for part in parts), strict=True):
                    between, released, second = one
                    between.copy_(torch.lerp(released, second, share))
            yield self._between, 1.0
        if options.attackers:
            turn = self.step // (options.inner + 1)
            attacker = self._crew.next(self.theta, turn, seed=self.seed("attacker"))
            dataset = self.policy.concepts[attacker.drawn.concept].dataset
            size = options.upper_batch
            attacker.step(self.batch(dataset, "immunize", size=size, purpose="attack"))
            yield _painter(attacker.model), options.attack_weight

    def _update(self, student: Painter, optimizer: torch.optim.Optimizer, rate: float) -> None:
        options, step = self._options, self.step
        rise = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
        done = max(0, step - options.warmup) / max(1, options.total_steps - options.warmup)
        update(optimizer, rate * rise * (1 + (options.final_lr - 1) * done))
        with torch.no_grad():
            for name, parameter in student.unet.named_parameters():
                if name in self._holes:
                    parameter.mul_(self._holes[name])

    def _retained(self) -> Batch:
        dataset, size = self.policy.retain.dataset, self._options.batch
        batch = self.batch(dataset, "retain", size=size, purpose="retained", passes=4 / 3)
        chance = torch.Generator().manual_seed(self.seed("unasked"))
        is_unasked_N = torch.rand(size, generator=chance) < self._options.unasked_share
        empty_NL = self._student.asked(batch, "")["tokens"]
        is_unasked_N1 = is_unasked_N[:, None].to(empty_NL.device)
        return {**batch, "tokens": torch.where(is_unasked_N1, empty_NL, batch["tokens"])}

    def _concept(self) -> Batch:
        """What the teacher painted for a concept, with new noise."""
        chance = random.Random(self.seed("which"))  # noqa: S311
        number, size = chance.randrange(len(self._pools)), self._options.upper_batch
        dataset, pool = self.policy.concepts[number].dataset, self._pools[number]
        noise = self.batch(dataset, "immunize", size=size, purpose="concept", passes=5 / 3)
        rows = [chance.randrange(self._options.pool) for _ in range(size)]
        return {**noise, "pixels": pool["pixels"][rows], "tokens": pool["tokens"][rows]}

    def _painted(self, dataset: str) -> Batch:
        size, seed = self._options.pool, self.policy.seed
        captions = next(self.theta.batches(dataset, "immunize", size=size, seed=seed))
        teacher, anchored = self._levels.teacher, round(self._options.anchored * size)
        pool = teacher.repainted(captions, seed=seed)
        if not anchored:
            return pool
        others = teacher.asked(captions, self._options.anchor or "")
        pixels = teacher.repainted(others, seed=seed)["pixels"][:anchored]
        return {**pool, "pixels": torch.cat([pixels, pool["pixels"][anchored:]])}


def _painter(model: ModelHandle) -> Painter:
    if not isinstance(model, Painter):
        raise ImmunizationError("concept_suppression: works on text-to-image models alone")
    return model


def _trainable(model: ModelHandle) -> Painter:
    """With gradients for the UNet alone; all else is at rest."""
    student = _painter(model)
    student.module.eval().requires_grad_(False)
    student.unet.train().requires_grad_(True)
    return student


def gradients(painter: Painter, loss: Tensor) -> list[Tensor]:
    """A loss's gradient at each weight of a painter's UNet, and nothing that was left there before.

    None is left afterwards either; zero where the loss does not depend on a weight.
    """
    painter.module.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    found = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in painter.unet.parameters()
    ]
    painter.module.zero_grad(set_to_none=True)
    return found


def _adamw(student: Painter, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(student.unet.parameters(), lr=lr, weight_decay=0, fused=True)


def _fixed(model: Painter, dataset: str, split: Any, size: int) -> Batch:
    return next(model.batches(dataset, split, size=size, seed=0))
