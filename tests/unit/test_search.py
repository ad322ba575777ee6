"""Which attacks go where, and which of them were best."""

from pathlib import Path

import pico
import pytest

from release_guard.evidence import Cost, Outcome, Point, Record, Trial
from release_guard.plugins import Spec
from release_guard.policy import Budget, Policy
from release_guard.search import (
    best_of_each_family,
    from_scratch,
    gentler,
    listed,
    ranked,
    retuned,
    smaller,
)


def record(spec: Spec, *, breach: int | None, height: float = 0.9, seed: int = 0) -> Record:
    cost = Cost(steps=breach or 40, samples=1, flops=1, seconds=1)
    trial = Trial(
        arm="undefended",
        precision="fp32",
        target="t",
        attack=spec,
        seed=seed,
        budget=Budget(unit="steps", limit=40),
        ceiling=0.5,
        split="search",
        examples=10,
        grid_ratio=1.5,
        weights="",
        data="",
    )
    curve = (Point(cost=cost, score=height),)
    outcome = Outcome(ending="breached" if breach else "survived", curve=curve, examples=10)
    return Record(trial=trial, outcome=outcome, origin="listed")


FAST, SLOW = Spec(name="finetune", lr=1e-2), Spec(name="finetune", lr=1e-3)
ADAPTER = Spec(name="lora", lr=1e-2)


def test_cheap_attacks_come_first(tmp_path: Path, image_data: Path) -> None:
    attacks = [{"name": "lora"}, {"name": "finetune"}, {"name": "linear_probe"}]
    policy = Policy.load(pico.pico_policy(tmp_path, image_data, attacks=attacks))
    names = [spec.name for spec in listed(policy, policy.concepts[0])]
    assert names == ["linear_probe", "finetune", "lora"]


def test_from_scratch_only_full_fine_tuning_makes_sense() -> None:
    head = Spec(name="finetune", scope="head")
    assert from_scratch([ADAPTER, FAST, head, SLOW]) == (FAST, SLOW)


def test_retuning_tries_other_rates_once() -> None:
    rates = [spec.options["lr"] for spec in retuned(SLOW, [SLOW, Spec(name="finetune", lr=3e-3)])]
    assert rates == [pytest.approx(3.33e-4), pytest.approx(1e-2)]


def test_ranking_is_by_budget_to_breach_then_by_height() -> None:
    never_low, never_high = Spec(name="lora", lr=1.0), Spec(name="lora", lr=2.0)
    records = [
        record(never_low, breach=None, height=0.2),
        record(SLOW, breach=30),
        record(never_high, breach=None, height=0.4),
        record(FAST, breach=3),
    ]
    assert ranked(records, ceiling=0.5, unit="steps") == [FAST, SLOW, never_high, never_low]
    assert best_of_each_family([FAST, SLOW, never_high]) == (FAST, never_high)


def test_a_chain_is_a_family_by_its_steps() -> None:
    whitened = Spec(name="chain", steps=[{"name": "rescale"}, {"name": "finetune", "lr": 0.1}])
    slower = Spec(name="chain", steps=[{"name": "rescale"}, {"name": "finetune", "lr": 0.01}])
    other = Spec(name="chain", steps=[{"name": "reinit"}, {"name": "finetune", "lr": 0.1}])

    assert best_of_each_family([whitened, FAST, slower, other]) == (whitened, FAST, other)


def test_a_chain_recovers_by_its_last_step() -> None:
    chain = Spec(name="chain", steps=[{"name": "rescale"}, {"name": "finetune", "lr": 0.1}])
    calmer = gentler(chain)

    assert calmer is not None
    assert calmer.label == "rescale > finetune(clip=1.0, lr=0.03)"
    surgical = Spec(name="chain", steps=[{"name": "rescale"}, {"name": "weight_noise"}])
    assert gentler(surgical) is None


def test_less_memory_takes_half_the_batch() -> None:
    assert smaller(Spec(name="finetune", batch=256)) == Spec(name="finetune", batch=128)
    assert smaller(Spec(name="finetune")) == Spec(name="finetune", batch=16)
    chain = Spec(name="chain", steps=[{"name": "rescale"}, {"name": "finetune", "batch": 8}])
    halved = smaller(chain)
    assert halved is not None
    assert halved.label == "rescale > finetune(batch=4)"
    assert smaller(Spec(name="finetune", batch=1)) is None
    assert smaller(Spec(name="weight_noise")) is None


def test_ranking_takes_the_geometric_mean_over_seeds() -> None:
    records = [
        record(FAST, breach=2, seed=0),
        record(FAST, breach=32, seed=1),
        record(SLOW, breach=6, seed=0),
        record(SLOW, breach=6, seed=1),
    ]
    assert ranked(records, ceiling=0.5, unit="steps")[0] == SLOW
