import re

from evidence_builder import example_policy, passing_evidence
from rich_evidence import rich_evidence, rich_policy

from release_guard.noise import scores, section
from release_guard.sweep import places

POLICY = rich_policy()
EVIDENCE = rich_evidence(POLICY)


def test_every_size_has_the_scores_of_all_its_seeds():
    found = scores(places(EVIDENCE, POLICY)[0], "defended")
    assert list(found) == [0.005, 0.01, 0.02, 0.04, 0.08]
    for size, reached in found.items():
        assert len(reached) == 6
        assert max(reached) == 0.2 - 1.5 * size
        assert list(reached) == sorted(reached)


def test_a_curve_joins_its_points_and_its_band_holds_all_seeds():
    first = section(EVIDENCE, POLICY).split("<figure>")[1]
    line, _ = re.findall(r'<polyline points="([^"]*)" class="envelope arm-defended"', first)
    assert len(line.split()) == 5  # the other one is the legend's
    (band,) = re.findall(r'<polygon points="([^"]*)" class="band arm-defended"', first)
    assert len(band.split()) == 10
    assert "0.193 with 0.5 per cent, 0.080 with 8" in first


def test_one_size_is_no_curve():
    policy = example_policy()
    assert section(passing_evidence(policy), policy) == ""
    kept = tuple(
        record
        for record in EVIDENCE.records
        if record.trial.attack.options.get("deviation", 0.02) == 0.02
    )
    assert section(EVIDENCE.model_copy(update={"records": kept}), POLICY) == ""
