"""Bilevel concept suppression: a pruned painter learns from its teacher all but the concepts.

Distilling a pruned model teaches it anew what its data leave out, and suppressing that afterwards
costs what distillation gave; so both levels are descended together. Shapes: N pictures.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from release_guard import pruning
from release_guard.errors import ImmunizationError
from release_guard.immunization import Training, update
from release_guard.modalities import Batch, Modality, ModelHandle, Painter, evaluating
from release_guard.policy import Policy
from release_guard.stages import TrainedStage, Workspace

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
}


class ConceptSuppression(TrainedStage):
    """Distil a teacher into a pruned text-to-image model and leave the concepts out."""

    paper = "https://arxiv.org/abs/2412.15341"
    modalities = ("text_to_image",)

    variant: Literal["paper", "code", "joint"] = "joint"
    """Sets every option that is not given."""
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
    upper_batch: int = Field(16, ge=1)
    """Concept pictures of an upper step."""
    pool: int = Field(64, ge=1)
    """Pictures of each concept that the teacher paints for them, for captions of its data."""
    eta: float = Field(1.0, ge=0)
    """How far beyond no prompt at all, away from the concept, the target lies."""
    anchor: str | None = None
    """Prompt whose prediction the concept's is to become, instead of that target."""
    scope: Literal["all", "cross_attention", "others"] = "all"
    """Which weights the upper level moves."""
    kd_weights: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (2.0, 0.1)
    """Of the distance to the teacher's output and of that to its blocks' outputs."""
    snr_gamma: float = Field(5.0, gt=0)
    """Largest signal-to-noise ratio that counts in the denoising loss."""
    probed: int = Field(64, ge=1)
    """Examples scored at a look, at most; with a judge each of them is painted."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_variant(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return {**_VARIANTS.get(values.get("variant", "joint"), {}), **values}
        return values

    @property
    def steps(self) -> int:
        return self.total_steps

    def check(self, model: ModelHandle, policy: Policy) -> None:
        if not policy.concepts:
            raise ImmunizationError(
                "concept_suppression: the policy names no concept; add one, or leave it out"
            )
        student, teacher = _painter(model), self._teacher(model, policy)
        if student.unet.config.block_out_channels != teacher.unet.config.block_out_channels:
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
        return _Bilevel(self, _painter(model), self._teacher(model, policy), policy)

    def measure(
        self, base: ModelHandle, immunized: ModelHandle, policy: Policy
    ) -> Mapping[str, float]:
        """Both levels' losses and the pull of each concept, before and after; the UNets' sizes."""
        teacher = self._teacher(base, policy)
        figures = {
            "MACs of the UNet, million": pruning.macs(_painter(immunized).unet) / 1e6,
            "MACs of the teacher's UNet, million": pruning.macs(teacher.unet) / 1e6,
        }
        for name, handle in (("base", base), ("immunized", immunized)):
            student = _painter(handle)
            retained = _fixed(student, policy.retain.dataset, "guard", self.upper_batch)
            with evaluating(student.module), evaluating(teacher.module):
                lower = self.lower_loss(student, teacher, retained)
                apart = _mean_square(student.predicted(retained) - teacher.predicted(retained))
                figures[f"lower loss on retained pictures, {name}"] = float(lower)
                figures[f"distance to the teacher on retained pictures, {name}"] = float(apart)
            for concept in policy.concepts:
                batch = _fixed(student, concept.dataset, "immunize", self.upper_batch)
                with evaluating(student.module):
                    upper = self.upper_loss(student, teacher, batch)
                    figures[f"upper loss on {concept.name}, {name}"] = float(upper)
                    pull = self._pull(student, teacher, batch)
                    figures[f"pull of {concept.name}, {name}"] = float(pull)
        return {name: round(value, 4) for name, value in figures.items()}

    def effect(self, base: ModelHandle, immunized: ModelHandle, policy: Policy) -> float:
        """By how much the concepts' pull fell."""
        teacher, falls = self._teacher(base, policy), []
        for concept in policy.concepts:
            pulls = []
            for handle in (base, immunized):
                student = _painter(handle)
                batch = _fixed(student, concept.dataset, "immunize", self.upper_batch)
                with evaluating(student.module):
                    pulls.append(float(self._pull(student, teacher, batch)))
            falls.append(pulls[0] - pulls[1])
        return sum(falls) / len(falls)

    def caveats(self, model: ModelHandle, policy: Policy) -> Sequence[str]:
        yardstick = (
            "concept_suppression compares its use with the pruned model as it was given, not with "
            "what distillation alone would have made of it"
        )
        return (yardstick,) if self.teacher else ()

    def lower_loss(self, student: Painter, teacher: Painter, batch: Batch) -> Tensor:
        """Denoising and distillation: L_diff + a L_out + b L_feat."""
        with _block_outputs(student.unet) as mine:
            found = student.predicted(batch)
        with torch.no_grad(), _block_outputs(teacher.unet) as theirs:
            taught = teacher.predicted(batch)
        weights_N = student.min_snr(batch, gamma=self.snr_gamma)
        errors_N = (found - student.wanted(batch)).square().flatten(1).mean(dim=1)
        output, features = self.kd_weights
        apart = [_mean_square(one - other) for one, other in zip(mine, theirs, strict=True)]
        return (
            (weights_N * errors_N).mean()
            + output * _mean_square(found - taught)
            + features * torch.stack(apart).mean()
        )

    def upper_loss(self, student: Painter, teacher: Painter, batch: Batch) -> Tensor:
        """Distance of the prediction for the concept to the target that the teacher gives."""
        with torch.no_grad():
            if self.anchor is not None:
                target = teacher.predicted(teacher.asked(batch, self.anchor))
            else:
                without = teacher.predicted(teacher.asked(batch, ""))
                target = away(without, teacher.predicted(batch), eta=self.eta)
        return _mean_square(student.predicted(batch) - target)

    def _pull(self, student: Painter, teacher: Painter, batch: Batch) -> Tensor:
        with torch.no_grad():
            without = teacher.predicted(teacher.asked(batch, self.anchor or ""))
            return pull(student.predicted(batch), without, teacher.predicted(batch))

    def _teacher(self, model: ModelHandle, policy: Policy) -> Painter:
        """In evaluation mode, without gradients."""
        teacher = model.copy()
        if self.teacher:
            source = policy.located(self.teacher)
            teacher = Modality.build(policy.modality).load(source)
        teacher.module.to(model.device).eval().requires_grad_(False)
        return _painter(teacher)


def away(without: Tensor, with_concept: Tensor, *, eta: float) -> Tensor:
    """ESD's target e_0 - eta (e_c - e_0): arXiv 2303.07345, equation 7, there of the model itself.

    Args:
        without: Prediction e_0 under no prompt.
        with_concept: Prediction e_c under the concept's, of the same shape.
        eta: 0: as if nothing had been asked for; more: away from the concept.
    """
    return without - eta * (with_concept - without)


def pull(found: Tensor, without: Tensor, with_concept: Tensor) -> Tensor:
    """How far a prediction goes from `without` (0) towards `with_concept` (1); ESD's target: -eta.

    What a damaged model predicts beside that line does not count.
    """
    concept = with_concept - without
    return ((found - without) * concept).sum() / concept.square().sum()


class _Bilevel(Training):
    """The released weights, perhaps a copy that only learns, and a teacher that stays."""

    def __init__(
        self, options: ConceptSuppression, base: Painter, teacher: Painter, policy: Policy
    ) -> None:
        super().__init__(options.name, options.model_dump_json(), base, policy)
        self._options = options
        self._teacher = teacher
        self._student = _trainable(self.theta)
        self._parameters = list(self._student.unet.parameters())
        self._upper_parameters = _scope(self._student.unet, options.scope)
        self._lower = torch.optim.AdamW(self._parameters, lr=options.lr, weight_decay=0, fused=True)
        self._upper = torch.optim.AdamW(
            self._upper_parameters, lr=options.upper_lr, weight_decay=0, fused=True
        )
        self._second = _trainable(self.theta.copy())
        self._second_lower = torch.optim.AdamW(
            self._second.unet.parameters(), lr=options.lr, weight_decay=0, fused=True
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
        kept: dict[str, Any] = {
            "lower": self._lower.state_dict(),
            "upper": self._upper.state_dict(),
        }
        if self._options.copies == "two":
            kept["second"] = self._second.state()
            kept["second lower"] = self._second_lower.state_dict()
        return kept

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._lower.load_state_dict(kept["lower"])
        self._upper.load_state_dict(kept["upper"])
        if self._options.copies == "two":
            self._second.load_state(kept["second"])
            self._second_lower.load_state_dict(kept["second lower"])

    def _lower_step(self, student: Painter, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        loss = self._options.lower_loss(student, self._teacher, self._retained())
        torch.autograd.backward(loss)
        self._update(student, optimizer, self._options.lr)
        return {"lower loss": loss.item()}

    def _upper_step(self) -> dict[str, float]:
        loss = self._options.upper_loss(self._student, self._teacher, self._concept())
        _add_gradient(loss, self._upper_parameters)
        self._update(self._student, self._upper, self._options.upper_lr)
        return {"upper loss": loss.item()}

    def _step_on_both(self) -> dict[str, float]:
        """One step on L_CU + weight (L_ft - what the second copy has): the penalty's outer step."""
        options, batch = self._options, self._retained()
        lower = options.lower_loss(self._student, self._teacher, batch)
        torch.autograd.backward(options.weight * lower)
        upper = options.upper_loss(self._student, self._teacher, self._concept())
        _add_gradient(upper, self._upper_parameters)
        self._update(self._student, self._lower, options.lr)
        losses = {"upper loss": upper.item(), "lower loss": lower.item()}
        if options.copies == "two":
            with torch.no_grad():
                second = options.lower_loss(self._second, self._teacher, batch)
            losses["gap"] = (lower - second).item()
        return losses

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
        return self.batch(dataset, "retain", size=size, purpose="retained", passes=4 / 3)

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
        return self._teacher.repainted(captions, seed=seed)


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


def _scope(unet: nn.Module, scope: str) -> list[nn.Parameter]:
    """All of a UNet's weights, those of its cross-attentions, or the others."""
    return [
        parameter
        for name, parameter in unet.named_parameters()
        if scope == "all" or (".attn2." in name) == (scope == "cross_attention")
    ]


def _add_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@contextmanager
def _block_outputs(unet: Any) -> Iterator[list[Tensor]]:
    """What the down, mid and up blocks give while inside, in the order in which they work."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _fixed(model: Painter, dataset: str, split: Any, size: int) -> Batch:
    return next(model.batches(dataset, split, size=size, seed=0))


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().mean()
