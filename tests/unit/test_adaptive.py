"""The adaptive search: where it looks next, whatever the number of workers."""

import math
import statistics

import pytest

from release_guard.adaptive import BATCH, Space, Tried, loss, propose
from release_guard.attacks import Attack
from release_guard.evidence import Cost, Outcome, Point
from release_guard.plugins import Spec
from release_guard.priors import priors

LISTED = (Spec(name="finetune", batch=256), Spec(name="lora"), Spec(name="linear_probe"))


def anything(attack: Attack) -> bool:
    return True


def outcome(*points: tuple[int, float]) -> Outcome:
    curve = tuple(
        Point(cost=Cost(steps=steps, samples=1, flops=1, seconds=1), score=score)
        for steps, score in points
    )
    return Outcome(ending="survived", curve=curve, examples=10)


def test_early_breaches_are_best_and_misses_count_what_they_lack() -> None:
    def lost(*points: tuple[int, float]) -> float:
        return loss(outcome(*points), 0.5, 100, "steps")

    assert lost((1, 0.1), (10, 0.6)) == pytest.approx(math.log(0.1))
    assert lost((1, 0.1), (100, 0.6)) == pytest.approx(0)
    assert lost((1, 0.1), (100, 0.4)) == pytest.approx(0.2)
    assert lost() == 1
    assert -20 < lost((0, 0.9)) < lost((1, 0.9))  # surgical: at no step


def test_proposals_follow_from_what_is_known() -> None:
    tried = [Tried(spec, place / 3) for place, spec in enumerate(LISTED)]

    def proposed(number: int, seed: str = "0/t@fp32") -> tuple[Spec, ...]:
        return propose(LISTED, tried, number=number, fits=anything, seed=seed)

    assert proposed(0) == proposed(0)
    assert proposed(0) != proposed(1)
    assert proposed(0) != proposed(0, seed="1/t@fp32")
    assert len(proposed(0)) == BATCH


def test_half_goes_to_the_best_family_the_rest_to_the_others_in_turn() -> None:
    tried = [Tried(LISTED[0], 0.9), Tried(LISTED[1], -1.0), Tried(LISTED[2], 0.5)]
    for number in range(3):
        names = [
            each.name for each in propose(LISTED, tried, number=number, fits=anything, seed="s")
        ]
        assert names.count("lora") == BATCH // 2
        assert {"finetune", "linear_probe"} <= set(names)


def test_the_search_closes_in_on_the_best_rate() -> None:
    """The loss is the distance from a rate of 3e-3 in decades; nothing else matters."""
    tried = [Tried(Spec(name="lora", lr=lr), abs(math.log10(lr / 3e-3))) for lr in (1e-5, 1e-1)]
    rates: list[float] = []
    for number in range(20):
        for spec in propose(LISTED[1:2], tried, number=number, fits=anything, seed="s"):
            rates.append(spec.options["lr"])
            tried.append(Tried(spec, abs(math.log10(rates[-1] / 3e-3))))
    late = [abs(math.log10(rate / 3e-3)) for rate in rates[-20:]]
    assert statistics.median(late) < 0.5  # a uniform draw over four decades has 1


def test_a_range_grows_beyond_an_edge_that_was_best() -> None:
    found = priors(Attack.build(LISTED[1]))  # 1e-5 to 1e-1

    def grown(*rates: float) -> tuple[float, float]:
        tried = [
            (Attack.build(Spec(name="lora", lr=rate)), float(place))
            for place, rate in enumerate(rates)
        ]
        return Space.of(found, tried).ranges["lr"]

    assert grown(1e-3) == (1e-5, 1e-1)
    assert grown(9e-2, 1e-3) == (1e-5, pytest.approx(0.3))
    assert grown(0.29, 9e-2) == (1e-5, pytest.approx(0.87))
    assert grown(1.1e-5, 1e-3) == (pytest.approx(1e-5 / 3), 1e-1)


def test_listed_values_beyond_a_prior_are_part_of_the_search() -> None:
    attack = Attack.build(LISTED[0])
    space = Space.of(priors(attack), [(attack, 0.0)])
    assert 256 in space.values["batch"]
    assert space.decode(space.encode(attack))["batch"] == 256


def test_what_does_not_fit_is_never_proposed() -> None:
    tried = [Tried(LISTED[0], 0.1)]

    def small(attack: Attack) -> bool:
        return attack.model_dump()["batch"] <= 32

    for number in range(5):
        found = propose(LISTED[:1], tried, number=number, fits=small, seed="s")
        assert {spec.options["batch"] for spec in found} <= {16, 32}


def test_nothing_is_proposed_twice_and_a_family_that_ran_dry_gives_way() -> None:
    listed = (Spec(name="weight_noise"), Spec(name="lora"))  # the first has five settings
    tried = [Tried(listed[0], 0.1)]  # the best, with its default written nowhere
    noise: list[float] = []
    for number in range(4):
        found = propose(listed, tried, number=number, fits=anything, seed="s")
        assert len(found) == BATCH
        tried += [Tried(spec, 0.9) for spec in found]
        noise += [spec.options["deviation"] for spec in found if spec.name == "weight_noise"]
    assert sorted(noise) == [0.005, 0.01, 0.04, 0.08]
