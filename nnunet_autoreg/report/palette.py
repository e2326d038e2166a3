"""The colours, dashes and markers of every picture.

The colours are those of Okabe and Ito (2008), which most people can distinguish, whichever colour
vision they have. Colour is never the only difference: everything with a separate colour also has a
separate dash, marker or word. Two pairs are close for people who cannot see green (orange and
yellow, orange and vermillion), and no picture relies on one of them.
"""

from dataclasses import dataclass
from typing import Any

BLACK = "#000000"
ORANGE = "#e69f00"
SKY_BLUE = "#56b4e9"
GREEN = "#009e73"
YELLOW = "#f0e442"
BLUE = "#0072b2"
VERMILLION = "#d55e00"
PURPLE = "#cc79a7"
WHITE = "#ffffff"

# Axes, grids and remarks.
INK = "#1b1f24"
SOFT = "#59636e"
GRID = "#d5dae0"


@dataclass(frozen=True)
class Style:
    """Colour, dash and marker of one kind of element.

    Attributes:
        dash: matplotlib's line style.
        marker: matplotlib's marker, for single points.
    """

    colour: str
    dash: Any = "-"
    marker: str = "o"
    width: float = 1.8

    def line(self) -> dict[str, Any]:
        """Return the arguments of ``Axes.plot`` for a line."""
        return {"color": self.colour, "linestyle": self.dash, "linewidth": self.width}


SERIES = (
    Style(BLUE, "-", "o"),
    Style(ORANGE, "--", "s"),
    Style(GREEN, "-.", "^"),
    Style(BLACK, ":", "D"),
    Style(PURPLE, (0, (5, 1)), "v"),
    Style(VERMILLION, (0, (1, 1)), "P"),
    Style(SKY_BLUE, (0, (3, 1, 1, 1)), "X"),
    Style(YELLOW, (0, (8, 2)), "*"),
)
"""Styles of series without a fixed meaning, such as modalities, in the order of drawing."""

CURVES = {
    "main": Style(VERMILLION, "-", "o", 2.4),
    "second": Style(BLUE, "-", "s", 1.5),
    "base": Style(BLACK, "--", "^", 1.5),
    "base2": Style(PURPLE, ":", "v", 1.8),
}
"""The curves of a chart: the main one, the one compared with it, and two trivial baselines."""

CURVES_ON_DARK = {"main": ORANGE, "second": SKY_BLUE, "base": "#c3cad2", "base2": PURPLE}
"""Colours of the same curves on a dark page."""

BOXES = {
    "true": Style(YELLOW, "-", width=3.0),
    "found": Style(SKY_BLUE, "-", width=1.6),
    "false": Style(VERMILLION, "--", width=1.6),
    "ignored": Style(WHITE, ":", width=1.4),
}
"""Boxes on a grey image: an object, a detection that found one, a false one, one not counted."""

STRUCTURES = (Style(SKY_BLUE, "-"), Style(YELLOW, "--"), Style(VERMILLION, "-."))
"""Outlines of segmented structures on a grey image."""

GIVEN = Style(SKY_BLUE, "-")
PREDICTED = Style(ORANGE, "--")
CROP = Style(YELLOW, "-", width=2.0)
"""The parts of a sequence on a grey image: known to the network, to be predicted, and the crop."""

FROM_PRETRAINED = Style(BLUE, "-", "o")
FROM_BASELINE = Style(ORANGE, "--", "s")
FROM_RANDOM = Style(BLACK, ":", "D")
STOCK_TRAINING = Style(GREEN, "-.", "^")
STARTS = (FROM_PRETRAINED, FROM_BASELINE, FROM_RANDOM, STOCK_TRAINING)
"""Starts of fine-tuning: our pretraining, the pretraining compared with it, random weights; and
nnU-Net's own training.
"""


def bytes_of(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue of a colour, each from 0 to 255."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue
