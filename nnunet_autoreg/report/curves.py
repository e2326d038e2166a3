"""Line charts as SVG, drawn here so that they follow the page's light or dark look and stay
small.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 260, 54, 134, 12, 30
MAX_POINTS = 240
LABEL_GAP = 15


@dataclass(frozen=True)
class Line:
    """A series: its name at its end, (step, value) in order, and its look: main, second, base or
    base2.
    """

    label: str
    points: Points
    look: str = "main"


def chart(
    title: str, unit: str, lines: Sequence[Line], note: str = "", logarithmic: bool = False
) -> str:
    """A figure of the lines that have finite points; "" if none has any.

    Args:
        logarithmic: of the values, where all of them are greater than 0.
    """
    lines = [
        Line(line.label, thinned([p for p in line.points if math.isfinite(p[1])]), line.look)
        for line in lines
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    values = [value for line in lines for _, value in line.points]
    logarithmic = logarithmic and min(values) > 0
    low, high, marks = _scale(min(values), max(values), logarithmic)
    steps = [step for line in lines for step, _ in line.points]
    frame = _Frame(min(steps), max(steps), low, high, logarithmic)
    drawn = [*_grid(frame, marks), *(_curve(frame, line) for line in lines), *_labels(frame, lines)]
    said = "; ".join(
        f"{line.label} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines
    )
    alt = f"{title}, steps {min(steps):g} to {max(steps):g}: {said}"
    svg = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(alt)}">{"".join(drawn)}</svg>'
    )
    caption = f" {escape(note)}" if note else ""
    return (
        f"<figure><h3>{escape(title)} <span "
        f'class="soft">({escape(unit)})</span></h3>{svg}<figcaption>{caption}</figcaption></figure>'
    )


def thinned(points: Points, most: int = MAX_POINTS) -> Points:
    """At most ``most`` points: means over neighbours, at the last neighbour's step."""
    if len(points) <= most:
        return points
    bounds = [round(i * len(points) / most) for i in range(most + 1)]
    pieces = [points[a:b] for a, b in pairwise(bounds)]
    return [(piece[-1][0], sum(v for _, v in piece) / len(piece)) for piece in pieces]


@dataclass(frozen=True)
class _Frame:
    first: float
    last: float
    low: float
    high: float
    logarithmic: bool

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high, value = (
            math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value)
        )
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _scale(low: float, high: float, logarithmic: bool) -> tuple[float, float, list[float]]:
    """Axis limits around the values, and where the marks go."""
    if logarithmic:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        return (
            10.0**first,
            10.0**last,
            [10.0**e for e in range(first, last + 1, max(1, math.ceil((last - first) / 5)))],
        )
    span = (high - low) or abs(high) or 1.0
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    stride = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough)
    bottom = math.floor(low / stride) * stride
    top = math.ceil(high / stride) * stride
    top = top if top > bottom else bottom + stride
    return bottom, top, [bottom + i * stride for i in range(round((top - bottom) / stride) + 1)]


def _grid(frame: _Frame, marks: Iterable[float]) -> Iterable[str]:
    for mark in marks:
        y = frame.y(mark)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:.4g}</text>'
    low = HEIGHT - 9
    if frame.last > frame.first:
        yield f'<text x="{LEFT}" y="{low}" text-anchor="start">{frame.first:,.0f}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{low}" text-anchor="middle">step</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{low}" text-anchor="end">{frame.last:,.0f}</text>'


def _curve(frame: _Frame, line: Line) -> str:
    spots = [(frame.x(step), frame.y(value)) for step, value in line.points]
    x, y = spots[-1]
    path = (
        f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in spots)}"/>'
        if len(spots) > 1
        else ""
    )
    return f'<g class="{line.look}">{path}<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8"/></g>'


def _labels(frame: _Frame, lines: Sequence[Line]) -> Iterable[str]:
    """Each line's name and last value at its end, moved apart where they would touch."""
    ends = sorted(((frame.y(line.points[-1][1]), line) for line in lines), key=lambda end: end[0])
    heights: list[float] = []
    for y, _ in ends:
        heights.append(max(y, heights[-1] + LABEL_GAP) if heights else y)
    over = max(0.0, heights[-1] - (HEIGHT - BOTTOM + 8))
    for i in range(len(heights) - 1, -1, -1):
        heights[i] = (
            min(heights[i], heights[i + 1] - LABEL_GAP)
            if i + 1 < len(heights)
            else heights[i] - over
        )
    for height, (_, line) in zip(heights, ends, strict=True):
        yield (
            f'<g class="{line.look}"><text class="label" x="{WIDTH - RIGHT + 8}" '
            f'y="{height + 4:.1f}">'
            f"{escape(line.label)} {line.points[-1][1]:.3g}</text></g>"
        )
