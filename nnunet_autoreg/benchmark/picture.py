"""The pictures of a benchmark.

``benchmark.png`` shows Dice of every seed by arm and number of labels, and paired differences.
``learning_curve.png`` shows Dice over the number of labelled patients, for all lengths.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.benchmark.folds import merged_folds, shown_split
from nnunet_autoreg.benchmark.protocol import OWN_PREFIX, PRETRAINED, SCRATCH, STOCK
from nnunet_autoreg.benchmark.split import SPLITS
from nnunet_autoreg.benchmark.statistics import Difference, mean_interval
from nnunet_autoreg.benchmark.table import TableRow, rows_of
from nnunet_autoreg.records import atomic_path
from nnunet_autoreg.report.palette import (
    FROM_BASELINE,
    FROM_PRETRAINED,
    FROM_RANDOM,
    GRID,
    SERIES,
    SOFT,
    STOCK_TRAINING,
    WHITE,
    Style,
)
from nnunet_autoreg.wording import counted

FILLS = ("full", "none", "left", "bottom", "right", "top")
"""How the markers of the first, second, ... encoder are filled."""

STYLE_OF_ARM = {
    PRETRAINED: FROM_PRETRAINED,
    SCRATCH: FROM_RANDOM,
    STOCK: STOCK_TRAINING,
}
STYLES_OF_TWINS = (FROM_BASELINE, *SERIES[4:])
"""Styles of arms with other objectives, in the order in which they are shown."""

LEAST_SPAN = 0.1
"""Smallest span of an axis of Dice, so that differences within noise do not fill the picture."""

Name = tuple[str, str]
"""Encoder and arm of a series."""


def draw(path: Path, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the runs that have the length and split of the last line.

    Of each encoder, only the runs with the recipe of its last line are drawn. Nothing is drawn if
    there is only a part of a cross-validation yet.
    """
    from matplotlib.figure import Figure

    # Runs of another length are not a fair comparison.
    steps = lines[-1]["steps"]
    shown = [line for line in _comparable(lines) if line["steps"] == steps]
    if not shown:
        return
    rows = rows_of(shown)

    # Runs of older versions have no surface Dice, and get no second line of panels.
    has_surface = any(row.surface_dice for row in rows)
    num_lines = 2 if has_surface else 1
    figure = Figure(figsize=(10, 4.3 * num_lines + 0.5), layout="constrained")
    panels = figure.subplots(num_lines, 2, squeeze=False)
    labels = sorted({row.key.labels for row in rows})
    for line_of_panels, is_surface in zip(panels, (False, True), strict=False):
        _draw_dice(line_of_panels[0], rows, labels, is_surface)
        _draw_differences(line_of_panels[1], rows, labels, is_surface)

    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{_heading(title, shown)}, {counted(steps, 'step')}", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def draw_curve(path: Path, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw Dice over the number of labelled patients, with 95 % intervals.

    Runs of every length that have the split and batch of the last line are drawn, each length in a
    separate panel. All panels have the same axis.
    """
    from matplotlib.figure import Figure

    shown = _comparable(lines)
    if not shown:
        return
    rows = rows_of(shown)
    names = _names(rows)
    lengths = sorted({row.key.steps for row in rows})
    labels = sorted({row.key.labels for row in rows})
    span = labels[-1] - labels[0] or labels[0]

    width = max(6.0, 1.5 + 3.6 * len(lengths))
    figure = Figure(figsize=(width, 4.8), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for axis, steps in zip(panels, lengths, strict=True):
        # One entry of the legend serves all panels.
        is_named = steps == lengths[0]
        for name in names:
            series = [row for row in rows if _name_of(row) == name and row.key.steps == steps]
            _draw_curve_of(axis, series, names, 0.02 * span, is_named)
        axis.set(xticks=labels, xlabel="labelled patients", title=counted(steps, "step"))
        axis.set_xlim(labels[0] - 0.15 * span, labels[-1] + 0.15 * span)
        axis.minorticks_off()
        _plain(axis)

    # The axis is shared, so that widening one panel widens all.
    panels[0].set_ylabel("Dice (bars: 95 % over patients and seeds)")
    widen(panels[0])
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(_heading(title, shown), fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_curve_of(
    axis: Any,
    rows: Sequence[TableRow],
    names: Sequence[Name],
    spacing: float,
    is_named: bool,
) -> None:
    """Draw one series: a point with its interval for each number of labels, joined by a line.

    Args:
        spacing: distance between the series, in labelled patients, so that their bars do not
            overlap.
    """
    labels, means, below, above = [], [], [], []
    for row in sorted(rows, key=lambda row: row.key.labels):
        dice = mean_interval(row.lines)
        if dice is not None:
            labels.append(row.key.labels)
            means.append(dice.mean)
            lower, upper = _bar(dice)
            below.append(lower)
            above.append(upper)
    if not labels:
        return

    name = _name_of(rows[0])
    _, arm = name
    shift = spacing * (names.index(name) - (len(names) - 1) / 2)
    axis.errorbar(
        [number + shift for number in labels],
        means,
        [below, above],
        linestyle=_style_of_arm(names, arm).dash,
        linewidth=1.6,
        elinewidth=1.0,
        capsize=3,
        markersize=6,
        label=_label(name) if is_named else None,
        **_style(names, name),
    )


def _comparable(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the runs with the split and batch of the last line, of any length.

    Of each encoder, only those with the recipe of its last line. Folds are joined.
    """
    last = lines[-1]
    split = shown_split(last["split"])
    alike = []
    for line in merged_folds(lines):
        if line["split"] == split and line["batch"] == last["batch"]:
            alike.append(line)

    last_recipe = {line["encoder"]: line["recipe"] for line in alike}
    return [line for line in alike if line["recipe"] == last_recipe[line["encoder"]]]


def _heading(title: str, shown: Sequence[Mapping[str, Any]]) -> str:
    """Return the title of a picture: how many patients are scored, how often, and how."""
    patients: set[str] = set()
    for line in shown:
        patients.update(str(subject) for subject in line["subjects"].values())
    num_patients = counted(len(patients), "patient")
    num_seeds = counted(len({line["seed"] for line in shown}), "seed")

    split = shown[0]["split"]
    if split in SPLITS:
        split = f"{split} patients"
    batch = counted(shown[0]["batch"], "patch")
    return f"{title}: n = {num_patients} scored, {num_seeds}\n{split}, steps of {batch}"


def _name_of(row: TableRow) -> Name:
    return row.key.encoder, row.key.arm


def _names(rows: Sequence[TableRow]) -> list[Name]:
    """Return the name of every series once, in the order of the table."""
    names = [_name_of(row) for row in rows]
    return list(dict.fromkeys(names))


def _label(name: Name) -> str:
    """Return a series' entry of the legend."""
    encoder, arm = name
    return arm if encoder == "-" else f"{arm}, {encoder.removeprefix(OWN_PREFIX)}"


def _bar(difference: Difference) -> tuple[float, float]:
    """Return how far an interval reaches below and above its mean."""
    low, high = difference.over_both
    # Rounding may put the ends of an interval of no width on the wrong side of its mean.
    return max(difference.mean - low, 0.0), max(high - difference.mean, 0.0)


def _position(
    names: Sequence[Name],
    name: Name,
    labels: Sequence[int],
    num_labels: int,
) -> float:
    """Return the position of a series on the x axis: beside the others of the number of labels."""
    # Series share 70 % of the room of a number of labels; the rest is the gap to the next one.
    offset = (names.index(name) + 0.5) / len(names) - 0.5
    return labels.index(num_labels) + 0.7 * offset


def _style_of_arm(names: Sequence[Name], arm: str) -> Style:
    """Return the style of an arm; arms with other objectives get theirs in the order of names."""
    if arm in STYLE_OF_ARM:
        return STYLE_OF_ARM[arm]
    others = [other for _, other in names if other not in STYLE_OF_ARM]
    twins = list(dict.fromkeys(others))  # each once
    return STYLES_OF_TWINS[twins.index(arm) % len(STYLES_OF_TWINS)]


def _style(names: Sequence[Name], name: Name) -> dict[str, Any]:
    """Return the colour and marker of the arm; how the marker is filled shows the encoder."""
    encoder, arm = name
    style = _style_of_arm(names, arm)
    encoders = list(dict.fromkeys(encoder for encoder, _ in names))
    fill = FILLS[encoders.index(encoder) % len(FILLS)]
    drawn = {"color": style.colour, "marker": style.marker, "fillstyle": fill}
    if fill == "none":
        # White inside, so that lines do not run through the marker.
        drawn |= {"fillstyle": "full", "markerfacecolor": WHITE}
    return drawn


def _draw_dice(
    axis: Any,
    rows: Sequence[TableRow],
    labels: Sequence[int],
    is_surface: bool,
) -> None:
    """Draw the score of every seed as a point and their mean as a bar."""
    names = _names(rows)
    for name in names:
        style = _style(names, name)

        for row in rows:
            scores = row.surface_dice if is_surface else row.dice
            if _name_of(row) != name or not scores:
                continue
            x = _position(names, name, labels, row.key.labels)
            mean = np.mean(scores)
            axis.plot([x] * len(scores), scores, linestyle="", markersize=4, alpha=0.5, **style)
            axis.plot([x - 0.04, x + 0.04], [mean, mean], color=style["color"], linewidth=2.5)

        # One entry of the legend serves all panels.
        if not is_surface:
            axis.plot([], [], linestyle="", label=_label(name), **style)

    _show_labels(axis, labels)
    axis.set_ylabel(f"{_score(is_surface)} (points: seeds, bars: mean)")
    widen(axis)
    _plain(axis)


def _draw_differences(
    axis: Any,
    rows: Sequence[TableRow],
    labels: Sequence[int],
    is_surface: bool,
) -> None:
    """Draw the differences to scratch or, if there are no such pairs, to stock."""
    other = SCRATCH
    pairs = _pairs(rows, other, is_surface)
    if not pairs:
        other = STOCK
        pairs = _pairs(rows, other, is_surface)

    # Series without a pair take no room, but all series have the styles of the other panel.
    names = _names([row for row, _ in pairs])
    all_names = _names(rows)
    for row, difference in pairs:
        name = _name_of(row)
        below, above = _bar(difference)
        axis.errorbar(
            _position(names, name, labels, row.key.labels),
            difference.mean,
            [[below], [above]],
            capsize=3,
            markersize=5,
            **_style(all_names, name),
        )

    axis.axhline(0, color=SOFT, linewidth=0.8)
    _show_labels(axis, labels)
    axis.set_ylabel(f"{_score(is_surface)} minus {other} (bars: 95 %)")
    if not pairs:
        axis.text(0.5, 0.6, "no pairs yet", transform=axis.transAxes, ha="center")
    widen(axis, is_score=False)
    _plain(axis)


def _pairs(
    rows: Sequence[TableRow],
    other: str,
    is_surface: bool,
) -> list[tuple[TableRow, Difference]]:
    """Return the rows that have a difference to the other arm, each with that difference."""
    pairs = []
    for row in rows:
        if other == SCRATCH:
            difference = row.surface_to_scratch if is_surface else row.to_scratch
        else:
            difference = row.surface_to_stock if is_surface else row.to_stock
        if difference is not None:
            pairs.append((row, difference))
    return pairs


def _score(is_surface: bool) -> str:
    return "Surface Dice" if is_surface else "Dice"


def _show_labels(axis: Any, labels: Sequence[int]) -> None:
    """Let the x axis have one tick for each number of labels."""
    axis.set(xticks=range(len(labels)), xticklabels=labels, xlabel="labelled patients")
    axis.set_xlim(-0.5, len(labels) - 0.5)


def widen(axis: Any, is_score: bool = True) -> None:
    """Let the value axis span at least 0.1, around what is drawn.

    Args:
        is_score: the values are scores, not differences; the axis then stays within 0 and 1.
    """
    low, high = axis.get_ylim()
    missing = LEAST_SPAN - (high - low)
    if missing <= 0:
        return
    low, high = low - missing / 2, high + missing / 2

    # No score is below 0 or above 1, so that room there would show nothing.
    if is_score and low < 0:
        low, high = 0.0, high - low
    if is_score and high > 1:
        low, high = low - (high - 1), 1.0
    axis.set_ylim(low, high)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
