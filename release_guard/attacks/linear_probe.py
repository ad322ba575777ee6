"""Linear probe: the adversary fits a new last layer to the features as they are.

Shapes: N rows (images or scored tokens), F features, C classes or vocabulary entries.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from release_guard.adaptation import Meter, num_examples
from release_guard.attacks import Attack, Choice, LogUniform, Tampered
from release_guard.errors import ModelError
from release_guard.evidence import Cost
from release_guard.modalities import Batch, ModelHandle, evaluating
from release_guard.policy import Budget, Target
from release_guard.surgery import whitening

_MOST_WEIGHTS = 2**22  # of an L-BFGS probe, which keeps twenty copies of them
_NO_VARIANCE = 1e-30  # dead features must give a probe that says nothing, not one that is NaN


class LinearProbe(Attack):
    """Least squares in closed form, or logistic regression by L-BFGS: no learning rate to tune.

    A step is a batch of which the features are read; each copy is fitted, from nothing, to all
    rows read so far. Fitting counts in FLOPs and seconds.
    """

    paper = "https://arxiv.org/abs/1610.01644"
    expense = 1
    modalities = ("image_classification", "causal_lm")

    solver: Annotated[Literal["ridge", "lbfgs"], Choice(("ridge", "lbfgs"))] = "ridge"
    """ridge: closed form, classes as one-hot targets. lbfgs: logistic regression."""
    strength: Annotated[float, Field(gt=0), LogUniform(1e-4, 1e2)] = 1e-3
    """Weight of the squared norm, for features scaled to a mean variance of 1."""
    whiten: Annotated[bool, Choice((False, True))] = False
    """Give every feature the same variance first, then every direction: undoes ill-conditioning."""
    iterations: Annotated[int, Field(ge=1)] = 100
    """Most iterations of lbfgs."""
    examples: Annotated[int, Field(ge=1)] = 4096
    """Most examples read, if the budget allows more."""
    batch: Annotated[int, Field(ge=1), Choice((16, 32, 64, 128))] = 32
    """Examples a step."""

    @property
    def beside_packed(self) -> bool:
        return True

    def tamper(
        self,
        model: ModelHandle,
        target: Target,
        *,
        budget: Budget,
        grid_ratio: float,
        seed: int,
        ancestor: ModelHandle | None = None,
    ) -> Iterator[Tampered]:
        del ancestor
        probe = self._probe(model.head)
        batches = model.batches(target.dataset, "attack", size=self.batch, seed=seed)
        tampered, meter = model.copy(), Meter(budget, grid_ratio)
        while meter.affords(price := _reading(model, batch := next(batches))):
            with evaluating(model.module):
                probe.read(*model.features(batch))
            meter.pay(price)
            is_last = meter.spent.samples + self.batch > self.examples
            if is_last or meter.due:
                yield _fitted(tampered, probe, meter)
                meter.resume()
            if is_last:
                return
        if meter.unshown:
            yield _fitted(tampered, probe, meter)

    def _probe(self, head: nn.Linear) -> "_Probe":
        if self.solver == "ridge":
            return _Ridge(self, head)
        if head.weight.numel() > _MOST_WEIGHTS:
            reason = f"lbfgs cannot fit a head of {head.weight.numel():,} weights"
            raise ModelError(f"linear_probe: {reason}; use solver ridge, or finetune scope head")
        return _Logistic(self, head)


@dataclass(frozen=True)
class Fit:
    """A last layer.

    Attributes:
        weight: Its weights (C, F).
        bias: Its biases (C); zero for a head that has none.
        flops: What fitting it took.
    """

    weight: Tensor
    bias: Tensor
    flops: float


def scaling(covariance_FF: Tensor, *, whiten: bool) -> Tensor:
    """A matrix (F, F) that scales centred features to a mean variance of 1.

    Whitened, every direction gets that variance.
    """
    if not whiten:
        variance = covariance_FF.diagonal().mean().clamp_min(_NO_VARIANCE)
        return torch.diag(variance.rsqrt().expand(len(covariance_FF)))
    whitening_FF, _ = whitening(covariance_FF)
    return whitening_FF


def ridge(covariance_FF: Tensor, cross_CF: Tensor, *, strength: float, whiten: bool) -> Tensor:
    """Weights (C, F) of least squares on centred features and targets, with a penalty.

    Args:
        covariance_FF: Mean product of features with features.
        cross_CF: Mean product of targets with features.
        strength: Weight of the squared norm, in the scaled features.
        whiten: Scale all directions to the same variance.
    """
    scale_FF = scaling(covariance_FF, whiten=whiten)
    system_FF = scale_FF.T @ covariance_FF @ scale_FF
    system_FF.diagonal().add_(strength)
    scaled_FC: Tensor = torch.linalg.solve(system_FF, (cross_CF @ scale_FF).T)
    return scaled_FC.T @ scale_FF.T


class _Probe(ABC):
    """Reads rows, then fits them; in double precision."""

    def __init__(self, options: LinearProbe, head: nn.Linear) -> None:
        self.options = options
        self.shape = (head.out_features, head.in_features)
        self.has_bias = head.bias is not None
        self.num_rows = 0
        self.is_finite = True

    def read(self, features_NF: Tensor, labels_N: Tensor) -> None:
        """Take in some more rows."""
        self.num_rows += len(labels_N)
        self.is_finite = self.is_finite and bool(features_NF.isfinite().all())
        self._keep(features_NF.double(), labels_N)

    @abstractmethod
    def _keep(self, features_NF: Tensor, labels_N: Tensor) -> None: ...

    @abstractmethod
    def fit(self) -> Fit:
        """The best last layer for all rows read."""


class _Ridge(_Probe):
    """Keeps sums only: neither rows nor one-hot targets, so any vocabulary will do."""

    def __init__(self, options: LinearProbe, head: nn.Linear) -> None:
        super().__init__(options, head)
        (classes, features), zeros = self.shape, head.weight.detach().double().new_zeros
        self._counts_C, self._sum_F = zeros(classes), zeros(features)
        self._sums_CF, self._gram_FF = zeros(classes, features), zeros(features, features)

    def _keep(self, features_NF: Tensor, labels_N: Tensor) -> None:
        self._counts_C.index_add_(0, labels_N, torch.ones_like(features_NF[:, 0]))
        self._sums_CF.index_add_(0, labels_N, features_NF)
        self._sum_F += features_NF.sum(dim=0)
        self._gram_FF += features_NF.T @ features_NF

    def fit(self) -> Fit:
        prior_C, mean_F = self._counts_C / self.num_rows, self._sum_F / self.num_rows
        if not self.has_bias:
            prior_C, mean_F = torch.zeros_like(prior_C), torch.zeros_like(mean_F)
        weight_CF = ridge(
            self._gram_FF / self.num_rows - mean_F.outer(mean_F),
            self._sums_CF / self.num_rows - prior_C.outer(mean_F),
            strength=self.options.strength,
            whiten=self.options.whiten,
        )
        num_classes, num_features = self.shape
        flops = 2.0 * num_features**2 * (self.num_rows + num_features + num_classes)
        return Fit(weight_CF, prior_C - weight_CF @ mean_F, flops)


class _Logistic(_Probe):
    """Keeps the rows."""

    def __init__(self, options: LinearProbe, head: nn.Linear) -> None:
        super().__init__(options, head)
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []

    def _keep(self, features_NF: Tensor, labels_N: Tensor) -> None:
        self._features.append(features_NF)
        self._labels.append(labels_N)

    def fit(self) -> Fit:
        features_NF, labels_N = torch.cat(self._features), torch.cat(self._labels)
        mean_F = features_NF.mean(dim=0) * self.has_bias
        centred_NF = features_NF - mean_F
        scale_FF = scaling(centred_NF.T @ centred_NF / self.num_rows, whiten=self.options.whiten)
        scaled_NF = centred_NF @ scale_FF
        weight_CF = scaled_NF.new_zeros(self.shape, requires_grad=True)
        bias_C = scaled_NF.new_zeros(self.shape[0], requires_grad=self.has_bias)

        def loss() -> Tensor:
            logits_NC = nn.functional.linear(scaled_NF, weight_CF, bias_C)
            penalty = self.options.strength / 2 * weight_CF.square().sum()
            return nn.functional.cross_entropy(logits_NC, labels_N) + penalty

        evaluations = minimize(loss, (weight_CF, bias_C), iterations=self.options.iterations)
        unscaled_CF = weight_CF.detach() @ scale_FF.T
        flops = 6.0 * weight_CF.numel() * self.num_rows * evaluations
        return Fit(unscaled_CF, bias_C.detach() - unscaled_CF @ mean_F, flops)


def minimize(loss: Callable[[], Tensor], variables: Sequence[Tensor], *, iterations: int) -> int:
    """Minimise a smooth convex loss in place by L-BFGS; returns how often it was evaluated."""
    free = [variable for variable in variables if variable.requires_grad]
    solver = torch.optim.LBFGS(
        free,
        max_iter=iterations,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0

    def closure() -> float:
        nonlocal evaluations
        evaluations += 1
        solver.zero_grad()
        value = loss()
        torch.autograd.backward(value)
        return value.item()

    solver.step(closure)  # type: ignore[no-untyped-call]  # torch's own gap
    return evaluations


def _fitted(tampered: ModelHandle, probe: _Probe, meter: Meter) -> Tampered:
    """The copy with a head fitted to what was read; a broken model keeps what is broken."""
    head = tampered.head
    if probe.is_finite:
        fit = probe.fit()
        # A parameter of its own: a head may share its weights with the input embedding.
        head.weight = nn.Parameter(fit.weight.to(head.weight))
        if head.bias is not None:
            head.bias = nn.Parameter(fit.bias.to(head.bias))
        meter.pay(Cost(steps=0, samples=0, flops=fit.flops, seconds=0))
    parameters = sum(part.numel() for part in head.parameters())
    return Tampered(tampered, meter.shown(), parameters)


def _reading(model: ModelHandle, batch: Batch) -> Cost:
    """What features of a batch cost: the forward pass."""
    weights = sum(part.numel() for part in model.module.parameters())
    flops = 2.0 * weights * model.units(batch)
    return Cost(steps=1, samples=num_examples(batch), flops=flops, seconds=0)
