import re

from hypothesis import given
from hypothesis import strategies as st

from release_guard.curves import Line, Plane, envelope, height_at, picture

curves = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1), min_size=1, max_size=4
)


@given(curves)
def test_the_envelope_is_the_worst_case_at_every_cost(found):
    worst = envelope(found)
    for cost, height in worst:
        below = [score for curve in found for at, score in curve if at <= cost]
        assert height == max(0.0, *below)
    assert [cost for cost, _ in worst] == sorted({at for curve in found for at, _ in curve})


def test_a_staircase_holds_until_its_next_point():
    curve = [(2, 0.1), (5, 0.4)]
    assert [height_at(curve, cost) for cost in (1, 2, 4.9, 5, 100)] == [None, 0.1, 0.1, 0.4, 0.4]


def test_a_legend_of_five_arms_takes_two_lines_and_pushes_the_picture_down():
    arms = ("undefended", "defended", "never_knew", "sham", "ancestor")

    def drawn(count: int) -> str:
        lines = [Line(arm, [(1, 0.2), (10, 0.5)]) for arm in arms[:count]]
        return picture(lines, Plane("steps", "score", ceiling=0.5, budget=5), alt="a")

    def height(source: str) -> float:
        return float(re.search(r'viewBox="0 0 360 ([\d.]+)"', source)[1])

    assert height(drawn(5)) - height(drawn(3)) == 17
    assert all(f"envelope arm-{arm}" in drawn(5) for arm in arms)
    marks = re.findall(r'<path d="M[^"]*" class="mark arm-(\w+)"', drawn(5))
    assert set(marks) == set(arms) - {"undefended"}  # its mark is a circle


def test_a_band_is_as_wide_as_it_says():
    line = Line("defended", [(1, 0.2), (10, 0.4)], [(1, 0.1, 0.3), (10, 0.2, 0.6)])
    source = picture([line], Plane("steps", "score"), alt="a")
    (corners,) = re.findall(r'<polygon points="([^"]*)"', source)
    heights = [float(pair.split(",")[1]) for pair in corners.split()]
    top, bottom = 50, 246
    assert min(heights) == bottom - 0.6 * (bottom - top)
    assert max(heights) == bottom - 0.1 * (bottom - top)
