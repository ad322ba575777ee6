"""Which configurations are tried on which arm, and which of them were the best."""

from collections.abc import Iterable, Sequence
from itertools import islice

from release_guard.attacks import Attack
from release_guard.errors import ModelError
from release_guard.evidence import Record
from release_guard.plugins import Spec
from release_guard.policy import MergeTarget, Policy, Target, Unit
from release_guard.priors import Fits, drawable, draws, rounded
from release_guard.statistics import best_score, budget_to_breach, geometric_mean

TUNING_FACTORS = (1 / 3, 3.0, 10.0)  # from scratch wants other, mostly larger, learning rates
DRAWN_AT_ONCE = 8  # attacks of a pool, whatever the number of workers: any number draws the same
CALMER = 0.3  # what a learning rate is multiplied by after a collapse
FROM_SCRATCH = "finetune"  # adapters and probes on random features only weaken that arm


def listed(policy: Policy, target: Target) -> tuple[Spec, ...]:
    """The policy's attacks on a target, cheapest and most often fatal first."""
    built = [(Attack.build(spec), spec) for spec in policy.attacks]
    aimed = [(attack.expense, spec) for attack, spec in built if target in attack.targets(policy)]
    return tuple(spec for _, spec in sorted(aimed, key=lambda item: item[0]))


def controls(policy: Policy, target: Target) -> tuple[Spec, ...]:
    """The listed attacks that are tried on other arms than the defended one.

    A surgical attack counts against the defended model by itself: it has no budget to compare. A
    merge is different: whether the undefended model gains the task by it is all there is to know.
    """
    attacks = listed(policy, target)
    if isinstance(target, MergeTarget):
        return attacks
    return tuple(spec for spec in attacks if not Attack.build(spec).surgical)


def pool(policy: Policy, target: Target, fits: Fits) -> tuple[Spec, ...]:
    """The attacks that are drawn for a target: always the same ones for a policy and a model.

    Raises:
        ModelError: The model or its data can take none of them.
    """
    families = drawable(listed(policy, target))
    if not families or not policy.red_team.drawn:
        return ()

    def teaches(attack: Attack) -> bool:  # which may depend on what was drawn
        return fits(attack) and not attack.surgical

    stream = draws(families, seed=f"{policy.seed}/{target.name}", fits=teaches)
    found = tuple(islice(stream, policy.red_team.drawn_pool))
    if not found:
        names = ", ".join(spec.name for spec in best_of_each_family(families))
        raise ModelError(
            f"{target.name}: no options drawn for {names} fit this model and its data (blocks, "
            "examples to attack with); add examples, or set red_team.drawn to 0"
        )
    return found


def gentler(spec: Spec) -> Spec | None:
    """The attack that recovers from a collapse: slower, with a bound on every update."""
    attack = Attack.build(spec.last)
    lr = getattr(attack, "lr", None)
    if lr is None:
        return None
    calmer: dict[str, float] = {"lr": rounded(CALMER * lr)}
    if "clip" in type(attack).model_fields:
        calmer["clip"] = min(1.0, getattr(attack, "clip", None) or 1.0)
    return spec.changed(**calmer)


def smaller(spec: Spec) -> Spec | None:
    """The attack that needs less memory: batches of half the size."""
    batch = getattr(Attack.build(spec.last), "batch", 1)
    return spec.changed(batch=batch // 2) if batch > 1 else None


def from_scratch(attacks: Iterable[Spec]) -> tuple[Spec, ...]:
    """The listed attacks that make sense on random weights: full fine-tuning, whatever the head."""
    scoped = (spec for spec in attacks if spec.name == FROM_SCRATCH)
    return tuple(spec for spec in scoped if spec.options.get("scope", "all") == "all")


def retuned(best: Spec, tried: Sequence[Spec]) -> tuple[Spec, ...]:
    """The best attack at other learning rates, so that an arm has its own tuning."""
    rate = best.options.get("lr")
    if rate is None:
        return ()
    rates = [float(f"{rate * factor:.3g}") for factor in TUNING_FACTORS]
    variants = [best.changed(lr=rate) for rate in rates]
    return tuple(variant for variant in variants if variant not in tried)


def ranked(records: Iterable[Record], *, ceiling: float, unit: Unit) -> list[Spec]:
    """Configurations, best for the attacker first.

    Least geometric-mean budget to breach over seeds; among those that never breached, the highest
    score.
    """
    by_spec: dict[str, list[Record]] = {}
    for record in records:
        by_spec.setdefault(record.trial.attack.label, []).append(record)

    def order(group: list[Record]) -> tuple[float, float, str]:
        costs = [budget_to_breach(record.outcome, ceiling, unit) for record in group]
        heights = [best_score(record.outcome) for record in group]
        return geometric_mean(costs), -sum(heights) / len(heights), group[0].trial.attack.label

    return [group[0].trial.attack for group in sorted(by_spec.values(), key=order)]


def best_of_each_family(specs: Sequence[Spec]) -> tuple[Spec, ...]:
    """The first of each attack family in a ranking."""
    seen: dict[str, Spec] = {}
    for spec in specs:
        seen.setdefault(spec.family, spec)
    return tuple(seen.values())
