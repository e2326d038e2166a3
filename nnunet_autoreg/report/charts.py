"""Charts of the logged metrics, drawn by matplotlib.

``report.html`` holds every chart as an SVG, and ``progress.png`` shows all of them in one picture.
Both are drawn by ``draw``, so that they cannot differ.
"""

import io
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from nnunet_autoreg.objective_kinds import figure_of_merit
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.records import atomic_path
from nnunet_autoreg.report import palette
from nnunet_autoreg.report.metrics import read_lines

Points = Sequence[tuple[float, float]]
Series = Mapping[str, Points]

MAX_POINTS = 240
NUM_MARKED = 12
"""Curves of at most this many points have a marker at each of them, longer ones at the last."""

FAR_ABOVE = 2.0
"""A baseline this many times above all other curves would flatten them, and is not drawn."""

# Inches. At matplotlib's 72 points an inch this is 360 x 230 units, about the pixels that a chart
# has on the page, so that a font size in points is one in pixels.
CHART_SIZE = (5.0, 3.2)
# On both sides there is room for half a number of the step axis.
AXES_BOX = (0.145, 0.18, 0.78, 0.62)
FONT_SIZE = 12
LEGEND_LENGTH, ENTRY_LENGTH, LETTER_LENGTH = 340.0, 36.0, 7.0
"""Pixels of a row of the legend, of the line and space of an entry, and of a letter of the page."""
LEFT_OF_AXES = -0.12
"""Left position of legends and titles, in widths of the axes: above the numbers of the value
axis."""
ROUND_STEPS = (1, 2, 2.5, 5, 10)
"""Steps between two numbers of an axis, times a power of ten."""
DECIMALS = re.compile(r"-?\d+\.\d+")

# The colours of the light page. The style sheet of page.html names them --main, --second, ... and
# has other values for a dark page.
COLOURS = {
    **{look: style.colour for look, style in palette.CURVES.items()},
    "soft": palette.SOFT,
    "line": palette.GRID,
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        points: (step, value), by step.
        look: main, second, base or base2; colour, width, dashes and marker follow from it.
        is_level: the curve does not depend on training; its last value is drawn as a horizontal
            line.
    """

    label: str
    points: Points
    look: str = "main"
    is_level: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps, with one unit.

    Attributes:
        note: a sentence below the chart.
        is_logarithmic: the value axis is logarithmic if all values are greater than 0.
        highest: the value axis goes from 0 to at least this value, so that noise does not fill it.
        num_steps: the step axis goes from 0 to at least this step.
    """

    title: str
    unit: str
    curves: Sequence[Curve] = ()
    note: str = ""
    is_logarithmic: bool = False
    highest: float = 0.0
    num_steps: int = 0


# Metrics that have their own chart, in the order of the page.
LEARNING_CHARTS = {
    "lr": Chart("Learning rate", ""),
    "gradient_norm": Chart("Gradient norm", "before clipping", is_logarithmic=True),
}
COST_CHARTS = {
    "step_time": Chart("Time per step", "s"),
    "tokens_per_second": Chart("Speed", "tokens per second"),
    "data_wait": Chart("Waiting for data", "share of time", highest=1.0),
}
HEALTH_CHARTS = {
    "token_variance": Chart(
        "Token variance",
        "share",
        note="How much of the features depends on the image rather than on the position. "
        "A value near 0 means that the features have collapsed.",
        highest=1.0,
    ),
    "effective_rank": Chart(
        "Effective rank",
        "directions",
        note="Over how many directions the features spread. "
        "A value near 1 means that the features have collapsed.",
        highest=10.0,
    ),
    "skipped_steps": Chart("Skipped steps", "steps", highest=10.0),
}
COLLAPSE_LIMITS = {"token_variance": "min_token_variance", "effective_rank": "min_effective_rank"}
"""Health metric -> field of the run's plan: values below it count as collapsed."""

# Metric -> label, look, and whether it is a level that does not depend on training.
ERROR_CURVES = {
    "heldout_error": ("validation", "main", False),
    "train_error": ("training", "second", False),
    "heldout_mean": ("mean", "base2", True),
    "heldout_copy": ("copy", "base", True),
}
PROBE_CURVES = {
    "probe_features": ("features", "main", False),
    "probe_voxels": ("voxels", "base", True),
    "probe_chance": ("chance", "base2", True),
}
KIND_PREFIX = "heldout_error_"
"""The validation error of one kind of sequences is logged as this prefix and the kind's name."""

TERM_CURVES = {"heldout": ("validation", "main"), "train": ("training", "second")}
"""First word of the name of a term of the loss -> label and look of its curve."""

NOT_DRAWN = {"peak_memory", "share_of_peak"}
"""Metrics that hardly change during a run. The report has them in a table."""


def read_series(metrics: Path) -> Series:
    """Return the metrics of a ``metrics.jsonl``: name -> (number of steps done, value)."""
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in read_lines(metrics):
        if line["unit"] != "text":
            num_done = line["step"] + 1
            series[str(line["name"])].append((num_done, line["value"]))
    return series


def read_units(metrics: Path) -> dict[str, str]:
    """Return the unit of every metric of a ``metrics.jsonl``."""
    units = {}
    for line in read_lines(metrics):
        units[str(line["name"])] = str(line["unit"])
    return units


def learning_charts(series: Series, plan: Plan | None = None) -> list[Chart]:
    """Return the charts of the error, the learning rate and the gradients.

    Args:
        plan: sets the length of the step axis.
    """
    by_kind = []
    names = [name for name in series if name.startswith(KIND_PREFIX)]
    # There are only a few looks that people can distinguish; further kinds are left out.
    for name, look in zip(names, palette.CURVES, strict=False):
        by_kind.append(Curve(name.removeprefix(KIND_PREFIX), series[name], look))

    error = error_chart(series, plan)
    charts = [
        error,
        Chart("Validation error by kind of sequences", error.unit, by_kind, highest=1.0),
        *_single_charts(LEARNING_CHARTS, series, plan),
    ]
    return _drawable(charts, plan)


def cost_charts(series: Series, plan: Plan | None = None) -> list[Chart]:
    """Return the charts of the time of a step, the speed, and the waiting for data.

    Args:
        plan: sets the length of the step axis.
    """
    return _drawable(_single_charts(COST_CHARTS, series, plan), plan)


def error_chart(series: Series, plan: Plan | None = None) -> Chart:
    """Return the chart of the figure of merit and its trivial baselines.

    Args:
        plan: plan of the run, whose objective names the baselines.
    """
    # Trivial predictor -> what it predicts
    references = {"mean": "predicting the mean", "copy": "copying the previous block"}
    title, unit = "Error", "per voxel"
    if plan is not None:
        figure = figure_of_merit(plan)
        title = _capitalised(figure.name)
        references |= figure.references
        if figure.unit != "squared error":
            unit = figure.unit

    curves = _curves(ERROR_CURVES, series)
    notes = []
    if any(curve.label == "mean" for curve in curves):
        notes.append(f"Dotted: {references['mean']}.")

    # Trivial predictors that only this objective has.
    for name, predictor in references.items():
        if name not in ("mean", "copy"):
            curves += _curves({f"heldout_{name}": (name, "base2", True)}, series)
            notes.append(f"Dotted, {name}: {predictor}.")

    copy = next((curve for curve in curves if curve.label == "copy"), None)
    if copy is not None:
        others = [curve for curve in curves if curve is not copy]
        highest = max(_values(others), default=0.0)
        # A level far above all other curves would press them to the bottom.
        _, level = copy.points[-1]
        if level > FAR_ABOVE * highest:
            curves = others
            notes.append(f"{_capitalised(references['copy'])} costs {level:.3g}, above this chart.")
        else:
            notes.append(f"Dashed: {references['copy']}.")

    return Chart(title, unit, curves, " ".join(notes), highest=1.0)


def _capitalised(text: str) -> str:
    """Return a text with a capital first letter; the others stay, unlike with ``capitalize``."""
    return f"{text[0].upper()}{text[1:]}"


def health_charts(
    series: Series,
    plan: Plan | None = None,
    units: Mapping[str, str] | None = None,
) -> list[Chart]:
    """Return the charts of the features' health, the probe, and every metric that has no other.

    Args:
        plan: sets the length of the step axis, and the values below which features are collapsed.
        units: units of the metrics that only an objective measures.
    """
    probe = Chart(
        "Probe on labels",
        "balanced accuracy",
        _curves(PROBE_CURVES, series),
        "A linear classifier on the frozen features, scored on other patients, compared with the "
        "same classifier on raw voxels.",
        highest=1.0,
    )
    own = _own_charts(series, plan, units or {})
    charts = [*_single_charts(HEALTH_CHARTS, series, plan), probe, *own]
    return _drawable(charts, plan)


def _own_charts(series: Series, plan: Plan | None, units: Mapping[str, str]) -> list[Chart]:
    """Return a chart for every metric that has no other, and one for each term of the loss."""
    known = {
        *LEARNING_CHARTS,
        *COST_CHARTS,
        *HEALTH_CHARTS,
        *ERROR_CURVES,
        *PROBE_CURVES,
        *NOT_DRAWN,
    }
    notes: Mapping[str, str] = {}
    if plan is not None:
        figure = figure_of_merit(plan)
        known |= {f"heldout_{name}" for name in figure.references}
        notes = figure.notes
    # A term of the loss is logged in training and in validation; both are in one chart.
    charts: dict[str, Chart] = {}
    for name in sorted(set(series) - known):
        if name.startswith(KIND_PREFIX):
            continue
        shown_name, label, look = name, "last", "second"
        phase, _, term = name.partition("_")
        if phase in TERM_CURVES and term:
            shown_name = term
            label, look = TERM_CURVES[phase]

        title = shown_name.replace("_", " ").capitalize()
        curves = [Curve(label, series[name], look)]
        if title in charts:
            curves = [*charts[title].curves, *curves]
        unit = units.get(name, f"{name} in metrics.jsonl")
        if unit == "1":
            unit = ""
        charts[title] = Chart(title, unit, curves, notes.get(shown_name, ""))

    return list(charts.values())


def _single_charts(charts: Mapping[str, Chart], series: Series, plan: Plan | None) -> list[Chart]:
    """Return the charts of one curve each, filled with the metrics of their names."""
    filled = []
    for name, chart in charts.items():
        points = series.get(name, ())
        curves = [Curve("last", points, "second")]
        if points and plan is not None and name in COLLAPSE_LIMITS:
            limit = getattr(plan.run, COLLAPSE_LIMITS[name])
            curves.append(Curve("collapsed below", [(0.0, limit)], "base", is_level=True))
        filled.append(replace(chart, curves=curves))
    return filled


def _curves(wanted: Mapping[str, tuple[str, str, bool]], series: Series) -> list[Curve]:
    """Return the curves of a chart whose metrics were logged."""
    curves = []
    for name, (label, look, is_level) in wanted.items():
        if series.get(name):
            curves.append(Curve(label, series[name], look, is_level))
    return curves


def _values(curves: Sequence[Curve]) -> list[float]:
    values: list[float] = []
    for curve in curves:
        values += [value for _, value in curve.points]
    return values


def _drawable(charts: Sequence[Chart], plan: Plan | None) -> list[Chart]:
    """Return the charts that have finite points, with at most MAX_POINTS of them a curve."""
    num_steps = 0 if plan is None else plan.optim.num_steps
    drawable = []
    for chart in charts:
        curves = []
        for curve in chart.curves:
            finite = [(step, value) for step, value in curve.points if math.isfinite(value)]
            if finite:
                curves.append(replace(curve, points=thinned(finite)))

        if curves:
            drawable.append(replace(chart, curves=curves, num_steps=num_steps))

    return drawable


def thinned(points: Points, max_points: int = MAX_POINTS) -> Points:
    """Return at most ``max_points`` points.

    Neighbours are replaced by the mean of their values, at the last neighbour's step.
    """
    if len(points) <= max_points:
        return points

    bounds = [round(i * len(points) / max_points) for i in range(max_points + 1)]
    means = []
    for start, stop in pairwise(bounds):
        steps, values = zip(*points[start:stop], strict=True)
        means.append((steps[-1], sum(values) / len(values)))
    return means


def draw(axis: Any, chart: Chart) -> int:
    """Draw the chart's curves, grid and legend into a matplotlib axis.

    Returns:
        the rows of the legend, which is directly above the curves.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    last_step = max(step for curve in chart.curves for step, _ in curve.points)
    last_step = max(last_step, chart.num_steps, 1)
    _draw_curves(axis, chart.curves, last_step)
    _scale_heights(axis, chart)

    # Fractions of a step would be confusing.
    axis.set_xlim(0, last_step)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND_STEPS))
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))

    axis.grid(axis="y", color=palette.GRID, clip_on=False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelcolor=palette.SOFT, labelsize=FONT_SIZE)
    # The first numbers of both axes are at one corner.
    axis.tick_params(axis="x", pad=8)
    return _draw_legend(axis)


def _draw_curves(axis: Any, curves: Sequence[Curve], last_step: float) -> None:
    """Draw each curve, and each level as a line over the whole width."""
    for curve in curves:
        style = palette.CURVES[curve.look]
        steps, values = zip(*curve.points, strict=True)
        label = f"{curve.label} {_number(values[-1])}"
        if curve.is_level:
            level = [values[-1]] * 2
            axis.plot([0, last_step], level, label=label, clip_on=False, **style.line())
            continue

        axis.plot(
            steps,
            values,
            label=label,
            marker=style.marker,
            markersize=5,
            markevery=1 if len(values) <= NUM_MARKED else [len(values) - 1],
            # A clip path would need an id, and ids are shared by all charts of a page.
            clip_on=False,
            **style.line(),
        )


def _scale_heights(axis: Any, chart: Chart) -> None:
    """Set the range and the ticks of the vertical axis."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    heights = _values(chart.curves)
    if chart.is_logarithmic and min(heights) > 0:
        first = math.floor(math.log10(min(heights)))
        last = math.ceil(math.log10(max(heights)))
        axis.set_yscale("log")
        # At least one power of ten, so that both ends have a tick.
        axis.set_ylim(10.0**first, 10.0 ** max(last, first + 1))
        axis.yaxis.set_major_locator(LogLocator(numticks=6))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        # From 0, so that a small change looks small.
        axis.set_ylim(min(0.0, *heights), max(chart.highest, 1.1 * max(heights)) or 1.0)
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))


def _draw_legend(axis: Any) -> int:
    """Draw the legend above the axis and its highest number, where no curve can lie behind it.

    Returns:
        its rows: four names with their values need two.
    """
    _, labels = axis.get_legend_handles_labels()
    length = sum(ENTRY_LENGTH + LETTER_LENGTH * len(label) for label in labels)
    is_short = length <= LEGEND_LENGTH
    legend = axis.legend(
        loc="lower left",
        bbox_to_anchor=(LEFT_OF_AXES, 1.07 if is_short else 1.06),
        ncols=4 if is_short else 2,
        frameon=False,
        fontsize=FONT_SIZE,
        labelspacing=0.2,
        borderpad=0.4 if is_short else 0.1,
        borderaxespad=0,
        # Long enough that dashes and dots differ.
        handlelength=1.9,
        handletextpad=0.4,
        columnspacing=0.8 if is_short else 2.5,
    )
    for text in legend.get_texts():
        text.set_color(palette.SOFT)
    return 1 if is_short else 2


def short_number(value: float) -> str:
    """Return the number of a tick in at most six characters: "0.25", "2.5e-5", "120k", "2.5M"."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            divisor = 1e3 if suffix == "k" else size
            return f"{value / divisor:.4g}{suffix}"

    if abs(value) >= 1000:
        return f"{value:,.0f}"
    # All small numbers in one form, so that the ticks of an axis can be compared.
    plain = f"{value:.6g}"
    if len(plain) <= 6 and not 0 < abs(value) < 1e-3:
        return plain
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _number(value: float) -> str:
    """Return a number with three digits, but large ones in full."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def description(chart: Chart) -> str:
    """Return the chart in words, for people who cannot see it."""
    # A level has points at the ends of the axis, and says nothing about the steps.
    drawn = [curve for curve in chart.curves if not curve.is_level] or chart.curves
    steps: list[float] = []
    for curve in drawn:
        steps += [step for step, _ in curve.points]

    changes = []
    for curve in chart.curves:
        (_, first), (_, last) = curve.points[0], curve.points[-1]
        change = f"from {first:.4g} to {last:.4g}"
        if curve.is_level:
            change = f"at {last:.4g}"
        changes.append(f"{curve.label} {change}")

    range_of_steps = f"steps {min(steps):g} to {max(steps):g}"
    return f"{chart.title}, {range_of_steps}: {'; '.join(changes)}"


def figure_of(chart: Chart) -> str:
    """Return the chart as an HTML figure with a heading and a caption."""
    unit = f' <span class="soft">({escape(chart.unit)})</span>' if chart.unit else ""
    heading = f"<h3>{escape(chart.title)}{unit}</h3>"
    caption = f"<figcaption>{escape(chart.note)}</figcaption>" if chart.note else ""
    return f"<figure>{heading}{svg(chart)}{caption}</figure>"


def svg(chart: Chart) -> str:
    """Return the chart as an SVG element that takes fonts and colours from the page around it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Text is not converted to outlines: it is smaller, and it can be searched and read aloud. The
    # ids of markers are hashes of this salt, so that no two charts of a page share one.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):
        figure = Figure(figsize=CHART_SIZE)
        axis = figure.add_axes(AXES_BOX)
        draw(axis, chart)
        axis.set_xlabel("step", color=palette.SOFT, fontsize=FONT_SIZE, labelpad=1)

        # No metadata: the page is the same for the same metrics.
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)

    return _for_the_page(written.getvalue(), description(chart))


def _for_the_page(text: str, alt: str) -> str:
    """Return matplotlib's SVG file as a small element for the inside of an HTML page."""
    root = ElementTree.fromstring(text)
    view_box = root.get("viewBox", "")
    referred = set(re.findall(r'xlink:href="#(\w+)"', text))

    for element in root.iter():
        # HTML knows the names of SVG elements without their namespace.
        element.tag = _without_namespace(element.tag)
        attributes = {_without_namespace(name): value for name, value in element.attrib.items()}
        if attributes.get("id") not in referred:
            attributes.pop("id", None)
        if attributes.get("transform", "").startswith("rotate(-0 "):
            del attributes["transform"]

        for name, value in attributes.items():
            if name == "style":
                # Fonts and colours are those of the page. It has variables for the colours.
                parts = value.split("; ")
                kept = [part for part in parts if not part.startswith(("font", "stroke-linecap"))]
                style = ";".join(kept)
                for colour_name, colour in COLOURS.items():
                    style = style.replace(colour, f"var(--{colour_name})")
                attributes[name] = style.replace(": ", ":")
            else:
                # A tenth of a unit is enough; more digits only make the page larger.
                rounded = DECIMALS.sub(lambda match: f"{float(match[0]):.1f}", value)
                attributes[name] = " ".join(rounded.replace(".0 ", " ").split())
        element.attrib = attributes

        # Line breaks between elements are not needed.
        element.tail = None
        if element.text and not element.text.strip():
            element.text = None

    # The first element is a global style sheet, which would apply to the whole page.
    root[:] = [child for child in root if child.find("style") is None]
    root.attrib = {"class": "chart", "viewBox": view_box, "role": "img", "aria-label": alt}
    title = ElementTree.Element("title")
    title.text = alt
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _without_namespace(name: str) -> str:
    return name.rpartition("}")[2]


def draw_progress(metrics: Path, picture: Path, plan: Plan | None = None) -> None:
    """Draw all charts of a ``metrics.jsonl`` into one PNG, two beside each other.

    Args:
        plan: plan of the run, which sets the length of the step axis.
    """
    from matplotlib.figure import Figure

    series = read_series(metrics)
    charts = [
        *learning_charts(series, plan),
        *health_charts(series, plan, read_units(metrics)),
        *cost_charts(series, plan),
    ]
    num_rows = max(1, -(-len(charts) // 2))
    width, height = CHART_SIZE
    figure = Figure(figsize=(2 * width, 1.15 * height * num_rows), layout="constrained")

    for number, chart in enumerate(charts, start=1):
        axis = figure.add_subplot(num_rows, 2, number)
        num_legend_rows = draw(axis, chart)
        # The title is above the legend.
        title = f"{chart.title} ({chart.unit})" if chart.unit else chart.title
        title_pad = 18 + 14 * num_legend_rows
        axis.set_title(title, loc="left", x=LEFT_OF_AXES, pad=title_pad, fontsize=11)
        note = textwrap.fill(chart.note, 60)
        axis.set_xlabel(f"step\n{note}" if note else "step", color=palette.SOFT)

    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
