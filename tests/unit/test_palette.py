"""The palette: colours stay apart under deuteranopia, and colour is never the only difference."""

from itertools import combinations
from pathlib import Path

import pytest
from colour_vision import distance, lab, rgb_of, simulated

from nnunet_autoreg.report import palette

REPO = Path(__file__).resolve().parents[2]

# Distances in CIELAB, where about 2 can just be seen.
USED_TOGETHER = {
    "curves": (list(palette.CURVES.values()), 24),
    "boxes": (list(palette.BOXES.values()), 30),
    "structures": (list(palette.STRUCTURES), 30),
    "blocks": ([palette.GIVEN, palette.PREDICTED], 30),
    "starts": (list(palette.STARTS), 24),
    "first series": (list(palette.SERIES[:4]), 24),
}
"""Styles that are used in one picture, and how far apart their colours have to be."""


def test_the_simulation_maps_red_and_green_onto_each_other():
    # Grey stays grey, blue stays blue; lime green and tomato were the boxes of older versions.
    assert simulated(rgb_of("#808080")) == pytest.approx(rgb_of("#808080"), abs=0.01)
    assert lab(rgb_of("#ffffff")) == pytest.approx([100, 0, 0], abs=0.1)
    assert distance("#32cd32", "#ff6347") < 6
    assert distance("#0072b2", "#e69f00") > 90


@pytest.mark.parametrize("group", USED_TOGETHER)
def test_colours_of_one_picture_are_far_apart(group):
    styles, least = USED_TOGETHER[group]

    close = {}
    for first, second in combinations(styles, 2):
        found = distance(first.colour, second.colour)
        if found < least:
            close[first.colour, second.colour] = found

    assert close == {}


@pytest.mark.parametrize("group", USED_TOGETHER)
def test_no_two_styles_differ_only_in_colour(group):
    styles, _ = USED_TOGETHER[group]

    for first, second in combinations(styles, 2):
        same = (first.dash, first.marker, first.width) == (second.dash, second.marker, second.width)
        assert not same, (first, second)


def test_curves_on_a_dark_page_are_far_apart_too():
    colours = palette.CURVES_ON_DARK

    assert set(colours) == set(palette.CURVES)
    assert min(distance(a, b) for a, b in combinations(colours.values(), 2)) > 14


def test_no_other_module_defines_colours():
    owners = set()
    for path in sorted((REPO / "nnunet_autoreg").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if any(f'"{mark}' in text for mark in ("#0", "#c", "#e", "#f", "tab:", "tomato", "lime")):
            owners.add(path.name)

    assert owners == {"palette.py"}
