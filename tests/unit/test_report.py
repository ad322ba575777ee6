import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from evidence_builder import (
    MERGED,
    POLICY,
    Asked,
    evidence,
    example_policy,
    passing_evidence,
    record,
    refused_evidence,
)
from rich_evidence import HIDDEN, WEAK, rich_evidence, rich_policy

from release_guard.card import lint
from release_guard.evidence import Change, Evidence, StageReport
from release_guard.gate import gate
from release_guard.plugins import Spec
from release_guard.policy import Policy
from release_guard.release import Check, Result, Verdict
from release_guard.report import render

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = '<script>alert("1")</script><img src=x>'


class Page(HTMLParser):
    """Checks nesting while it reads; keeps what the tests ask for."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def wide_policy() -> Policy:
    second = '[[concepts]]\nname = "hats"\ndataset = "hats.parquet"\nceiling = "midpoint"\n\n'
    return example_policy(
        ('precisions = ["fp32"]', 'precisions = ["fp32", "nf4"]'),
        ("[red_team]", f"{second}[red_team]"),
    )


def alone_policy() -> Policy:
    return example_policy(('profile = "smoke"', 'profile = "smoke"\nnever_knew = "unavailable"'))


def undecided_evidence(policy: Policy) -> Evidence:
    def costs(asked: Asked) -> float:
        limit = policy.red_team.budget.limit
        return {"undefended": 10, "never_knew": limit, "defended": limit * 1.2}[asked.arm]

    return evidence(policy, costs)


def empty_evidence(policy: Policy) -> Evidence:
    nothing = {"records": (), "retention": (), "stages": (), "ceilings": {}, "planned": 0}
    return evidence(policy, lambda _: 1.0, change=Change(identical=True, relative_l2={}), **nothing)


def broken_evidence(policy: Policy) -> Evidence:
    """Only crashes, only on one arm."""
    asked = Asked("defended", policy.attacks[0], "footwear", "fp32", 7, "search")
    crashed = record(policy, asked, 100, "listed", ending="failed")
    bare = crashed.outcome.model_copy(update={"curve": (), "examples": 0, "note": "no memory"})
    only = crashed.model_copy(update={"outcome": bare})
    return evidence(policy, lambda _: 1.0, records=(only,), retention=())


CASES = {
    "passing": (example_policy(), passing_evidence),
    "refused": (example_policy(), refused_evidence),
    "undecided": (example_policy(), undecided_evidence),
    "empty": (example_policy(), empty_evidence),
    "broken": (example_policy(), broken_evidence),
    "wide": (wide_policy(), undecided_evidence),
    "alone": (alone_policy(), passing_evidence),
    "rich": (rich_policy(), rich_evidence),
}
every_case = pytest.mark.parametrize("case", CASES)


@cache
def source_of(case: str) -> str:
    policy, build = CASES[case]
    return page(policy, build(policy))


def page(policy: Policy, found: Evidence, title: str = "acme/shoes") -> str:
    return render(found, gate(found, policy), policy, title=title)


@every_case
def test_every_verdict_gives_a_well_formed_page_with_described_pictures(case):
    parsed = Page(source_of(case))
    pictures = parsed.attributes("svg")
    assert bool(pictures) == (case != "empty")
    assert all(each["role"] == "img" and each["aria-label"] for each in pictures)
    assert {"PASS", "FAIL", "INCONCLUSIVE"} & set(parsed.text.split())


@every_case
def test_nothing_is_fetched_and_nothing_runs(case):
    source = source_of(case)
    parsed = Page(source)
    tags = {tag for tag, _ in parsed.tags}
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object", "use", "image"})
    assert all("src" not in attributes for _, attributes in parsed.tags)
    assert all(not name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert "url(" not in source
    assert "@import" not in source
    links = {each["href"] for each in parsed.attributes("a")}
    assert links <= {"https://arxiv.org/abs/2404.12699"}


@every_case
def test_every_coordinate_is_a_number_inside_its_picture(case):
    source = source_of(case)
    for picture in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        _, _, width, height = map(float, re.search(r'viewBox="([^"]*)"', picture)[1].split())
        for points in re.findall(r'points="([^"]*)"', picture):
            for x, y in (pair.split(",") for pair in points.split()):
                assert 0 <= float(x) <= width
                assert 0 <= float(y) <= height


def test_the_page_tells_what_was_found():
    policy = example_policy()
    found = passing_evidence(policy)
    verdict = gate(found, policy)
    text = Page(render(found, verdict, policy, title="acme/shoes")).text
    assert verdict.claim[1:] in text
    for said in [*verdict.not_tested, *(check.name for check in verdict.checks)]:
        assert said in text
    for attack in policy.attacks:
        assert attack.label in text
    assert {record.trial.seed for record in found.records} <= {
        int(n) for n in re.findall(r"\d+", text)
    }
    assert f"{len(found.records)} of {found.planned}" in text


def test_a_confirmed_breach_stands_out():
    policy = example_policy()
    marked = page(policy, refused_evidence(policy))
    cells = re.findall(r'<td role="cell" data-name="fp32, defended" class="(\w*)">([^<]*)', marked)
    assert [css for css, _ in cells] == ["bad", "good", "good", "good"]
    assert "breached at " in cells[0][1]
    assert "confirmed" in cells[0][1]
    assert "neither signed nor pushed" in Page(marked).text


def test_a_breach_beyond_the_budget_is_listed():
    policy = example_policy()
    text = Page(page(policy, undecided_evidence(policy))).text
    section = text.split("Breaches beyond the budget")[1].split("Checks")[0]
    assert "steps, beyond the budget (" in section
    text = Page(page(policy, passing_evidence(policy))).text
    assert "None was seen" in text.split("Breaches beyond the budget")[1]


def test_texts_of_others_are_escaped():
    policy = example_policy(('{ name = "linear_probe" }', f"{{ name = '{HOSTILE}' }}"))
    hostile = StageReport(
        name=HOSTILE,
        paper=f"javascript:{HOSTILE}",
        options={HOSTILE: HOSTILE},
        measures={},
        seconds=1,
    )
    found = passing_evidence(
        policy,
        stages=(hostile,),
        environment={HOSTILE: HOSTILE},
        tool=HOSTILE,
        change=Change(identical=False, relative_l2={HOSTILE: 0.5}),
    )
    verdict = Verdict([Check(HOSTILE, Result.FAIL, HOSTILE)], (), HOSTILE, (HOSTILE,))
    parsed = Page(render(found, verdict, policy, title=HOSTILE))
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "img"})
    assert parsed.attributes("a") == []
    assert parsed.text.count(HOSTILE) >= 10


def test_equal_evidence_gives_equal_bytes_in_any_order():
    policy = wide_policy()
    found = undecided_evidence(policy)
    shuffled = found.model_copy(update={"records": found.records[::-1]})
    reread = Evidence.from_jsonl(shuffled.to_jsonl())
    assert page(policy, found) == page(policy, shuffled) == page(policy, reread)


def test_folders_of_the_machine_stay_out(tmp_path: Path):
    (tmp_path / "policy.toml").write_text(POLICY)
    policy = Policy.load(tmp_path / "policy.toml")
    assert str(tmp_path) in policy.retain.dataset
    source = page(policy, passing_evidence(policy))
    assert str(tmp_path) not in source
    assert "retained.parquet" in source


@every_case
def test_no_page_promises_more_than_was_measured(case):
    lint(Page(source_of(case)).text)


def test_a_seldom_unit_is_read_off_the_curves():
    policy = example_policy(
        ('{ unit = "steps", limit = 400 }', '{ unit = "flops", limit = 400000000.0 }')
    )
    text = Page(page(policy, passing_evidence(policy))).text
    assert "4.00e8 FLOPs" in text
    assert "flops spent (log scale)" in text


def test_a_tuned_attack_stands_in_the_table():
    policy = example_policy()
    tuned = Spec.model_validate({**policy.attacks[0].model_dump(), "lr": 0.123})
    assert tuned.label in Page(page(policy, passing_evidence(policy))).text


def test_trials_that_ran_on_above_the_ceiling_are_counted_as_breaches():
    policy = example_policy()
    found = refused_evidence(policy)
    kept = tuple(
        record.model_copy(
            update={"outcome": record.outcome.model_copy(update={"ending": "survived"})}
        )
        for record in found.records
    )
    unmarked = found.model_copy(update={"records": kept})
    (before, after) = (
        re.search(r"defended: ([^;]*);", alt)[1]
        for source in (page(policy, found), page(policy, unmarked))
        for alt in re.findall(r'aria-label="(undefended: \d+ breached[^"]*)"', source)
    )
    assert before == after
    assert "breached" in before


def sections(source: str) -> dict[str, str]:
    """Each section by its title."""
    found = re.findall(r"<section>\n<h2>([^<]*)</h2>\n(.*?)</section>", source, re.DOTALL)
    return dict(found)


@every_case
def test_every_picture_stands_under_a_sentence_on_how_to_read_it(case):
    for title, content in sections(source_of(case)).items():
        if "<svg" in content:
            assert content.startswith('<p class="how">'), title


@pytest.mark.parametrize(
    "title",
    [
        "Harm against cost",
        "Who still stands",
        "From the search to fresh seeds",
        "Learning rate against cost",
        "What more trials would find",
        "Noise on the weights",
        "Distance moved",
    ],
)
def test_pictures_whose_figures_are_not_written_in_them_have_a_table(title):
    content = sections(source_of("rich"))[title]
    figures = re.findall(r"<figure>.*?</figure>", content, re.DOTALL)
    assert figures
    for figure in figures:
        assert "<details><summary>The same as a table</summary>" in figure
        assert "<table" in figure.split("<details>")[1]


def test_the_key_figures_name_the_worst_place_of_the_draws():
    policy = rich_policy()
    content = sections(page(policy, rich_evidence(policy, broken=True)))["Key figures"]
    assert "random attacks</span><b>≤ 40.1 %</b>" in content
    assert "Of 20 drawn, 1 did, 3 were lost." in content
    assert "random attacks" not in sections(source_of("passing"))["Key figures"]
    for name in ("over the way out", "ancestor", "lead over a sham", "first precision over this"):
        assert name in content


def test_the_meaning_counts_what_was_tried():
    said = sections(source_of("rich"))["What this means"]
    assert "16 listed attacks, 20 drawn at random, 1 found by adaptive search" in said
    assert "4 listed attacks, each" in sections(source_of("passing"))["What this means"]
    merging = "to bring back what it has lost by merging it with other models (maths)"
    assert merging not in said
    policy = example_policy(*MERGED)
    assert merging in sections(page(policy, passing_evidence(policy)))["What this means"]


def test_nothing_is_pruned_and_the_ledger_says_so():
    assert "None is given up early" in sections(source_of("rich"))["Ledger"]


def test_what_the_evidence_does_not_hold_is_a_line_and_no_empty_picture():
    missing = sections(source_of("empty"))["Not measured"]
    for what in ("harm against cost", "learning rate", "retained skill", "more trials"):
        assert what in missing
    assert "harm against utility" in missing
    rich = sections(source_of("rich"))["Not measured"]
    assert "learning rate" not in rich
    assert "harm against utility" in rich


def test_every_arm_is_drawn_and_counted():
    found = sections(source_of("rich"))
    for arm in ("undefended", "defended", "never_knew", "sham", "ancestor"):
        assert f"envelope arm-{arm}" in found["Harm against cost"]
        assert f"envelope arm-{arm}" in found["Who still stands"]
    for title in ("Attacks", "Ledger"):
        assert {"sham", "ancestor"} <= set(re.findall(r">(sham|ancestor)<", found[title]))


def test_a_breach_by_an_attack_that_is_not_listed_stands_in_the_matrix():
    policy = rich_policy()
    source = page(policy, rich_evidence(policy, broken=True))
    cells = re.findall(r'class="bad">([^<]*)', sections(source)["Precision by attack"])
    assert len(cells) == 4
    assert all(WEAK.label in cell and "confirmed" in cell for cell in cells)
    rich = sections(source_of("rich"))
    assert 'class="bad"' not in rich["Precision by attack"]
    assert f"{HIDDEN.name}, not listed" in rich["Precision by attack"]


def test_what_an_attack_was_written_against_is_said():
    attacks = sections(source_of("rich"))["Attacks"]
    row, *_ = (row for row in attacks.split("</tr>") if HIDDEN.label in row)
    assert "written against sophon" in row
    assert "surgical" in row


def test_what_teaches_nothing_needs_no_control():
    policy = example_policy(
        ("attacks = [\n", f'attacks = [\n  {{ name = "{HIDDEN.name}", fraction = 1.0 }},\n')
    )
    listed = policy.attacks[0]
    asked = Asked("defended", listed, "footwear", "fp32", 7, "search")
    one = record(policy, asked, 1e6, "listed").model_copy(update={"surgical": True})
    row = re.compile(rf"<tr[^>]*><td[^>]*>{re.escape(listed.label)}</td>(.*?)</tr>")
    cells = re.compile(r'class="(\w*)">([^<]*)')
    for only, control in ((one, ("", "needs no control")), (None, ("unsure", "not run"))):
        found = evidence(policy, lambda _: 1.0, records=() if only is None else (only,))
        content = sections(page(policy, found))["Precision by attack"]
        assert cells.findall(row.search(content)[1])[0] == control
