"""What goes into a merge and what comes out: weights made comparable, then a model again."""

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch

from release_guard.anatomy import Anatomy, anatomy
from release_guard.data import Split
from release_guard.errors import PolicyError
from release_guard.evidence import Kept
from release_guard.merging import State, check_alike, check_finite
from release_guard.modalities import ModelHandle
from release_guard.policy import MergeTarget, Policy, Target
from release_guard.realign import absorbed, realign, swapped

Alignment = Literal["none", "anchored", "joint", "rotated"]
Swap = Literal["none", "attention", "mlp"]


def merged_targets(policy: Policy) -> tuple[Target, ...]:
    """What can be attacked by merging: merge targets, and concepts if an ancestor is public."""
    concepts = policy.concepts if policy.red_team.ancestor else ()
    return (*concepts, *policy.merge_targets)


@dataclass(frozen=True)
class Ingredients:
    """Weights that are merged.

    Attributes:
        release: Of the model that is attacked, realigned if that was asked for.
        donor: Of the model it is merged with.
        base: Of their common ancestor, if there is one.
    """

    release: State
    donor: State
    base: State | None

    @classmethod
    def of(cls, model: ModelHandle, target: Target, ancestor: ModelHandle | None) -> Self:
        """Load what a target names; a concept is merged with the public ancestor itself.

        Raises:
            ModelError: The donor or the base has another architecture, or other tokens.
            PolicyError: A concept, and there is no ancestor.
        """
        release, base = model.state(), ancestor.state() if ancestor is not None else None
        if isinstance(target, MergeTarget):
            donor = _beside(model, target.donor)
            base = _beside(model, target.base) if target.base is not None else base
        elif base is None:
            advice = "name it as red_team.ancestor, or leave this attack out"
            raise PolicyError(f"{target.name}: to be merged it needs a public ancestor; {advice}")
        else:
            donor = base
        check_alike([state for state in (release, donor, base) if state is not None])
        return cls(release, donor, base)

    def need_base(self, method: str) -> State:
        """The common ancestor.

        Raises:
            PolicyError: There is none.
        """
        if self.base is None:
            advice = "give merge_targets.base or red_team.ancestor, or merge by linear or slerp"
            raise PolicyError(f"{method}: needs the ancestor of both models; {advice}")
        return self.base

    def realigned(self, model: ModelHandle, how: Alignment, swap: Swap) -> "Ingredients":
        """The same, the release brought into the form nearest to the ancestor (or the donor).

        Raises:
            ModelError: The model's parts are not known.
        """
        if how == "none" and swap == "none":
            return self
        body = anatomy(model.module)
        release, donor, base = self.release, self.donor, self.base
        if how == "rotated":
            donor, base = absorbed(donor, body), None if base is None else absorbed(base, body)
        anchor = donor if base is None else base
        if how != "none":
            release = realign(release, anchor, body, how)
        return Ingredients(_swapped(release, anchor, body, swap), donor, base)

    def into(self, model: ModelHandle, merged: State, *, keep_head: bool) -> ModelHandle:
        """A copy of the model with merged weights.

        Statistics are kept within what the models have: a variance must not become negative.

        Args:
            model: The release; it stays as it is.
            merged: All weights.
            keep_head: The last layer is the release's; one that is tied to the input embedding is
                merged in any case.

        Raises:
            ValueError: A weight is not finite, or one is missing.
        """
        done = {name: value.detach() for name, value in merged.items()}
        states = [self.release, self.donor, *([] if self.base is None else [self.base])]
        for name, buffer in model.module.named_buffers():
            if name in done and buffer.is_floating_point():
                known = torch.stack([state[name] for state in states])
                done[name] = done[name].clamp(known.amin(dim=0), known.amax(dim=0))
        first: dict[int, str] = {}  # names of one and the same weight
        for name, weight in model.module.named_parameters(remove_duplicate=False):
            done[name] = done[first.setdefault(id(weight), name)]
        if keep_head:
            done |= {name: self.release[name] for name in head_names(model)}
        check_alike([self.release, done])
        check_finite(done)
        changed = model.copy()
        changed.load_state(done)
        return changed


def kept(model: ModelHandle, donor: ModelHandle, dataset: str, split: Split, *, limit: int) -> Kept:
    """What a merge keeps of the donor's own task.

    Whoever merges has both last layers, one for each task, so the donor's may take the place of the
    merged model's.

    Args:
        model: The merged model.
        donor: As it was before.
        dataset: Examples of what it can do.
        split: Those that are scored.
        limit: How many of them, at most.

    Raises:
        ValueError: A score is not finite.
    """
    own = donor.state()
    tried = [donor, model]
    if names := head_names(model):
        tried.append(model.copy())
        tried[-1].load_state(model.state() | {name: own[name] for name in names})
    scores = [one.scores(dataset, split, limit=limit) for one in tried]
    alone, *merged = (math.fsum(each) / len(each) for each in scores)
    if not all(map(math.isfinite, (alone, *merged))):
        raise ValueError("the donor's task has a score that is not finite")
    return Kept(merged=max(merged), alone=alone, examples=len(scores[0]))


def _beside(model: ModelHandle, source: str) -> State:
    """Weights of another checkpoint, where the model's are."""
    return {name: value.to(model.device) for name, value in model.peer(source).state().items()}


def head_names(model: ModelHandle) -> tuple[str, ...]:
    """Names of the last layer's weights; none if it shares them with the input embedding."""
    mine = {id(part) for part in model.head.parameters()}
    named = model.module.named_parameters(remove_duplicate=False)
    names = tuple(name for name, part in named if id(part) in mine)
    return names if len(names) == len(mine) else ()


def _swapped(release: State, anchor: State, body: Anatomy, swap: Swap) -> State:
    return release if swap == "none" else swapped(release, anchor, body, swap)
