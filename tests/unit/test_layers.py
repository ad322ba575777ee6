import re

from evidence_builder import example_policy, passing_evidence

from release_guard.evidence import Change
from release_guard.layers import blocks, section

POLICY = example_policy()


def shown(**moved: float) -> str:
    change = Change(identical=not any(moved.values()), relative_l2=moved)
    return section(passing_evidence(POLICY, change=change))


def test_tensors_are_gathered_by_the_number_of_their_block():
    found = blocks(
        {
            "model.layers.10.a": 0.3,
            "model.layers.2.a": 0.1,
            "model.layers.2.b": 0.2,
            "model.embed.weight": 0.9,
            "head.weight": 0.8,
        }
    )
    assert found == {2: [0.1, 0.2], 10: [0.3]}
    assert list(found) == [2, 10]


def test_blocks_are_drawn_where_there_are_some():
    deep = shown(**{f"h.{block}.w": 0.01 * (block + 1) for block in range(4)})
    assert "block 3 moved most, median 4 %" in deep
    assert len(re.findall(r"<figure>", deep)) == 2
    flat = shown(**{"body.weight": 0.1, "head.weight": 0.2})
    assert len(re.findall(r"<figure>", flat)) == 1


def test_every_tensor_stands_in_the_table():
    moved = {f"t{number}": 0.001 * (number + 1) for number in range(30)}
    source = shown(**moved)
    assert all(f">{name}<" in source for name in moved)
    assert "the 12 of 30 tensors" in source


def test_no_change_is_said():
    assert "Nothing moved" in shown(**{"body.weight": 0.0})
    assert "Nothing moved" in shown()
