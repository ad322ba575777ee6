"""What somebody with a donor makes of a release: merges without data, with data, and a fine-tune.

A merge is a point: its score on the protected task and on the donor's. `front` is the best score on
the protected task among merges that are of use, that keep nine tenths of what the donor's task is
worth in the best merge of the undefended model, as `release_guard.usefulness` has it.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks._mergeable import Family
from release_guard import merging
from release_guard.adaptation import Recipe, adapt
from release_guard.attacks import Attack
from release_guard.ingredients import Alignment, Ingredients, Swap, head_names
from release_guard.merging import State
from release_guard.modalities import Batch, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Budget
from release_guard.trapping import loss_with
from release_guard.usefulness import USEFUL

SHARES = list(itertools.product((0.3, 0.6, 1.0), (0.3, 0.5, 0.7)))
TIES = ((0.2, 1.0), (0.9, 0.7))
RECOVERY = (10, 50, 150)
LABELLED = 100
DATA_USING = {
    "RegMean": [
        {"method": "regmean", "weight": weight, "keep": keep, "examples": 256}
        for weight, keep in ((0.25, 0.9), (1, 0.9), (1, 1.0), (2, 0.9), (3, 1.0), (6, 0.9))
    ],
    "Fisher": [{"method": "fisher", "weight": weight, "examples": 64} for weight in (0.3, 3)],
    "AdaMerging": [{"method": "adamerging", "start": 0.3, "examples": 256, "lr": 1e-2}],
}


class Point(NamedTuple):
    """A merge: its score on the protected task, on the donor's, and how it was made."""

    task: float
    theirs: float
    how: str


@dataclass(frozen=True)
class Fit:
    """How coefficients are fitted to labels, beyond what the attack `merge_with_data` does.

    Attributes:
        rows: A coefficient for each row of each tensor, not for each tensor.
        start: First coefficients of the release and of the donor.
        lr: Adam's learning rate.
        weight: Of the protected task's loss beside the donor's 1.
    """

    rows: bool
    start: tuple[float, float]
    lr: float
    weight: float


FITS = (
    Fit(rows=False, start=(0.5, 0.5), lr=2e-2, weight=1),
    Fit(rows=False, start=(1.0, 0.5), lr=5e-2, weight=3),
    Fit(rows=True, start=(0.5, 0.5), lr=5e-2, weight=1),
    Fit(rows=True, start=(1.0, 0.5), lr=2e-2, weight=3),
)
FIT_STEPS = (50, 100)


def bar(points: Iterable[Point], donor: float) -> float:
    """What a merge must keep of the donor's task, from the undefended model's data-free merges."""
    best = max(points, key=lambda point: (point.task + point.theirs, -point.theirs))
    return USEFUL * min(donor, best.theirs)


def front(points: Iterable[Point], least: float) -> Point | None:
    """The useful merge that does most of the protected task, if there is one."""
    return max((point for point in points if point.theirs >= least), default=None)


class Thief:
    """Merges one release with a family's donor; each task keeps its own last layer."""

    def __init__(self, family: Family, release: ModelHandle) -> None:
        self.family = family
        self.release = release
        self._donor = family.load("donor").state()
        self._own = head_names(release)

    def point(self, merged: ModelHandle, how: str) -> Point:
        """Score a merge on both tasks."""
        theirs = merged.copy()
        theirs.load_state(merged.state() | self._their_head)
        return Point(self.family.score(merged, "task"), self.family.score(theirs, "theirs"), how)

    def data_free(self, align: Alignment, swap: Swap = "none") -> list[Point]:
        """All merges without data, after bringing the release near to the base."""
        with torch.no_grad():
            parts = self._parts(align, swap)
            return [
                self.point(parts.into(self.release, merged, keep_head=True), f"{align} {how}")
                for how, merged in _arithmetic(parts)
            ]

    def with_data(self, name: str, align: Alignment) -> list[Point]:
        """All merges of a kind that reads examples without labels."""
        points = []
        for options in DATA_USING[name]:
            spec = Spec(name="merge_with_data", realign=align, **{"batch": 32} | options)
            merged = Attack.build(spec).transform(
                self.release, self.family.target, seed=0, ancestor=None
            )
            points.append(self.point(merged, spec.label))
        return points

    def fitted(self, fits: Iterable[Fit], align: Alignment) -> list[Point]:
        """Coefficients fitted to 100 labels a task, looked at along the way."""
        with torch.no_grad():
            parts = self._parts(align, "none")
        return [point for fit in fits for point in self._fitted(fit, parts)]

    def recovered(self, align: Alignment) -> list[Point]:
        """After short fine-tunes of the half-way merge on 100 labels a task."""
        with torch.no_grad():
            parts = self._parts(align, "none")
            base = parts.need_base("recovery")
            half = merging.task_arithmetic(base, [parts.release, parts.donor], [0.5, 0.5])
            student = parts.into(self.release, half, keep_head=True)
        return [self._practised(student.copy(), steps) for steps in RECOVERY]

    @property
    def _their_head(self) -> State:
        return {name: self._donor[name] for name in self._own}

    def _parts(self, align: Alignment, swap: Swap) -> Ingredients:
        parts = Ingredients.of(self.release, self.family.target, None)
        return parts.realigned(self.release, align, swap)

    def _fitted(self, fit: Fit, parts: Ingredients) -> Iterator[Point]:
        base = parts.need_base("coefficients")
        names = [name for name, _ in self.release.module.named_parameters()]
        names = [name for name in names if name not in self._own]
        deltas = {n: (parts.release[n] - base[n], parts.donor[n] - base[n]) for n in names}
        shares = {name: _shares(fit, base[name]) for name in names}
        heads = [{name: parts.release[name] for name in self._own}, self._their_head]
        batches = [
            next(self.release.batches(data, "attack", size=LABELLED, seed=0))
            for data in (self.family.data("task"), self.family.data("theirs"))
        ]
        optimizer = torch.optim.Adam([each for pair in shares.values() for each in pair], fit.lr)

        def merged() -> State:
            return {
                name: base[name] + sum(map(torch.mul, shares[name], deltas[name])) for name in names
            }

        for step in range(1, max(FIT_STEPS) + 1):
            weights = merged()
            own, theirs = (
                loss_with(self.release, weights | head, batch)
                for head, batch in zip(heads, batches, strict=True)
            )
            optimizer.zero_grad()
            (fit.weight * own + theirs).backward()
            optimizer.step()
            if step in FIT_STEPS:
                with torch.no_grad():
                    done = parts.into(self.release, parts.release | merged(), keep_head=True)
                    yield self.point(done, f"{fit}, {step} steps")

    def _practised(self, student: ModelHandle, steps: int) -> Point:
        heads = [{name: student.state()[name] for name in self._own}, self._their_head]
        for parameter in student.head.parameters():
            parameter.requires_grad_(requires_grad=False)
        streams = [_few(student, self.family.data(name)) for name in ("task", "theirs")]

        def in_turn() -> Iterator[Batch]:
            for turn in itertools.cycle(range(len(streams))):
                student.module.load_state_dict(heads[turn], strict=False)
                yield next(streams[turn])

        budget = Budget(limit=2 * steps)
        for _ in adapt(student, in_turn(), Recipe(3e-4), budget=budget, grid_ratio=2, seed=0):
            pass
        student.module.load_state_dict(heads[0], strict=False)
        return self.point(student, f"recovery, {steps} steps")


def _shares(fit: Fit, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = [len(like), *[1] * (like.ndim - 1)] if fit.rows and like.ndim else []
    one, other = (torch.full(shape, value, requires_grad=True) for value in fit.start)
    return one, other


def _few(model: ModelHandle, dataset: str) -> Iterator[Batch]:
    """Batches out of the first 100 examples of the attack split."""
    return itertools.cycle(
        list(itertools.islice(model.batches(dataset, "attack", size=LABELLED // 2, seed=0), 2))
    )


def _arithmetic(parts: Ingredients) -> Iterator[tuple[str, State]]:
    both, base = [parts.release, parts.donor], parts.need_base("merges")
    for weights in SHARES:
        yield f"task arithmetic {weights}", merging.task_arithmetic(base, both, weights)
    for density, scale in TIES:
        merged = merging.ties(base, both, [1, 1], density=density, scale=scale)
        yield f"TIES {density}, {scale}", merged
    yield "slerp", merging.slerp(parts.release, parts.donor, 0.5)


def broken(family: Family, points: Sequence[Point]) -> list[str]:
    """What would make a merge look like a defence: none of it may be found."""
    base, donor = (family.load(name).state() for name in ("base", "donor"))
    found = []
    if any(not torch.equal(base[n], v) for n, v in merging.linear([base, base], (1, 1)).items()):
        found.append("a base merged with itself is another model")
    merged: Mapping[str, Tensor] = merging.task_arithmetic(base, [donor], [0.5])
    if all(torch.equal(merged[name], donor[name]) for name in merged):
        found.append("a merge is its donor")
    if len({point[:2] for point in points}) == 1:
        found.append("all merges are the same")
    return found
