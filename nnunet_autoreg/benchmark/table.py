"""The lines of runs as a table for people, and its numbers for the picture."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        to_scratch, to_stock: paired differences to the twin from random weights, and to nnU-Net as
            it comes.
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
        return [
            mean_dice(line, SURFACE)
            for line in self.lines.values()
            if tolerance_of(line) is not None
        ]

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
    groups: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
    for line in merged_folds(lines):
        groups.setdefault(_group(key_of(line)), {})[int(line["seed"])] = line

    # The twin from random weights has the same plans and recipe; nnU-Net as it comes has neither.
    rows = []
    for seeds in groups.values():
        by_seed = dict(sorted(seeds.items()))
        key = key_of(next(iter(by_seed.values())))
        twin = _lines_of(groups, key, arm="scratch", encoder=key.encoder, recipe=key.recipe)
        stock = _lines_of(groups, key, arm=STOCK, encoder="-", recipe="")
        # No arm is compared with itself, and stock with nothing.
        twin = {} if key.arm in ("scratch", STOCK) else twin
        stock = {} if key.arm == STOCK else stock
        rows.append(
            TableRow(
                key,
                by_seed,
                paired(by_seed, twin),
                paired(by_seed, stock),
                paired(by_seed, twin, SURFACE),
                paired(by_seed, stock, SURFACE),
            ),
        )
    return sorted(rows, key=_position_in_table)


def _position_in_table(row: TableRow) -> tuple[Any, ...]:
    key = row.key
    length = (key.split, key.steps, key.batch, key.labels)
    # Stock comes last, since it belongs to no encoder.
    return (*length, key.arm == STOCK, key.recipe, key.encoder, arms().index(key.arm))


def _group(key: RunKey) -> tuple[Any, ...]:
    return (key.split, key.steps, key.batch, key.labels, key.recipe, key.encoder, key.arm)


def _lines_of(
    groups: Mapping[tuple[Any, ...], Lines],
    key: RunKey,
    arm: str,
    encoder: str,
    recipe: str,
) -> Lines:
    return groups.get((key.split, key.steps, key.batch, key.labels, recipe, encoder, arm), {})


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
    text += [f"| {' | '.join(_cells(row))} |" for row in rows]
    notes = [*_notes(rows), unfinished_folds(lines)]
    return "\n".join([*text, "", *filter(None, notes)]) + "\n"


def _cells(row: TableRow) -> list[str]:
    key, lines = row.key, list(row.lines.values())

    # Patients may have several scans; seeds may then label different numbers of cases.
    labels = str(key.labels)
    num_labelled = sorted({int(line["num_labelled"]) for line in lines})
    if num_labelled != [key.labels]:
        labels += f" ({'-'.join(map(str, num_labelled))} cases)"

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
    wanted = {(split, number, last.batch) for number in steps or [last.steps]}
    rows = [row for row in rows_of(lines) if length_of(row.key) in wanted]

    # The answers come first.
    sentences = []
    for row in rows:
        # Without the arm from random weights, stock nnU-Net is what to compare with.
        other = "scratch" if row.to_scratch is not None else STOCK
        difference = row.to_scratch or row.to_stock
        if difference is not None and row.key.arm not in (SCRATCH, STOCK):
            encoder = row.key.encoder.removeprefix(OWN_PREFIX)
            name_of_arm = row.key.arm if encoder == "-" else f"{row.key.arm} ({encoder})"
            compared = f"{name_of_arm} minus {other}"
            patients = counted(row.key.labels, "labelled patient")
            sentences.append(verdict(difference))
            text = f"{compared}, {patients}, {counted(row.key.steps, 'step')}"
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

    unfinished = unfinished_folds(lines)
    return "\n\n".join(filter(None, ["\n".join(sentences), *blocks, unfinished]))


def _short_table(rows: Sequence[TableRow]) -> str:
    """Return a heading and a table of runs of one length and network, and of stock nnU-Net."""
    first = rows[0]
    encoder = first.key.encoder.removeprefix(OWN_PREFIX)
    name = STOCK if encoder == "-" else encoder
    if first.key.recipe:
        name += f" ({first.key.recipe})"
    line = next(iter(first.lines.values()))
    num_patients = len(set(line["subjects"].values()))
    steps, batch = counted(first.key.steps, "step"), counted(first.key.batch, "patch")
    seeds = sorted({len(row.lines) for row in rows})
    heading = (
        f"{name}, {steps} of {batch}; {first.key.split}: {counted(num_patients, 'patient')}, "
        f"{' or '.join(map(str, seeds))} {'seed' if seeds == [1] else 'seeds'}"
    )

    cells = [SHORT_COLUMNS]
    for row in sorted(rows, key=lambda row: row.key.labels):
        dice = f"{np.mean(row.dice):.3f}"
        differences = [figures(found) for found in (row.to_scratch, row.to_stock)]
        cells.append((str(row.key.labels), row.key.arm, dice, differences[0], differences[1]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

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
        return f"not known from 1 seed: {figures(difference)}"
    if low > 0:
        return f"better: {figures(difference)}"
    if high < 0:
        return f"worse: {figures(difference)}"
    return f"no difference shown: {figures(difference)}"


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
    """Return the same with a remark if there is 1 seed."""
    is_single = difference is not None and difference.num_seeds < 2
    return figures(difference) + (", 1 seed" if is_single else "")


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
        pretraining = next(iter(row.lines.values())).get("pretraining")
        if pretraining and pretraining.get("flops"):
            flops_of.setdefault(row.key.encoder, {})[row.key.arm] = float(pretraining["flops"])

    # An arm that was pretrained at a higher cost may be better only for that reason.
    sentences = []
    for encoder, of_arm in flops_of.items():
        least, most = min(of_arm, key=of_arm.__getitem__), max(of_arm, key=of_arm.__getitem__)
        ratio = of_arm[most] / of_arm[least]
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
