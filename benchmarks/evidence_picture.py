"""Draw what ``evidence.py`` measured on IXI: docs/explanation/evidence.png.

    python benchmarks/evidence_picture.py

Left: the Dice of every draw of labelled patients, by the weights that fine-tuning started from.
Right: the dense probe after more and more steps of pretraining.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")

import matplotlib.pyplot as plt
from measured import REPOSITORY, lines_of

from nnunet_autoreg.benchmark.picture import widen
from nnunet_autoreg.report.palette import FROM_BASELINE, FROM_PRETRAINED, FROM_RANDOM, GRID

DATA, ENCODER = "ixi", "resenc_tiny"
PICTURE = REPOSITORY / "docs" / "explanation" / "evidence.png"
SHOWN = {"optimizer": "adamw", "lr": 1e-2, "steps": 800}
"""The settings of the fine-tunings that are drawn: those with which all draws were run."""
NUM_SCORED = 20
"""Patients of the development part, who are scored in both panels."""
ARMS = {
    "scratch": "random\nweights",
    "masked": "masked\npretraining",
    "ar": "autoregressive\npretraining",
}
STYLES = {
    "scratch": FROM_RANDOM,
    "masked": FROM_BASELINE,
    "ar": FROM_PRETRAINED,
}

Line = Mapping[str, Any]


def finetunings(lines: Sequence[Line], arm: str) -> dict[tuple[int, Any], float]:
    """Return the Dice of an arm's fine-tunings by (draw, pretraining seed)."""
    found = {}
    for line in lines:
        is_run = line["command"] == "finetune" and line["arm"] == arm
        if not is_run or line["encoder"] != ENCODER:
            continue
        settings = line["settings"]
        if all(settings[key] == value for key, value in SHOWN.items()):
            found[line["draw"], line["pretraining_seed"]] = line["dice_mean"]
    return found


def draw_dice(axes: Any, lines: Sequence[Line]) -> None:
    """Draw one column of points for each arm, and a line for each draw."""
    columns = {arm: finetunings(lines, arm) for arm in ARMS}
    # Means of different draws cannot be compared, so that only those of all arms are shown.
    draws = sorted(set.intersection(*({draw for draw, _ in scores} for scores in columns.values())))
    for arm, scores in columns.items():
        columns[arm] = {run: dice for run, dice in scores.items() if run[0] in draws}

    for draw in draws:
        heights = []
        for scores in columns.values():
            of_draw = [dice for (number, _), dice in scores.items() if number == draw]
            heights.append(np.mean(of_draw) if of_draw else np.nan)
        axes.plot(range(len(ARMS)), heights, color=GRID, linewidth=1, zorder=1)

    for column, (arm, scores) in enumerate(columns.items()):
        values = list(scores.values())
        style = STYLES[arm]
        axes.scatter(
            [column] * len(values), values, color=style.colour, marker=style.marker, s=34, zorder=2
        )
        if values:
            mean = float(np.mean(values))
            axes.hlines(mean, column - 0.22, column + 0.22, color=style.colour, linewidth=3)
            axes.annotate(f"{mean:.3f}", (column + 0.25, mean), va="center", fontsize=11)
    axes.set_xticks(range(len(ARMS)), list(ARMS.values()))
    axes.set_xlim(-0.5, len(ARMS) - 0.3)
    axes.set_ylabel("Dice of 12 structures")
    axes.set_title(
        f"After fine-tuning on 5 labelled patients\n"
        f"(n = {NUM_SCORED} patients scored, {len(draws)} draws)",
        fontsize=11,
    )


def probe_points(lines: Sequence[Line], objective: str) -> list[tuple[int, float]]:
    """Return (pretraining steps, Dice of the probe) of one objective's default runs."""
    steps_of = {}
    for line in lines:
        is_pretraining = line["command"] == "pretrain" and line["objective"] == objective
        # Runs with changed plan values are other curves.
        if is_pretraining and line["settings"].get("half") and not line["settings"]["set"]:
            steps_of[line["arm"], line["pretraining_seed"]] = line["steps"]

    points: dict[int, list[float]] = {}
    for line in lines:
        steps = steps_of.get((line["arm"], line.get("pretraining_seed")))
        if line["arm"] == "random":
            steps = 0
        if line["command"] != "probe" or line["encoder"] != ENCODER or steps is None:
            continue
        for result in line["results"]:
            if result["levels"] == "encoder":
                mean = float(np.mean(list(result["dice"].values())))
                points.setdefault(steps, []).append(mean)
    return sorted((steps, float(np.mean(values))) for steps, values in points.items())


def draw_probe(axes: Any, lines: Sequence[Line]) -> None:
    """Draw the probe of the encoder over the steps of pretraining."""
    for arm, objective in (("ar", "autoregressive"), ("masked", "masked")):
        points = probe_points(lines, objective)
        steps = [step for step, _ in points]
        dice = [value for _, value in points]
        style = STYLES[arm]
        axes.plot(steps, dice, marker=style.marker, label=objective, markersize=6, **style.line())
    axes.set_xlabel("steps of pretraining (0 = random weights)")
    axes.set_ylabel("Dice of a linear classifier")
    axes.set_title(
        f"Frozen features of the encoder\n(n = {NUM_SCORED} patients, means over draws)",
        fontsize=11,
    )
    axes.legend(frameon=False)


def main() -> None:
    """Write the picture."""
    # Scores on other data are another picture.
    lines = [line for line in lines_of("evidence.jsonl") if line["set"] == DATA]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), width_ratios=(1.15, 1))
    draw_dice(left, lines)
    draw_probe(right, lines)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        # Otherwise small differences fill the picture.
        widen(axes)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=130, facecolor="white")


if __name__ == "__main__":
    main()
