"""Which configurations are tried on which arm, and which of them were the best."""

from collections.abc import Callable, Iterable, Sequence

from release_guard.attacks import Attack
from release_guard.evidence import Record
from release_guard.plugins import Spec
from release_guard.policy import Policy, Target, Unit
from release_guard.statistics import best_score, budget_to_breach, geometric_mean

TUNING_FACTORS = (1 / 3, 3.0, 10.0)  # from scratch wants other, mostly larger, learning rates
FROM_SCRATCH = "finetune"  # adapters and probes on random features only weaken that arm


def listed(policy: Policy, target: Target) -> tuple[Spec, ...]:
    """The policy's attacks on a target, cheapest and most often fatal first."""
    built = [(Attack.build(spec), spec) for spec in policy.attacks]
    aimed = [(attack.expense, spec) for attack, spec in built if target in attack.targets(policy)]
    return tuple(spec for _, spec in sorted(aimed, key=lambda item: item[0]))


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
    variants = [Spec(name=best.name, **{**best.options, "lr": rate}) for rate in rates]
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
        seen.setdefault(spec.name, spec)
    return tuple(seen.values())


def by_expense(policy: Policy, target: Target) -> Callable[[Record], int]:
    """Sort key that puts records of cheap attacks first."""
    order = {spec.label: place for place, spec in enumerate(listed(policy, target))}
    return lambda record: order.get(record.trial.attack.label, len(order))
