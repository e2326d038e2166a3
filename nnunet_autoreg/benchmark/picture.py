"""``benchmark.png``: Dice of every seed by arm and number of labels, and paired differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.benchmark.protocol import OWN_PREFIX, STOCK
from nnunet_autoreg.benchmark.table import TableRow, rows_of
from nnunet_autoreg.records import atomic_path
from nnunet_autoreg.report.palette import (
    FROM_BASELINE,
    FROM_PRETRAINED,
    FROM_RANDOM,
    GRID,
    SOFT,
    STOCK_TRAINING,
)
from nnunet_autoreg.wording import counted

FILLS = ("full", "none", "left", "bottom", "right", "top")
"""How the markers of the first, second, ... encoder are filled."""

STYLE_OF_ARM = {
    "pretrained": FROM_PRETRAINED,
    "masked": FROM_BASELINE,
    "scratch": FROM_RANDOM,
    "stock": STOCK_TRAINING,
}

LEAST_SPAN = 0.1
"""Of an axis of Dice, so that differences within noise do not fill the picture."""


def draw(path: Path, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the runs that have the length and split of the last line.

    Of each encoder, only the runs with the recipe of its own last line are drawn.
    """
    from matplotlib.figure import Figure

    # Runs of another length are no fair comparison.
    last = lines[-1]
    length = (last["split"], last["steps"], last["batch"])
    alike = [line for line in lines if (line["split"], line["steps"], line["batch"]) == length]
    last_recipe = {line["encoder"]: line["recipe"] for line in alike}
    shown = [line for line in alike if line["recipe"] == last_recipe[line["encoder"]]]
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
    patients = {str(subject) for line in alike for subject in line["subjects"].values()}
    seeds = {line["seed"] for line in alike}
    figure.suptitle(
        f"{title}: n = {counted(len(patients), 'test patient')}, {counted(len(seeds), 'seed')}\n"
        f"{last['split']} split, {last['steps']:,} steps of {counted(last['batch'], 'patch')}",
        fontsize=11,
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _names(rows: Sequence[TableRow]) -> list[tuple[str, str]]:
    """Return (encoder, arm) of every series, in the order of the table."""
    return list(dict.fromkeys((row.key.encoder, row.key.arm) for row in rows))


def _position(
    names: Sequence[tuple[str, str]],
    name: tuple[str, str],
    labels: Sequence[int],
    num_labels: int,
) -> float:
    """Return where a series stands on the x axis: beside the others of the number of labels."""
    # Series share 70 % of the room of a number of labels; the rest is the gap to the next one.
    offset = (names.index(name) + 0.5) / len(names) - 0.5
    return labels.index(num_labels) + 0.7 * offset


def _style(names: Sequence[tuple[str, str]], name: tuple[str, str]) -> dict[str, Any]:
    """Return the colour and marker of the arm; how the marker is filled shows the encoder."""
    encoder, arm = name
    style = STYLE_OF_ARM[arm]
    encoders = list(dict.fromkeys(encoder for encoder, _ in names))
    fill = FILLS[encoders.index(encoder) % len(FILLS)]
    return {"color": style.colour, "marker": style.marker, "fillstyle": fill}


def _draw_dice(
    axis: Any, rows: Sequence[TableRow], labels: Sequence[int], is_surface: bool
) -> None:
    """Draw the score of every seed as a point and their mean as a bar."""
    names = _names(rows)
    for name in names:
        encoder, arm = name
        style = _style(names, name)

        for row in rows:
            scores = row.surface_dice if is_surface else row.dice
            if (row.key.encoder, row.key.arm) != name or not scores:
                continue
            x = _position(names, name, labels, row.key.labels)
            mean = np.mean(scores)
            axis.plot([x] * len(scores), scores, linestyle="", markersize=4, alpha=0.5, **style)
            axis.plot([x - 0.04, x + 0.04], [mean, mean], color=style["color"], linewidth=2.5)

        # One entry of the legend serves all panels.
        if not is_surface:
            label = arm if encoder == "-" else f"{arm}, {encoder.removeprefix(OWN_PREFIX)}"
            axis.plot([], [], linestyle="", label=label, **style)

    kind = "Surface Dice" if is_surface else "Dice"
    axis.set(
        xticks=range(len(labels)),
        xticklabels=labels,
        xlabel="labelled patients",
        ylabel=f"{kind} (points: seeds, bars: mean)",
    )
    axis.set_xlim(-0.5, len(labels) - 0.5)
    _widen(axis, LEAST_SPAN)
    _plain(axis)


def _draw_differences(
    axis: Any,
    rows: Sequence[TableRow],
    labels: Sequence[int],
    is_surface: bool,
) -> None:
    """Draw the differences to scratch or, where there are no such pairs, to stock."""
    to = "scratch"
    pairs = []
    for row in rows:
        difference = row.surface_to_scratch if is_surface else row.to_scratch
        if difference is not None:
            pairs.append((row, difference))

    if not pairs:
        to = STOCK
        for row in rows:
            difference = row.surface_to_stock if is_surface else row.to_stock
            if difference is not None:
                pairs.append((row, difference))

    kind = "Surface Dice" if is_surface else "Dice"
    names = _names([row for row, _ in pairs])
    for row, difference in pairs:
        name = (row.key.encoder, row.key.arm)
        low, high = difference.over_both
        # Rounding may put the ends of an interval of no width on the wrong side of its mean.
        below, above = max(difference.mean - low, 0.0), max(high - difference.mean, 0.0)
        axis.errorbar(
            _position(names, name, labels, row.key.labels),
            difference.mean,
            [[below], [above]],
            capsize=3,
            markersize=5,
            **_style(_names(rows), name),
        )
    axis.axhline(0, color=SOFT, linewidth=0.8)
    axis.set(
        xticks=range(len(labels)),
        xticklabels=labels,
        xlabel="labelled patients",
        ylabel=f"{kind} minus {to}, 95 %",
    )
    axis.set_xlim(-0.5, len(labels) - 0.5)
    if not pairs:
        axis.text(0.5, 0.6, "no pairs yet", transform=axis.transAxes, ha="center")
    _widen(axis, LEAST_SPAN)
    _plain(axis)


def _widen(axis: Any, least_span: float) -> None:
    """Let the value axis span at least so much, around what is drawn."""
    low, high = axis.get_ylim()
    missing = least_span - (high - low)
    if missing > 0:
        axis.set_ylim(low - missing / 2, high + missing / 2)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
