"""Measure by commands only whether detection learns, on generated cubes and on real scans.

    python benchmarks/detection.py prepare --set toy --work FOLDER
    python benchmarks/detection.py prepare --set oasis --data RAW_DATASET --work FOLDER
    python benchmarks/detection.py run --work FOLDER --encoder resenc_tiny --arm scratch
        --epochs 16 --iterations 50
    python benchmarks/detection.py run --work FOLDER --encoder resenc_tiny --arm pretrained
        --pretrain-raw RAW --pretrain-sets 4 27 51 61
    python benchmarks/detection.py centre --work FOLDER
    python benchmarks/detection.py table

``run`` first pretrains an encoder (``--pretrain-steps``) on the images of ``--pretrain-sets``,
except those of ``--exclude``. The scratch arm takes only its plan from it, so that two steps on the
set itself are enough. ``--weights`` uses an existing encoder instead. Then ``run`` plans,
preprocesses, trains one fold with nnUNetv2_train, and reads what its validation wrote, in original
images and without mirroring. It adds one JSON line per training to the results. ``centre`` scores a
baseline without a network: in every validation scan one box in the middle, of the median size of
the training objects. ``table`` prints all lines in Markdown.

Toy set: nnDetection's idea of solid and holed cubes, here 40 images of 80^3 with 0 to 3 cubes of 8
to 16 voxels, every 8th without any.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.benchmark.protocol import recipe_values
from nnunet_autoreg.geometry import size_text
from nnunet_autoreg.rng import generator

RESULTS = Path(__file__).parent / "results" / "detection.jsonl"
TOY = "Dataset902_ToyCubes"
SIDE, NUM_CASES, EMPTY_EVERY, MOST_CUBES = 80, 40, 8, 3
SMALLEST, LARGEST, HOLE = 8, 16, 0.5
LABELS = {"background": 0, "solid": 1, "holed": 2}
NUM_TOY_FOLDS = 5
FOLDS = {
    "oasis": ((6, 7), (0, 1), (2, 3)),
    "sarcoma": ((12, 13, 14, 15), (0, 1, 2, 3)),
    "sarcoma_ct": ((8, 9, 10, 11), (0, 1, 2, 3)),
    "ms": ((1,), (0,)),
}
"""Indices, in the order of the names, of the scans that each fold validates on; the others train.

Every scan is of another patient.
"""


@dataclass(frozen=True)
class ToyCase:
    """Hold a toy image (Z, Y, X), its label map, and its number of cubes."""

    image: np.ndarray
    labels: np.ndarray
    num_cubes: int


def draw_case(number: int, seed: int = 0, side: int = SIDE) -> ToyCase:
    """Return toy case ``number``: noise with cubes.

    The cubes are brighter by two standard deviations of the noise; holed ones lack their inner
    half.
    """
    random = generator(seed, "toy cubes", number)
    image = random.standard_normal((side, side, side)).astype(np.float32)
    labels = np.zeros(image.shape, np.uint8)
    taken = np.zeros(image.shape, bool)
    wanted = 0
    if number % EMPTY_EVERY != EMPTY_EVERY - 1:
        wanted = int(random.integers(0, MOST_CUBES + 1))

    num_cubes = 0
    while num_cubes < wanted:
        size = int(random.integers(SMALLEST, LARGEST + 1))
        start = random.integers(2, side - size - 2, 3)
        cube = tuple(slice(s, s + size) for s in start)
        around = tuple(slice(max(0, s - 2), s + size + 2) for s in start)
        # At least two voxels lie between two cubes.
        if taken[around].any():
            continue

        kind = int(random.integers(1, 3))
        body = np.ones((size,) * 3, bool)
        if kind == LABELS["holed"]:
            hole = max(2, round(size * HOLE))
            low = (size - hole) // 2
            inner = slice(low, low + hole)
            body[inner, inner, inner] = False
        image[cube][body] += 2
        labels[cube][body] = kind
        taken[cube] = True
        num_cubes += 1
    return ToyCase(image, labels, num_cubes)


def write_toy(raw: Path, num_cases: int = NUM_CASES, side: int = SIDE) -> None:
    """Write the toy set as an nnU-Net raw dataset with a block for detection."""
    import SimpleITK

    for number in range(num_cases):
        case = draw_case(number, side=side)
        for folder, name, array in (
            ("imagesTr", f"toy_{number:02}_0000", case.image),
            ("labelsTr", f"toy_{number:02}", case.labels),
        ):
            (raw / folder).mkdir(parents=True, exist_ok=True)
            image = SimpleITK.GetImageFromArray(array)
            SimpleITK.WriteImage(image, str(raw / folder / f"{name}.nii.gz"))
    described = {
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
        "autoreg_detection": {},
    }
    (raw / "dataset.json").write_text(json.dumps(described))


def prepare(kind: str, data: Path | None, work: Path) -> None:
    """Write or copy the dataset, and its fixed folds."""
    if kind != "toy" and data is None:
        sys.exit(f"--set {kind} needs --data, the raw dataset")
    dataset = TOY if data is None else data.name
    raw = work / "raw" / dataset
    for folder in (work / "preprocessed" / dataset, work / "results"):
        folder.mkdir(parents=True)
    if data is None:
        write_toy(raw)
    else:
        shutil.copytree(data, raw)
        described = json.loads((raw / "dataset.json").read_text())
        (raw / "dataset.json").write_text(json.dumps({**described, "autoreg_detection": {}}))
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (raw / "labelsTr").glob("*.nii.gz"))

    folds = []
    if data is None:
        validation = [cases[fold::NUM_TOY_FOLDS] for fold in range(NUM_TOY_FOLDS)]
    else:
        validation = []
        for indices in FOLDS[kind]:
            validation.append([cases[i] for i in indices])
    for held_out in validation:
        training = [case for case in cases if case not in held_out]
        folds.append({"train": training, "val": held_out})
    (work / "preprocessed" / dataset / "splits_final.json").write_text(json.dumps(folds))


def environment(work: Path, threads: int) -> dict[str, str]:
    """Return the environment of the commands.

    It has nnU-Net's folders, augmentation in the training's own process, and this interpreter's
    commands first.
    """
    folders = {
        "nnUNet_raw": work / "raw",
        "nnUNet_preprocessed": work / "preprocessed",
        "nnUNet_results": work / "results",
    }
    settings = {
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "1000",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return {**os.environ, **settings, **{name: str(folder) for name, folder in folders.items()}}


def run(args: argparse.Namespace) -> None:
    """Pretrain and plan unless that was done, train one fold, and add a line to the results."""
    work: Path = args.work
    env = environment(work, args.threads)
    dataset = next(p.name for p in (work / "raw").iterdir())
    number = dataset[len("Dataset") :].split("_")[0]
    # Each arm pretrains under its own name: scratch only needs a plan, and makes it on the set.
    args.weights_name = args.weights or f"{args.encoder}_{args.arm}"
    plans = f"AutoregPlans_{args.weights_name}"
    file = work / "preprocessed" / dataset / f"{plans}.json"
    pretrain_sets = [int(s) for s in args.pretrain_sets or [number]]
    if args.arm == "pretrained" and not args.weights and int(number) in pretrain_sets:
        sys.exit(
            "the pretrained arm must not have seen the scans it is scored on: name "
            f"--pretrain-sets without {number}, or --weights",
        )
    if not file.is_file():
        plan(env, number, args)
    if args.plan_only:
        return
    shorten(file, args)
    trainer = "AutoregDetectionScratchTrainer"
    if args.arm == "pretrained":
        trainer = "AutoregDetectionTrainer"

    start = time.monotonic()
    log = work / f"{args.weights_name}_{args.arm}_{args.fold}.log"
    line = f"nnUNetv2_train {number} 3d_fullres {args.fold} -tr {trainer} -p {plans} -device cpu"
    with log.open("w") as handle:
        subprocess.run(line.split(), env=env, check=True, stdout=handle, stderr=subprocess.STDOUT)
    minutes = (time.monotonic() - start) / 60
    folder = work / "results" / dataset / f"{trainer}__{plans}__3d_fullres" / f"fold_{args.fold}"
    summary = json.loads((folder / "validation_detection" / "summary_detection.json").read_text())
    validation = json.loads((folder / "validation" / "summary.json").read_text())
    dice = validation["foreground_mean"]["Dice"]
    planned = json.loads(file.read_text())["configurations"]["3d_fullres"]
    pretraining = work / "results" / "autoreg_pretraining" / args.weights_name
    card = json.loads((pretraining / "encoder.json").read_text())
    pretrained = {}
    if args.arm == "pretrained":
        for name in ("name", "num_scans", "num_steps", "objective", "licences"):
            pretrained[name] = card[name]
    add_line(
        args.results,
        {
            "set": dataset,
            "encoder": args.encoder,
            "arm": args.arm,
            "fold": args.fold,
            "iterations": args.epochs * args.iterations,
            "batch": planned["batch_size"],
            "patch": planned["patch_size"],
            "recipe": args.recipe,
            "minutes": round(minutes, 2),
            "threads": args.threads,
            "pretrained": pretrained,
            **figures(summary),
            "dice": round(dice, 4),
        },
    )


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of an evaluation that a line has."""
    return {
        "scans": summary["scans"]["number"],
        "objects": sum(c["objects"] for c in summary["classes"].values()),
        **{f"ap_{iou}": round(summary["ap"][iou]["mean"], 4) for iou in ("0.1", "0.5")},
        "ap_0.1_ci95": summary["ap"]["0.1"]["ci95"],
        "map": round(next(iter(summary["map"].values()))["mean"], 4),
        "cpm": round(summary["froc"]["cpm"]["mean"], 4),
    }


def add_line(results: Path, line: dict[str, Any]) -> None:
    """Append a line to the results, and print it."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as handle:
        handle.write(json.dumps(line) + "\n")
    print(json.dumps(line))


def answer_the_centre(args: argparse.Namespace) -> None:
    """Score one box per scan and class, in the middle.

    Its sides relative to the scan's are the median of those of the training objects.
    """
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    from nnunet_autoreg.detection.evaluate import EvaluationSettings, evaluate
    from nnunet_autoreg.detection.matching import scan_of_instances
    from nnunet_autoreg.detection.objects import ObjectSource

    (raw,) = (args.work / "raw").iterdir()
    dataset = json.loads((raw / "dataset.json").read_text())
    source = ObjectSource(raw / "labelsTr", raw, dataset, SimpleITKIO)
    splits_file = args.work / "preprocessed" / raw.name / "splits_final.json"
    fold = json.loads(splits_file.read_text())[args.fold]

    # Class index -> relative sides of its objects.
    sides: dict[int, list[Any]] = {}
    for case in fold["train"]:
        known = source.read(case)
        for item in known.instances.objects:
            if not item.ignored:
                side = np.subtract(item.box_zyx[3:], item.box_zyx[:3]) / known.shape_vox
                sides.setdefault(item.class_index, []).append(side)
    boxes = {}
    for class_index in sorted(sides):
        half = np.median(sides[class_index], axis=0) / 2
        boxes[class_index] = np.concatenate([0.5 - half, 0.5 + half])

    scans = []
    for case in fold["val"]:
        known = source.read(case)
        found = [box * np.tile(known.shape_vox, 2) for box in boxes.values()]
        detections = (found, list(boxes), [1.0] * len(found))
        scans.append(scan_of_instances(case, known.spacing_mm, known.instances, detections))
    summary = evaluate(scans, source.classes, EvaluationSettings())
    add_line(
        args.results,
        {
            "set": raw.name,
            "encoder": "none",
            "arm": "centre",
            "fold": args.fold,
            **figures(summary),
        },
    )


def plan(env: dict[str, str], number: str, args: argparse.Namespace) -> None:
    """Pretrain, then plan and preprocess for that encoder."""
    raw = {"nnUNet_raw": str(args.pretrain_raw)} if args.pretrain_raw else {}
    name = args.weights_name
    left_out = ["--exclude", str(args.exclude)] if args.exclude else []
    pretrain = [
        *("autoreg_pretrain", "-d", *(args.pretrain_sets or [number]), "--name", name),
        *("--encoder", args.encoder, "--steps", str(args.pretrain_steps), "--batch", "4"),
        *("--device", "cpu", *left_out),
    ]
    preprocess = [
        *("nnUNetv2_plan_and_preprocess", "-d", number, "-pl", "AutoregPlanner"),
        *("-overwrite_plans_name", f"AutoregPlans_{name}", "-c", "3d_fullres", "-np", "1"),
    ]
    if not args.weights:
        subprocess.run(pretrain, env={**env, **raw}, check=True)
    subprocess.run(preprocess, env={**env, "autoreg_weights": name}, check=True)


def shorten(file: Path, args: argparse.Namespace) -> None:
    """Write length, patch and batch into the plans file."""
    plans = json.loads(file.read_text())
    lengths = {
        "num_iterations_per_epoch": args.iterations,
        "num_val_iterations_per_epoch": args.val_iterations,
    }
    plans["autoreg"]["recipe"] |= args.recipe | lengths
    configuration = plans["configurations"]["3d_fullres"]
    configuration["autoreg_detection"]["num_epochs"] = args.epochs
    if args.batch:
        configuration["batch_size"] = args.batch
    if args.patch:
        configuration["patch_size"] = args.patch
        configuration["architecture"]["arch_kwargs"]["input_shape"] = args.patch
    file.write_text(json.dumps(plans, indent=2))


def table(results: Path) -> list[str]:
    """Return rows of Markdown.

    Runs that differ only in the fold share a row, with the score of every fold.
    """
    rows: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for line in map(json.loads, results.read_text().splitlines()):
        patch = size_text(line.get("patch", []))
        length = f"{line['iterations']}, {patch}" if patch else "-"
        key = (line["set"].split("_")[1], line["encoder"], line["arm"], length)
        rows.setdefault(key, {})[line["fold"]] = line
    measures = {"AP@0.1": "ap_0.1", "AP@0.5": "ap_0.5", "mAP": "map", "CPM": "cpm"}
    made = [
        f"| set | encoder | start | iterations, patch | folds | objects | {' | '.join(measures)} |",
        f"|{'---|' * (6 + len(measures))}",
    ]
    for key, of_fold in sorted(rows.items()):
        lines = [of_fold[fold] for fold in sorted(of_fold)]
        folds = ", ".join(str(line["fold"]) for line in lines)
        num_objects = sum(line["objects"] for line in lines)
        cells = [*key, folds, str(num_objects)]
        for name in measures.values():
            cells.append(_mean_of([line[name] for line in lines if name in line]))
        made.append(f"| {' | '.join(cells)} |")
    return made


def _mean_of(values: list[float]) -> str:
    """Return the mean with the values in brackets; only the value if it is one, "-" if none."""
    each = ", ".join(f"{value:.2f}" for value in values)
    if len(values) > 1:
        return f"{np.mean(values):.2f} ({each})"
    return each or "-"


def main() -> None:
    """Run the command that was typed."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(required=True, dest="command")
    first = commands.add_parser("prepare")
    first.add_argument("--set", choices=["toy", *FOLDS], required=True)
    first.add_argument("--data", type=Path)
    second = commands.add_parser("run")
    second.add_argument("--encoder", required=True)
    second.add_argument("--arm", choices=["scratch", "pretrained"], default="scratch")
    second.add_argument("--fold", type=int, default=0)
    second.add_argument("--epochs", type=int, default=16)
    second.add_argument("--iterations", type=int, default=50)
    second.add_argument("--val-iterations", type=int, default=4)
    second.add_argument("--batch", type=int)
    second.add_argument("--patch", type=int, nargs=3)
    second.add_argument(
        "--plan-only",
        action="store_true",
        help="pretrain, plan and preprocess, then stop",
    )
    second.add_argument("--pretrain-steps", type=int, default=2)
    second.add_argument(
        "--pretrain-sets",
        nargs="+",
        default=[],
        metavar="NUMBER",
        help="datasets to pretrain on (default: this one)",
    )
    second.add_argument("--exclude", type=Path, help="file with names of scans to leave out of it")
    second.add_argument(
        "--recipe",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the planned recipe of fine-tuning",
    )
    second.add_argument(
        "--weights",
        help="an encoder in FOLDER/results/autoreg_pretraining instead of a pretraining",
    )
    second.add_argument("--pretrain-raw", type=Path, help="their nnUNet_raw (default: FOLDER's)")
    second.add_argument("--threads", type=int, default=1)
    third = commands.add_parser("centre")
    third.add_argument("--fold", type=int, default=0)
    fourth = commands.add_parser("table")
    for command in (second, third, fourth):
        command.add_argument("--results", type=Path, default=RESULTS)
    for command in (first, second, third):
        command.add_argument("--work", type=Path, required=True)
    args = p.parse_args()
    if args.command == "prepare":
        prepare(args.set, args.data, args.work)
    elif args.command == "centre":
        answer_the_centre(args)
    elif args.command == "table":
        print("\n".join(table(args.results)))
    else:
        args.recipe = recipe_values(tuple(args.recipe))
        run(args)


if __name__ == "__main__":
    main()
