"""What a red team compares: the undefended and the defended model, and those that control both."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from release_guard.data import Overlap, scored
from release_guard.errors import ModelError
from release_guard.evidence import Arm, Change, Retention, StageReport, Unattacked
from release_guard.manifest import hash_directory
from release_guard.modalities import Modality
from release_guard.phases import Folders
from release_guard.policy import MergeTarget, Policy, Precision, Target
from release_guard.quantization import at

if TYPE_CHECKING:
    from release_guard.modalities import ModelHandle

_ARMS: tuple[Arm, ...] = ("undefended", "defended")


@dataclass(frozen=True)
class Subject:
    """The models compared.

    Attributes:
        undefended: Folder of the base model.
        defended: Folder of the very files to be published.
        base: Loaded from `undefended`.
        immunized: Loaded from `defended`.
        stages: What the stages said of themselves.
        as_is: No stage was to be applied.
        sham: Folder of a model moved as far to no purpose, if the policy asks for one.
        ancestor: Folder of the public ancestor; `undefended` if that is public itself.
        artefacts: Folders of the precisions that are published in files of their own: what is
            attacked there. The other arms are rounded in memory.
    """

    undefended: Path
    defended: Path
    base: "ModelHandle"
    immunized: "ModelHandle"
    stages: tuple[StageReport, ...] = ()
    sham: Path | None = None
    ancestor: Path | None = None
    artefacts: Mapping[Precision, Path] = field(default_factory=dict)
    as_is: bool = False

    @property
    def folders(self) -> Folders:
        """Where everything lies."""
        return Folders(
            self.undefended, self.defended, self.sham, self.ancestor, artefacts=self.artefacts
        )

    def seen(self, arm: Arm, precision: Precision, policy: Policy) -> "ModelHandle":
        """The base or the immunized model at a precision: its very files, if there are some."""
        if arm == "defended" and precision in self.artefacts:
            modality = Modality.build(policy.modality)
            return modality.load(str(self.artefacts[precision]), artefact=precision)
        return at(self.immunized if arm == "defended" else self.base, precision)

    def roots(self, policy: Policy) -> dict[Precision, str]:
        """Digests of the files of every precision that has some."""
        folders = {"fp32": self.defended, **self.artefacts}
        return {
            precision: hash_directory(folders[precision]).payload.root
            for precision in policy.precisions
            if precision in folders
        }

    @property
    def change(self) -> Change:
        """Relative L2 distance of every tensor; both models share names and shapes.

        Raises:
            ModelError: They do not.
        """
        before, after = self.base.state(), self.immunized.state()
        if {name: value.shape for name, value in before.items()} != {
            name: value.shape for name, value in after.items()
        }:
            raise ModelError(
                "the two models differ in their tensors' names or shapes; give `--base`"
            )
        distances = {
            name: float(
                (after[name].double() - value.double()).norm() / max(1e-12, value.double().norm())
            )
            for name, value in before.items()
        }
        return Change(identical=not any(distances.values()), relative_l2=distances)

    def overlaps(self, policy: Policy) -> Mapping[str, Overlap]:
        """How much of each target's data stands in those that must be kept."""
        return {
            target.name: self.base.overlap(target.dataset, _kept(target, policy))
            for target in policy.targets
        }

    def unattacked(self, precisions: Sequence[Precision], policy: Policy) -> Iterator[Unattacked]:
        """What both do at no cost: the release must not, the other one must be seen to learn."""
        for arm, precision in itertools.product(_ARMS, precisions):
            model = self.seen(arm, precision, policy)
            for concept in policy.concepts:
                dataset, split = scored(concept, "confirm")
                scores = model.scores(dataset, split, limit=policy.red_team.confirm_examples)
                yield Unattacked(
                    arm=arm,
                    target=concept.name,
                    precision=precision,
                    score=fmean(scores),
                    examples=len(scores),
                )

    def retention(self, precision: Precision, policy: Policy) -> Retention:
        """Paired scores of both on retained data, rounded alike."""
        limit = policy.red_team.confirm_examples * 2  # pairs are cheap and decide the bound's width
        dataset = policy.retain.dataset
        base, immunized = (
            tuple(self.seen(arm, precision, policy).scores(dataset, "utility", limit=limit))
            for arm in _ARMS
        )
        return Retention(precision=precision, base=base, immunized=immunized)


def _kept(target: Target, policy: Policy) -> str:
    """The data that must not hold a target's examples: what else is to be kept."""
    return target.donor_dataset if isinstance(target, MergeTarget) else policy.retain.dataset
