"""The dense probe's figures as JSON lines and as a table with intervals."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_autoreg.benchmark.public_ids import PublicIds

if TYPE_CHECKING:
    # The demo reads the figures, and its help must not load torch.
    from nnunet_autoreg.benchmark.dense_probe import ProbeResult

RANDOM, RAW = "random", "raw voxels"


@dataclass(frozen=True)
class ProbeLine:
    """One classifier's result with the encoder that it belongs to.

    Attributes:
        encoder: a run's name, "random", or "raw voxels".
        architecture: the encoder's name in ``model.sizes``; "-" for raw voxels.
        seed: seed of the random weights; None for a file's.
    """

    encoder: str
    architecture: str
    seed: int | None
    result: "ProbeResult"


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % t interval over draws; without an interval if there is one draw."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if not math.isfinite(self.low):
            return f"{self.mean:+.3f}, 1 draw"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class ProbeRow:
    """The results of one encoder, one set of levels and one number of labels, over all draws.

    Attributes:
        num_seeds: random networks that were averaged; 1 for pretrained ones.
        dice: mean Dice of every draw.
        to_random: paired difference to random weights of the same architecture and levels.
        dice_of_structure: mean over draws and seeds.
    """

    encoder: str
    architecture: str
    levels: str
    num_labels: int
    num_seeds: int
    dice: list[float]
    to_random: Interval | None
    dice_of_structure: dict[int, float]


def as_json(
    line: ProbeLine,
    structures: Mapping[int, str],
    ids: PublicIds,
    context: Mapping[str, Any],
) -> str:
    """Return one line of JSON.

    Args:
        ids: what scans and patients are called in it.
        context: the content that all lines of a command share.
    """
    result = line.result

    def named(dices: Mapping[int, float]) -> dict[str, float]:
        return {structures[label]: round(dice, 5) for label, dice in dices.items()}

    of_patient = {}
    for patient, dices in result.dice_of_patient.items():
        of_patient[ids.of_patient(patient)] = named(dices)

    content = {
        "encoder": line.encoder,
        "architecture": line.architecture,
        "seed": line.seed,
        "levels": result.levels,
        "labels": result.num_labels,
        "draw": result.draw,
        "dice": round(result.dice, 5) if math.isfinite(result.dice) else None,
        "dice_per_structure": named(result.dice_of_structure),
        "dice_per_patient": of_patient,
        "labelled": sorted(ids.of_case(name) for name in result.labelled),
        **context,
    }
    return json.dumps(content, allow_nan=False)


def t_interval(differences: Sequence[float]) -> Interval:
    """Return mean and 95 % t interval of paired differences."""
    values = np.array(differences)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)

    # SciPy is imported late because it takes a tenth of a second.
    from scipy.stats import t

    standard_error = values.std(ddof=1) / math.sqrt(len(values))
    half_width = float(t.ppf(0.975, len(values) - 1) * standard_error)
    return Interval(mean, mean - half_width, mean + half_width)


def rows_of(lines: Sequence[ProbeLine]) -> list[ProbeRow]:
    """Return one row per encoder, levels and number of labels, in the order of the lines."""
    groups: dict[tuple[str, str, str, int], list[ProbeLine]] = {}
    for line in lines:
        key = (line.encoder, line.architecture, line.result.levels, line.result.num_labels)
        groups.setdefault(key, []).append(line)

    rows = []
    for (encoder, architecture, levels, num_labels), members in groups.items():
        # Draw by draw, the same patients are labelled for the twin with random weights.
        dice_of_draw = _dice_of_draws(members)
        to_random = None
        twins = groups.get((RANDOM, architecture, levels, num_labels))
        if twins and encoder != RANDOM:
            random_of_draw = _dice_of_draws(twins)
            pairs = [dice_of_draw[draw] - random_of_draw[draw] for draw in dice_of_draw]
            to_random = t_interval(pairs)

        dice_by_structure: dict[int, list[float]] = {}
        for line in members:
            for label, value in line.result.dice_of_structure.items():
                dice_by_structure.setdefault(label, []).append(value)
        of_structure = {label: float(np.mean(v)) for label, v in dice_by_structure.items()}

        row = ProbeRow(
            encoder,
            architecture,
            levels,
            num_labels,
            num_seeds=len({line.seed for line in members}),
            dice=list(dice_of_draw.values()),
            to_random=to_random,
            dice_of_structure=of_structure,
        )
        rows.append(row)
    return rows


def table(lines: Sequence[ProbeLine], structures: Mapping[int, str]) -> str:
    """Return the figures as two markdown tables: means over structures, then every structure."""
    rows = rows_of(lines)
    text = [
        "| encoder | levels | labelled patients | Dice (sd over draws) | minus random [95 %] |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{np.std(row.dice, ddof=1):.3f}" if len(row.dice) > 1 else "-"
        difference = str(row.to_random) if row.to_random is not None else "-"
        cells = [
            _name(row),
            row.levels,
            str(row.num_labels),
            f"{np.mean(row.dice):.3f} ({spread})",
            difference,
        ]
        text.append(_table_row(cells))

    # Structures are rows here, since there may be many.
    columns = ["structure"]
    columns += [f"{_name(row)}, {row.levels}, {row.num_labels}" for row in rows]
    text += ["", _table_row(columns), "|---" * len(columns) + "|"]
    for label, name in structures.items():
        values = [row.dice_of_structure.get(label, math.nan) for row in rows]
        cells = [f"{value:.3f}" if math.isfinite(value) else "-" for value in values]
        text.append(_table_row([name, *cells]))

    text += [
        "",
        "Dice: mean over structures of the mean over the scored patients. Random: the same network "
        "with random weights, mean over its seeds. Differences are paired by draw; the t interval "
        "holds the choice of labelled patients. It does not hold other scored patients or another "
        "pretraining.",
    ]
    return "\n".join(text)


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def dice_by_draw(values: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Return draw -> Dice, mean over seeds, in the order of the draws.

    Args:
        values: draw and Dice of every classifier.
    """
    found: dict[int, list[float]] = {}
    for draw, dice in values:
        found.setdefault(draw, []).append(dice)
    return {draw: float(np.mean(of_seeds)) for draw, of_seeds in sorted(found.items())}


def _dice_of_draws(lines: Sequence[ProbeLine]) -> dict[int, float]:
    return dice_by_draw((line.result.draw, line.result.dice) for line in lines)


def _name(row: ProbeRow) -> str:
    if row.encoder == RAW:
        return RAW
    seeds = f", {row.num_seeds} seeds" if row.num_seeds > 1 else ""
    return f"{row.encoder} ({row.architecture}{seeds})"
