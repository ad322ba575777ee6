"""Drawing an attack's options from the priors that stand beside its fields."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from release_guard.anatomy import anatomy
from release_guard.attacks import Attack, Choice, LogUniform
from release_guard.errors import ModelError, PolicyError
from release_guard.modalities import ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import MergeTarget, Target

Prior = LogUniform | Choice
Fits = Callable[[Attack], bool]
"""Whether a model and a target's data can take an attack at all."""

_DIGITS = 3  # of a drawn number: enough to tell two apart, and readable in a report
_PATIENCE = 1_000  # draws in a row that do not fit before it is the model that does not

# By what factors optimizers shift the two ends of a prior of learning rates, which spans all of
# them: gradients are small numbers, and those that divide by their size take smaller steps.
_SHIFTS: Mapping[str, tuple[float, float]] = {
    "sgd": (1e2, 1.0),
    "nesterov": (1e2, 1.0),
    "adagrad": (1e2, 1.0),
    "adadelta": (1e4, 1e2),
    "adam": (1.0, 1e-1),
    "adamw": (1.0, 1e-1),
}


def priors(attack: Attack) -> dict[str, Prior]:
    """The options of an attack that can be drawn; the rate last, as it depends on the optimizer."""
    found = {
        name: item
        for name, field in type(attack).model_fields.items()
        for item in field.metadata
        if isinstance(item, LogUniform | Choice)
    }
    return dict(sorted(found.items(), key=lambda item: item[0] == "lr"))


def searchable(listed: Sequence[Spec]) -> tuple[Spec, ...]:
    """The listed attacks that have priors."""
    return tuple(spec for spec in listed if priors(Attack.build(spec)))


def drawable(listed: Sequence[Spec]) -> tuple[Spec, ...]:
    """Those of them that teach: surgical ones need not breach the undefended model to count."""
    return tuple(spec for spec in searchable(listed) if not Attack.build(spec).surgical)


def draws(listed: Sequence[Spec], *, seed: str, fits: Fits) -> Iterator[Spec]:
    """Independent attacks: a listed family, one of its members, then every prior.

    What has no prior stays as it is listed. A draw that does not fit is drawn again whole, so that
    the others keep their law; so is one that came before, which only families without any
    continuous option can give. They end where nothing else fits.
    """
    stream = random.Random(seed)  # noqa: S311  a reproducible draw, not a secret
    families = sorted({spec.name for spec in listed})
    seen: set[str] = set()
    refused = 0
    while refused < _PATIENCE:
        family = _pick(families, stream)
        spec = _drawn(_pick([spec for spec in listed if spec.name == family], stream), stream)
        if spec.label in seen or not possible(spec, fits):
            refused += 1
            continue
        refused = 0
        seen.add(spec.label)
        yield spec


def possible(spec: Spec, fits: Fits) -> bool:
    """Whether an attack can be built and fits."""
    try:
        return fits(Attack.build(spec))
    except PolicyError:  # options that exclude each other
        return False


def fitting(model: ModelHandle, target: Target) -> Fits:
    """What this model and the examples of this target can take.

    By the names that such options have in every attack: `last_k` and `new_blocks` blocks, a new
    `head`, parts to `realign` or `swap`; and by the examples that an attack wants at once.
    """
    most_blocks = len(model.blocks)
    new_head = not _is_tied(model)
    known_forms = _known_forms(model)
    enough: dict[int, bool] = {}

    def fits(attack: Attack) -> bool:
        options = attack.model_dump()
        if max(options.get("last_k", 0), options.get("new_blocks", 0)) > most_blocks:
            return False
        if options.get("head") == "new" and not new_head:
            return False
        if not {options.get("realign", "none"), options.get("swap", "none")} <= known_forms:
            return False
        size = max(1, attack.wants)
        if size not in enough:
            enough[size] = _has_batch(model, target, size)
        return enough[size]

    return fits


def _drawn(listed: Spec, stream: random.Random) -> Spec:
    drawn: dict[str, Any] = {}
    for name, prior in priors(Attack.build(listed)).items():
        shift = (1.0, 1.0)
        if name == "lr" and "optimizer" in drawn:
            shift = _SHIFTS.get(drawn["optimizer"], shift)
        drawn[name] = _sample(prior, stream, shift)
    return Spec(name=listed.name, **{**listed.options, **drawn})


def _sample(prior: Prior, stream: random.Random, shift: tuple[float, float]) -> Any:
    if isinstance(prior, Choice):
        return _pick(prior.values, stream)
    low, high = prior.low * shift[0], prior.high * shift[1]
    return rounded(low * (high / low) ** stream.random())


def rounded(value: float) -> float:
    """A number with few digits."""
    return float(f"{value:.{_DIGITS}g}")


def _pick(values: Sequence[Any], stream: random.Random) -> Any:
    return values[int(stream.random() * len(values))]  # the same in every version of Python


def _has_batch(model: ModelHandle, target: Target, size: int) -> bool:
    """Of the target's examples, and of the donor's where there is one."""
    sources = [target.dataset]
    sources += [target.donor_dataset] if isinstance(target, MergeTarget) else []
    try:
        for source in sources:
            model.batches(source, "attack", size=size, seed=0)
    except ModelError:
        return False
    return True


def _known_forms(model: ModelHandle) -> set[str]:
    """Ways to realign or swap a model's parts; of one whose parts are not known, none."""
    try:
        body = anatomy(model.module)
    except ModelError:
        return {"none"}
    parts = {"none", "anchored", "joint", "attention", "mlp"}
    return parts if body.stream is None else parts | {"rotated"}


def _is_tied(model: ModelHandle) -> bool:
    weight = model.head.weight
    others = (part for part in model.module.modules() if part is not model.head)
    return any(getattr(part, "weight", None) is weight for part in others)
