"""Draw what ``evidence.py`` measured on IXI: docs/explanation/evidence.png.

    python benchmarks/evidence_picture.py

Left: the Dice of every draw of labelled patients, by the weights that fine-tuning started from.
Right: the dense probe after more and more steps of pretraining.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")

import matplotlib.pyplot as plt
from evidence_table import with_transfer_named
from measured import REPOSITORY, lines_of

from nnunet_autoreg.benchmark.picture import widen
from nnunet_autoreg.report.palette import FROM_BASELINE, FROM_PRETRAINED, FROM_RANDOM, GRID, SOFT

DATA, ENCODER = "ixi", "resenc_tiny"
PICTURE = REPOSITORY / "docs" / "explanation" / "evidence.png"
SHOWN = {"optimizer": "adamw", "lr": 1e-2, "steps": 800}
"""The settings of the fine-tunings that are drawn: those with which all draws were run."""
NUM_SCORED = 20
"""Patients of the development part, who are scored in both panels."""
STYLES = {
    "scratch": FROM_RANDOM,
    "masked": FROM_BASELINE,
    "ar": FROM_PRETRAINED,
}

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of points.

    Attributes:
        recipe: changed values of the recipe; None for any.
    """

    label: str
    arm: str
    recipe: list[str] | None = None


COLUMNS = (
    Column("random weights", "scratch"),
    Column("pretrained encoder", "ar", ["transfer_decoder=false"]),
)
"""The start without pretraining and the planned one. The page of measurements has tables of all."""


def finetunings(lines: Sequence[Line], column: Column) -> dict[tuple[int, Any], float]:
    """Return the Dice of the fine-tunings of a column by (draw, pretraining seed)."""
    found = {}
    for line in lines:
        is_run = line["command"] == "finetune" and line["arm"] == column.arm
        if not is_run or line["encoder"] != ENCODER or line["split"] != "development":
            continue
        settings = with_transfer_named(line)["settings"]
        has_recipe = column.recipe in (None, settings["recipe"])
        if has_recipe and all(settings[key] == value for key, value in SHOWN.items()):
            found[line["draw"], line["pretraining_seed"]] = line["dice_mean"]
    return found


def draw_dice(axes: Any, lines: Sequence[Line]) -> None:
    """Draw one column of points for each start, and a line for each pretrained fine-tuning."""
    scores = [finetunings(lines, column) for column in COLUMNS]
    # Means of different draws cannot be compared, so that only those of all columns are shown.
    draws_of_columns = []
    for runs in scores:
        draws_of_columns.append({draw for draw, _ in runs})
    draws = sorted(set.intersection(*draws_of_columns))

    from_random, from_pretraining = scores
    twins = {draw: dice for (draw, _), dice in from_random.items()}
    for (draw, _), dice in from_pretraining.items():
        if draw in draws:
            axes.plot((0, 1), (twins[draw], dice), color=SOFT, linewidth=0.8, zorder=1)

    for position, (column, runs) in enumerate(zip(COLUMNS, scores, strict=True)):
        values = [dice for (draw, _), dice in runs.items() if draw in draws]
        style = STYLES[column.arm]
        at = [position] * len(values)
        axes.scatter(at, values, color=style.colour, marker=style.marker, s=34, zorder=2)

        # The means are outside, where no line crosses them.
        mean = float(np.mean(values))
        side = -1 if position == 0 else 1
        ends = sorted((position + 0.06 * side, position + 0.26 * side))
        axes.hlines(mean, *ends, color=style.colour, linewidth=3)
        axes.annotate(
            f"mean {mean:.3f}",
            (position + 0.3 * side, mean),
            va="center",
            ha="right" if position == 0 else "left",
            fontsize=11,
        )
    axes.set_xticks(range(len(COLUMNS)), [column.label for column in COLUMNS], fontsize=11)
    axes.set_xlim(-0.9, len(COLUMNS) - 0.1)
    axes.set_ylabel("Dice of 12 structures")
    axes.set_title(
        f"Fine-tuned on 5 labelled patients\n"
        f"(n = {NUM_SCORED} patients scored, {len(draws)} choices of the 5)",
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
        f"Frozen features of the encoder\n(n = {NUM_SCORED} patients scored)",
        fontsize=11,
    )
    # At the left, each curve has room above itself.
    axes.legend(
        frameon=False,
        loc="upper left",
        title="pretraining",
        alignment="left",
        handlelength=2.6,
    )


def main() -> None:
    """Write the picture."""
    # Scores on other data are another picture.
    lines = [line for line in lines_of("evidence.jsonl") if line["set"] == DATA]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2), width_ratios=(1.5, 1))
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
