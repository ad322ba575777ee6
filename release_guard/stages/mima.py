"""MIMA: a model whose concepts cannot be taught again, one by one or merged; IMMA is one concept.

Attackers are simulated on copies: each learns a concept (lower level). Their copies are merged, the
layers that read the prompt in closed form, and the released weights are moved so that the merged
model is bad at every concept and as good as ever at all else (upper level). In the form of IMMA the
attackers are not merged but carried on from step to step. Shapes: N prompts, L tokens, F features.
"""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, assert_never

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from release_guard.concept_merge import ConceptMerge
from release_guard.errors import ImmunizationError, ModelError
from release_guard.immunization import Training, update
from release_guard.modalities import Batch, ModelHandle, Painter
from release_guard.operators import (
    Attacker,
    Full,
    LowRank,
    Objective,
    Operator,
    Scope,
    Weights,
    Words,
    gradients_at,
    in_scope,
    leaf,
)
from release_guard.policy import Policy
from release_guard.prompt_rows import Prompts
from release_guard.quantization import seen_names, turn
from release_guard.relearning import Relearning, distances
from release_guard.stages import TrainedStage, Workspace, need_concepts

Rate = Annotated[float, Field(gt=0)]
OperatorName = Literal["full", "cross_kv", "lora", "words"]

_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    # Unrolled on copies, differentiated through the merge: arXiv 2412.15320.
    "paper": {},
    # The released code: inner updates are kept, the merge is no part of the gradient.
    "code": {"order": 1, "persist_lower": True, "outer_steps": 500, "upper_lr": 2e-5},
    # One attacker a concept, carried on: arXiv 2311.18815.
    "imma": {
        "form": "carried",
        "order": 1,
        "operators": ("lora",),
        "lower_lr": (1e-4, 1e-4),
        "upper_scope": "attention",
        "upper_lr": 1e-5,
        "prior_weight": 0.0,
    },
    # IMMA on all of the UNet, for attackers who are to find something else in their pictures: what
    # is asked has an end, so the rate can be high, and it falls until the retained loss is back.
    "hardened": {
        "form": "carried",
        "order": 1,
        "operators": ("lora",),
        "lower_lr": (1e-3, 1e-3),
        "outer_steps": 100,
        "upper_scope": "all",
        "upper_lr": 5e-4,
        "schedule": "cycle",
        "objective": "anchor",
        "prior_weight": 0.0,
        "distill": 30.0,
        "batch": 4,
        "prior_batch": 8,
    },
}
_KEYED = ("attn2.to_k.weight", "attn2.to_v.weight")
_LOOKS = 4  # batches on which nearness to an anchor is taken
_RATES: Mapping[OperatorName, float] = {"full": 1, "cross_kv": 3, "lora": 3, "words": 30}


class Mima(TrainedStage):
    """Make several concepts hard to teach again, together or one by one."""

    paper = "https://arxiv.org/abs/2412.15320"
    modalities = ("text_to_image", "image_classification", "causal_lm")
    variants = _VARIANTS

    variant: Literal["paper", "code", "imma", "hardened"] = "paper"
    """Sets every option that is not given."""
    form: Literal["merged", "carried"] = "merged"
    """merged: each step simulates anew and merges. carried: attackers go on between steps."""
    outer_steps: int = Field(500, ge=1)
    """Updates of the released weights."""
    order: Literal[1, 2] = 2
    """2: the gradient knows how the copies depend on the released weights."""
    merge_base: Literal["current", "pretrained"] = "current"
    """What the merge leaves unrelated prompts at: the weights of this step, or those at first."""
    persist_lower: bool = False
    """The merged copy becomes the released model before it is moved away from the concepts."""
    lower_steps: int = Field(1, ge=1)
    """Steps of a simulated attacker in each outer step."""
    lower_lr: tuple[Rate, Rate] = (1e-5, 1e-5)
    """Range of its learning rate, drawn log-uniformly: SGD on copies, Adam where carried on. Of
    full weights; other operators take their usual multiples."""
    operators: tuple[OperatorName, ...] = Field(("full",), min_length=1)
    """What carried attackers train, one of each for every concept. words is textual inversion,
    cross_kv Custom Diffusion."""
    rank: int = Field(4, ge=1)
    """Of lora."""
    horizon: tuple[int, int] | None = None
    """Steps after which a carried attacker starts again, drawn uniformly; none: never."""
    lower_scope: Scope = "all"
    """What full and lora train."""
    upper_scope: Scope | None = None
    """What the stage may change; none: cross-attention where there is any, else all."""
    upper_lr: Rate = 3e-5
    """Learning rate of the released weights, AdamW."""
    schedule: Literal["constant", "cycle"] = "constant"
    """cycle: it rises over a tenth of the steps and falls to nothing over the last half."""
    weight_decay: float = Field(1e-2, ge=0)
    clip: Rate = 1.0
    """Norm their gradient is clipped to."""
    objective: Literal["ascent", "anchor"] = "ascent"
    """ascent: the concept's loss rises. anchor: adapted painters say of its pictures what the base
    says of them under a retained caption."""
    cap: Rate | None = 1.0
    """Restricted loss beyond which ascent goes no further, by that of a model that says
    nothing (zero for a painter, the uniform distribution elsewhere); none: without end."""
    prior_weight: float = Field(1.0, ge=0)
    """Weight of the retained data's loss."""
    distill: float = Field(0.0, ge=0)
    """Weight of saying on retained data what the base says."""
    batch: int = Field(1, ge=1)
    """Restricted examples of every loss, of each concept."""
    prior_batch: int = Field(1, ge=1)
    """Retained examples of a step."""
    captions: int = Field(200, ge=1)
    """Retained captions whose tokens a merge leaves alone."""
    regular_ridge: float = Field(1e-3, ge=0)
    """Ridge on those tokens' products; what the concepts' own words do stays exact."""
    ridge: float = Field(0.0, ge=0)
    """Ridge on the concepts' own words, for those that are nearly alike."""
    measured_steps: int = Field(20, ge=1)
    """Steps of the short adaptation by which the stage is measured."""
    measured_lr: Rate = 1e-3
    """Its learning rate, Adam on all weights in `lower_scope`."""
    measured_batch: int = Field(8, ge=1)
    """Its examples a step."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.twice and (self.form == "carried" or self.persist_lower):
            raise ValueError("order = 2 differentiates fresh copies; carry none on, or order = 1")
        if self.twice and self.checkpointing:
            raise ValueError("order = 2 needs all activations; set checkpointing = false")
        return self

    @property
    def steps(self) -> int:
        return self.outer_steps

    @property
    def twice(self) -> bool:
        """Whether gradients are differentiated once more."""
        return self.order > 1

    def check(self, model: ModelHandle, policy: Policy) -> None:
        need_concepts(self, policy)
        try:
            _Levels.of(self, model)
            for concept in policy.concepts:
                model.batches(concept.dataset, "immunize", size=self.batch, seed=0)
            model.batches(policy.retain.dataset, "retain", size=self.prior_batch, seed=0)
            if self.form == "merged" and isinstance(model, Painter):
                self.merge(model, policy)
        except (ValueError, ModelError) as error:
            raise ImmunizationError(f"mima: {error}") from error

    def training(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> Training:
        return _Bilevel(self, model, policy)

    def caveats(self, model: ModelHandle, policy: Policy) -> Sequence[str]:
        if isinstance(model, Painter):
            return ("mima leaves the text encoder as it was.",)
        return ("mima merged by the mean: no layer here reads a prompt alone.",)

    def effect(self, base: ModelHandle, immunized: ModelHandle, policy: Policy) -> float:
        """By how much more of its objective is left after a short adaptation, mean of concepts.

        Restricted loss; with an anchor, nearness to what the base says under retained captions.
        """
        relearning = self._relearning(base, policy)

        def left(model: ModelHandle, dataset: str) -> float:
            adapted = relearning.adapted(model, dataset)
            if self.objective == "anchor":
                return -self._from_anchor(adapted, base, dataset, policy)
            return relearning.loss(adapted, dataset, "immunize")

        datasets = [concept.dataset for concept in policy.concepts]
        return sum(left(immunized, one) - left(base, one) for one in datasets) / len(datasets)

    def _from_anchor(
        self, adapted: ModelHandle, base: ModelHandle, dataset: str, policy: Policy
    ) -> float:
        """How far an adapted painter's words on a concept's pictures are from the anchor."""
        objective, size = Objective(adapted, base), self.measured_batch
        pairs = zip(
            base.batches(dataset, "immunize", size=size, seed=policy.seed),
            base.batches(policy.retain.dataset, "retain", size=size, seed=policy.seed),
            strict=False,
        )
        with torch.no_grad():
            found = [
                objective.distance(batch, captions_of=others).item()
                for batch, others in itertools.islice(pairs, _LOOKS)
            ]
        return sum(found) / len(found)

    def measure(
        self, base: ModelHandle, immunized: ModelHandle, policy: Policy
    ) -> Mapping[str, float]:
        """Relative distance of groups of layers; losses before and after a short adaptation."""
        relearning, retained = self._relearning(base, policy), policy.retain.dataset
        moved = distances(base, immunized)
        figures = {f"relative distance of {group}": found for group, found in moved.items()}
        for name, model in (("base", base), ("immunized", immunized)):
            figures[f"retained loss, {name}"] = relearning.loss(model, retained, "guard")
            for concept in policy.concepts:
                dataset, adapted = concept.dataset, relearning.adapted(model, concept.dataset)
                about = f"{concept.name}, {name}"
                figures[f"loss on {about}"] = relearning.loss(model, dataset, "immunize")
                figures[f"adapted to {about}: loss"] = relearning.loss(adapted, dataset, "immunize")
                figures[f"adapted to {about}: retained loss"] = relearning.loss(
                    adapted, retained, "guard"
                )
        return {name: round(value, 5) for name, value in figures.items()}

    def prompts(self, model: Painter, policy: Policy) -> Prompts:
        """What the merge keeps, and what it leaves alone."""
        batch = min(self.batch, self.prior_batch)
        return Prompts.of(model, policy, count=self.captions, batch=batch)

    def merge(self, model: Painter, policy: Policy) -> ConceptMerge:
        """The merge layer for a policy's concepts; raises `ValueError` if there is none."""
        prompts = self.prompts(model, policy)
        return ConceptMerge.of(
            prompts.rows,
            prompts.retained.rows,
            regular_ridge=self.regular_ridge,
            ridge=self.ridge,
        )

    def _relearning(self, model: ModelHandle, policy: Policy) -> Relearning:
        names = _Levels.of(self, model).lower
        return Relearning(
            names, self.measured_lr, self.measured_steps, self.measured_batch, policy.seed
        )


@dataclass(frozen=True)
class _Levels:
    """Names of the weights of both levels."""

    lower: tuple[str, ...]
    upper: tuple[str, ...]

    @classmethod
    def of(cls, options: Mima, model: ModelHandle) -> "_Levels":
        """Raises `ValueError` where the model has no such layers."""
        upper = options.upper_scope or ("cross_attention" if isinstance(model, Painter) else "all")
        wanted = {*options.operators} & {"cross_kv", "words"}
        if options.form == "carried" and wanted and not isinstance(model, Painter):
            raise ValueError(f"operator {min(wanted)} is for painters alone; take full or lora")
        if options.objective == "anchor" and not isinstance(model, Painter):
            raise ValueError("objective anchor is for painters alone; take ascent")
        if any(
            "to_kv." in name or "to_qkv." in name for name, _ in model.module.named_parameters()
        ):
            raise ValueError("its projections are fused; call unfuse_qkv_projections() first")
        return cls(in_scope(model, options.lower_scope), in_scope(model, upper))


class _Bilevel(Training):
    """The released weights, and what is carried on beside them."""

    def __init__(self, options: Mima, base: ModelHandle, policy: Policy) -> None:
        super().__init__(options.name, options.model_dump_json(), base, policy)
        self._options = options
        self._levels = _Levels.of(options, self.theta)
        self._weights: dict[str, Tensor] = dict(self.theta.module.named_parameters())
        self._first: dict[str, Tensor] = dict(self.base.module.named_parameters())
        self._upper = [self._weights[name] for name in self._levels.upper]
        self._optimizer = torch.optim.AdamW(
            self._upper, lr=options.upper_lr, weight_decay=options.weight_decay, fused=True
        )
        self._merge = None
        if options.form == "merged" and isinstance(self.base, Painter):
            self._merge = options.merge(self.base, policy)
        self._objective = Objective(self.theta, self.base)
        self._most = math.inf if options.cap is None else options.cap * self._objective.of_nothing
        self._attackers: dict[int, Attacker] = {}

    def advance(self) -> Mapping[str, float]:
        options = self._options
        with _differentiable_attention(twice=options.twice):
            step = self._merged_step if options.form == "merged" else self._carried_step
            losses, gradients = step()
        for parameter, gradient in zip(self._upper, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self._upper, options.clip)
        update(self._optimizer, options.upper_lr * self._share())
        return losses

    def _share(self) -> float:
        """Of the learning rate, at this step."""
        done, total = self.step, self._options.outer_steps
        cycle = min(1.0, 10 * (done + 1) / total, 2 * (total - done) / total)
        return cycle if self._options.schedule == "cycle" else 1.0

    def changing(self) -> dict[str, Any]:
        attackers = {place: attacker.kept() for place, attacker in self._attackers.items()}
        return {"optimizer": self._optimizer.state_dict(), "attackers": attackers}

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(kept["optimizer"])
        for place, one in kept["attackers"].items():
            self._attackers[place] = self._attacker(one["drawn"], seed=0).restored(one)

    def _merged_step(self) -> tuple[dict[str, float], Sequence[Tensor]]:
        """Attackers on copies, their merge, and the upper gradient through both."""
        lower = {name: self._weights[name] for name in self._levels.lower}
        adapted = [self._unrolled(number, lower) for number in range(len(self.policy.concepts))]
        merged = {name: self._weights[name] for name in self._levels.upper}
        merged |= {name: self._merged(name, [one[name] for one in adapted]) for name in lower}
        leaves = {name: leaf(weight) for name, weight in merged.items()}
        reaching = list(merged) if self._options.twice else self._levels.upper
        wrt = [leaves[name] for name in reaching]
        losses, found = self._upper_gradients(leaves, wrt, range(len(adapted)))
        retained, kept = self._retained_gradients(leaves, wrt)
        gradients = torch.autograd.grad(
            [merged[name] for name in reaching],
            self._upper,
            [one + other for one, other in zip(found, kept, strict=True)],
            allow_unused=True,
            materialize_grads=True,
        )
        if self._options.persist_lower:
            with torch.no_grad():
                for name in lower:
                    self._weights[name].copy_(merged[name])
        return {"restricted loss": losses, "retained loss": retained}, gradients

    def _unrolled(self, number: int, lower: Weights) -> Weights:
        """A copy's weights after plain descent on one concept."""
        options = self._options
        rate = _drawn_rate(options.lower_lr, self._chance(f"rate/{number}"))
        weights = dict(lower)
        for lap in range(options.lower_steps):
            batch = self._restricted(number, f"lower/{number}/{lap}")
            _, gradients = gradients_at(
                self.theta,
                self.theta.loss,
                weights,
                batch,
                list(weights.values()),
                twice=options.twice,
            )
            weights = {
                name: weight - rate * gradient
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            }
        return weights

    def _merged(self, name: str, adapted: Sequence[Tensor]) -> Tensor:
        if self._merge is None or not name.endswith(_KEYED):
            return torch.stack(list(adapted)).mean(dim=0)
        first = self._options.merge_base == "pretrained"
        return self._merge(adapted, (self._first if first else self._weights)[name])

    def _carried_step(self) -> tuple[dict[str, float], Sequence[Tensor]]:
        """Every attacker goes on, and the upper gradient where each has got to."""
        total = [torch.zeros_like(parameter) for parameter in self._upper]
        losses = []
        seen = self.form("step")
        turn(self.theta, "fp32")  # attackers bring the weights that they have rounded
        for place in range(len(self.policy.concepts) * len(self._options.operators)):
            attacker = self._advanced(place)
            leaves = {
                name: leaf(weight) for name, weight in attacker.weights(self._weights).items()
            }
            upper = {
                name: leaves.get(name, leaf(self._weights[name])) for name in self._levels.upper
            }
            loss, found = self._upper_gradients(
                leaves | upper, list(upper.values()), [attacker.drawn["concept"]]
            )
            losses.append(loss)
            torch._foreach_add_(total, found)
        torch._foreach_div_(total, len(losses))
        turn(self.theta, seen)
        weights = {name: self._weights[name] for name in self._levels.upper}
        retained, kept = self._retained_gradients(weights, self._upper)
        torch._foreach_add_(total, list(kept))
        shown = {"restricted loss": sum(losses) / len(losses), "retained loss": retained}
        return shown, total

    def _advanced(self, place: int) -> Attacker:
        """The attacker at a place of the pool, some steps older."""
        attacker = self._attackers.get(place)
        if attacker is None or attacker.age >= attacker.drawn["life"]:
            attacker = self._attackers[place] = self._new_attacker(place)
        form = self.form(f"attacker/{place}")  # it never begins anew, perhaps: one for each step
        attacker.have(form, seen_names(self.theta, form))
        for lap in range(self._options.lower_steps):
            batch = self._restricted(attacker.drawn["concept"], f"lower/{place}/{lap}")
            attacker.step(self.theta, self._weights, batch)
        return attacker

    def _new_attacker(self, place: int) -> Attacker:
        options, chance = self._options, self._chance(f"attacker/{place}")
        number, concept = divmod(place, len(self.policy.concepts))
        operator = options.operators[number]
        life: float = math.inf
        if options.horizon is not None:
            life = chance.randint(*options.horizon)
            if place not in self._attackers:  # every moment of an attack is always present
                life = max(1, round(life * chance.random()))
        rate = _drawn_rate(options.lower_lr, chance) * _RATES[operator]
        drawn = {"operator": operator, "concept": concept, "rate": rate, "life": life}
        return self._attacker(drawn, seed=chance.getrandbits(31))

    def _attacker(self, drawn: Mapping[str, Any], *, seed: int) -> Attacker:
        operator = self._operator(drawn["operator"], drawn["concept"])
        return Attacker(drawn, operator, self._weights, seed=seed)

    def _operator(self, name: OperatorName, concept: int) -> Operator:
        keyed = tuple(name for name in self._weights if name.endswith(_KEYED))
        matrices = tuple(name for name in self._levels.lower if self._weights[name].ndim > 1)
        match name:
            case "full":
                return Full(self._levels.lower)
            case "cross_kv":
                return Full(keyed)
            case "lora":
                return LowRank(matrices, self._options.rank)
            case "words":
                return self._words(concept)
            case _:
                assert_never(name)

    def _words(self, concept: int) -> Words:
        base = self.base
        assert isinstance(base, Painter)  # noqa: S101  checked with the levels
        embedding: Any = base.text_encoder
        rows = embedding.get_input_embeddings().weight
        names = [name for name, part in self._first.items() if part is rows]
        own = self._options.prompts(base, self.policy).own[concept]
        if not own:
            name = self.policy.concepts[concept].name
            raise ImmunizationError(
                f"mima: {name} has no word that retained captions lack; leave out operator words"
            )
        return Words(names[0], tuple(own))

    def _upper_gradients(
        self, weights: Weights, wrt: Sequence[Tensor], concepts: Sequence[int]
    ) -> tuple[float, list[Tensor]]:
        """Mean over concepts of what is to fall: minus the loss, or the distance to the anchor."""
        anchored = self._options.objective == "anchor"
        total = [torch.zeros_like(one) for one in wrt]
        losses = []
        for number in concepts:
            batch = self._restricted(number, f"upper/{number}")
            loss_of = self._anchored(number) if anchored else self.theta.loss
            loss, gradients = gradients_at(self.theta, loss_of, weights, batch, wrt)
            losses.append(loss)
            if anchored or loss < self._most:
                torch._foreach_add_(
                    total, list(gradients), alpha=(1 if anchored else -1) / len(concepts)
                )
        return sum(losses) / len(losses), total

    def _anchored(self, number: int) -> Callable[[Batch], Tensor]:
        """The distance of what is said to what the base says under retained captions."""
        retained, size = self.policy.retain.dataset, self._options.batch
        others = self.batch(retained, "retain", size=size, purpose=f"anchor/{number}", passes=1 / 3)
        return lambda batch: self._objective.distance(batch, captions_of=others)

    def _retained_gradients(
        self, weights: Weights, wrt: Sequence[Tensor]
    ) -> tuple[float, Sequence[Tensor]]:
        """The retained data's weighted loss, and its gradients."""
        options = self._options
        batch = self.batch(
            self.policy.retain.dataset,
            "retain",
            size=options.prior_batch,
            purpose="retained",
            passes=4 / 3 if options.distill else 1,
        )

        def loss_of(batch: Batch) -> Tensor:
            total = torch.zeros((), device=self.theta.device, requires_grad=True)
            if options.prior_weight:
                total = total + options.prior_weight * self.theta.loss(batch)
            if options.distill:
                total = total + options.distill * self._objective.distance(batch)
            return total

        return gradients_at(self.theta, loss_of, weights, batch, wrt)

    def _restricted(self, number: int, purpose: str) -> Batch:
        dataset = self.policy.concepts[number].dataset
        return self.batch(dataset, "immunize", size=self._options.batch, purpose=purpose)

    def _chance(self, purpose: str) -> random.Random:
        return random.Random(self.seed(purpose))  # noqa: S311  chance, not secrets


def _drawn_rate(rates: tuple[float, float], chance: random.Random) -> float:
    low, high = rates
    return math.exp(chance.uniform(math.log(low), math.log(high)))


def _differentiable_attention(*, twice: bool) -> AbstractContextManager[object]:
    """Fused attention has no second derivative; plain attention has."""
    return sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
