"""Bugs of published benchmarks and defences, each of which this project must not have."""

import pytest
from evidence_builder import example_policy, passing_evidence

from release_guard.attacks import Attack
from release_guard.errors import PolicyError
from release_guard.gate import gate
from release_guard.modalities import Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept
from release_guard.release import Result


@pytest.fixture(scope="module", params=["image_classification", "causal_lm"])
def subject(request: pytest.FixtureRequest) -> tuple[ModelHandle, str]:
    """A model and what it must not learn."""
    images = request.param == "image_classification"
    folder = request.getfixturevalue("classifier_folder" if images else "lm_folder")
    data = request.getfixturevalue("image_data" if images else "text_data")
    model = Modality.build(Spec(name=request.param)).load(str(folder))
    return model, str(data / ("restricted.parquet" if images else "restricted.jsonl"))


def test_no_example_is_dropped_from_the_last_batch(subject: tuple[ModelHandle, str]) -> None:
    """SOPHON's test loader dropped it."""
    model, dataset = subject
    scored = [
        len(model.scores(dataset, split, limit=10_000)) for split in ("search_half", "confirm_half")
    ]
    assert sum(scored) == 900
    assert len(model.scores(dataset, "search", limit=77)) == 77


def test_hooks_do_not_accumulate(subject: tuple[ModelHandle, str]) -> None:
    """RepNoise's did, with every batch."""
    model, dataset = subject
    before = hooks(model)
    batch = next(model.batches(dataset, "attack", size=8, seed=0))
    for _ in range(2):
        model.logits(batch)
        model.features(batch)
        model.scores(dataset, "search", limit=8)
    concept = Concept(name="restricted", dataset=dataset, ceiling=0.5)
    for name in ("finetune", "linear_probe"):
        attack = Attack.build(Spec(name=name))
        copies = attack.tamper(model, concept, budget=Budget(limit=3), grid_ratio=1.5, seed=0)
        assert {hooks(copy.model) for copy in copies} == {before}
    assert hooks(model) == before


def hooks(model: ModelHandle) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in model.module.modules() for kind in kinds)


@pytest.mark.parametrize(("value", "read"), [("false", False), ("no", False), (False, False)])
def test_a_switch_that_says_no_is_off(value: object, *, read: bool) -> None:
    """`type=bool` took every text for true: Deep Ignorance's LoRA runs trained all weights."""
    assert Attack.build(Spec(name="lora", packed=value)).packed is read


@pytest.mark.parametrize("value", ["maybe", "", 2, None])
def test_a_switch_that_says_neither_is_refused(value: object) -> None:
    with pytest.raises(PolicyError, match="packed"):
        Attack.build(Spec(name="lora", packed=value))


def test_adapters_train_what_they_say(subject: tuple[ModelHandle, str]) -> None:
    model, dataset = subject
    concept = Concept(name="restricted", dataset=dataset, ceiling=0.5)
    attack = Attack.build(Spec(name="lora", rank=1, head="frozen"))
    (first, *_) = attack.tamper(model, concept, budget=Budget(limit=1), grid_ratio=1.5, seed=0)
    adapted = [name for name in first.model.state() if "lora_" in name]
    assert adapted
    assert first.parameters == sum(first.model.state()[name].numel() for name in adapted)
    assert first.parameters < 0.2 * sum(weight.numel() for weight in model.state().values())


def test_attacks_of_one_name_do_not_overwrite_each_other() -> None:
    """TamperBench's did: the second one's results took the place of the first one's."""
    policy = example_policy()
    evidence = passing_evidence(policy)
    names = [record.trial.attack.label for record in evidence.records]
    twins = [spec.label for spec in policy.attacks if spec.name == "finetune"]
    assert len(set(twins)) == 2
    for twin in twins:
        fewer = [r for r, name in zip(evidence.records, names, strict=True) if name != twin]
        lost = evidence.model_copy(update={"records": tuple(fewer), "planned": len(fewer)})
        missing = {check.name: check.detail for check in gate(lost, policy).checks}
        assert twin in missing["coverage/footwear@fp32"]


def test_a_base_that_scores_nothing_has_nothing_to_lose() -> None:
    """A baseline of 0 gave a drop of 0, and that passed."""
    policy = example_policy()
    evidence = passing_evidence(policy)
    assert gate(evidence, policy).passed
    nothing = tuple(
        item.model_copy(
            update={"base": (0.0,) * len(item.base), "immunized": (0.0,) * len(item.base)}
        )
        for item in evidence.retention
    )
    verdict = gate(evidence.model_copy(update={"retention": nothing}), policy)
    (check,) = [item for item in verdict.checks if item.name == "retains/retained@fp32"]
    assert check.result is Result.INCONCLUSIVE
    assert "nothing to lose" in check.detail
