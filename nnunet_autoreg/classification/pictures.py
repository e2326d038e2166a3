"""Draw a picture of a classification: ROC curve, confusion matrix and calibration of each task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.records import atomic_path
from nnunet_autoreg.report.palette import BLUE, SOFT, VERMILLION

WIDTH, HEIGHT = 4.2, 4.2
"""Inches of one panel."""


def draw_tasks(picture: Path, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw a row of three panels for every task.

    Args:
        tasks: task -> its scores, as ``metrics.evaluate_task`` returns them.
    """
    import matplotlib

    # No window is needed, and a cluster has none.
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * WIDTH, HEIGHT * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 3, squeeze=False)
    for row, (name, scores) in zip(axes, tasks.items(), strict=True):
        _draw_roc(row[0], name, scores)
        _draw_confusion(row[1], scores)
        _draw_calibration(row[2], scores)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_roc(axis: Any, name: str, scores: Mapping[str, Any]) -> None:
    """Draw the ROC curve of a task, with its interval."""
    roc = scores["roc"]
    auc = scores["auc"]
    axis.plot([0, 1], [0, 1], linestyle=":", color=SOFT, linewidth=1, label="chance")
    # The AUC is None if there are only cases of one class.
    if auc["value"] is not None:
        rates = np.array(roc["false_positive_rate"])
        ends = auc["ci95"]
        interval = f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
        if roc["ci95"]:
            band = np.array(roc["ci95"])
            axis.fill_between(
                rates,
                band[:, 0],
                band[:, 1],
                color=BLUE,
                alpha=0.2,
                linewidth=0,
                label="95 %",
            )
        axis.plot(
            rates,
            np.array(roc["sensitivity"], dtype=float),
            color=BLUE,
            linewidth=2,
            label=f"AUC {auc['value']:.2f}{interval}",
        )

    axis.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        xlabel="false positive rate",
        ylabel="sensitivity",
        aspect="equal",
    )
    axis.grid(alpha=0.3)
    numbers = f"n = {scores['cases']}, patients: {scores['patients']}"
    meaning = "mean of one class against others"
    if roc["positive"]:
        meaning = f"positive: {roc['positive']}"
    axis.set_title(f"{name} ({numbers})\nROC curve, {meaning}", fontsize=10)
    axis.legend(fontsize=8, loc="lower right")


def _draw_confusion(axis: Any, scores: Mapping[str, Any]) -> None:
    """Draw the confusion matrix of a task, with numbers of cases and shares of the true class."""
    counts = np.array(scores["confusion"])  # (true, predicted)
    totals = counts.sum(1, keepdims=True)
    shares = counts / np.where(totals, totals, 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(len(counts)):
        for column in range(len(counts)):
            # Dark cells need light letters.
            colour = "white" if shares[row, column] > 0.55 else "black"
            text = f"{counts[row, column]}\n{100 * shares[row, column]:.0f} %"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)

    classes = scores["classes"]
    ticks = range(len(classes))
    axis.set(xticks=ticks, yticks=ticks, xlabel="predicted", ylabel="true")
    # Long names of many classes would overlap.
    rotation = 45 if sum(len(kind) for kind in classes) > 24 else 0
    axis.set_xticklabels(classes, rotation=rotation)
    axis.set_yticklabels(classes)
    accuracy = scores["balanced_accuracy"]["value"]
    axis.set_title(f"confusion matrix\nbalanced accuracy {accuracy:.2f}", fontsize=10)


def _draw_calibration(axis: Any, scores: Mapping[str, Any]) -> None:
    """Draw how often predictions of a task are right, against their probability."""
    bins = scores["calibration"]["bins"]
    axis.plot([0, 1], [0, 1], linestyle=":", color=SOFT, linewidth=1, label="perfect")
    x = [row["probability"] for row in bins]
    y = [row["true"] for row in bins]
    if all(row["ci95"] for row in bins):
        low = [max(0.0, row["true"] - row["ci95"][0]) for row in bins]
        high = [max(0.0, row["ci95"][1] - row["true"]) for row in bins]
        axis.errorbar(
            x,
            y,
            yerr=[low, high],
            color=VERMILLION,
            linewidth=1,
            capsize=2,
            fmt="none",
            label="95 %",
        )

    # The area of a point shows the number of its cases.
    sizes = [12 + 160 * row["cases"] / scores["cases"] for row in bins]
    # There is no line between the points, because it would emphasise bins of one or two cases.
    axis.scatter(x, y, s=sizes, color=VERMILLION, zorder=3, label="bin (area: cases)")

    is_binary = len(scores["classes"]) == 2
    kind = scores["classes"][1] if is_binary else "the predicted class"
    error = scores["calibration_error"]["value"]
    axis.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        xlabel=f"probability of {kind}",
        ylabel=f"share that is {kind}" if is_binary else "share that is right",
        aspect="equal",
    )
    axis.grid(alpha=0.3)
    # The error is always that of the predicted class, even if the points show one class.
    axis.set_title(f"calibration\nexpected calibration error {error:.2f}", fontsize=10)
    # Points may lie anywhere, so the legend is below the axes.
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
