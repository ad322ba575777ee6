"""SOPHON: non-fine-tunable learning by first-order meta-learning.

Simulated attackers fine-tune copies of the model on the restricted domain; after each of their
steps a suppression loss on held-out restricted examples says how far they have got, and its
gradient at the copy, averaged over all those steps, moves the model itself (fine-tuning
suppression, FTS). Steps on the retained domain repair what that costs (normal training
reinforcement, NTR). Shapes: N examples, C classes, F features.
"""

import math
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from release_guard.adaptation import renew_blocks
from release_guard.errors import ImmunizationError
from release_guard.immunization import Training, divided, update
from release_guard.modalities import Batch, ModelHandle
from release_guard.policy import Policy
from release_guard.stages import TrainedStage, Workspace

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
        "ice": 1.0,
        "klu": 0.0,
        "probe": 0.0,
        "alpha": 3e-4,
        "beta": 5e-4,
        "final_lr": 1.0,
        "ntr_steps": 1,
        "ntr_batch": 150,
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
        "ice": 0.0,
        "klu": 1.0,
        "probe": 1.0,
        "alpha": 3.1e-3,
        "beta": 2e-3,
        "final_lr": 0.1,
        "ntr_steps": 4,
        "ntr_batch": 32,
        "distill": 1.0,
        "tail_steps": 1_200,
    },
}
_TEMPERATURE = 2.0  # of the distillation
_PROBE_RIDGE = 0.1  # relative to the mean variance of the features
_MOST_PROBED = 1_000  # classes; beyond, as in a vocabulary, a ridge probe makes no sense


class Sophon(TrainedStage):
    """Make fine-tuning on a restricted domain start from a bad place and stay there."""

    paper = "https://arxiv.org/abs/2404.12699"
    modalities = ("image_classification", "causal_lm")

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
    """Share of attackers that begin with a new head."""
    renew_share: float = Field(ge=0, le=1)
    """Share of attackers that begin with new weights in the last one or two blocks."""
    batch: int = Field(ge=1)
    """Restricted examples of an attacker's step."""
    query: int = Field(ge=1)
    """Restricted examples the suppression loss is taken on, disjoint from that step's batch."""
    ice: float = Field(ge=0)
    """Weight of the inverse cross-entropy, -log(1 - p_label)."""
    klu: float = Field(ge=0)
    """Weight of KL(uniform || p)."""
    probe: float = Field(ge=0)
    """Weight of the variance of the labels that a ridge probe on the features explains."""
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
    distill: float = Field(ge=0)
    """Weight of staying close to the base model's outputs on retained examples."""
    tail_steps: int = Field(ge=0)
    """Reinforcement steps at the end, without suppression: cheap repair of what it cost."""
    tail_lr: float = Field(1e-3, gt=0)
    """Their learning rate, which falls linearly to zero."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_variant(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return {**_VARIANTS.get(values.get("variant", "hardened"), {}), **values}
        return values

    @property
    def steps(self) -> int:
        return self.outer_steps + self.tail_steps

    def check(self, model: ModelHandle, policy: Policy) -> None:
        if not policy.concepts:
            raise ImmunizationError("sophon: the policy names no concept; add one, or leave it out")
        if self.probe and model.head.out_features > _MOST_PROBED:
            raise ImmunizationError(
                f"sophon: `probe` works up to {_MOST_PROBED} classes, this head has "
                f"{model.head.out_features}; set probe = 0"
            )

    def training(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> Training:
        return _Simulation(self, model, policy, workspace.workers)

    def effect(self, base: ModelHandle, immunized: ModelHandle, policy: Policy) -> float:
        """By how much KL(uniform || p) on the restricted examples fell."""
        measures = self.measure(base, immunized, policy)
        names = [f"KL(uniform || p) on {concept.name}" for concept in policy.concepts]
        falls = [measures[f"{name}, base"] - measures[f"{name}, immunized"] for name in names]
        return sum(falls) / len(falls)

    def measure(
        self, base: ModelHandle, immunized: ModelHandle, policy: Policy
    ) -> Mapping[str, float]:
        """Suppression losses before and after, and the retained score on the guard split."""
        figures = {}
        for name, handle in (("base", base), ("immunized", immunized)):
            model = handle.copy()
            model.module.eval()
            scores = model.scores(policy.retain.dataset, "guard", limit=500)
            figures[f"retained score, {name}"] = sum(scores) / len(scores)
            for concept in policy.concepts:
                batch = next(model.batches(concept.dataset, "immunize", size=self.query, seed=0))
                with torch.no_grad():
                    logits_NC, labels_N = model.logits(batch)
                figures[f"KL(uniform || p) on {concept.name}, {name}"] = float(klu(logits_NC))
                figures[f"inverse cross-entropy on {concept.name}, {name}"] = float(
                    ice(logits_NC, labels_N)
                )
        return {name: round(value, 4) for name, value in figures.items()}


def ice(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Inverse cross-entropy -log(1 - p_label), mean; finite at any margin.

    Source: arXiv 2404.12699; as logsumexp(z) - logsumexp(z without the label), since the literal
    form is infinite in fp32 from a margin near 20. Its gradient vanishes as p_label -> 0.
    """
    others_NC = logits_NC.scatter(1, labels_N[:, None], float("-inf"))
    return (logits_NC.logsumexp(dim=1) - others_NC.logsumexp(dim=1)).mean()


def klu(logits_NC: Tensor) -> Tensor:
    """KL(uniform || p), mean: zero iff every prediction is uniform.

    Source: arXiv 2404.12699. Gradient at the logits: p_i - 1/C.
    """
    num_classes = logits_NC.shape[1]
    log_p_NC: Tensor = logits_NC.log_softmax(dim=1)
    return -(log_p_NC.mean(dim=1) + math.log(num_classes)).mean()


def probe_explains(features_NF: Tensor, labels_N: Tensor, *, num_classes: int) -> Tensor:
    """Share in [0, 1) of the labels' variance that a ridge probe on the features explains.

    The closed-form linear-probe attacker, differentiable in the features; invariant to their scale
    and rotation. With one label only there is nothing to explain: zero.
    """
    centred_NF = features_NF - features_NF.mean(dim=0)
    labels_NC = nn.functional.one_hot(labels_N, num_classes).to(features_NF.dtype)
    labels_NC = labels_NC - labels_NC.mean(dim=0)
    total = labels_NC.square().sum()
    if total == 0:
        return (features_NF * 0).sum()
    gram_FF = centred_NF.T @ centred_NF
    ridge = _PROBE_RIDGE * gram_FF.diagonal().mean() + torch.finfo(gram_FF.dtype).tiny
    cross_FC = centred_NF.T @ labels_NC
    identity_FF = torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    solved_FC: Tensor = torch.linalg.solve(gram_FF + ridge * identity_FF, cross_FC)
    return (cross_FC * solved_FC).sum() / total


@dataclass
class _Attacker:
    """A simulated attacker: the released weights plus its own displacement, which it carries on."""

    model: ModelHandle
    optimizer: torch.optim.Optimizer
    own: frozenset[int]
    """Places of the parameters that it began anew: no function of the released ones."""
    life: int
    age: int = 0
    drawn: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.module.parameters())


class _Simulation(Training):
    """The released weights and the attackers that ride on them."""

    def __init__(self, options: Sophon, base: ModelHandle, policy: Policy, workers: int) -> None:
        super().__init__(options.name, options.model_dump_json(), base, policy)
        self._options = options
        self._workers = workers
        self._spare_cores = torch.get_num_threads() == 1 and base.device.type == "cpu"
        self._draws_nothing = False  # not known yet
        self._parameters = list(self.theta.module.parameters())
        self._suppress = torch.optim.Adam(self._parameters, lr=options.alpha, fused=True)
        self._reinforce = torch.optim.Adam(self._parameters, lr=options.beta, fused=True)
        self._pool: list[_Attacker] = []

    def advance(self) -> Mapping[str, float]:
        options = self._options
        tail = self.step - options.outer_steps
        if tail < 0:
            return self._outer_step()
        rate = options.tail_lr * (1 - tail / options.tail_steps)
        return {"retained loss": self._reinforce_once(rate)}

    def changing(self) -> dict[str, Any]:
        attackers = [
            {
                "model": attacker.model.state(),
                "optimizer": attacker.optimizer.state_dict(),
                "drawn": attacker.drawn,
                "age": attacker.age,
            }
            for attacker in self._pool
        ]
        return {
            "suppress": self._suppress.state_dict(),
            "reinforce": self._reinforce.state_dict(),
            "attackers": attackers,
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._suppress.load_state_dict(kept["suppress"])
        self._reinforce.load_state_dict(kept["reinforce"])
        for one in kept["attackers"]:
            attacker = self._attacker(one["drawn"], seed=0)
            attacker.model.load_state(one["model"])
            attacker.optimizer.load_state_dict(one["optimizer"])
            attacker.age = one["age"]
            self._pool.append(attacker)

    def _outer_step(self) -> Mapping[str, float]:
        options = self._options
        fade = 1 + (options.final_lr - 1) * self.step / options.outer_steps
        before = [parameter.detach().clone() for parameter in self._parameters]
        suppressed = self._suppress_step(options.alpha * fade)
        retained = [
            self._reinforce_once(options.beta * fade, turn=turn)
            for turn in range(options.ntr_steps)
        ]
        self._carry(before)
        losses = {"suppression": suppressed, "retained loss": retained}
        return {name: sum(found) / len(found) for name, found in losses.items() if found}

    def _suppress_step(self, rate: float) -> list[float]:
        options = self._options
        total = [torch.zeros_like(parameter) for parameter in self._parameters]
        losses = []
        for start in range(0, options.advance, options.attackers):  # each attacker once in a round
            turns = range(start, min(start + options.attackers, options.advance))
            attackers = [self._next_attacker(turn) for turn in turns]
            for attacker, (loss, gradients) in zip(
                attackers, self._attack_all(attackers, turns), strict=True
            ):
                if not math.isfinite(loss):  # it ruined itself; the next starts afresh
                    attacker.age = attacker.life
                    continue
                losses.append(loss)
                torch._foreach_add_(total, gradients)
        if not losses:
            return losses
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient / len(losses)
        nn.utils.clip_grad_norm_(self._parameters, options.clip)
        update(self._suppress, rate)
        return losses

    def _attack_all(
        self, attackers: Sequence[_Attacker], turns: Sequence[int]
    ) -> Sequence[tuple[float, list[Tensor]]]:
        """One step of each, at once where one thread an operation leaves cores free.

        Models that draw random numbers (dropout) share torch's one stream of them, so they step in
        order; the first round finds out.
        """
        if self._spare_cores and self._draws_nothing and self._workers > 1:
            with ThreadPoolExecutor(self._workers) as threads:
                return list(threads.map(self._attack_once, attackers, turns))
        before = torch.get_rng_state()
        found = list(map(self._attack_once, attackers, turns))
        self._draws_nothing = torch.equal(before, torch.get_rng_state())
        return found

    def _attack_once(self, attacker: _Attacker, turn: int) -> tuple[float, list[Tensor]]:
        """One attacker step, then the suppression loss and its gradient at the stepped weights."""
        options = self._options
        concept = self.policy.concepts[attacker.drawn["concept"]]
        size = options.batch + options.query
        batch = self.batch(concept.dataset, "immunize", size=size, purpose=f"restricted/{turn}")
        inner, query = divided(batch, options.batch)
        attacker.optimizer.zero_grad(set_to_none=True)
        attacker.model.loss(inner).backward()  # type: ignore[no-untyped-call]  # as below
        attacker.optimizer.step()
        attacker.age += 1
        suppression = self._suppression(attacker.model, query)
        attacker.optimizer.zero_grad(set_to_none=True)
        suppression.backward()  # type: ignore[no-untyped-call]  # as below; sharded weights need it
        found = [parameter.grad for parameter in attacker.parameters]
        attacker.optimizer.zero_grad(set_to_none=True)
        return suppression.item(), [
            torch.zeros_like(parameter) if gradient is None or place in attacker.own else gradient
            for place, (gradient, parameter) in enumerate(
                zip(found, attacker.parameters, strict=True)
            )
        ]

    def _suppression(self, model: ModelHandle, query: Batch) -> Tensor:
        options = self._options
        features_NF, labels_N = model.features(query)
        logits_NC = model.head(features_NF)
        loss: Tensor = logits_NC.new_zeros(())
        if options.ice:
            loss = loss + options.ice * ice(logits_NC, labels_N)
        if options.klu:
            loss = loss + options.klu * klu(logits_NC)
        if options.probe:
            loss = loss + options.probe * probe_explains(
                features_NF, labels_N, num_classes=logits_NC.shape[1]
            )
        return loss

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
        logits_NC, labels_N = self.theta.logits(batch)
        task = nn.functional.cross_entropy(logits_NC, labels_N)
        loss = task
        if options.distill:
            loss = loss + options.distill * self._distance(batch, logits_NC)
        self._reinforce.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        update(self._reinforce, rate)
        return task.item()

    def _distance(self, batch: Batch, logits_NC: Tensor) -> Tensor:
        """Distillation from the base model: KL at temperature 2, scaled back by its square."""
        with torch.no_grad():
            wanted_NC, _ = self.base.logits(batch)
        return _TEMPERATURE**2 * nn.functional.kl_div(
            (logits_NC / _TEMPERATURE).log_softmax(dim=1),
            (wanted_NC / _TEMPERATURE).softmax(dim=1),
            reduction="batchmean",
        )

    def _carry(self, before: Sequence[Tensor]) -> None:
        """Attackers ride on the released weights: what those moved, they move too."""
        with torch.no_grad():
            for attacker in self._pool:
                moves = zip(self._parameters, before, attacker.parameters, strict=True)
                for place, (parameter, old, theirs) in enumerate(moves):
                    if place not in attacker.own:
                        theirs.add_(parameter - old)

    def _next_attacker(self, turn: int) -> _Attacker:
        place = (self.step * self._options.advance + turn) % self._options.attackers
        if place == len(self._pool):
            attacker = self._fresh_attacker(turn)
            # ages are staggered, so that every moment of an attack is always present
            share = (place + 1) / self._options.attackers
            attacker.life = attacker.drawn["life"] = max(1, round(attacker.life * share))
            self._pool.append(attacker)
        elif self._pool[place].age >= self._pool[place].life:
            self._pool[place] = self._fresh_attacker(turn)
        return self._pool[place]

    def _fresh_attacker(self, turn: int) -> _Attacker:
        options = self._options
        chance = random.Random(self.seed(f"attacker/{turn}"))  # noqa: S311
        adam = chance.random() < options.adam_share
        low, high = options.adam_lr if adam else options.sgd_lr
        drawn = {
            "adam": adam,
            "lr": math.exp(chance.uniform(math.log(low), math.log(high))),
            "new_head": chance.random() < options.reinit_share,
            "new_blocks": self._new_blocks(chance),
            "life": chance.randint(*options.horizon),
            "concept": chance.randrange(len(self.policy.concepts)),
        }
        return self._attacker(drawn, seed=self.seed(f"head/{turn}"))

    def _new_blocks(self, chance: random.Random) -> int:
        if chance.random() >= self._options.renew_share:
            return 0
        return chance.randint(1, min(2, len(self.theta.blocks)))

    def _attacker(self, drawn: dict[str, Any], *, seed: int) -> _Attacker:
        model = self.theta.copy()
        renewed: list[nn.Module] = []
        if drawn["new_head"]:
            model.reinit_head(seed=seed)
            renewed.append(model.head)
        if drawn["new_blocks"]:
            renew_blocks(model, drawn["new_blocks"], seed=seed)
            renewed += model.blocks[-drawn["new_blocks"] :]
        model.module.train()
        parameters = list(model.module.parameters())
        optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, lr=drawn["lr"], fused=True)
            if drawn["adam"]
            else torch.optim.SGD(parameters, lr=drawn["lr"], momentum=self._options.momentum)
        )
        new = {id(parameter) for part in renewed for parameter in part.parameters()}
        own = frozenset(place for place, parameter in enumerate(parameters) if id(parameter) in new)
        return _Attacker(model, optimizer, own, drawn["life"], drawn=drawn)
