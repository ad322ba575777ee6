import itertools
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from release_guard import charts, svg
from release_guard.charts import Reference, Row
from release_guard.svg import Axis

costs = st.floats(1e-3, 1e18)


@given(st.lists(costs, min_size=1))
def test_a_log_axis_holds_every_value_in_order(values):
    axis = Axis.logarithmic(values, 10, 110)
    placed = [axis.at(value) for value in sorted(values)]
    assert placed == sorted(placed)
    assert placed[0] > 10
    assert placed[-1] < 110
    assert 1 <= len(axis.ticks) <= 10
    assert all(10 <= axis.at(tick) <= 110 for tick in axis.ticks)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.04, 0.04), (0, 28), (0, 0.0021), (-3, 1e5)])
def test_a_linear_axis_has_a_few_round_ticks_inside(low, high):
    ticks = Axis(low, high, 0, 100).ticks
    assert 3 <= len(ticks) <= 8
    assert low - 1e-9 <= ticks[0] < ticks[-1] <= high + 1e-9
    gaps = {
        round((after - before) / (high - low), 9) for before, after in itertools.pairwise(ticks)
    }
    assert len(gaps) == 1


def test_values_outside_are_drawn_at_the_edge():
    axis = Axis.logarithmic([1, 100], 0, 50)
    assert (axis.at(0), axis.at(1e9)) == (0, 50)


def test_long_names_keep_both_ends_and_never_meet_their_figures():
    name = "vit.encoder.layer.11.attention.attention.query.weight.of.a.long.model"
    row = Row(name, "≥ 12.5 (3.1 or more)", 12.5)
    picture = charts.rows([row], Axis.logarithmic([1, 100], 8, 340), title="t", alt="a")
    texts = [element.text for element in ElementTree.fromstring(picture).iter("text")]  # noqa: S314
    (label,) = [text for text in texts if "…" in text]
    assert name.startswith(label.split("…")[0])
    assert name.endswith(label.split("…")[1])
    assert len(label) + len(row.note) < svg.WIDTH / 6.2


def test_a_censored_value_is_an_arrow_with_an_open_whisker():
    axis = Axis.logarithmic([1, 100], 8, 340)

    def drawn(row: Row) -> str:
        return charts.rows([row], axis, title="t", alt="a", references=[Reference(10, "bar: 10")])

    closed = drawn(Row("kappa", "x", 20, low=10, high=40))
    opened = drawn(Row("kappa", "x", 20, low=10, censored=True))
    assert svg.marker("arrow", axis.at(20), 49, css="mark arm-defended") in opened
    assert svg.marker("diamond", axis.at(20), 49, css="mark arm-defended") in closed
    assert f'points="{axis.at(10):g},49 {axis.end:g},49"' in opened
    assert f'points="{axis.at(10):g},49 {axis.at(40):.2f},49"' in closed


def test_names_in_pictures_are_escaped():
    picture = charts.stacks(
        [charts.Stack('<b>&"', "<i>", [("breached", 2)])], title="<u>", alt='"><script>'
    )
    root = ElementTree.fromstring(picture)  # noqa: S314
    assert root.attrib["aria-label"] == '"><script>'
    assert [element.text for element in root.iter("text")][-2:] == ['<b>&"', "<i>"]
