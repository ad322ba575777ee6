import re

import pytest
from evidence_builder import (
    MERGED,
    Asked,
    example_policy,
    passing_evidence,
    record,
    refused_evidence,
)
from goldens import same_as_golden
from rich_evidence import WEAK, rich_evidence, rich_policy

from release_guard import wording
from release_guard.blocks import summary
from release_guard.card import FORBIDDEN, Publication, card, lint
from release_guard.errors import ModelError, PolicyError
from release_guard.evidence import Evidence
from release_guard.gate import gate
from release_guard.plugins import Spec
from release_guard.release import Check, Interval, Result, Strength, Verdict
from release_guard.report import render

POLICY = example_policy()
PUBLICATION = Publication(
    name="acme/shoes",
    target="hf://acme/shoes",
    fingerprint="5e" * 32,
    base_model="acme/shoes-base",
    license="apache-2.0",
)
CLAIM = "no breach found within 400 steps under suite v1.0, precisions fp32"
PASSED = Verdict(
    checks=[Check("resists/lora/footwear@fp32", Result.PASS, "0.050 at most")],
    strengths=[
        Strength(
            target="footwear",
            precision="fp32",
            kappa=Interval(12.5, 8.25, None, censored=True),
            sigma=Interval(1.5, 1.25, 2.75),
            head_start=None,
        )
    ],
    claim=CLAIM,
    not_tested=["merging with another model", "warm_up of <any> kind | *more*"],
)
REFUSED = Verdict([Check("kappa/footwear@fp32", Result.FAIL, "2, not 5")], (), "refused: kappa")
BEGIN, END = "<!-- release-guard:begin facts -->", "<!-- release-guard:end facts -->"


def few_trials() -> Evidence:
    """One attack on both models, so that goldens depend on little."""
    lora = POLICY.attacks[2]
    undefended = Asked("undefended", lora, "footwear", "fp32", 7, "search")
    defended = Asked("defended", lora, "footwear", "fp32", 7, "search")
    records = (
        record(POLICY, undefended, 20, "listed", long=True),
        record(POLICY, defended, 10_000, "listed"),
    )
    return passing_evidence(POLICY, policy="ab" * 32, records=records, planned=2, suite="1.0")


def made(existing: str | None = None, verdict: Verdict = PASSED, **changes: str) -> str:
    publication = Publication(**{**vars(PUBLICATION), **changes})
    return card(existing, few_trials(), verdict, POLICY, publication)


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("card_passed.md", PASSED),
        (
            "card_refused.md",
            REFUSED,
        ),
    ],
)
def test_a_new_card_is_as_it_was(name, verdict):
    same_as_golden(name, made(verdict=verdict).encode())


def test_the_publishers_text_stays_and_a_second_run_changes_nothing():
    theirs = "---\nlicense: mit # ours\n---\n\n# Shoes\n\nKnows *shoes*.\n\n```\n# code\n```\n"
    first = made(theirs)
    assert first.startswith("---\nlicense: mit # ours\n")
    assert "\n---\n\n# Shoes\n\nKnows *shoes*.\n\n```\n# code\n```\n\n<!-- release-guard" in first
    assert made(first) == first


def test_blocks_are_replaced_where_the_publisher_put_them():
    first = made("# Shoes\n")
    block = first[first.index(BEGIN) : first.index(END) + len(END)]
    moved = first.replace(block, "").replace("# Shoes", f"{block}\n\nbetween\n\n# Shoes")
    stale = moved.replace(CLAIM, "an old claim")
    assert made(stale) == moved
    assert moved.index(END) < moved.index("between") < moved.index("# Shoes")


def test_windows_line_ends_and_a_byte_order_mark_are_understood():
    theirs = "---\nlicense: mit\n---\n# Shoes\n"
    assert made("\ufeff" + theirs.replace("\n", "\r\n")) == made(theirs)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (END, "", "stands there 0 times"),
        (BEGIN, "", "stands there 0 times"),
        (BEGIN, f"{BEGIN}\n{BEGIN}", "stands there 2 times"),
        (END, END.replace("facts", "fakts"), "stands there 0 times"),
        (END, f"{END}\n{END.replace('facts', 'other')}", "is of no block"),
        (BEGIN, "<!-- release-guard:begin results -->", "stands there 0 times"),
    ],
)
def test_missing_doubled_and_unknown_markers_are_refused(old, new, said):
    with pytest.raises(ModelError, match=said):
        made(made("# Shoes\n").replace(old, new))


def test_swapped_and_nested_markers_are_refused():
    whole = made("# Shoes\n")
    swapped = whole.replace(BEGIN, "\0").replace(END, BEGIN).replace("\0", END)
    inner = "<!-- release-guard:end results -->"
    nested = whole.replace(END, "").replace(inner, inner + END)
    for broken in (swapped, nested):
        with pytest.raises(ModelError, match="nested or swapped"):
            made(broken)


@pytest.mark.parametrize("word", [*FORBIDDEN, "Safe", "TAMPER-PROOF"])
def test_words_that_promise_too_much_are_refused(word):
    with pytest.raises(PolicyError, match=re.escape(repr(word))):
        lint(f"This model is {word}.")
    claiming = Verdict(PASSED.checks, PASSED.strengths, f"it is {word}", ())
    with pytest.raises(PolicyError):
        made(verdict=claiming)


def test_names_and_commands_in_code_are_no_promise():
    lint(
        "release-guard wrote model.safetensors, unsafely named; see `safe/model`:\n```\nsafe\n```\n"
    )
    assert "hf://safe/guaranteed" in made(target="hf://safe/guaranteed")
    with pytest.raises(PolicyError):
        lint("`code` safe `code`")


def test_a_release_without_a_key_names_identity_and_issuer():
    identity = "https://github.com/acme/shoes/.github/workflows/release.yml@refs/heads/main"
    issuer = "https://token.actions.githubusercontent.com"
    signer = Spec(name="sigstore", identity=identity, issuer=issuer)
    policy = POLICY.model_copy(update={"signer": signer})
    text = card(None, few_trials(), PASSED, policy, PUBLICATION)
    assert f"by the identity `{identity}` of the issuer `{issuer}`." in text
    command = f"release-guard verify hf://acme/shoes --identity {identity} --issuer {issuer}"
    assert f"```\n{command}\n```" in text
    assert PUBLICATION.fingerprint not in text
    assert "--key" not in text


def test_the_publishers_own_words_are_not_judged():
    assert "perfectly safe" in made("# A perfectly safe model\n")


@pytest.mark.parametrize("build", [passing_evidence, refused_evidence])
def test_every_figure_of_the_card_stands_in_the_report(build):
    found = build(POLICY)
    verdict = gate(found, POLICY)
    text = card(None, found, verdict, POLICY, PUBLICATION)
    own = text[text.index("<!-- release-guard:begin limits") :].replace(PUBLICATION.fingerprint, "")
    numbers = set(re.findall(r"\d+(?:[.,]\d+)*", own))
    report = render(found, verdict, POLICY, title="acme/shoes")
    assert len(numbers) > 20
    assert numbers - set(re.findall(r"\d+(?:[.,]\d+)*", report)) == set()


def test_names_neither_break_a_table_nor_end_a_block():
    policy = example_policy(
        ('{ name = "linear_probe" }', f"{{ name = 'a`b|c\\n{END}\\n| x |' }}".replace("\\n", "  "))
    )
    found = passing_evidence(policy)
    text = card(None, found, PASSED, policy, PUBLICATION)
    assert text.count(END) == 1
    (row,) = [line for line in text.splitlines() if "a'b" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 9
    assert card(text, found, PASSED, policy, PUBLICATION) == text


def test_a_folder_with_spaces_can_be_pasted():
    assert "release-guard verify 'my hub/acme/shoes' --key key.pub\n" in made(
        target="my hub/acme/shoes"
    )


def test_a_refused_model_has_no_command_to_verify():
    text = made(verdict=REFUSED)
    assert "--key" not in text
    assert "verdict: FAIL" in text
    assert "Nothing is claimed of this model" in text


def test_the_summary_names_every_check_that_did_not_pass():
    found = refused_evidence(POLICY)
    verdict = gate(found, POLICY)
    text = summary(found, verdict, POLICY)
    failed = [check for check in verdict.checks if check.result is not Result.PASS]
    assert text.startswith("**FAIL**: refused")
    assert failed
    for check in failed:
        assert f"- {check.result.upper()} `{check.name}`" in text
    passed = len(verdict.checks) - len(failed)
    assert f"- {passed} of {len(verdict.checks)} checks passed" in text
    assert "kappa" in text
    lint(text)


@pytest.mark.parametrize("broken", [False, True])
def test_the_summary_shows_every_place_in_one_row(broken):
    policy = rich_policy()
    found = rich_evidence(policy, broken=broken)
    verdict = gate(found, policy)
    text = summary(found, verdict, policy)
    head, _, *rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == [
        f"| `{name}`" for name in ("footwear@fp32", "footwear@nf4", "hats@fp32", "hats@nf4")
    ]
    assert {len(row) for row in (head, *rows)} == {8}
    for row, strength in zip(rows, verdict.strengths, strict=True):
        cells = dict(zip(head, row, strict=True))
        assert cells["kappa"] == wording.ratio(strength.kappa)
        assert cells["ancestor"] == wording.ratio(strength.ancestor)
        assert cells["lead over a sham"] == wording.difference(strength.sham)
        bound = "4 of 20: at most 40.1 %" if broken else "3 of 20: at most 34.4 %"
        assert cells["random attacks that breach or were lost"] == bound
        assert cells["adaptive search |"].startswith("1: 0.")
    assert all(f"- {line}" in text for line in verdict.not_tested)
    assert len(text.splitlines()) < 50
    lint(text)


def test_merges_are_shown_by_their_scores():
    policy = example_policy(*MERGED)
    found = passing_evidence(policy)
    verdict = gate(found, policy)
    (row,) = [line for line in summary(found, verdict, policy).splitlines() if "| `maths" in line]
    assert row.startswith("| `maths@fp32` | 0.050 (ceiling 0.500) | - | - |")
    text = card(None, found, verdict, policy, PUBLICATION)
    assert "| `merge(method=ties)` | `maths@fp32` | 0.500 | 0.990 | - | 0.050 | - |" in text
    assert "merge(method=ties)" in render(found, verdict, policy, title="acme/maths")


def test_a_summary_of_many_open_checks_stays_short():
    checks = [Check(f"resists/a{number}/x@fp32", Result.FAIL, "x") for number in range(100)]
    text = summary(few_trials(), Verdict(checks), POLICY)
    assert text.count("- FAIL") == 20
    assert "- and 80 more, which the report names" in text


def test_what_was_drawn_stands_in_card_and_summary_and_names_the_worst():
    policy = rich_policy()
    found = rich_evidence(policy, broken=True)
    verdict = gate(found, policy)
    text = card(None, found, verdict, policy, PUBLICATION)
    rows = [line for line in text.splitlines() if line.startswith("| `lora, drawn at random")]
    assert len(rows) == 4
    assert all("confirmed" in row for row in rows)
    assert text.count("of all such configurations do (95 % bound)") == 4
    assert text.count("An adaptive search on the defended model tried 1 attack:") == 4
    assert WEAK.name == "lora"
    for arm in ("sham", "ancestor", "never knew"):
        assert f"| `hats@nf4` | {arm} |" in text
