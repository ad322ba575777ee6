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
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from release_guard.adaptation import Randomness, renew_blocks
from release_guard.errors import ImmunizationError
from release_guard.modalities import Batch, ModelHandle, Painter, State
from release_guard.policy import Policy
from release_guard.stages import Stage, Workspace

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


class Sophon(Stage):
    """Make fine-tuning on a restricted domain start from a bad place and stay there."""

    paper = "https://arxiv.org/abs/2404.12699"

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
    probe_every: int = Field(50, ge=1)
    """Steps between looks at the retained score."""
    keep_every: int = Field(100, ge=1)
    """Steps between checkpoints."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_variant(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return {**_VARIANTS.get(values.get("variant", "hardened"), {}), **values}
        return values

    def immunize(self, model: ModelHandle, policy: Policy, workspace: Workspace) -> ModelHandle:
        if isinstance(model, Painter):
            advice = "remove it from stages, or release a classifier or a language model"
            raise ImmunizationError(f"sophon: a text-to-image model has no classes; {advice}")
        if self.probe and model.head.out_features > _MOST_PROBED:
            raise ImmunizationError(
                f"sophon: `probe` works up to {_MOST_PROBED} classes, this head has "
                f"{model.head.out_features}; set probe = 0"
            )
        steps = self.outer_steps + self.tail_steps
        with ThreadPoolExecutor(workspace.workers) as threads:
            training = _Training(self, model, policy, threads)
            training.resume(workspace.directory)
            while training.step < steps:
                line = training.advance()
                if training.step % self.probe_every == 0 or training.step == steps:
                    training.guard()
                if training.step % self.keep_every == 0:
                    training.keep(workspace.directory)
                workspace.progress(training.step, steps, line)
            return training.result()

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


class _Training:
    """All that changes while SOPHON runs, so that it can be kept and taken up again.

    Every random choice derives from the seed and the outer step: a resumed run equals one that was
    never interrupted.
    """

    def __init__(
        self, options: Sophon, base: ModelHandle, policy: Policy, threads: ThreadPoolExecutor
    ) -> None:
        self._options = options
        self._threads = threads
        self._spare_cores = torch.get_num_threads() == 1 and base.device.type == "cpu"
        self._draws_nothing = False  # not known yet
        self._policy = policy
        self._base = base.copy()
        self._base.module.eval()
        self.theta = base.copy()
        self.theta.module.train()
        self._parameters = list(self.theta.module.parameters())
        self._suppress = torch.optim.Adam(self._parameters, lr=options.alpha, fused=True)
        self._reinforce = torch.optim.Adam(self._parameters, lr=options.beta, fused=True)
        self._pool: list[_Attacker] = []
        self._start_score = self._score(self._base)
        self._good: State | None = None
        self.step = 0

    def advance(self) -> str:
        """One outer step, or one of the tail; its losses in words.

        Raises:
            ImmunizationError: The weights are not finite any more; the last checkpoint was before.
        """
        with Randomness(self._seed("noise"), self.theta.device).used():  # what dropout draws
            line = self._any_step()
        if not all(parameter.isfinite().all() for parameter in self._parameters):
            raise ImmunizationError(
                f"sophon: the weights diverged at step {self.step + 1}; lower alpha or beta"
            )
        self.step += 1
        return line

    def guard(self) -> None:
        """Keep this state if the retained score is still within the policy's margin."""
        if self._start_score - self._score(self.theta) <= self._policy.retain.margin:
            self._good = self.theta.state()

    def result(self) -> ModelHandle:
        """The last state that kept the retained score: later ones are rolled back.

        Raises:
            ImmunizationError: There was none.
        """
        if self._good is None:
            raise ImmunizationError(
                "sophon: at no look was the retained score within retain.margin; lower alpha, or "
                "raise ntr_steps"
            )
        immunized = self._base.copy()
        immunized.load_state(self._good)
        return immunized

    def keep(self, directory: Path) -> None:
        """Write everything that changes, whole or not at all."""
        attackers = [
            {
                "model": attacker.model.state(),
                "optimizer": attacker.optimizer.state_dict(),
                "drawn": attacker.drawn,
                "age": attacker.age,
            }
            for attacker in self._pool
        ]
        state = {
            "about": self._about,
            "step": self.step,
            "theta": self.theta.state(),
            "good": self._good,
            "suppress": self._suppress.state_dict(),
            "reinforce": self._reinforce.state_dict(),
            "attackers": attackers,
        }
        partial = directory / "sophon.partial"
        torch.save(state, partial)
        partial.replace(directory / "sophon.pt")

    def resume(self, directory: Path) -> None:
        """Go on from a checkpoint of exactly this stage and policy, if there is one."""
        path = directory / "sophon.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location=self.theta.device)
        if state["about"] != self._about:
            return
        self.step, self._good = state["step"], state["good"]
        self.theta.load_state(state["theta"])
        self._suppress.load_state_dict(state["suppress"])
        self._reinforce.load_state_dict(state["reinforce"])
        for kept in state["attackers"]:
            attacker = self._attacker(kept["drawn"], seed=0)
            attacker.model.load_state(kept["model"])
            attacker.optimizer.load_state_dict(kept["optimizer"])
            attacker.age = kept["age"]
            self._pool.append(attacker)

    @property
    def _about(self) -> str:
        return f"{self._policy.digest} {self._options.model_dump_json()}"

    def _any_step(self) -> str:
        options = self._options
        tail = self.step - options.outer_steps
        if tail < 0:
            return self._outer_step()
        retained = self._reinforce_once(options.tail_lr * (1 - tail / options.tail_steps))
        return f"retained loss {retained:.3f}"

    def _outer_step(self) -> str:
        options = self._options
        fade = 1 + (options.final_lr - 1) * self.step / options.outer_steps
        before = [parameter.detach().clone() for parameter in self._parameters]
        suppression = self._suppress_step(options.alpha * fade)
        retained = [
            self._reinforce_once(options.beta * fade, turn=turn)
            for turn in range(options.ntr_steps)
        ]
        self._carry(before)
        mean = sum(retained) / max(1, len(retained))
        return f"suppression {suppression:.3f}, retained loss {mean:.3f}"

    def _suppress_step(self, rate: float) -> float:
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
            return math.nan
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient / len(losses)
        nn.utils.clip_grad_norm_(self._parameters, options.clip)
        _step(self._suppress, rate)
        return sum(losses) / len(losses)

    def _attack_all(
        self, attackers: Sequence[_Attacker], turns: Sequence[int]
    ) -> Sequence[tuple[float, list[Tensor]]]:
        """One step of each, at once where one thread an operation leaves cores free.

        Models that draw random numbers (dropout) share torch's one stream of them, so they step in
        order; the first round finds out.
        """
        if self._spare_cores and self._draws_nothing:
            return list(self._threads.map(self._attack_once, attackers, turns))
        before = torch.get_rng_state()
        found = list(map(self._attack_once, attackers, turns))
        self._draws_nothing = torch.equal(before, torch.get_rng_state())
        return found

    def _attack_once(self, attacker: _Attacker, turn: int) -> tuple[float, list[Tensor]]:
        """One attacker step, then the suppression loss and its gradient at the stepped weights."""
        options = self._options
        concept = self._policy.concepts[attacker.drawn["concept"]]
        size = options.batch + options.query
        seed = self._seed(f"restricted/{turn}")
        batch = next(self.theta.batches(concept.dataset, "immunize", size=size, seed=seed))
        inner, query = _split(batch, options.batch)
        attacker.optimizer.zero_grad(set_to_none=True)
        attacker.model.loss(inner).backward()  # type: ignore[no-untyped-call]  # as below
        attacker.optimizer.step()
        attacker.age += 1
        suppression = self._suppression(attacker.model, query)
        found: Sequence[Tensor | None] = torch.autograd.grad(
            suppression, attacker.parameters, allow_unused=True
        )
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
        retained, seed = self._policy.retain.dataset, self._seed(f"retained/{turn}")
        batch = next(self.theta.batches(retained, "retain", size=options.ntr_batch, seed=seed))
        logits_NC, labels_N = self.theta.logits(batch)
        task = nn.functional.cross_entropy(logits_NC, labels_N)
        loss = task
        if options.distill:
            loss = loss + options.distill * self._distance(batch, logits_NC)
        self._reinforce.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        _step(self._reinforce, rate)
        return task.item()

    def _distance(self, batch: Batch, logits_NC: Tensor) -> Tensor:
        """Distillation from the base model: KL at temperature 2, scaled back by its square."""
        with torch.no_grad():
            wanted_NC, _ = self._base.logits(batch)
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
        chance = random.Random(self._seed(f"attacker/{turn}"))  # noqa: S311
        adam = chance.random() < options.adam_share
        low, high = options.adam_lr if adam else options.sgd_lr
        drawn = {
            "adam": adam,
            "lr": math.exp(chance.uniform(math.log(low), math.log(high))),
            "new_head": chance.random() < options.reinit_share,
            "new_blocks": self._new_blocks(chance),
            "life": chance.randint(*options.horizon),
            "concept": chance.randrange(len(self._policy.concepts)),
        }
        return self._attacker(drawn, seed=self._seed(f"head/{turn}"))

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

    def _score(self, model: ModelHandle) -> float:
        training = model.module.training
        model.module.eval()
        scores = model.scores(self._policy.retain.dataset, "guard", limit=2_000)
        model.module.train(training)
        return sum(scores) / len(scores)

    def _seed(self, purpose: str) -> int:
        return random.Random(f"{self._policy.seed}/{self.step}/{purpose}").getrandbits(31)  # noqa: S311


def _split(batch: Batch, size: int) -> tuple[Batch, Batch]:
    first = {name: value[:size] for name, value in batch.items()}
    return first, {name: value[size:] for name, value in batch.items()}


def _step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
