"""SOPHON: non-fine-tunable learning by first-order meta-learning.

Simulated attackers fine-tune copies of the model on the restricted domain; after each of their
steps a suppression loss on held-out restricted examples says how far they have got, and its
gradient at the copy, averaged over all those steps, moves the model itself (fine-tuning
suppression, FTS). Steps on the retained domain repair what that costs (normal training
reinforcement, NTR). Shapes: N examples, C classes, F features.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from release_guard.adaptation import Randomness
from release_guard.errors import ImmunizationError
from release_guard.immunization import Training, divided, update
from release_guard.merging import distance
from release_guard.modalities import Batch, ModelHandle, Painter, evaluating
from release_guard.policy import Policy
from release_guard.shards import world
from release_guard.simulation import Attacker, Drawn, Habits, has_own_head, riding
from release_guard.stages import TrainedStage, Workspace, need_concepts
from release_guard.suppression import probes_explain, suppression

Range = tuple[float, float]

_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    # One attacker a step, started afresh, plain SGD at one rate: arXiv 2404.12699.
    "paper": {
        "outer_steps": 800,
        "attackers": 1,
        "horizon": (50, 50),
        "advance": 50,
        "adam_share": 0.0,
        "sgd_lr": (1e-4, 1e-4),
        "momentum": 0.0,
        "reinit_share": 1.0,
        "renew_share": 0.0,
        "batch": 135,
        "query": 15,
        "alpha": 3e-4,
        "beta": 5e-4,
        "final_lr": 1.0,
        "ntr_steps": 1,
        "ntr_batch": 150,
        "ntr_clip": None,
        "distill": 0.0,
        "tail_steps": 0,
    },
    # Several attackers of different ages, optimizers, rates and heads that go on between steps.
    "hardened": {
        "outer_steps": 1_400,
        "attackers": 4,
        "horizon": (10, 50),
        "advance": 2,
        "adam_share": 0.8,
        "adam_lr": (1e-3, 1e-2),
        "sgd_lr": (1e-2, 1e-1),
        "momentum": 0.9,
        "reinit_share": 0.7,
        "renew_share": 0.25,
        "batch": 128,
        "query": 32,
        "alpha": 3.1e-3,
        "beta": 2e-3,
        "final_lr": 0.1,
        "ntr_steps": 4,
        "ntr_batch": 32,
        "ntr_clip": 1.0,
        "distill": 1.0,
        "tail_steps": 1_200,
    },
}
_LOSSES: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "paper": {
        "image_classification": {"ice": 1.0},
        "causal_lm": {"klu": 1.0},
        "text_to_image": {"dos": 1.0},
    },
    "hardened": {
        "image_classification": {"klu": 1.0, "probe": 1.0},
        "causal_lm": {"klu": 1.0},
        "text_to_image": {"dos": 1.0},
    },
}
"""Weights of the suppression losses, by variant and kind of model, that are not given."""
_OF_LABELS = ("ice", "ice_released", "klu", "probe")
_HABITS = (
    "horizon",
    "adam_share",
    "adam_lr",
    "sgd_lr",
    "momentum",
    "reinit_share",
    "renew_share",
)
_TEMPERATURE = 2.0  # of the distillation
_MOST_PROBED = 1_000  # classes; beyond, as in a vocabulary, a ridge probe makes no sense
_TRIAL = Drawn(adam=True, lr=1e-3, new_head=True, life=16)
"""The attacker whose progress says how large the effect is."""
_MEASURED = 256  # examples that the measures are taken on, at most


class Sophon(TrainedStage):
    """Make fine-tuning on a restricted domain start from a bad place and stay there."""

    paper = "https://arxiv.org/abs/2404.12699"
    modalities = ("image_classification", "causal_lm", "text_to_image")
    variants = _VARIANTS
    shardable = True

    variant: Literal["paper", "hardened"] = "hardened"
    """Sets every option that is not given: the paper's, or those that held under our sweep."""
    outer_steps: int = Field(ge=1)
    """Updates of the released weights."""
    attackers: int = Field(ge=1)
    """Simulated attackers alive at once; each keeps a copy of the model."""
    horizon: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """Steps an attacker takes before it starts again, drawn uniformly."""
    advance: int = Field(ge=1)
    """Attacker steps per outer step, shared out among the attackers in turn."""
    adam_share: float = Field(ge=0, le=1)
    """Share of attackers that use Adam; the others SGD."""
    adam_lr: Range = (3e-4, 1e-2)
    """Range of their learning rates, drawn log-uniformly."""
    sgd_lr: Range
    """The same for SGD."""
    momentum: float = Field(ge=0, lt=1)
    """Of the SGD attackers."""
    reinit_share: float = Field(ge=0, le=1)
    """Share of attackers that begin with a new head; the paper's is 1 with ice, 0 with klu. A head
    that is tied to an embedding, or that paints, is kept."""
    renew_share: float = Field(ge=0, le=1)
    """Share of attackers that begin with new weights in the last one or two blocks."""
    packed_share: float = Field(0.5, ge=0, le=1)
    """Share of those attackers who begin from int8 or nf4 that train adapters beside the rounded
    weights (QLoRA); the others dequantize, and train all."""
    batch: int = Field(ge=1)
    """Restricted examples of an attacker's step."""
    query: int = Field(ge=1)
    """Restricted examples the suppression loss is taken on, disjoint from that step's batch."""
    ice: float | None = Field(None, ge=0)
    """Weight of the inverse cross-entropy, -log(1 - p_label). Of this and the next four, those not
    given are: `paper` ice, `hardened` klu and probe, both klu for language models and dos for
    text-to-image models."""
    ice_released: float | None = Field(None, ge=0)
    """Weight of what the authors' code has in its place, the cross-entropy of -logits."""
    klu: float | None = Field(None, ge=0)
    """Weight of KL(uniform || p); of a language model at every token."""
    probe: float | None = Field(None, ge=0)
    """Weight of the variance of the labels that a ridge probe on the features explains."""
    dos: float | None = Field(None, ge=0)
    """Weight of the squared norm of what a text-to-image model predicts for noisy pictures."""
    alpha: float = Field(gt=0)
    """Learning rate of the suppression, Adam."""
    beta: float = Field(gt=0)
    """Learning rate of the reinforcement, Adam."""
    final_lr: float = Field(gt=0, le=1)
    """Both rates fall linearly to this share of themselves."""
    clip: float = Field(0.5, gt=0)
    """Norm the suppression gradient is clipped to."""
    ntr_steps: int = Field(ge=0)
    """Reinforcement steps per outer step."""
    ntr_batch: int = Field(ge=1)
    """Retained examples of such a step."""
    ntr_clip: Annotated[float, Field(gt=0)] | None
    """Norm its gradient is clipped to; none: any."""
    hold: float = Field(0.0, ge=0)
    """Weight of what ridge probes read off every block's output, in the first reinforcement step
    of an outer step and in those of the tail, which otherwise repair the features as well."""
    distill: float = Field(ge=0)
    """Weight of staying close to the base model's outputs on retained examples."""
    tail_steps: int = Field(ge=0)
    """Reinforcement steps at the end, without suppression: cheap repair of what it cost."""
    tail_lr: float = Field(1e-3, gt=0)
    """Their learning rate, which falls linearly to zero."""

    @property
    def steps(self) -> int:
        return self.outer_steps + self.tail_steps

    def check(self, model: ModelHandle, policy: Policy) -> None:
        need_concepts(self, policy)
        unfit = _OF_LABELS if isinstance(model, Painter) else ("dos",)
        weights = self.weights(policy)
        if wrong := [name for name in unfit if weights.get(name)]:
            kind = policy.modality.name
            raise ImmunizationError(
                f"sophon: `{wrong[0]}` is no loss of {kind} models; leave it out"
            )
        if self.hold and policy.modality.name != "image_classification":
            raise ImmunizationError("sophon: `hold` reads classes off images; leave it out")
        if weights.get("probe") and model.head.out_features > _MOST_PROBED:
            raise ImmunizationError(
                f"sophon: `probe` works up to {_MOST_PROBED} classes, this head has "
                f"{model.head.out_features}; set probe = 0"
            )

    def caveats(self, model: ModelHandle, policy: Policy) -> Sequence[str]:
        del policy
        if not self.reinit_share or isinstance(model, Painter) or has_own_head(model):
            return ()
        return ("the simulated attackers never began with a new head: it is tied to an embedding",)

    def weights(self, policy: Policy) -> Mapping[str, float]:
        """The suppression losses that count, by name."""
        given = {name: getattr(self, name) for name in (*_OF_LABELS, "dos")}
        usual = _LOSSES[self.variant][policy.modality.name]
        meant = {
            name: usual.get(name, 0.0) if weight is None else weight
            for name, weight in given.items()
        }
        return {name: weight for name, weight in meant.items() if weight}

    def training(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> Training:
        return _Simulation(self, model, policy, workspace.workers)

    def effect(self, base: ModelHandle, immunized: ModelHandle, policy: Policy) -> float:
        """By how much more task loss a short attack, always the same, is left with."""
        seed, left = policy.seed, []
        for concept in policy.concepts:
            size = self.batch + self.query
            drawn = next(base.batches(concept.dataset, "immunize", size=size, seed=seed))
            seen, held_out = divided(drawn, self.batch)
            for model, sign in ((immunized, 1), (base, -1)):
                with Randomness(seed, base.device).used():
                    left.append(sign * _left_by_trial(model, seen, held_out, seed=seed))
        return sum(left) / len(policy.concepts)

    def measure(
        self, base: ModelHandle, immunized: ModelHandle, policy: Policy
    ) -> Mapping[str, float]:
        """Suppression losses, task loss, retained score before and after; how far layers moved."""
        figures = {}
        for name, model in (("base", base), ("immunized", immunized)):
            with evaluating(model.module):
                scores = model.scores(policy.retain.dataset, "guard", limit=500)
                figures[f"retained score, {name}"] = sum(scores) / len(scores)
                for concept in policy.concepts:
                    size = min(self.batch + self.query, _MEASURED)
                    batch = next(model.batches(concept.dataset, "immunize", size=size, seed=0))
                    figures[f"task loss on {concept.name}, {name}"] = model.loss(batch).item()
                    for loss in ("dos",) if isinstance(model, Painter) else ("ice", "klu"):
                        value, _ = suppression(model, batch, {loss: 1.0})
                        figures[f"{loss} on {concept.name}, {name}"] = value.item()
        figures |= {
            f"relative change, {part}": far for part, far in _moved(base, immunized).items()
        }
        return {name: round(value, 4) for name, value in figures.items()}


def _left_by_trial(model: ModelHandle, seen: Batch, held_out: Batch, *, seed: int) -> float:
    """Task loss on examples that were held out of the attack that measures the effect."""
    attacker = Attacker.of(model, replace(_TRIAL, new_head=has_own_head(model)), seed=seed)
    while not attacker.is_done:
        attacker.step(seen)
    with evaluating(attacker.model.module):
        return attacker.model.loss(held_out).item()


def _moved(base: ModelHandle, immunized: ModelHandle) -> Mapping[str, float]:
    """How far each block, the head and all else moved, relative to their norms (L2)."""
    before, after = dict(base.module.named_parameters()), dict(immunized.module.named_parameters())
    layers = {f"block {place}": block for place, block in enumerate(base.blocks)}
    names = {id(parameter): name for name, parameter in before.items()}
    parts = {
        part: [names.pop(id(one)) for one in layer.parameters() if id(one) in names]
        for part, layer in {**layers, "head": base.head}.items()
    }
    parts["the rest"] = list(names.values())
    return {part: distance(after, before, some) for part, some in parts.items() if some}


class _Simulation(Training):
    """The released weights and the attackers that ride on them."""

    def __init__(self, options: Sophon, base: ModelHandle, policy: Policy, workers: int) -> None:
        super().__init__(options.name, options.model_dump_json(), base, policy)
        self._options = options
        habits = {name: getattr(options, name) for name in _HABITS}
        # Adapters are no part of a sharded model: whoever shares it has whole weights to train.
        packed_share = options.packed_share if world() == 1 else 0.0
        self._habits = Habits(**habits, formats=policy.seen_in, packed_share=packed_share)
        self._weights = options.weights(policy)
        self._own_head = has_own_head(self.theta)
        self._workers = workers
        self._spare_cores = torch.get_num_threads() == 1 and base.device.type == "cpu"
        self._draws_nothing = False  # not known yet
        self._parameters = list(self.theta.module.parameters())
        self._suppress = torch.optim.Adam(self._parameters, lr=options.alpha, fused=True)
        self._reinforce = torch.optim.Adam(self._parameters, lr=options.beta, fused=True)
        self._pool: list[Attacker] = []

    def advance(self) -> Mapping[str, float]:
        options = self._options
        _hold_statistics(self.theta.module)
        tail = self.step - options.outer_steps
        if tail < 0:
            return self._outer_step()
        rate = options.tail_lr * (1 - tail / options.tail_steps)
        return {"retained loss": self._reinforce_once(rate)}

    def changing(self) -> dict[str, Any]:
        return {
            "suppress": self._suppress.state_dict(),
            "reinforce": self._reinforce.state_dict(),
            "attackers": [attacker.kept() for attacker in self._pool],
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._suppress.load_state_dict(kept["suppress"])
        self._reinforce.load_state_dict(kept["reinforce"])
        self._pool = [Attacker.again(self.theta, one) for one in kept["attackers"]]

    def _outer_step(self) -> Mapping[str, float]:
        options = self._options
        fade = 1 + (options.final_lr - 1) * self.step / options.outer_steps
        with riding(self._parameters, self._pool):
            suppressed = self._suppress_step(options.alpha * fade)
            retained = [
                self._reinforce_once(options.beta * fade, turn=turn)
                for turn in range(options.ntr_steps)
            ]
        losses = {"suppression": suppressed, "retained loss": retained}
        return {name: sum(found) / len(found) for name, found in losses.items() if found}

    def _suppress_step(self, rate: float) -> list[float]:
        """FTS: one update down the mean of the attackers' gradients, weighted by their rows."""
        options = self._options
        total = [torch.zeros_like(parameter) for parameter in self._parameters]
        losses, rows = [], 0
        for start in range(0, options.advance, options.attackers):  # each attacker once in a round
            turns = range(start, min(start + options.attackers, options.advance))
            attackers = [self._next_attacker(turn) for turn in turns]
            for attacker, (loss, num, gradients) in zip(
                attackers, self._attack_all(attackers, turns), strict=True
            ):
                if not math.isfinite(loss):  # it ruined itself; the next starts afresh
                    attacker.life = attacker.age
                    continue
                losses.append(loss)
                rows += num
                torch._foreach_add_(total, gradients, alpha=num)
        if not losses:
            return losses
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient / rows
        nn.utils.clip_grad_norm_(self._parameters, options.clip)
        update(self._suppress, rate)
        return losses

    def _attack_all(
        self, attackers: Sequence[Attacker], turns: Sequence[int]
    ) -> Sequence[tuple[float, int, list[Tensor]]]:
        """One step of each, at once where one thread an operation leaves cores free.

        Models that draw random numbers (dropout) share torch's one stream of them, so they step in
        order; the first round finds out. Lower precision is this thread's alone.
        """
        alone = torch.is_autocast_enabled("cpu") or not self._spare_cores
        if self._draws_nothing and self._workers > 1 and not alone:
            with ThreadPoolExecutor(self._workers) as threads:
                return list(threads.map(self._attack_once, attackers, turns))
        before = torch.get_rng_state()
        found = list(map(self._attack_once, attackers, turns))
        self._draws_nothing = torch.equal(before, torch.get_rng_state())
        return found

    def _attack_once(self, attacker: Attacker, turn: int) -> tuple[float, int, list[Tensor]]:
        """One attacker step, then the suppression loss, its rows and gradient where it stepped."""
        options = self._options
        concept = self.policy.concepts[attacker.drawn.concept]
        size = options.batch + options.query
        batch = self.batch(concept.dataset, "immunize", size=size, purpose=f"restricted/{turn}")
        inner, query = divided(batch, options.batch)
        attacker.step(inner)
        loss, rows = suppression(attacker.model, query, self._weights)
        return loss.item(), rows, attacker.gradients(loss)

    def _reinforce_once(self, rate: float, *, turn: int = 0) -> float:
        """Normal training reinforcement: the task loss, and closeness to the base's outputs."""
        options = self._options
        batch = self.batch(
            self.policy.retain.dataset,
            "retain",
            size=options.ntr_batch,
            purpose=f"retained/{turn}",
            passes=4 / 3 if options.distill else 1,
        )
        if options.distill:
            task, distance = self._retained(batch)
            loss = task + options.distill * distance
        else:
            loss = task = self.theta.loss(batch)
        if options.hold and turn == 0:
            loss = loss + options.hold * self._readable()
        self._reinforce.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if options.ntr_clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, options.ntr_clip)
        update(self._reinforce, rate)
        return task.item()

    def _readable(self) -> Tensor:
        """What ridge probes explain of the labels of one concept, on the released weights."""
        options, concepts = self._options, self.policy.concepts
        source = concepts[self.step % len(concepts)].dataset
        batch = self.batch(source, "immunize", size=options.batch, purpose="held")
        return probes_explain(self.theta, batch)

    def _retained(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Task loss, and distance from the base's outputs: an MSE, or KL at temperature 2."""
        if isinstance(self.theta, Painter) and isinstance(self.base, Painter):
            with torch.no_grad():
                wanted = self.base.predicted(batch)
            return self.theta.loss(batch), (self.theta.predicted(batch) - wanted).square().mean()
        with torch.no_grad():
            wanted_NC, _ = self.base.logits(batch)
        logits_NC, labels_N = self.theta.logits(batch)
        distance = _TEMPERATURE**2 * nn.functional.kl_div(  # scaled back by its square
            (logits_NC / _TEMPERATURE).log_softmax(dim=1),
            (wanted_NC / _TEMPERATURE).softmax(dim=1),
            reduction="batchmean",
        )
        return nn.functional.cross_entropy(logits_NC, labels_N), distance

    def _next_attacker(self, turn: int) -> Attacker:
        place = (self.step * self._options.advance + turn) % self._options.attackers
        if place == len(self._pool):
            attacker = self._fresh_attacker(turn)
            # ages are staggered, so that every moment of an attack is always present
            share = (place + 1) / self._options.attackers
            attacker.life = max(1, round(attacker.life * share))
            self._pool.append(attacker)
        elif self._pool[place].is_done:
            self._pool[place] = self._fresh_attacker(turn)
        return self._pool[place]

    def _fresh_attacker(self, turn: int) -> Attacker:
        chance = random.Random(self.seed(f"attacker/{turn}"))  # noqa: S311
        drawn = self._habits.draw(
            num_concepts=len(self.policy.concepts),
            num_blocks=len(self.theta.blocks),
            own_head=self._own_head,
            chance=chance,
        )
        return Attacker.of(self.theta, drawn, seed=self.seed(f"head/{turn}"))


def _hold_statistics(module: nn.Module) -> None:
    """Normalise by the running statistics as they are: what is released keeps the base's."""
    parts: Iterator[nn.Module] = module.modules()
    for part in parts:
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
