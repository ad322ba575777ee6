"""What can be known before anything is spent: does an order make sense, will it work at all?"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from release_guard.attacks import Attack
from release_guard.errors import ImmunizationError, ModelError, PolicyError
from release_guard.manifest import hash_directory
from release_guard.plugins import Spec
from release_guard.policy import HUB_PREFIX, Policy
from release_guard.quantization import require_layers
from release_guard.shards import world
from release_guard.sources import local_folder, named_in
from release_guard.stages import Stage, misplaced

if TYPE_CHECKING:
    from release_guard.modalities import ModelHandle


@dataclass(frozen=True)
class Order:
    """What is to be published.

    Attributes:
        source: Folder or Hub id of the model.
        repo: `owner/name` on the policy's hub.
        policy: What it must resist.
        base: Undefended original, where `source` was immunized elsewhere; none: `source` itself.
        as_is: Judge `source` as it is; no stage is applied.
        dry_run: Stop before anything is signed, and need no key.
        pack_only: Stop before anything is signed; another job goes on from the packed folder.
        tag: Name for the revision that is made.
    """

    source: str
    repo: str
    policy: Policy
    base: str | None = None
    as_is: bool = False
    dry_run: bool = False
    pack_only: bool = False
    tag: str | None = None

    @property
    def untouched(self) -> bool:
        """Whether the source itself goes out: nothing immunizes it."""
        return self.as_is or not self.policy.stages

    @property
    def stops(self) -> bool:
        """Whether nothing is signed or sent."""
        return self.dry_run or self.pack_only


def check_order(order: Order, output: Path) -> None:
    """Whether it is clear which model is published, and that nothing goes out with it by accident.

    Raises:
        PolicyError: The source was immunized elsewhere, and stages would immunize its base instead;
            the run's folder or the policy's data lie in the model's.
    """
    if order.base and not order.untouched:
        raise PolicyError(
            "--base says that the source was immunized elsewhere, but the policy has stages, which "
            "would immunize the base and publish that; add --as-is, or leave --base out"
        )
    if not (model := Path(order.source)).is_dir():
        return
    model = model.resolve()
    if output.resolve().is_relative_to(model):
        raise PolicyError(f"{output}: lies in the model's own folder; choose another --output")
    if not order.untouched:
        return  # what stages make goes out, not the folder as it is
    for key, source in named_in(order.policy):
        local = not source.startswith(HUB_PREFIX)
        if local and model in Path(source).resolve().parents:
            raise PolicyError(
                f"{key}: {source} lies in the model's own folder and would be published with it; "
                "move it out"
            )


def check_stage_kinds(policy: Policy) -> None:
    """Whether every stage is for this kind of model.

    Raises:
        PolicyError: One line for each that is not.
    """
    if lines := tuple(misplaced(policy)):
        raise PolicyError("\n".join(lines))


def check_stages(base: "ModelHandle", policy: Policy) -> None:
    """Whether every stage can work on this model and these data, in as many processes.

    Raises:
        ImmunizationError: It cannot.
    """
    for place, spec in enumerate(policy.stages):
        stage = Stage.build(spec, where=f"stages[{place}]")
        if world() > 1 and not stage.shardable:
            raise ImmunizationError(
                f"stages[{place}]: {spec.name} works in one process only, and there are {world()}"
            )
        stage.check(base, policy)


def check_attacks(policy: Policy) -> None:
    """Whether every listed attack is for this kind of model, and has the ancestor it needs.

    A merge target that names its base brings the ancestor along.

    Raises:
        PolicyError: One line for each that is not.
    """
    lines = []
    for place, spec in enumerate(policy.attacks):
        attack, kind = Attack.build(spec, where=f"attacks[{place}]"), policy.modality.name
        if attack.modalities and kind not in attack.modalities:
            others = ", ".join(attack.modalities)
            lines.append(
                f"attacks[{place}]: {spec.name} is for {others}, not for {kind}; remove it"
            )
        aimed = attack.targets(policy)
        has_bases = bool(aimed) and all(getattr(target, "base", None) for target in aimed)
        if attack.needs_ancestor and policy.red_team.ancestor is None and not has_bases:
            advice = "name one as red_team.ancestor, or remove the attack"
            if policy.merge_targets:
                advice = f"give merge_targets.base, {advice}"
            lines.append(f"attacks[{place}]: {spec.name} needs a public ancestor; {advice}")
    if lines:
        raise PolicyError("\n".join(lines))


def public_ancestor(policy: Policy, source: Path, undefended: Path) -> Path | None:
    """Folder of the ancestor the policy names.

    Raises:
        PolicyError: It is one of the two models that are compared with it.
        ModelError: It cannot be had.
    """
    named = policy.red_team.ancestor
    if named is None or named == "undefended":
        return None if named is None else undefended
    folder = local_folder(named)
    root = hash_directory(folder).payload.root
    if root == hash_directory(undefended).payload.root:
        advice = 'if that is public, write ancestor = "undefended"'
        raise PolicyError(f"red_team.ancestor: {named} is the undefended model itself; {advice}")
    if root == hash_directory(source).payload.root:
        advice = "name the public model it was made from, or remove the key"
        raise PolicyError(f"red_team.ancestor: {named} is the model to be released; {advice}")
    return folder


def check_relatives(base: "ModelHandle", policy: Policy, ancestor: Path | None) -> None:
    """Whether the ancestor and the donors of merges have the base model's tensors.

    Raises:
        ModelError: One cannot be loaded, or has other shapes or other tokens.
    """
    sources = [str(ancestor)] if policy.red_team.ancestor not in {None, "undefended"} else []
    for target in policy.merge_targets:
        sources += filter(None, [target.donor, target.base])
    for source in dict.fromkeys(sources):
        base.peer(source)


def check_formats(base: "ModelHandle", policy: Policy) -> None:
    """Whether the model has layers for every format that is published or shown to stages.

    Raises:
        ModelError: Nothing would be rounded.
    """
    for key, formats in (("precisions", policy.precisions), ("awareness", policy.seen_in)):
        for form in formats:
            try:
                require_layers(base, form)
            except ModelError as error:
                raise ModelError(f"{key}: {error}") from None


def check_donors(policy: Policy, source: Path, undefended: Path) -> None:
    """Whether every donor is a model of its own.

    Raises:
        PolicyError: It is one of those that it is to be merged with.
        ModelError: It cannot be had.
    """
    for place, target in enumerate(policy.merge_targets):
        others = {"the model to be released": source, "the undefended model": undefended}
        base = target.base or policy.red_team.ancestor
        if base not in {None, "undefended"}:
            others["its own base"] = local_folder(str(base))
        root = _payload_root(local_folder(target.donor))
        for what, folder in others.items():
            if root == _payload_root(folder):
                advice = "name a model with a task of its own"
                raise PolicyError(f"merge_targets[{place}].donor: that is {what}; {advice}")


def _payload_root(folder: Path) -> str:
    return hash_directory(folder).payload.root


def check_data(base: "ModelHandle", policy: Policy) -> None:
    """Everything about the data that can go wrong, before anything is spent.

    Raises:
        ModelError: A data set cannot be read or is too small for an attack, or a concept shares
            examples with the retained data, a merge target with the donor's.
    """
    base.digest(policy.retain.dataset)
    retained, donors = "the retained data", "the donor's data"
    for target, dataset, what in (
        *((concept, policy.retain.dataset, retained) for concept in policy.concepts),
        *((merge, merge.donor_dataset, donors) for merge in policy.merge_targets),
    ):
        overlap = base.overlap(target.dataset, dataset)
        if overlap.exact > policy.gate.max_overlap:
            raise ModelError(
                f"{target.name}: {overlap.exact:.1%} of its examples stand in {what} too "
                f"({target.dataset}); remove them from one of the two, or raise gate.max_overlap"
            )
    for place, spec in enumerate(policy.attacks):
        try:
            _check_read(base, policy, spec)
        except ModelError as error:
            raise ModelError(f"attacks[{place}]: {error}") from error


def _check_read(base: "ModelHandle", policy: Policy, spec: Spec) -> None:
    """Whether an attack has the examples that it reads."""
    attack = Attack.build(spec).located(policy)
    for source in attack.sources:
        base.digest(source)
    if not attack.wants:
        return
    for target in (target for target in policy.targets if spec in policy.aimed_at(target)):
        for dataset in filter(None, (target.dataset, getattr(target, "donor_dataset", None))):
            base.batches(dataset, "attack", size=attack.wants, seed=policy.seed)
