"""The lines of runs as a table for people, and its numbers for the picture."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nnunet_autoreg.benchmark.folds import merged_folds, shown_split, unfinished_folds
from nnunet_autoreg.benchmark.protocol import OWN_PREFIX, SCRATCH, STOCK, arms
from nnunet_autoreg.benchmark.results import UNEQUAL_COST, RunKey, key_of
from nnunet_autoreg.benchmark.split import SPLITS
from nnunet_autoreg.benchmark.statistics import SURFACE, Difference, mean_dice, paired, tolerance_of
from nnunet_autoreg.wording import counted

TERMINAL_WIDTH = 80

Lines = Mapping[int, Mapping[str, Any]]
"""Lines of runs that differ only in their seed, by seed."""


@dataclass(frozen=True)
class TableRow:
    """Runs that differ only in their seed.

    Attributes:
        key: key of the first seed.
        lines: one line of results per seed.
        to_scratch, to_stock: paired differences to the twin from random weights, and to stock
            nnU-Net.
        surface_to_scratch, surface_to_stock: the same of the surface Dice.
    """

    key: RunKey
    lines: Lines
    to_scratch: Difference | None
    to_stock: Difference | None
    surface_to_scratch: Difference | None = None
    surface_to_stock: Difference | None = None

    @property
    def dice(self) -> list[float]:
        """Mean Dice of every seed."""
        return [mean_dice(line) for line in self.lines.values()]

    @property
    def surface_dice(self) -> list[float]:
        """Mean surface Dice of every seed that has one."""
        scored = [line for line in self.lines.values() if tolerance_of(line) is not None]
        return [mean_dice(line, SURFACE) for line in scored]

    @property
    def tolerances_mm(self) -> list[float]:
        """Tolerances of the surface Dice."""
        found = {tolerance_of(line) for line in self.lines.values()}
        return sorted(tolerance for tolerance in found if tolerance is not None)


def rows_of(lines: Sequence[Mapping[str, Any]]) -> list[TableRow]:
    """Return one row for each arm, encoder, number of labels, length and recipe.

    Of several lines of the same run the last one counts. The folds of a cross-validation are one
    run for each seed, once all of them are finished.
    """
    groups: dict[RunKey, dict[int, Mapping[str, Any]]] = {}
    for line in merged_folds(lines):
        of_seed = groups.setdefault(_without_seed(key_of(line)), {})
        of_seed[int(line["seed"])] = line

    rows = []
    for lines_of_seeds in groups.values():
        by_seed = dict(sorted(lines_of_seeds.items()))
        key = key_of(next(iter(by_seed.values())))

        # No arm is compared with itself, and stock with nothing.
        twin: Lines = {}
        if key.arm not in (SCRATCH, STOCK):
            twin_key = replace(key, arm=SCRATCH)  # the same plans and recipe
            twin = groups.get(_without_seed(twin_key), {})

        stock: Lines = {}
        if key.arm != STOCK:
            stock_key = replace(key, arm=STOCK, encoder="-", recipe="")
            stock = groups.get(_without_seed(stock_key), {})

        row = TableRow(
            key,
            by_seed,
            to_scratch=paired(by_seed, twin),
            to_stock=paired(by_seed, stock),
            surface_to_scratch=paired(by_seed, twin, SURFACE),
            surface_to_stock=paired(by_seed, stock, SURFACE),
        )
        rows.append(row)
    return sorted(rows, key=_position_in_table)


def _without_seed(key: RunKey) -> RunKey:
    return replace(key, seed=0)


def _position_in_table(row: TableRow) -> tuple[Any, ...]:
    key = row.key
    length = (key.split, key.steps, key.batch, key.labels)
    # Stock comes last, since it belongs to no encoder.
    return (*length, key.arm == STOCK, key.recipe, key.encoder, arms().index(key.arm))


COLUMNS = (
    "split",
    "steps x batch",
    "labels",
    "encoder",
    "arm",
    "seeds",
    "Dice (sd over seeds)",
    "minus scratch [95 %]",
    "minus stock [95 %]",
    "surface Dice (sd over seeds)",
    "minus scratch [95 %]",
    "s a step",
    "min a run",
    "pretraining",
)


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as markdown, with notes about its figures."""
    rows = rows_of(lines)
    text = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = " | ".join(_cells(row))
        text.append(f"| {cells} |")

    text += ["", *_notes(rows)]
    unfinished = unfinished_folds(lines)
    if unfinished:
        text.append(unfinished)
    return "\n".join(text) + "\n"


def _cells(row: TableRow) -> list[str]:
    key = row.key
    lines = list(row.lines.values())

    # Patients may have several scans; seeds may then label different numbers of cases.
    labels = str(key.labels)
    numbers_of_cases = sorted({int(line["num_labelled"]) for line in lines})
    if numbers_of_cases != [key.labels]:
        numbers = "-".join(str(number) for number in numbers_of_cases)
        labels += f" ({numbers} cases)"

    surface = "-"
    if row.surface_dice:
        tolerance = " or ".join(f"{value:g}" for value in row.tolerances_mm)
        surface = f"{_mean_and_deviation(row.surface_dice)} at {tolerance} mm"

    encoder = key.encoder.removeprefix(OWN_PREFIX)
    if key.recipe:
        encoder += f", {key.recipe}"

    paces = [line["seconds_per_step"] for line in lines if line["seconds_per_step"]]
    minutes = [(line["train_s"] + line["validate_s"]) / 60 for line in lines]
    return [
        key.split,
        f"{key.steps} x {key.batch}",
        labels,
        encoder,
        key.arm,
        str(len(lines)),
        _mean_and_deviation(row.dice),
        signed(row.to_scratch),
        signed(row.to_stock),
        surface,
        signed(row.surface_to_scratch),
        f"{np.median(paces):.2f}" if paces else "-",
        f"{np.mean(minutes):.1f}",
        _pretraining(lines[0].get("pretraining")),
    ]


SHORT_COLUMNS = ("labels", "arm", "Dice", "minus scratch [95 %]", "minus stock [95 %]")

Length = tuple[str, int, int]
"""Split, steps and batch of runs that may be compared."""


def length_of(key: RunKey) -> Length:
    """Return the properties that runs must share to be compared."""
    return key.split, key.steps, key.batch


def summary(lines: Sequence[Mapping[str, Any]], steps: Sequence[int] = ()) -> str:
    """Return the results of the runs in words and in tables of at most 80 columns.

    ``table.md`` has all runs.

    Args:
        steps: the lengths to show; by default, that of the last line. Split and batch are those of
            the last line.
    """
    last = key_of(lines[-1])
    split = shown_split(last.split)
    lengths = {(split, number, last.batch) for number in steps or [last.steps]}
    rows = [row for row in rows_of(lines) if length_of(row.key) in lengths]

    # The answers come first.
    sentences = []
    for row in rows:
        if row.key.arm in (SCRATCH, STOCK):
            continue
        # Without the arm from random weights, stock nnU-Net is compared with.
        other = SCRATCH if row.to_scratch is not None else STOCK
        difference = row.to_scratch or row.to_stock
        if difference is None:
            continue

        sentences.append(verdict(difference))
        encoder = row.key.encoder.removeprefix(OWN_PREFIX)
        patients = counted(row.key.labels, "labelled patient")
        num_steps = counted(row.key.steps, "step")
        text = f"{row.key.arm} ({encoder}) minus {other}, {patients}, {num_steps}"
        sentences += textwrap.wrap(
            text,
            TERMINAL_WIDTH,
            initial_indent="  ",
            subsequent_indent="  ",
        )

    # One table for each network and length, with stock nnU-Net in all of them.
    stock = [row for row in rows if row.key.arm == STOCK]
    tables: dict[tuple[Any, ...], list[TableRow]] = {}
    for row in rows:
        if row.key.arm != STOCK:
            network = (length_of(row.key), row.key.encoder, row.key.recipe)
            tables.setdefault(network, []).append(row)

    blocks = []
    for (length, _, _), ours in tables.items():
        rivals = [row for row in stock if length_of(row.key) == length]
        blocks.append(_short_table([*ours, *rivals]))
    if not tables and stock:
        blocks.append(_short_table(stock))

    parts = ["\n".join(sentences), *blocks, unfinished_folds(lines)]
    return "\n\n".join(part for part in parts if part)


def _short_table(rows: Sequence[TableRow]) -> str:
    """Return a heading and a table of runs of one length and network, and of stock nnU-Net."""
    key = rows[0].key
    name = STOCK if key.arm == STOCK else key.encoder.removeprefix(OWN_PREFIX)
    if key.recipe:
        name += f" ({key.recipe})"
    steps, batch = counted(key.steps, "step"), counted(key.batch, "patch")

    line = next(iter(rows[0].lines.values()))
    num_patients = len(set(line["subjects"].values()))
    patients = counted(num_patients, "patient")
    numbers_of_seeds = sorted({len(row.lines) for row in rows})
    seeds = " or ".join(str(number) for number in numbers_of_seeds)
    seeds += " seed" if numbers_of_seeds == [1] else " seeds"
    heading = f"{name}, {steps} of {batch}; {key.split}: {patients}, {seeds}"

    cells = [SHORT_COLUMNS]
    for row in sorted(rows, key=lambda row: row.key.labels):
        dice = f"{np.mean(row.dice):.3f}"
        to_scratch, to_stock = figures(row.to_scratch), figures(row.to_stock)
        cells.append((str(row.key.labels), row.key.arm, dice, to_scratch, to_stock))

    widths = []
    for column in zip(*cells, strict=True):
        widths.append(max(len(text) for text in column))

    table = textwrap.wrap(heading, TERMINAL_WIDTH)
    for texts in cells:
        padded = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
        table.append("  ".join(padded).rstrip())
    return "\n".join(table)


def verdict(difference: Difference) -> str:
    """Return whether a difference is shown, with its figures.

    It is shown if the 95 % interval over seeds and patients does not hold 0.
    """
    low, high = difference.over_both
    if difference.num_seeds < 2:
        answer = "not known from 1 seed"
    elif low > 0:
        answer = "better"
    elif high < 0:
        answer = "worse"
    else:
        answer = "no difference shown"
    return f"{answer}: {figures(difference)}"


def _mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f"{np.std(values, ddof=1):.3f}" if len(values) > 1 else "-"
    return f"{np.mean(values):.3f} ({deviation})"


def figures(difference: Difference | None) -> str:
    """Return a difference with its interval; "-" if there is none."""
    if difference is None:
        return "-"
    low, high = difference.over_both
    return f"{difference.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def signed(difference: Difference | None) -> str:
    """Return a difference with its interval, and with a remark if there is 1 seed."""
    text = figures(difference)
    if difference is not None and difference.num_seeds < 2:
        text += ", 1 seed"
    return text


def _pretraining(made_by: Mapping[str, Any] | None) -> str:
    """Return objective, length and cost of the pretraining that a run started from."""
    if made_by is None:
        return "-"

    objective = made_by["objective"].split(" (")[0]
    times = f" x {made_by['batch']}" if made_by["batch"] else ""
    text = f"{objective}, {made_by['steps']}{times} on {made_by['scans']} scans"

    # Lines of older versions have no cost.
    costs = []
    if made_by.get("flops") is not None:
        costs.append(f"{made_by['flops']:.3g} FLOPs")
    if made_by.get("samples") is not None:
        costs.append(f"{made_by['samples']} samples")
    if made_by.get("seconds") is not None:
        costs.append(f"{made_by['seconds']:.0f} s")
    return f"{text}; {', '.join(costs)}" if costs else text


def unequal_pretrainings(rows: Sequence[TableRow]) -> list[str]:
    """Return a sentence for each encoder whose arms were pretrained at unequal cost."""
    flops_of: dict[str, dict[str, float]] = {}
    for row in rows:
        first_line = next(iter(row.lines.values()))
        pretraining = first_line.get("pretraining")
        if pretraining and pretraining.get("flops"):
            flops_of_arm = flops_of.setdefault(row.key.encoder, {})
            flops_of_arm[row.key.arm] = float(pretraining["flops"])

    # An arm that was pretrained at a higher cost may be better only for that reason.
    sentences = []
    for encoder, flops_of_arm in flops_of.items():
        least = min(flops_of_arm, key=flops_of_arm.__getitem__)
        most = max(flops_of_arm, key=flops_of_arm.__getitem__)
        ratio = flops_of_arm[most] / flops_of_arm[least]
        if ratio > 1 + UNEQUAL_COST:
            name = encoder.removeprefix(OWN_PREFIX)
            sentences.append(
                f"NOT AT EQUAL COST: the pretraining of {most} ({name}) took {ratio:.2f} times the "
                f"FLOPs of {least}.",
            )
    return sentences


def _notes(rows: Sequence[TableRow]) -> list[str]:
    notes = [
        "Dice: mean over the patients of the split; a patient's is the mean over scans and labels. "
        "Labels: patients, and cases where their number differs (in folders of older versions: "
        "cases). Surface Dice: the share of border, by area, that lies within the tolerance of the "
        "other border. FLOPs of pretraining: forward and backward of encoder, decoder and head. "
        "Equal cost: all arms of a length take the same steps and patches a step; the patches' "
        "sizes and what a step costs differ between networks. Pretraining is listed apart.",
        "Differences are paired by seed and case. The 95 % interval is a bootstrap over patients "
        "and seeds. Every seed labels other patients of the pool, so that the interval includes "
        "that choice, the initial weights and the order of the data. It does not include another "
        "pretraining, another division into pool and test, or another dataset, and few seeds say "
        "little about their own spread. With 1 seed it is a bootstrap over patients only.",
    ]
    notes += unequal_pretrainings(rows)
    if any(row.key.split not in SPLITS for row in rows):
        notes.append(
            "A cross-validation scores every patient once a seed. Trainings of different folds "
            "share labelled patients, which the interval does not know of: it is somewhat narrow.",
        )

    left_out = 0
    for row in rows:
        for difference in (row.to_scratch, row.to_stock):
            if difference is not None:
                left_out = max(left_out, difference.num_left_out)

    if left_out:
        notes.append(
            f"Up to {left_out} cases have no Dice in some run (nothing to find and nothing found) "
            "and are left out of the pairs.",
        )
    return notes
