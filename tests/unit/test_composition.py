"""Whether the effect of every stage is still there after the last one."""

import math

import pytest
from evidence_builder import example_policy, passing_evidence
from hypothesis import given, settings
from hypothesis import strategies as st

from release_guard.blocks import results
from release_guard.composition import composition, told
from release_guard.errors import IntegrityError
from release_guard.evidence import Effect, Evidence, StageReport
from release_guard.gate import gate
from release_guard.policy import Policy
from release_guard.release import Check, Result
from release_guard.tables import stages as stage_table

SEVERAL = '[{ name = "sophon" }, { name = "mima" }, { name = "merge_guard" }]'
POLICY = example_policy(('[{ name = "sophon" }]', SEVERAL))
NAMES = [spec.name for spec in POLICY.stages]
EFFECTS = ((0.91, 0.85, 0.8), (2.0, 1.5), (0.4,))
"""Of three stages, after themselves and after each later one: they compose."""


def stages(effects: tuple[tuple[float | None, ...], ...] = EFFECTS) -> tuple[StageReport, ...]:
    return tuple(
        StageReport(
            name=name,
            paper="https://example.org",
            options={},
            measures={},
            seconds=1.0,
            effects=tuple(
                Effect.model_construct(after=after, value=value)
                for after, value in zip(NAMES[place:], values, strict=False)
            ),
        )
        for place, (name, values) in enumerate(zip(NAMES, effects, strict=False))
    )


def judged(evidence: Evidence, policy: Policy = POLICY) -> dict[str, Check]:
    return {check.name: check for check in composition(evidence, policy)}


def of(*effects: tuple[float | None, ...]) -> dict[str, Check]:
    return judged(passing_evidence(POLICY, stages=stages(effects)))


def test_stages_that_compose_pass_one_by_one() -> None:
    found = of(*EFFECTS)
    assert list(found) == ["stages/0-sophon", "stages/1-mima", "stages/2-merge_guard"]
    assert {check.result for check in found.values()} == {Result.PASS}
    assert found["stages/0-sophon"].detail == (
        "sophon: effect 0.91 after itself, 0.85 after mima, 0.8 after merge_guard; 87.9 % of it is "
        "left, at least 50 % is asked"
    )
    assert gate(passing_evidence(POLICY, stages=stages()), POLICY).passed


def test_who_undid_a_stage_is_named() -> None:
    found = of((0.91, 0.85, 0.12), (2.0, 1.5), (0.4,))
    undone = found.pop("stages/0-sophon")
    assert undone.result is Result.FAIL
    assert "0.12 after merge_guard: merge_guard undid most of it; 13.2 % of it is" in undone.detail
    assert {check.result for check in found.values()} == {Result.PASS}
    early = of((0.91, 0.12, 0.1), (2.0, 1.5), (0.4,))["stages/0-sophon"]
    assert "mima undid most of it" in early.detail


def test_half_is_left_exactly_and_only_the_end_counts() -> None:
    assert of((0.2, 0.0, 0.1), *EFFECTS[1:])["stages/0-sophon"].result is Result.PASS
    assert of((0.2, 0.2, 0.099), *EFFECTS[1:])["stages/0-sophon"].result is Result.FAIL


def test_the_policy_says_how_much_must_be_left() -> None:
    changes = ('[{ name = "sophon" }]', SEVERAL), ("[gate]", "[gate]\nstage_effect_kept = 0.9")
    policy = example_policy(*changes)
    found = judged(passing_evidence(policy, stages=stages()), policy)
    assert [check.result for check in found.values()] == [Result.FAIL, Result.FAIL, Result.PASS]


@pytest.mark.parametrize("own", [0.0, -0.3])
def test_a_stage_without_an_effect_of_its_own_fails(own: float) -> None:
    found = of(*EFFECTS[:2], (own,))["stages/2-merge_guard"]
    assert found.result is Result.FAIL
    assert "it did nothing that it is for" in found.detail
    assert of((own, 1.0, 1.0), *EFFECTS[1:])["stages/0-sophon"].result is Result.FAIL


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_finite_number_never_passes(value: float | None, place: int) -> None:
    effects = list(EFFECTS[0])
    effects[place] = value
    found = of(tuple(effects), *EFFECTS[1:])["stages/0-sophon"]
    assert found.result is Result.INCONCLUSIVE


def test_missing_looks_and_missing_stages_never_pass() -> None:
    nothing = judged(passing_evidence(POLICY, stages=()))
    assert {check.result for check in nothing.values()} == {Result.INCONCLUSIVE}
    assert len(nothing) == 3
    short = of((0.91, 0.85), *EFFECTS[1:])["stages/0-sophon"]
    assert short.result is Result.INCONCLUSIVE
    swapped = judged(passing_evidence(POLICY, stages=stages()[::-1]))
    assert swapped["stages/0-sophon"].result is Result.INCONCLUSIVE


def test_a_stage_that_the_policy_does_not_name_never_passes() -> None:
    policy = example_policy()
    found = judged(passing_evidence(policy, stages=stages()), policy)
    assert found["stages/1-mima"].result is Result.INCONCLUSIVE


def test_a_model_judged_as_it_is_is_asked_for_no_stage() -> None:
    assert judged(passing_evidence(POLICY, stages=(), as_is=True)) == {}
    claimed = judged(passing_evidence(POLICY, stages=stages(((0.9,),)), as_is=True))
    assert len(claimed) == 3, "what says that stages ran is judged by them"


def test_evidence_from_before_there_were_effects_is_judged_as_it_was() -> None:
    lines = passing_evidence(POLICY, stages=stages(((), (), ())), artefacts={}).to_jsonl()
    old = lines.replace(b'"schema_version":3', b'"schema_version":1')
    for later in (b'"as_is":false,', b'"artefacts":{},', b'"unrunnable":{},'):
        assert later in old or later.replace(b",", b"") in old
        old = old.replace(later, b"")
    evidence = Evidence.from_jsonl(old)
    assert judged(evidence) == {}
    assert gate(evidence, POLICY).passed
    assert not gate(Evidence.from_jsonl(lines), POLICY).passed
    with pytest.raises(IntegrityError):
        Evidence.from_jsonl(lines.replace(b'"schema_version":3', b'"schema_version":4'))


LOOKS = st.lists(st.sampled_from([-0.1, 0.0, 0.1, 0.45, 0.5, 0.9, 1.3]), min_size=3, max_size=3)


@settings(deadline=None, database=None)
@given(LOOKS, LOOKS, LOOKS, st.data())
def test_losing_an_effect_never_helps(
    first: list[float], second: list[float], third: list[float], data: st.DataObject
) -> None:
    """Nor does losing a report, nor less of an effect at the end."""
    whole = stages((tuple(first), tuple(second[:2]), tuple(third[:1])))
    place = data.draw(st.integers(0, 2))
    report = whole[place]
    look = data.draw(st.integers(0, len(report.effects) - 1))
    kind = data.draw(st.sampled_from(["lost", "unknown", "less", "report"]))
    effects = list(report.effects)
    if kind == "lost":
        del effects[look]
    elif kind == "less":
        effects[-1] = Effect(after=effects[-1].after, value=(effects[-1].value or 0) - 0.2)
    else:
        effects[look] = Effect(after=effects[look].after, value=None)
    changed = report.model_copy(update={"effects": tuple(effects)})
    lost = () if kind == "report" else (changed,)
    worse = (*whole[:place], *lost, *whole[place + 1 :])

    def passes(reports: tuple[StageReport, ...]) -> bool:
        return gate(passing_evidence(POLICY, stages=reports), POLICY).passed

    assert passes(whole) or not passes(worse)
    assert kind == "less" or not passes(worse)


def test_the_edge_of_that_property_has_both_sides() -> None:
    assert gate(passing_evidence(POLICY, stages=stages()), POLICY).passed


def test_a_report_keeps_what_is_finite_and_says_what_is_not() -> None:
    common = {"name": "x", "paper": "https://example.org", "options": {}, "seconds": 1.0}
    report = StageReport.of(measures={"a": 1.0, "b": math.inf}, caveats=["c"], **common)
    assert (report.measures, report.caveats) == ({"a": 1.0}, ("c", "b: not a finite number"))
    seen = report.seen("x", 0.5).seen("y", math.nan)
    assert told(seen) == "0.5 after itself, no finite number after y"


def test_card_and_report_show_effects_cost_and_caveats() -> None:
    caveat = "tied embeddings were left as they are"
    reports = tuple(
        report.model_copy(update={"caveats": (caveat,)} if report.name == "merge_guard" else {})
        for report in stages()
    )
    evidence = passing_evidence(POLICY, stages=reports)
    for text in (results(evidence, gate(evidence, POLICY), POLICY), stage_table(evidence)):
        assert caveat in text
        assert "0.91 after itself" in text
        assert "none counted" in text
    assert caveat in Evidence.from_jsonl(evidence.to_jsonl()).stages[2].caveats
