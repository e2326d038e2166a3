"""``benchmark.png``: Dice by arm and number of labels with every seed, and the paired differences
with their intervals.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.benchmark.protocol import ARMS, OWN_PREFIX, STOCK
from nnunet_autoreg.benchmark.table import Row, rows_of
from nnunet_autoreg.records import atomic_path

COLOURS = dict(zip(ARMS, ("#0072b2", "#cc79a7", "#e69f00", "#555555"), strict=True))
MARKERS = "osD^vP"


def draw(path: Path, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the runs of the length and split of the last line, those of an encoder with the recipe
    of its own last line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    last = lines[-1]
    alike = [
        line
        for line in lines
        if all(line[name] == last[name] for name in ("split", "steps", "batch"))
    ]
    recipes = {line["encoder"]: line["recipe"] for line in alike}
    rows = rows_of([line for line in alike if line["recipe"] == recipes[line["encoder"]]])
    # Runs of older versions have no surface Dice, and get no second line of panels.
    has_surface = any(row.surface_dice for row in rows)
    num_lines = 2 if has_surface else 1
    figure = Figure(figsize=(10, 4.3 * num_lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_lines, 2, squeeze=False)
    labels = sorted({row.key.labels for row in rows})
    for line_of_panels, is_surface in zip(panels, (False, True), strict=False):
        _draw_dice(line_of_panels[0], rows, labels, is_surface)
        _draw_differences(line_of_panels[1], rows, labels, is_surface)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(
        f"{title}: {last['split']} split, {last['steps']} steps of {last['batch']} patches",
        fontsize=11,
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _names(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(encoder, arm) of every series, in the order of the table."""
    return list(dict.fromkeys((row.key.encoder, row.key.arm) for row in rows))


def _place(
    names: Sequence[tuple[str, str]], name: tuple[str, str], labels: Sequence[int], num_labels: int
) -> float:
    return labels.index(num_labels) + 0.7 * ((names.index(name) + 0.5) / len(names) - 0.5)


def _style(names: Sequence[tuple[str, str]], name: tuple[str, str]) -> dict[str, Any]:
    encoders = list(dict.fromkeys(encoder for encoder, _ in names))
    return {"color": COLOURS[name[1]], "marker": MARKERS[encoders.index(name[0]) % len(MARKERS)]}


def _draw_dice(axis: Any, rows: Sequence[Row], labels: Sequence[int], is_surface: bool) -> None:
    names = _names(rows)
    for name in names:
        style, told = (
            _style(names, name),
            name[1] if name[0] == "-" else f"{name[1]}, {name[0].removeprefix(OWN_PREFIX)}",
        )
        for row in (row for row in rows if (row.key.encoder, row.key.arm) == name):
            place = _place(names, name, labels, row.key.labels)
            scores = row.surface_dice if is_surface else row.dice
            if not scores:
                continue
            axis.plot([place] * len(scores), scores, linestyle="", markersize=4, alpha=0.5, **style)
            axis.plot(
                [place - 0.04, place + 0.04],
                [np.mean(scores)] * 2,
                color=style["color"],
                linewidth=2.5,
            )
        # One entry of the legend serves all panels.
        if not is_surface:
            axis.plot([], [], linestyle="", label=told, **style)
    kind = "Surface Dice" if is_surface else "Dice"
    axis.set(
        xticks=range(len(labels)),
        xticklabels=labels,
        xlabel="labelled patients",
        ylabel=f"{kind} (points: seeds, bars: mean)",
    )
    axis.set_xlim(-0.5, len(labels) - 0.5)
    _plain(axis)


def _draw_differences(
    axis: Any,
    rows: Sequence[Row],
    labels: Sequence[int],
    is_surface: bool,
) -> None:
    """Draw the differences to scratch or, where there are no such pairs, to stock."""
    to = "scratch"
    found = [(row, row.surface_to_scratch if is_surface else row.to_scratch) for row in rows]
    pairs = [(row, difference) for row, difference in found if difference is not None]
    if not pairs:
        to = STOCK
        found = [(row, row.surface_to_stock if is_surface else row.to_stock) for row in rows]
        pairs = [(row, difference) for row, difference in found if difference is not None]
    kind = "Surface Dice" if is_surface else "Dice"
    names = _names([row for row, _ in pairs])
    for row, difference in pairs:
        name, (low, high) = (row.key.encoder, row.key.arm), difference.over_both
        # Rounding may put the ends of an interval of no width on the wrong side of its mean.
        reach = [[max(difference.mean - low, 0.0)], [max(high - difference.mean, 0.0)]]
        axis.errorbar(
            _place(names, name, labels, row.key.labels),
            difference.mean,
            reach,
            capsize=3,
            markersize=5,
            **_style(_names(rows), name),
        )
    axis.axhline(0, color="#999999", linewidth=0.8)
    axis.set(
        xticks=range(len(labels)),
        xticklabels=labels,
        xlabel="labelled patients",
        ylabel=f"{kind} minus {to}, 95 %",
    )
    axis.set_xlim(-0.5, len(labels) - 0.5)
    if not pairs:
        axis.text(0.5, 0.6, "no pairs yet", transform=axis.transAxes, ha="center")
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axis.set_axisbelow(True)
