"""Measure classification: baselines of frozen features in five folds, and fine-tuned folds.

    autoreg_embed -w brain -i RAW/imagesTr -o brain.npz
    python benchmarks/classification.py frozen --set ixi --dataset RAW --features brain=brain.npz
    python benchmarks/classification.py tuned --set ixi --arm pretrained --fold-folder FOLDER
    python benchmarks/classification.py table

``frozen`` reads ``classesTr.csv`` of a raw dataset, makes the folds that training would make, and
fits the majority class, the sizes of the labels, and a linear probe on each file of features. The
predictions of all five folds together are scored with bootstrap intervals over patients. Scans
without features are left out (``--allow-missing``), because a set may be measured in part.
``tuned`` adds what the validation of a fold of AutoregClassificationTrainer wrote. Each adds lines
to ``benchmarks/results/classification.jsonl``. ``table`` prints all lines in Markdown.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_lines import circumstances

from nnunet_autoreg.classification.baselines import (
    MAJORITY,
    SIZE,
    predict_baselines,
    size_features,
)
from nnunet_autoreg.classification.folds import make_folds
from nnunet_autoreg.classification.metrics import judge, scores_of
from nnunet_autoreg.classification.predictions import write_predictions
from nnunet_autoreg.classification.table import ClassTable, read_table
from nnunet_autoreg.downstream.label_maps import first_channels
from nnunet_autoreg.nnunet_api import read_scan
from nnunet_autoreg.records import append_json_line, read_json

RESULTS = Path(__file__).parent / "results" / "classification.jsonl"
SCORES = ("auc", "balanced_accuracy", "f1")
NAMES = {MAJORITY: "majority class", SIZE: "sizes of the labels"}


def read_features(files: Mapping[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    """Return name -> scan -> features, of files that autoreg_embed wrote."""
    found = {}
    for name, file in files.items():
        content = np.load(file)
        ids = content["ids"].tolist()
        found[name] = dict(zip(ids, content["features"], strict=True))
    return found


def part_of(table: ClassTable, cases: Sequence[str]) -> ClassTable:
    """Return the table of some cases."""
    return replace(
        table,
        labels={case: table.labels[case] for case in cases},
        patient_of={case: table.patient_of[case] for case in cases},
    )


def sizes_of(dataset: Path, cases: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the sizes of the labels of every case, from its original label map."""
    described = read_json(dataset / "dataset.json")
    values = [value for value in described["labels"].values() if value != 0]
    found = {}
    for case in cases:
        labels = read_scan(dataset / "labelsTr" / f"{case}{described['file_ending']}")
        found[case] = size_features(
            labels.array_CZYX[0].astype(np.int16), labels.spacing_mm, values
        )
    return found


def frozen(args: argparse.Namespace) -> None:
    """Score the baselines over all five folds."""
    start = time.monotonic()
    described = read_json(args.dataset / "dataset.json")
    images = first_channels(args.dataset, described["file_ending"])
    table = read_table(args.dataset / "classesTr.csv", described, list(images))
    files = dict(pair.split("=", 1) for pair in args.features)
    features = read_features({name: Path(file) for name, file in files.items()})

    cases = [case for case in images if all(case in of_case for of_case in features.values())]
    if len(cases) < len(images) and not args.allow_missing:
        sys.exit(f"{len(images) - len(cases)} scans have no features; add --allow-missing")
    table = part_of(table, cases)
    features = {SIZE: sizes_of(args.dataset, cases), **features}

    # Every case is predicted once, by the fold that it is validated in.
    predicted: dict[str, list[dict[str, np.ndarray]]] = {}
    fold_of = {}
    for number, fold in enumerate(make_folds(table)):
        fold_of.update(dict.fromkeys(fold["val"], number))
        found = predict_baselines(table, fold["train"], fold["val"], features)
        for name, of_tasks in found.items():
            merged = predicted.setdefault(name, [{} for _ in table.tasks])
            for of_case, values in zip(merged, of_tasks, strict=True):
                of_case.update(dict(zip(fold["val"], values, strict=True)))

    seconds = time.monotonic() - start
    for name, of_tasks in predicted.items():
        if args.predictions is not None:
            # In the form of autoreg_classify, for autoreg_evaluate_classification and its picture.
            values = {case: [of_case[case] for of_case in of_tasks] for case in cases}
            file = args.predictions / f"{name}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_predictions(file, table.tasks, values)
        for number, task in enumerate(table.tasks):
            truth = [table.labels[case][number] for case in cases]
            values = np.stack([of_tasks[number][case] for case in cases])
            patients = [table.patient_of[case] for case in cases]
            judged = judge(
                task,
                truth,
                values,
                patients,
                args.resamples,
                # Classifiers of different folds need not agree about the scale of their scores.
                strata=[fold_of[case] for case in cases],
            )
            scores = scores_of(judged)
            line = {
                "kind": "frozen",
                "set": args.set,
                "task": task.name,
                "classes": list(task.classes),
                "what": NAMES.get(name, f"linear probe of {name}"),
                "folds": 5,
                "scans": len(cases),
                "seconds_of_all_probes": round(seconds, 1),
                # Names alone: paths may hold what is nobody's business.
                "dataset": args.dataset.name,
                "features": {name: Path(file).name for name, file in files.items()},
                **scores,
            }
            add_line(args.results, line)


def tuned(args: argparse.Namespace) -> None:
    """Add the validation of a trained fold, and of its baselines."""
    summary = read_json(args.fold_folder / "validation" / "summary.json")
    logs = sorted(args.fold_folder.glob("training_log_*.txt"))
    seconds = sum(epoch_seconds(log.read_text()) for log in logs)
    plans = read_json(args.fold_folder.parent / "plans.json")
    for task, scores in summary["tasks"].items():
        entries = {f"{args.arm}, fine-tuned": scores}
        for name, of_tasks in (summary["baselines"] or {}).items():
            what = NAMES.get(name, f"linear probe ({args.arm})")
            entries[what] = of_tasks[task]
        for what, found in entries.items():
            kept = {name: found[name] for name in ("cases", "patients", *SCORES) if name in found}
            line = {
                "kind": "tuned",
                "set": args.set,
                "task": task,
                "what": what,
                "fold": summary["model"]["folds"],
                "trainer": summary["model"]["trainer"],
                "weights": (plans["autoreg"]["weights"] or {}).get("name"),
                "patch": plans["configurations"]["3d_fullres"]["patch_size"],
                "batch": plans["configurations"]["3d_fullres"]["batch_size"],
                "seconds_of_epochs": round(seconds, 1),
                **kept,
            }
            add_line(args.results, line)


def epoch_seconds(log: str) -> float:
    """Return the sum of the times of all epochs of a training log."""
    found = [line for line in log.splitlines() if "Epoch time:" in line]
    return sum(float(line.split("Epoch time:")[1].split()[0]) for line in found)


def add_line(results: Path, line: dict[str, Any]) -> None:
    """Append a line to the results, and print it."""
    line = {**line, **circumstances(torch.device("cpu"))}
    append_json_line(results, line, allow_nan=True)
    print(json.dumps({key: line[key] for key in ("set", "task", "what", "auc") if key in line}))


def table_lines(results: Path) -> list[str]:
    """Return all results as a Markdown table."""
    rows = ["| set, task | what | cases | AUC | balanced accuracy |", "|---|---|---|---|---|"]
    for line in map(json.loads, results.read_text().splitlines()):
        fold = "5 folds" if line["kind"] == "frozen" else f"fold {line['fold'][0]}"
        cells = [
            f"{line['set']}, {line['task']}",
            f"{line['what']}, {fold}",
            str(line["cases"]),
            shown(line.get("auc")),
            shown(line.get("balanced_accuracy")),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def shown(score: Mapping[str, Any] | None) -> str:
    """Return a score with its interval."""
    if score is None or score["value"] is None:
        return "-"
    ends = score["ci95"]
    interval = f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
    return f"{score['value']:.2f}{interval}"


def main() -> None:
    """Run one of the commands of the docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    frozen_parser = commands.add_parser("frozen")
    frozen_parser.add_argument("--set", required=True)
    frozen_parser.add_argument("--dataset", type=Path, required=True)
    frozen_parser.add_argument("--features", nargs="*", default=[], metavar="NAME=FILE")
    frozen_parser.add_argument("--allow-missing", action="store_true")
    frozen_parser.add_argument("--predictions", type=Path, metavar="FOLDER")
    frozen_parser.add_argument("--resamples", type=int, default=1000)
    tuned_parser = commands.add_parser("tuned")
    tuned_parser.add_argument("--set", required=True)
    tuned_parser.add_argument("--arm", choices=["pretrained", "scratch"], required=True)
    tuned_parser.add_argument("--fold-folder", type=Path, required=True)
    table_parser = commands.add_parser("table")
    for command in (frozen_parser, tuned_parser, table_parser):
        command.add_argument("--results", type=Path, default=RESULTS)

    args = parser.parse_args()
    if args.command == "frozen":
        frozen(args)
    elif args.command == "tuned":
        tuned(args)
    else:
        print("\n".join(table_lines(args.results)))


if __name__ == "__main__":
    main()
