"""Fine-tuning mechanics, counted and seeded. Nothing is scored here.

A step is one batch and one update of the weights.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from release_guard.errors import PolicyError
from release_guard.evidence import Cost, next_cost
from release_guard.modalities import Batch, ModelHandle
from release_guard.policy import Budget

OptimizerName = Literal["sgd", "nesterov", "adam", "adamw", "adagrad", "adadelta"]
ScheduleName = Literal["constant", "linear", "cosine", "one_cycle"]
Scope = Literal["all", "head", "last_k"]

_ONE_CYCLE_RISE = 0.3  # share of the schedule; this and the next two as in torch's OneCycleLR
_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_END = _ONE_CYCLE_START / 1e4


@dataclass(frozen=True)
class Recipe:
    """How weights are updated.

    Attributes:
        lr: Highest learning rate of the schedule.
        optimizer: Its name.
        momentum: Of `sgd` and `nesterov`; the others keep their usual constants.
        weight_decay: On every trained parameter; decoupled in `adamw`, an L2 term elsewhere.
        schedule: How the learning rate goes from there, after the warm-up.
        warmup: Steps over which the learning rate rises linearly; the first is not 0.
        schedule_steps: Steps the schedule is laid over, warm-up included; None: the whole budget.
        clip: Largest global norm of the gradient; None: any.
    """

    lr: float
    optimizer: OptimizerName = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: ScheduleName = "constant"
    warmup: int = 0
    schedule_steps: int | None = None
    clip: float | None = None


def adapt(
    model: ModelHandle,
    batches: Iterator[Batch],
    recipe: Recipe,
    *,
    budget: Budget,
    grid_ratio: float,
    seed: int,
) -> Iterator[Cost]:
    """Fine-tune whatever requires gradients, in place, on the task loss.

    Yields what has been spent at 1, 2, 3, 5, 8 ... steps, at last when the budget allows no further
    step; the model is in evaluation mode then. Divergence is not an error: the run ends after the
    first loss that is not finite, with the weights that gave it one update further.

    Args:
        model: Changed in place.
        batches: As many as wanted.
        recipe: How.
        budget: A step that would exceed it is not taken; one in seconds ends with the step that
            reaches it. Time spent by the caller between two yields does not count.
        grid_ratio: Ratio between the step counts at which it yields.
        seed: Fixes dropout; the caller's random state is left as it is.

    Raises:
        PolicyError: The budget does not even allow one step.
    """
    learner, meter = Learner(model, recipe), Meter(budget, grid_ratio)
    randomness = Randomness(seed, model.device)
    learner.start()
    while meter.affords(price := learner.price(batch := next(batches))):
        with randomness.used():
            loss = learner.step(batch, progress=meter.progress)
        meter.pay(price)
        if not math.isfinite(loss):
            break
        if meter.due:
            learner.stop()
            yield meter.shown()
            learner.start()
            meter.resume()
    learner.stop()
    if meter.unshown:
        yield meter.shown()


def select(model: ModelHandle, scope: Scope, *, last_k: int = 1) -> int:
    """Make a part of the weights trainable and nothing else; returns how many.

    `last_k` is the last blocks with all that comes after them: final normalisation and head.

    Raises:
        PolicyError: The model has fewer blocks than `last_k`.
    """
    match scope:
        case "all":
            chosen = list(model.module.parameters())
        case "head":
            chosen = list(model.head.parameters())
        case "last_k":
            chosen = _last(model, last_k)
        case _:
            assert_never(scope)
    model.module.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return count_trainable(model.module)


def renew_blocks(model: ModelHandle, num_blocks: int, *, seed: int) -> None:
    """Give the last blocks the weights that a fresh model of this configuration has there.

    Raises:
        PolicyError: The model has fewer blocks.
    """
    if num_blocks > len(model.blocks):
        raise PolicyError(f"new_blocks is {num_blocks}, but the model has {len(model.blocks)}")
    fresh = model.fresh(seed=seed).blocks[-num_blocks:]
    for old, new in zip(model.blocks[-num_blocks:], fresh, strict=True):
        old.load_state_dict(new.state_dict())


def last_blocks(model: ModelHandle, last_k: int) -> Sequence[nn.Module]:
    """The last blocks of a model.

    Raises:
        PolicyError: It has fewer.
    """
    if last_k > len(model.blocks):
        num = len(model.blocks)
        raise PolicyError(f"last_k: found {last_k}, but the model has {num} blocks; lower it")
    return model.blocks[-last_k:]


def count_trainable(module: nn.Module) -> int:
    """How many numbers require gradients."""
    return sum(part.numel() for part in module.parameters() if part.requires_grad)


def make_optimizer(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer, in torch's fused form wherever there is one."""
    lr, decay = recipe.lr, recipe.weight_decay
    match recipe.optimizer:
        case "sgd" | "nesterov":
            return torch.optim.SGD(
                parameters,
                lr=lr,
                momentum=recipe.momentum,
                weight_decay=decay,
                nesterov=recipe.optimizer == "nesterov",
                fused=True,
            )
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, weight_decay=decay, fused=True)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=True)
        case "adagrad":
            return torch.optim.Adagrad(parameters, lr=lr, weight_decay=decay, fused=True)
        case "adadelta":
            return torch.optim.Adadelta(parameters, lr=lr, weight_decay=decay)
        case _:
            assert_never(recipe.optimizer)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, *, clip: float | None) -> None:
    """One update of the weights down a loss, the gradient's global norm at most `clip`."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    if clip is not None:
        parameters = [part for group in optimizer.param_groups for part in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


def scheduled_lr(recipe: Recipe, step: int, progress: float) -> float:
    """Learning rate of a step.

    Args:
        recipe: Its schedule.
        step: Number of steps before this one.
        progress: Share of the budget they spent; tells where the schedule ends if the recipe
            does not.
    """
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    end = recipe.schedule_steps or (step / progress if progress else math.inf)
    done = min(1.0, (step - recipe.warmup) / (end - recipe.warmup)) if end > recipe.warmup else 1.0
    return recipe.lr * _FACTORS[recipe.schedule](done)


class Learner:
    """A model, an optimizer for whatever requires gradients, and a schedule: one step at a time.

    Attributes:
        model: What is trained.
        parameters: What of it.
    """

    def __init__(self, model: ModelHandle, recipe: Recipe) -> None:
        self.model = model
        self.parameters = [part for part in model.module.parameters() if part.requires_grad]
        self._recipe = recipe
        self._optimizer = make_optimizer(self.parameters, recipe)
        self._flops_per_unit = flops_per_unit(model.module)
        self._num_steps = 0

    def start(self) -> None:
        """Training mode, except for frozen parts: their statistics and dropout stay at rest."""
        _train(self.model.module)

    def stop(self) -> None:
        """Evaluation mode."""
        self.model.module.eval()

    def step(self, batch: Batch, *, progress: float) -> float:
        """One update of the weights; returns the loss before it.

        Args:
            batch: What to learn from.
            progress: Share of the budget spent; places the step in the schedule.
        """
        lr = scheduled_lr(self._recipe, self._num_steps, progress)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        loss = self.model.loss(batch)
        descend(self._optimizer, loss, clip=self._recipe.clip)
        self._num_steps += 1
        return loss.item()

    def price(self, batch: Batch) -> Cost:
        """What a step on a batch costs, seconds aside."""
        flops = float(self._flops_per_unit * self.model.units(batch))
        return Cost(steps=1, samples=num_examples(batch), flops=flops, seconds=0)


class Meter:
    """Counts what an attack spends, and knows when its copy is to be shown.

    Its clock starts when it is made; what happens between `shown` and `resume` is not counted.
    """

    def __init__(self, budget: Budget, grid_ratio: float) -> None:
        self._budget = budget
        self._grid_ratio = grid_ratio
        self._spent = Cost(steps=0, samples=0, flops=0, seconds=0)
        self._shown, self._due = 0, 1
        self._since = time.perf_counter()

    @property
    def spent(self) -> Cost:
        """All that was paid."""
        return self._spent

    @property
    def progress(self) -> float:
        """Share of the budget that was paid."""
        return self._spent.of(self._budget.unit) / self._budget.limit

    @property
    def due(self) -> bool:
        """Whether the next number of steps on the grid is reached: 1, 2, 3, 5, 8 ..."""
        return self._spent.steps >= self._due

    @property
    def unshown(self) -> bool:
        """Whether a step was paid since the copy was last shown."""
        return self._spent.steps > self._shown

    def affords(self, price: Cost) -> bool:
        """Whether the budget has room for one more step.

        Raises:
            PolicyError: It has no room for even the first one.
        """
        unit, limit = self._budget.unit, self._budget.limit
        if unit == "seconds":
            return self._spent.seconds < limit
        affordable = self._spent.of(unit) + price.of(unit) <= limit
        if not affordable and self._spent.steps == 0:
            what = f"a budget of {limit:g} {unit} is too small: one step needs {price.of(unit):g}"
            raise PolicyError(f"{what}; raise red_team.budget.limit or lower the batch size")
        return affordable

    def pay(self, price: Cost) -> None:
        """Add a price, and the time since the last one."""
        spent, now = self._spent, time.perf_counter()
        self._spent = Cost(
            steps=spent.steps + price.steps,
            samples=spent.samples + price.samples,
            flops=spent.flops + price.flops,
            seconds=spent.seconds + now - self._since,
        )
        self._since = now

    def shown(self) -> Cost:
        """Take note that the copy is shown, at this cost."""
        self._shown = self._spent.steps
        self._due = next_cost(self._shown, self._grid_ratio)
        return self._spent

    def resume(self) -> None:
        """Let the clock go on."""
        self._since = time.perf_counter()


class Randomness:
    """A stream of torch's global randomness, apart from everybody else's."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(self._devices):
            torch.manual_seed(seed)
            self._states = self._read()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Go on with this stream inside; the caller's own is back afterwards."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
            self._states = self._read()

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]


def flops_per_unit(module: nn.Module) -> int:
    """FLOPs of a step at one position: 2 a weight forward, 2 backward through, 2 for its gradient.

    6 x weights where all is trained, about 4 x with adapters, 2 x for a head on frozen features:
    the backward pass ends at the first trainable weight. Attention's own products are left out.
    """
    weights = list(module.parameters())
    trained = [number for number, weight in enumerate(weights) if weight.requires_grad]
    through = weights[trained[0] :] if trained else []
    return 2 * (_size(weights) + _size(through) + count_trainable(module))


def num_examples(batch: Batch) -> int:
    """How many examples a batch holds."""
    return len(next(iter(batch.values())))


def _last(model: ModelHandle, last_k: int) -> list[nn.Parameter]:
    """Parameters from the first of the last blocks on, in the order in which they were made."""
    blocks = last_blocks(model, last_k)
    inside = {id(part) for block in blocks for part in block.parameters()}
    every = list(model.module.parameters())
    first = next(number for number, part in enumerate(every) if id(part) in inside)
    head = [
        part for part in model.head.parameters() if all(part is not one for one in every[first:])
    ]
    return [*every[first:], *head]


def _train(module: nn.Module) -> None:
    weights = list(module.parameters())
    if weights and not any(weight.requires_grad for weight in weights):
        module.eval()
        return
    module.training = True
    for child in module.children():
        _train(child)


def _one_cycle(done: float) -> float:
    if done < _ONE_CYCLE_RISE:
        return _cosine(_ONE_CYCLE_START, 1.0, done / _ONE_CYCLE_RISE)
    return _cosine(1.0, _ONE_CYCLE_END, (done - _ONE_CYCLE_RISE) / (1 - _ONE_CYCLE_RISE))


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


_FACTORS: Mapping[ScheduleName, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: _cosine(1.0, 0.0, done),
    "one_cycle": _one_cycle,
}


def _size(weights: Iterable[Tensor]) -> int:
    """How many numbers; packed ones (bitsandbytes) are counted as if they were not."""
    return sum(math.prod(getattr(weight, "quant_state", weight).shape) for weight in weights)
