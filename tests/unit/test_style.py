"""Contrast by WCAG 2.2, and distance between colours as colour-blind readers see them."""

import itertools
from collections.abc import Sequence

import pytest

from release_guard.style import CSS, DARK, LIGHT

ARMS = ("undefended", "defended", "never", "sham", "ancestor")
MARKS = (*ARMS, "other", "ink", "soft")
HEAT = ("heat0", "heat1", "heat2", "heat3", "heat4")
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deutan": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}
modes = pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])


def linear(colour: str) -> list[float]:
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares
    ]


def luminance(rgb: Sequence[float]) -> float:
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def contrast(first: str, second: str) -> float:
    dark, bright = sorted(luminance(linear(colour)) for colour in (first, second))
    return (bright + 0.05) / (dark + 0.05)


def lab(colour: str, vision: str) -> list[float]:
    """CIE L*a*b* of a colour as that reader sees it, white D65."""
    rgb = [
        min(
            1.0,
            max(
                0.0, sum(weight * value for weight, value in zip(row, linear(colour), strict=True))
            ),
        )
        for row in VISION[vision]
    ]
    x = (0.4124 * rgb[0] + 0.3576 * rgb[1] + 0.1805 * rgb[2]) / 0.9505
    z = (0.0193 * rgb[0] + 0.1192 * rgb[1] + 0.9505 * rgb[2]) / 1.0890
    fx, fy, fz = (
        value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116
        for value in (x, luminance(rgb), z)
    )
    return [116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)]


def test_the_measures_are_right():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert lab("#ffffff", "full") == pytest.approx([100, 0, 0], abs=0.1)
    assert lab("#ff0000", "full") == pytest.approx([53.2, 80.1, 67.2], abs=0.2)


@modes
def test_text_can_be_read(colours):
    for text, ground in itertools.product(("ink", "soft"), ("paper", "panel")):
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for ground in ("bad", "good", "unsure"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5, ground


@modes
def test_lines_and_marks_stand_out(colours):
    for mark, ground in itertools.product(MARKS, ("paper", "panel")):
        assert contrast(colours[mark], colours[ground]) >= 3, (mark, ground)


@modes
@pytest.mark.parametrize("vision", VISION)
def test_arms_can_be_told_apart(colours, vision):
    for first, second in itertools.combinations(ARMS, 2):
        apart = zip(lab(colours[first], vision), lab(colours[second], vision), strict=True)
        assert sum((one - other) ** 2 for one, other in apart) ** 0.5 >= 20, (first, second)


@modes
@pytest.mark.parametrize("vision", VISION)
def test_shades_of_heat_grow_steadily(colours, vision):
    lightness = [lab(colours[shade], vision)[0] for shade in HEAT]
    gaps = [after - before for before, after in itertools.pairwise(lightness)]
    assert all(gap > 7 for gap in gaps) or all(gap < -7 for gap in gaps)
    assert contrast(colours["onheat"], colours["heat4"]) >= 4.5


def test_both_modes_name_the_same_colours_and_the_page_no_other():
    assert LIGHT.keys() == DARK.keys()
    for name in LIGHT:
        assert f"var(--{name})" in CSS, name
    rules = CSS[CSS.index("*{box-sizing") :]
    assert "#" not in rules
