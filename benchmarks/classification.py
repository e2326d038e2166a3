"""Measure classification: fine-tuning in five folds, and what it has to beat.

    python benchmarks/classification.py plan --preprocessed FOLDER --epochs 8 --batch 4 --rate 1e-3
    python benchmarks/classification.py tuned --set acdc --dataset RAW --pretrained MODEL \\
        --scratch MODEL
    python benchmarks/classification.py random --like RUN --out FOLDER
    autoreg_embed -w RUN -i RAW/imagesTr -o brain.npz
    python benchmarks/classification.py frozen --set ixi --dataset RAW --features brain=brain.npz

``classification.sh`` shows all lines in order. ``plan`` writes the length, the batch and one rate
for both arms into the plans of a preprocessed dataset.

``tuned`` scores the validation cases of all five folds together, for a pretrained model, for its
scratch twin, and for the baselines that both trainers fitted: the majority class, the sizes of the
labels, and a linear probe on the encoder before fine-tuning. In the scratch twin that encoder has
random weights, which is the control of the probe.

``frozen`` makes the folds that training would make, and fits the baselines on features that
autoreg_embed wrote. ``random`` writes an encoder of random weights in the form of a run, as their
control. Every score has a 95 % interval of a bootstrap over patients. Lines are added to
``benchmarks/results/classification.jsonl``, from which ``benchmarks/measured.py`` makes the tables
of ``docs/explanation/measured_classification.md``.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_lines import circumstances
from numpy.typing import NDArray

from nnunet_autoreg.classification.baselines import (
    MAJORITY,
    PROBE,
    SIZE,
    predict_baselines,
    size_features,
)
from nnunet_autoreg.classification.folds import make_folds
from nnunet_autoreg.classification.metrics import Judged, auc, judge, scores_of
from nnunet_autoreg.classification.plan import BLOCK, make_plan
from nnunet_autoreg.classification.predictions import (
    NAME,
    read_predictions,
    write_predictions,
)
from nnunet_autoreg.classification.table import ClassTable, read_table
from nnunet_autoreg.classification.validate import kept_table
from nnunet_autoreg.downstream.bootstrap import interval
from nnunet_autoreg.downstream.label_maps import first_channels
from nnunet_autoreg.downstream.plan_block import store
from nnunet_autoreg.finetune.load import read_tensors, write_tensors
from nnunet_autoreg.model.card import WEIGHTS_NAME, read_card
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.nnunet_api import read_scan
from nnunet_autoreg.records import append_json_line, read_json, sha256_of, write_json

RESULTS = Path(__file__).parent / "results" / "classification.jsonl"
NUM_FOLDS = 5
NAMES = {MAJORITY: "majority class", SIZE: "sizes of the labels"}
PRETRAINED, SCRATCH = "pretrained", "scratch"
FINE_TUNED = "fine-tuned, {}"
PROBED = "linear probe, {}"

Line = dict[str, Any]
CaseFeatures = dict[str, NDArray[Any]]


@dataclass
class Pooled:
    """Hold the predictions of all folds, in which every case is predicted once.

    Attributes:
        of_case: case -> one array of probabilities (K,) for each task.
        fold_of: case -> number of the fold that it was validated in.
    """

    of_case: dict[str, list[NDArray[Any]]]
    fold_of: dict[str, int]

    @classmethod
    def empty(cls) -> "Pooled":
        """Return predictions of no case."""
        return cls({}, {})

    def judged(self, table: ClassTable, task_index: int, num_resamples: int) -> Judged | None:
        """Return the predictions of a task, ready to be scored.

        All predictions of a table get the same resamples, so that their scores can be compared in
        pairs. The AUC compares cases of one fold only, because classifiers of different folds need
        not agree about the scale of their scores.
        """
        cases = sorted(self.of_case)
        return judge(
            table.tasks[task_index],
            [table.labels[case][task_index] for case in cases],
            np.stack([self.of_case[case][task_index] for case in cases]),
            [table.patient_of[case] for case in cases],
            num_resamples,
            strata=[self.fold_of[case] for case in cases],
        )


def frozen(args: argparse.Namespace) -> None:
    """Score the baselines on features of whole scans, over all folds."""
    start = time.monotonic()
    table = table_of(args.dataset)
    files = {}
    for pair in args.features:
        name, file = pair.split("=", 1)
        files[name] = Path(file)
    features: dict[str, CaseFeatures] = {SIZE: sizes_of(args.dataset, sorted(table.labels))}
    for name, file in files.items():
        features[name] = read_features(file)
    predicted = predict_folds(table, features)
    if args.predictions is not None:
        # In the form of autoreg_classify, for autoreg_evaluate_classification and its picture.
        args.predictions.mkdir(parents=True, exist_ok=True)
        for name, pooled in predicted.items():
            write_predictions(args.predictions / f"{name}.csv", table.tasks, pooled.of_case)

    common = {
        "kind": "frozen",
        "set": args.set,
        "scans": len(table.labels),
        "folds": NUM_FOLDS,
        "seconds_of_all_probes": round(time.monotonic() - start, 1),
    }
    for name, pooled in predicted.items():
        line = {**common, "what": NAMES.get(name, PROBED.format(name))}
        if name in files:
            # autoreg_embed writes encoder, spacing and tile beside its file.
            line["features"] = read_json(files[name].with_suffix(".json"))
        for found in scored(table, pooled, args.resamples):
            add_line(args.results, {**line, **found})


def predict_folds(table: ClassTable, features: Mapping[str, CaseFeatures]) -> dict[str, Pooled]:
    """Return the predictions of every baseline for the validation cases of all folds."""
    predicted: dict[str, Pooled] = {}
    for number, fold in enumerate(make_folds(table, NUM_FOLDS)):
        found = predict_baselines(table, fold["train"], fold["val"], features)
        for name, of_tasks in found.items():
            pooled = predicted.setdefault(name, Pooled.empty())
            for row, case in enumerate(fold["val"]):
                pooled.of_case[case] = [values_SK[row] for values_SK in of_tasks]
                pooled.fold_of[case] = number
    return predicted


def plan(args: argparse.Namespace) -> None:
    """Plan the classification of a preprocessed dataset, with a length and a rate for both arms."""
    file = args.preprocessed / "AutoregPlans.json"
    plans = read_json(file)
    folder = args.preprocessed / "AutoregPlans_3d_fullres"
    cases = sorted(path.name.removesuffix(".b2nd") for path in folder.glob("*.b2nd"))
    cases = [case for case in cases if not case.endswith("_seg")]
    table = kept_table(args.preprocessed, read_json(args.preprocessed / "dataset.json"), cases)

    encoder = plans["autoreg"]["encoder"]["class_path"]
    made = make_plan(
        table,
        args.batch,
        encoder,
        plans["autoreg"]["recipe"]["num_iterations_per_epoch"],
    )
    made = replace(made, num_epochs=args.epochs, pretrained_rate=args.rate, scratch_rate=args.rate)
    plans["configurations"]["3d_fullres"]["batch_size"] = args.batch
    store(plans, "3d_fullres", BLOCK, made)
    write_json(file, plans)


def tuned(args: argparse.Namespace) -> None:
    """Score the validation of all trained folds, and of the baselines of their trainers."""
    table = table_of(args.dataset)
    models = {PRETRAINED: args.pretrained, SCRATCH: args.scratch}
    predicted: dict[str, Pooled] = {}
    for arm, model in models.items():
        predicted[FINE_TUNED.format(arm)] = read_folds(model, NAME)
        predicted[PROBED.format(arm)] = read_folds(model, f"baseline_{PROBE}.csv")
    for name in (MAJORITY, SIZE):
        predicted[NAMES[name]] = read_folds(args.pretrained, f"baseline_{name}.csv")

    common = {"kind": "tuned", "set": args.set, "folds": NUM_FOLDS, **settings_of(args.pretrained)}
    common["seconds_of_epochs"] = {
        arm: round(seconds_of_epochs(model)) for arm, model in models.items()
    }
    for what, pooled in predicted.items():
        for found in scored(table, pooled, args.resamples):
            add_line(args.results, {**common, "what": what, **found})

    for form in (FINE_TUNED, PROBED):
        better, worse = form.format(PRETRAINED), form.format(SCRATCH)
        pair = (predicted[better], predicted[worse])
        for found in differences(table, pair, args.resamples):
            add_line(args.results, {**common, "what": f"{better} minus {SCRATCH}", **found})


def read_folds(model: Path, name: str) -> Pooled:
    """Return the predictions that the validation of every fold of a model wrote under a name."""
    pooled = Pooled.empty()
    for number in range(NUM_FOLDS):
        found = read_predictions(model / f"fold_{number}" / "validation" / name)
        pooled.of_case |= found.probabilities
        pooled.fold_of |= dict.fromkeys(found.probabilities, number)
    return pooled


def settings_of(model: Path) -> Line:
    """Return what a trained model's lines say about its training."""
    plans = read_json(model / "plans.json")
    configuration = plans["configurations"]["3d_fullres"]
    block = configuration[BLOCK]
    trainer = model.name.partition("__")[0]
    name, _, length = trainer.partition("_")
    return {
        "trainer": name,
        "epochs": int(length.removesuffix("epochs")) if length else block["num_epochs"],
        "iterations_per_epoch": block["num_iterations_per_epoch"],
        "encoder": plans["autoreg"]["encoder"]["name"],
        "weights": (plans["autoreg"]["weights"] or {}).get("name"),
        "spacing_mm": configuration["spacing"],
        "patch_vox": configuration["patch_size"],
        "batch": configuration["batch_size"],
        "balance": block["balance"],
        "rates": {PRETRAINED: block["pretrained_rate"], SCRATCH: block["scratch_rate"]},
    }


def seconds_of_epochs(model: Path) -> float:
    """Return the time of all epochs of all folds, from their logs."""
    total = 0.0
    for log in model.glob("fold_*/training_log_*.txt"):
        for line in log.read_text().splitlines():
            if "Epoch time:" in line:
                total += float(line.split("Epoch time:")[1].split()[0])
    return total


def scored(table: ClassTable, pooled: Pooled, num_resamples: int) -> Iterator[Line]:
    """Yield the scores of every task, and the AUC of every fold."""
    for number, task in enumerate(table.tasks):
        judged = pooled.judged(table, number, num_resamples)
        by_fold = []
        for fold in range(NUM_FOLDS):
            cases = {case for case, own in pooled.fold_of.items() if own == fold}
            part = Pooled({case: pooled.of_case[case] for case in cases}, pooled.fold_of)
            of_fold = part.judged(table, number, 0)
            by_fold.append(None if of_fold is None else round(float(auc(of_fold)[0]), 4))
        yield {
            "task": task.name,
            "classes": list(task.classes),
            **scores_of(judged),
            "auc_by_fold": by_fold,
        }


def differences(
    table: ClassTable,
    pair: tuple[Pooled, Pooled],
    num_resamples: int,
) -> Iterator[Line]:
    """Yield the difference of the AUC of two predictions of the same cases, for every task."""
    for number, task in enumerate(table.tasks):
        first, second = (pooled.judged(table, number, num_resamples) for pooled in pair)
        if first is None or second is None:
            continue
        difference_B = auc(first) - auc(second)
        ends = interval(difference_B[1:].tolist())
        yield {
            "task": task.name,
            "cases": len(first.truth_S),
            "patients": first.num_patients,
            "auc": {"value": float(difference_B[0]), "ci95": ends and list(ends)},
        }


def table_of(dataset: Path) -> ClassTable:
    """Return the classes of a raw dataset."""
    described = read_json(dataset / "dataset.json")
    images = first_channels(dataset, described["file_ending"])
    return read_table(dataset / "classesTr.csv", described, list(images))


def sizes_of(dataset: Path, cases: Sequence[str]) -> CaseFeatures:
    """Return the sizes of the labels of every case, from its original label map."""
    described = read_json(dataset / "dataset.json")
    values = [value for value in described["labels"].values() if value != 0]
    found = {}
    for case in cases:
        labels = read_scan(dataset / "labelsTr" / f"{case}{described['file_ending']}")
        found[case] = size_features(
            labels.array_CZYX[0].astype(np.int16),
            labels.spacing_mm,
            values,
        )
    return found


def read_features(file: Path) -> CaseFeatures:
    """Return scan -> features of a file that autoreg_embed wrote."""
    content = np.load(file)
    return dict(zip(content["ids"].tolist(), content["features"], strict=True))


def random_encoder(args: argparse.Namespace) -> None:
    """Write an encoder with random weights, of the same form as a run's and without its decoder."""
    card = read_card(args.like)
    torch.manual_seed(args.seed)
    network = build_network(
        card.class_path,
        card.arguments,
        card.crop_size_vox,
        card.num_input_channels,
        1,
    )
    state = network.state_dict()
    trained = read_tensors(args.like / WEIGHTS_NAME)
    args.out.mkdir(parents=True, exist_ok=True)
    weights = args.out / WEIGHTS_NAME
    write_tensors(
        weights,
        {
            name: state[name]
            for name in trained
            if name in state and not name.startswith("decoder.")
        },
    )
    replace(
        card,
        name=args.out.name,
        objective=f"none: random weights of seed {args.seed}",
        num_scans=0,
        num_steps=0,
        sha256=sha256_of(weights),
        adaptation=replace(card.adaptation, keys_to_decoder=()),
    ).save(args.out)
    print(f"wrote {args.out}")


def add_line(results: Path, line: Line) -> None:
    """Append a line to the results, and print it."""
    line = {**line, **circumstances(torch.device("cpu"))}
    append_json_line(results, line, allow_nan=True)
    print(json.dumps({key: line[key] for key in ("set", "task", "what", "auc") if key in line}))


def main() -> None:
    """Run one of the commands of the docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    frozen_parser = commands.add_parser("frozen")
    frozen_parser.add_argument("--features", nargs="*", default=[], metavar="NAME=FILE")
    frozen_parser.add_argument("--predictions", type=Path, metavar="FOLDER")
    plan_parser = commands.add_parser("plan")
    plan_parser.add_argument("--preprocessed", type=Path, required=True, metavar="FOLDER")
    plan_parser.add_argument("--epochs", type=int, required=True)
    plan_parser.add_argument("--batch", type=int, required=True)
    plan_parser.add_argument("--rate", type=float, required=True)
    tuned_parser = commands.add_parser("tuned")
    tuned_parser.add_argument("--pretrained", type=Path, required=True, metavar="MODEL")
    tuned_parser.add_argument("--scratch", type=Path, required=True, metavar="MODEL")
    for command in (frozen_parser, tuned_parser):
        command.add_argument("--set", required=True)
        command.add_argument("--dataset", type=Path, required=True, metavar="RAW")
        command.add_argument("--resamples", type=int, default=1000)
        command.add_argument("--results", type=Path, default=RESULTS)

    random_parser = commands.add_parser("random")
    random_parser.add_argument("--like", type=Path, required=True, metavar="RUN")
    random_parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    random_parser.add_argument("--seed", type=int, default=0)

    args = parser.parse_args()
    run = {"frozen": frozen, "plan": plan, "tuned": tuned, "random": random_encoder}
    run[args.command](args)


if __name__ == "__main__":
    main()
