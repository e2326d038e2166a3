"""Write the tables of the pages of measurements from the files in ``benchmarks/results``.

    python benchmarks/measured.py            # rewrite the pages
    python benchmarks/measured.py --check    # exit with 1 if a page differs

The pages are ``measured.md`` and ``measured_*.md`` in ``docs/explanation``. A table is written
between ``<!-- table: NAME -->`` and ``<!-- end -->``. The text around the tables is written by
hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detection import table as detection_table
from evidence_table import SCRATCH, compare, markdown, paired, patient_means, with_transfer_named
from evidence_table import table as evidence_table

from nnunet_autoreg.benchmark.table import markdown as benchmark_table

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
EXPLANATION = REPOSITORY / "docs" / "explanation"
PAGES = tuple(sorted(EXPLANATION.glob("measured*.md")))
TABLE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Line = dict[str, Any]


def lines_of(name: str) -> list[Line]:
    """Return the lines of a file of results."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


SUMMARY = (
    ("ixi", "resenc_tiny", 5, 800, 1e-2),
    ("ixi", "resenc_tiny", 5, 2400, 1e-2),
    ("ixi", "primus_tiny", 5, 1600, 1e-3),
    ("hippocampus", "resenc_tiny", 5, 800, 1e-2),
    ("hippocampus", "resenc_tiny", 1, 800, 1e-2),
)
"""Set, encoder, labelled patients, steps and rate of the fine-tunings in the first table."""
SUMMARY_ARMS = (SCRATCH, "ar", "masked", "alice", "joint", "primus8", "masked8")
TRANSFERS = {
    (): "encoder",
    ("transfer_decoder=false",): "encoder",
    ("transfer_decoder=true",): "encoder and decoder",
}
"""Changed values of the recipe -> transferred parts. Runs with other changes are left out."""

SUMMARY_SCORES = (
    "start",
    "transferred",
    "pretrainings x draws",
    "Dice",
    "minus random weights (95 %)",
    "surface Dice",
)
Setting = tuple[str, str, int, int, float]


def summary() -> str:
    """Return the fine-tunings that matter most: Dice, and the difference to random weights."""
    rows = []
    for setting in SUMMARY:
        data, encoder, labels, steps, _ = setting
        for cells in _summary_cells(_summary_groups(setting)):
            rows.append([data, encoder, labels, steps, *cells])
    header = ["set", "encoder", "labelled patients", "steps", *SUMMARY_SCORES]
    return markdown(header, rows)


def objectives_dice() -> str:
    """Return the fine-tunings of the first setting for which only the encoder was transferred."""
    groups = _summary_groups(SUMMARY[0])
    only_encoder = {key: members for key, members in groups.items() if key[2] == TRANSFERS[()]}
    return markdown(SUMMARY_SCORES, _summary_cells(only_encoder))


def _summary_groups(setting: Setting) -> dict[tuple[str, str, str], list[Line]]:
    """Return the fine-tunings of one setting by arm, objective and transferred parts."""
    data, encoder, labels, steps, rate = setting
    lines = [with_transfer_named(line) for line in lines_of("evidence.jsonl")]
    objective_of = {}
    for line in lines:
        if line["command"] == "pretrain" and line["set"] == data:
            objective_of[line["arm"]] = str(line["objective"])

    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        is_of_arm = line["command"] == "finetune" and line["arm"] in SUMMARY_ARMS
        if not is_of_arm or line["split"] != "development":
            continue
        found = (line["set"], line["encoder"], line["labels"], line["steps"])
        if found != (data, encoder, labels, steps):
            continue
        settings = line["settings"]
        has_rate = settings["lr"] == rate and settings["encoder_lr"] is None
        parts = TRANSFERS.get(tuple(settings["recipe"]))
        if parts is None or not has_rate or settings["optimizer"] != "adamw":
            continue

        objective = objective_of.get(line["arm"], "random")
        groups.setdefault((line["arm"], objective, parts), []).append(line)
    return groups


def _summary_cells(groups: Mapping[tuple[str, str, str], Sequence[Line]]) -> list[list[object]]:
    """Return one row of cells for each arm of a setting, random weights first."""
    scratch = next(members for (arm, _, _), members in groups.items() if arm == SCRATCH)
    rows: list[list[object]] = []
    for (arm, objective, parts), members in sorted(groups.items(), key=_random_weights_first):
        difference = "-"
        if arm != SCRATCH:
            pairs_RDJ = paired(members, scratch, patient_means("dice"))
            assert pairs_RDJ is not None, f"{arm}: no draw has a run from random weights"
            found = compare(pairs_RDJ, 0.02)
            low, high = found.bootstrap
            difference = f"{found.mean:+.3f} ({low:+.3f} to {high:+.3f})"
        num_seeds = len({line["pretraining_seed"] for line in members})
        num_draws = len({line["draw"] for line in members})
        runs = f"- x {num_draws}" if arm == SCRATCH else f"{num_seeds} x {num_draws}"
        dice = np.mean([line["dice_mean"] for line in members])
        surface = np.mean([line["surface_mean"] for line in members])
        transferred = "-" if arm == SCRATCH else parts
        scores = (f"{dice:.3f}", difference, f"{surface:.3f}")
        rows.append([objective, transferred, runs, *scores])
    return rows


def _random_weights_first(item: tuple[tuple[str, str, str], Sequence[Line]]) -> tuple[bool, str]:
    arm, objective, parts = item[0]
    return arm != SCRATCH, f"{objective} {parts}"


def evidence() -> str:
    """Return all measurements of the evidence harness."""
    return _evidence_tables(lines_of("evidence.jsonl"))


def _evidence_tables(lines: Sequence[Line]) -> str:
    # The titles of these tables are one level deeper in the page.
    return evidence_table(lines, None, None, 0.02).replace("## ", "### ")


SAME_COST_ARMS = {
    "ixi": ("random", "ar", "masked", "alice", "joint", "ar800", "masked800", "alice800"),
    "hippocampus": ("random", "ar100", "masked100", "joint100"),
}
"""Set -> random weights, and arms that cost as much as 2400, 800 or 100 autoregressive steps."""
SAME_COST_LABELS, SAME_COST_DRAWS = 5, 5


def objectives() -> str:
    """Return pretraining by each objective at equal cost, and the dense probe of its encoder."""
    everything = [*lines_of("evidence.jsonl"), *lines_of("objectives.jsonl")]
    lines = []
    for line in everything:
        is_shown = line.get("command") in ("pretrain", "probe") and line["set"] in SAME_COST_ARMS
        if not is_shown or line["encoder"] != "resenc_tiny":
            continue
        if line["arm"] not in SAME_COST_ARMS[line["set"]]:
            continue

        if line["command"] == "probe":
            # Random weights were probed with more draws and labels on one of the sets.
            probes = []
            for probe in line["results"]:
                if probe["labels"] == SAME_COST_LABELS and probe["draw"] < SAME_COST_DRAWS:
                    probes.append(probe)
            lines.append({**line, "results": probes})
        else:
            lines.append(line)
    return _evidence_tables(lines)


def few_label() -> str:
    """Return the first short trainings: mean Dice by split, labels and configuration."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for line in lines_of("few_label.jsonl"):
        key = (line["split"], line["steps"], line["labels"], line["arm"], line["configuration"])
        groups.setdefault(key, []).append(line["dice"])

    rows = []
    for key, dice in sorted(groups.items(), key=str):
        spread = f"{np.std(dice, ddof=1):.3f}" if len(dice) > 1 else "-"
        rows.append([*key, len(dice), f"{np.mean(dice):.3f}", spread])
    header = ["split", "steps", "labels", "arm", "configuration", "runs", "Dice", "sd over runs"]
    return markdown(header, rows)


def encoders() -> str:
    """Return the comparison of the two tiny encoders by ``autoreg_benchmark``."""
    return benchmark_table(lines_of("encoders.jsonl")).strip()


def detection() -> str:
    """Return the trainings of the detection benchmark."""
    return "\n".join(detection_table(RESULTS / "detection.jsonl"))


def steps() -> str:
    """Return the seconds of a training step, ours and the baseline's."""
    rows = []
    for line in lines_of("step.jsonl"):
        median = line["median_s"]
        seconds = [f"{median[arm]:.2f}" for arm in ("ours", "baseline", "baseline again")]
        ratio_keys = ("ours_over_baseline", "baseline_again_over_baseline")
        ratios = [f"{line[key]:.2f}" for key in ratio_keys]
        rows.append([line["what"], line["edge"], line["commit"], *seconds, *ratios])
    header = ["step", "edge of the crop", "commit", "ours, s", "baseline, s", "baseline again, s"]
    return markdown([*header, "ours / baseline", "noise: again / baseline"], rows)


def crops() -> str:
    """Return the number of crops per second that one core reads from the store."""
    rows = []
    for line in lines_of("store.jsonl"):
        if line["what"] != "crops":
            continue
        speed = line["crops_per_s_and_core"]
        size = " x ".join(str(n) for n in line["crop_vox"])
        values = [speed[arm] for arm in ("ours", "ours, first touch", "baseline", "baseline again")]
        rows.append([line["set"], size, *values])
    header = ["set", "crop", "ours", "ours, first touch", "nnU-Net's way", "the same again"]
    return markdown(header, rows)


def gpu() -> str:
    """Return the measurements on a GPU, without the lines that only hold the time of a part."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines_of("gpu.jsonl"):
        if line.get("what") == "whole part":
            continue
        words = [str(line[key]) for key in ("encoder", "order") if line.get(key)]
        groups.setdefault((line["part"], " ".join(words)), []).append(line)

    rows = []
    for (part, case), members in groups.items():
        right = "-"
        checks = [bool(line["ok"]) for line in members if "ok" in line]
        if checks:
            right = f"{sum(checks)} of {len(checks)}"
        figures = "; ".join(_gpu_figures(members))
        rows.append([part, case or "-", right, figures or "-"])
    return markdown(["part", "encoder, order", "right", "figures"], rows)


GPU_FIGURES = (
    ("first_step_s", "first step after {:.1f} s"),
    ("ended_after_s", "ended after {:.1f} s"),
    ("crops_per_s", "{:.0f} crops/s"),
    ("share_of_peak", "{:.1%} of the matrix peak"),
)
"""Field of a line of ``gpu.py`` -> how the table shows it."""


def _gpu_figures(lines: Sequence[Line]) -> list[str]:
    """Return the figures of one part, and the reason if a measurement is missing."""
    figures = []
    errors = [line["error"] for line in lines if "error" in line]
    if errors:
        figures.append(f"largest error {max(errors):.2g}")
    for key, words in GPU_FIGURES:
        figures += [words.format(line[key]) for line in lines if key in line]
    for line in lines:
        if "failed" in line:
            # The reason comes after the command that failed, and before the place in the code.
            reason = line["failed"].rpartition("autoreg_pretrain: ")[2]
            figures.append(reason.split(" (")[0].split("; it was")[0])
    return figures


def kills() -> str:
    """Return the runs that were killed at random moments and finished by the same line."""
    rows = []
    for line in lines_of("kills.jsonl"):
        counts = [line["num_kills"], line["num_finished"], line["num_identical"]]
        rows.append([line["command"], *counts])
    return markdown(["command", "kills", "runs finished", "of them equal to the last bit"], rows)


def classification_scores(kind: str) -> str:
    """Return the scores of classification of one kind: ``tuned``, ``unscaled`` or ``frozen``."""
    rows = []
    for line in lines_of("classification.jsonl"):
        if line["kind"] != kind:
            continue
        cases = f"{line['cases']} ({line['patients']})"
        scores = [score_text(line.get(name)) for name in ("auc", "balanced_accuracy")]
        tiles = []
        if kind == "frozen":
            features = line.get("features")
            tiles = ["-", "-"]
            if features:
                tiles = [sizes_text(features["spacing_mm"]), sizes_text(features["tile_size_vox"])]
        rows.append([line["set"], line["task"], line["what"], cases, *tiles, *scores])
    tiles = ["voxel, mm (z, y, x)", "tile"] if kind == "frozen" else []
    header = ["set", "task", "what", "cases (patients)", *tiles, "AUC", "balanced accuracy"]
    return markdown(header, rows)


def sizes_text(values: Sequence[float]) -> str:
    """Return sizes along three axes as text."""
    return " x ".join(f"{value:g}" for value in values)


def score_text(score: Mapping[str, Any] | None) -> str:
    """Return a score with its 95 % interval."""
    if score is None or score["value"] is None:
        return "-"
    ends = score["ci95"]
    interval = f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
    return f"{score['value']:.2f}{interval}"


HEADS = {"tuned": "scaled", "unscaled": "as they are"}
"""By kind of line, how the heads of a classifier read the encoder's features."""


def classification_settings() -> str:
    """Return the settings of every set's fine-tuning, and the time of all epochs of five folds."""
    rows = {}
    for line in lines_of("classification.jsonl"):
        if line["kind"] not in HEADS:
            continue
        minutes = [f"{seconds / 60:.0f}" for seconds in line["seconds_of_epochs"].values()]
        spacing, patch = sizes_text(line["spacing_mm"]), sizes_text(line["patch_vox"])
        steps = line["epochs"] * line["iterations_per_epoch"]
        rate = f"{line['rates']['pretrained']:g}"
        settings = [spacing, patch, line["batch"], steps, rate, line["balance"]]
        heads = HEADS[line["kind"]]
        rows[line["set"], heads] = [line["set"], heads, *settings, " / ".join(minutes)]
    header = ["set", "features", "voxel, mm (z, y, x)", "patch", "batch", "steps", "rate"]
    return markdown([*header, "balance", "minutes, pretrained / scratch"], list(rows.values()))


def classification_map() -> str:
    """Return how well the sets of the map of scans separate."""
    rows = []
    for line in lines_of("classification.jsonl"):
        if line["kind"] != "map":
            continue
        for name, share in line["nearest_neighbour_of_own_set"].items():
            features = line["features"][name]
            tile = sizes_text(features["tile_size_vox"])
            percent = f"{100 * share:.0f} %"
            rows.append([name, features["encoder"], tile, line["scans"][name], percent])
    return markdown(["set", "encoder", "tile", "scans", "nearest neighbour of the same set"], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "summary": summary,
    "evidence": evidence,
    "objectives": objectives,
    "objectives-dice": objectives_dice,
    "few-label": few_label,
    "encoders": encoders,
    "detection": detection,
    "steps": steps,
    "crops": crops,
    "classification-tuned": lambda: classification_scores("tuned"),
    "classification-unscaled": lambda: classification_scores("unscaled"),
    "classification-frozen": lambda: classification_scores("frozen"),
    "classification-settings": classification_settings,
    "classification-map": classification_map,
    "gpu": gpu,
    "kills": kills,
}


def filled(page: str) -> str:
    """Return the page with all of its tables made from the results."""

    def made(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        return f"{begin}{TABLES[name]()}\n{end}"

    return TABLE.sub(made, page)


def main() -> int:
    """Rewrite the pages, or compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="compare the pages, write nothing")
    args = parser.parse_args()

    num_different = 0
    for file in PAGES:
        page = file.read_text(encoding="utf-8")
        made = filled(page)
        if not args.check:
            file.write_text(made, encoding="utf-8")
        elif made != page:
            num_different += 1
            print(f"{file} differs from its results; run: python benchmarks/measured.py")
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
