import re

from evidence_builder import Asked, example_policy, passing_evidence, record
from rich_evidence import WEAK, rich_evidence, rich_policy

from release_guard.plugins import Spec
from release_guard.strips import best, section
from release_guard.svg import WIDTH
from release_guard.sweep import places

POLICY = example_policy()


def test_the_five_highest_of_the_search_come_first():
    policy = rich_policy()
    for place in places(rich_evidence(policy), policy):
        strips = best(place)
        assert len(strips) == 5
        heights = [strip.search for strip in strips]
        assert heights == sorted(heights, reverse=True)
        everything = [item.height(item.search) for item in place.configurations("defended")]
        assert heights == sorted(everything, reverse=True)[:5]


def test_a_confirmed_breach_is_named():
    policy = rich_policy()
    found = rich_evidence(policy, broken=True)
    (first, *_) = best(places(found, policy)[0])
    assert first.label == WEAK.label
    assert first.finding == "confirmed"
    assert first.note.endswith("on 3 fresh seeds: confirmed")


def test_a_lucky_search_shows_what_fresh_seeds_made_of_it():
    attack = POLICY.attacks[0]

    def run(seed: int, btb: float, *, is_fresh: bool):
        split = "confirm" if is_fresh else "search"
        asked = Asked("defended", attack, "footwear", "fp32", seed, split)
        origin = "confirming" if is_fresh else "listed"
        return record(POLICY, asked, btb, origin, stops=False)

    lucky = run(7, 300, is_fresh=False)
    others = [run(1_000 + number, 2_500, is_fresh=True) for number in range(5)]
    found = passing_evidence(POLICY, records=(lucky, *others))
    (strip,) = best(places(found, POLICY)[0])
    assert strip.search > 0.5 > strip.mean
    assert len(strip.seeds) == 5
    assert strip.finding == "refuted"
    source = section(found, POLICY)
    assert "on 5 fresh seeds: refuted" in source
    assert source.count('class="hollow arm-defended"') == 1


def test_an_attack_that_was_not_run_again_says_so():
    asked = Asked("defended", POLICY.attacks[0], "footwear", "fp32", 7, "search")
    found = passing_evidence(POLICY, records=(record(POLICY, asked, 1e4, "listed"),))
    (strip,) = best(places(found, POLICY)[0])
    assert strip.mean is None
    assert strip.note == "search 0.100; not run on fresh seeds"


def test_nothing_scored_on_the_defended_model_gives_no_section():
    assert section(passing_evidence(POLICY, records=()), POLICY) == ""


def test_a_long_label_is_cut_to_fit_and_stands_whole_in_the_table():
    options = {"batch": 256, "head": "new", "lr": 0.005, "optimizer": "adamw", "warmup": 100}
    attack = Spec.model_validate({"name": "finetune", **options})
    asked = Asked("defended", attack, "footwear", "fp32", 7, "search")
    found = passing_evidence(POLICY, records=(record(POLICY, asked, 1e4, "listed"),))
    picture, table = section(found, POLICY).split("<details>")
    (label,) = re.findall(r'class="halo strong">([^<]*)', picture)
    assert "…" in label
    assert 7.2 * len(label) < WIDTH  # bold
    assert attack.label in table
