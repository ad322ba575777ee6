import pytest

from release_guard import wording
from release_guard.release import Interval


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.123456, "0.123"),
        (12.345, "12.3"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (999_999, "999,999"),
        (1e6, "1.00e6"),
        (2.346e15, "2.35e15"),
    ],
)
def test_amounts_have_three_digits(value, text):
    assert wording.amount(value) == text


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (None, "not claimed"),
        (Interval(None, 1.0, 2.0), "not claimed"),
        (Interval(12.5, 3.1, 40), "12.5 (3.1 to 40)"),
        (Interval(12.5, 3.1, 40, censored=True), "≥ 12.5 (3.1 or more)"),
        (Interval(12.5, 3.1, None), "12.5 (3.1 or more)"),
        (Interval(12.5, None, 40), "12.5 (40 or less)"),
        (Interval(12.5, None, None), "12.5 (no bounds)"),
    ],
)
def test_ratios_name_the_bounds_they_have(interval, text):
    assert wording.ratio(interval) == text


def test_no_minus_stands_before_a_zero():
    assert wording.points(-0.0) == wording.points(-0.000001) == "0.00 points"
    assert wording.points(-0.01) == "-1.00 points"


@pytest.mark.parametrize(("number", "text"), [(0, "0 checks"), (1, "1 check"), (12, "12 checks")])
def test_a_count_agrees_with_its_noun(number, text):
    assert wording.count(number, "check") == text
