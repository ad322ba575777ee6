import pytest
import yaml

from release_guard.errors import ModelError
from release_guard.front_matter import edit

VALUES = {"base_model": "acme/base", "release_guard": {"verdict": "PASS", "policy": "sha256:0e1"}}
OURS = 'release_guard: {verdict: PASS, policy: "sha256:0e1"}\n'


def read(document: str) -> dict:
    return yaml.safe_load(document.split("---\n")[1])


def test_a_file_without_front_matter_gets_one():
    edited = edit("# Title\n", values=VALUES, tag="ours")
    assert edited == f"---\ntags: [ours]\nbase_model: acme/base\n{OURS}---\n# Title\n"


def test_comments_order_and_quotes_of_the_rest_stay():
    front = (
        "# on top\nlicense: 'mit' # why\ntags:\n- b\n- a # last\n# before\nlanguage: [de,  en]\n"
        "base_model: old/one # was\nd: 2024-01-02\n"
    )
    edited = edit(f"---\n{front}---\nText --- more\n", values=VALUES, tag="ours")
    expected = front.replace("- a # last\n", "- a # last\n- ours\n").replace("old/one", "acme/base")
    assert edited == f"---\n{expected}{OURS}---\nText --- more\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tags: [a, b]", ["a", "b", "ours"]),
        ("tags: []", ["ours"]),
        ("tags:", ["ours"]),
        ("tags: a", ["a", "ours"]),
        ("tags:\n- a", ["a", "ours"]),
        ("tags:\n    - a\n    - 'b c'", ["a", "b c", "ours"]),
        ("tags: [\n  a,\n  b\n]", ["a", "b", "ours"]),
        ("tags: [ours]", ["ours"]),
        ("tags:\n- ours\n- a", ["ours", "a"]),
        ("# nothing", ["ours"]),
    ],
)
def test_the_tag_joins_every_way_of_writing_a_list(before, after):
    edited = edit(f"---\n{before}\nlicense: mit\n---\n", values={}, tag="ours")
    assert read(edited) == {"tags": after, "license": "mit"}


@pytest.mark.parametrize(
    "before",
    [
        "",
        "base_model: old",
        "base_model:\n- old\n- older",
        "base_model: [old, older]",
        "base_model:",
    ],
)
def test_a_value_is_replaced_however_it_was_written(before):
    edited = edit(f"---\n{before}\nlicense: mit\n---\nx", values=VALUES, tag="ours")
    assert read(edited) == {**VALUES, "license": "mit", "tags": ["ours"]}
    assert edited.endswith("---\nx")


def test_editing_twice_changes_nothing():
    once = edit("---\nlicense: mit\n---\n# x\n", values=VALUES, tag="ours")
    assert edit(once, values=VALUES, tag="ours") == once


@pytest.mark.parametrize(
    "value", ["yes", "null", "1.5", "a: b", "a #b", "- x", 'say "so"', "2024-01-01"]
)
def test_any_text_is_read_back_as_the_same_text(value):
    assert read(edit("", values={"base_model": value}, tag="ours"))["base_model"] == value


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("---\nlicense: mit\n", "does not end"),
        ("---\na: [\n---\n", "not YAML (line 3)"),
        ("---\n- a\n---\n", "not a mapping"),
        ("---\n{a: 1}\n---\n", "cannot be edited"),
        ("---\nbase_model: &name old\nother: *name\n---\n", "cannot be edited"),
        ("---\ntags: {a: b}\n---\n", "cannot be edited"),
    ],
)
def test_what_cannot_be_edited_without_changing_more_is_refused(document, said):
    with pytest.raises(ModelError) as refused:
        edit(document, values=VALUES, tag="ours")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
