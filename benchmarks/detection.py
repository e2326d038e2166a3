"""Does detection learn? A generated set of cubes and OASIS brains through the commands alone; one JSON line per training.

    python benchmarks/detection.py prepare --set toy --work FOLDER
    python benchmarks/detection.py prepare --set oasis --data RAW_DATASET --work FOLDER
    python benchmarks/detection.py run --work FOLDER --encoder resenc_tiny --arm scratch --epochs 16 --iterations 50

``run`` pretrains an encoder of that name on the training images first (``--pretrain-steps``; the scratch arm uses none of it but its
plan), plans, preprocesses, trains one fold with nnUNetv2_train, and reads what its validation wrote: in original images, without mirroring.

Toy set: nnDetection's idea of solid and holed cubes, here 40 images of 80^3 with 0 to 3 cubes of 8 to 16 voxels, every 8th without any.
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

import numpy as np

from nnunet_autoreg.rng import generator

RESULTS = Path(__file__).parent / "results" / "detection.jsonl"
TOY, OASIS = "Dataset902_ToyCubes", "Dataset081_OasisNuclei"
SIDE, NUM_CASES, EMPTY_EVERY, MOST_CUBES = 80, 40, 8, 3
SMALLEST, LARGEST, HOLE = 8, 16, 0.5
LABELS = {"background": 0, "solid": 1, "holed": 2}
NUM_TOY_FOLDS = 5
OASIS_FOLDS = ((6, 7), (0, 1), (2, 3))
"""Places, in order of the names, of the brains that each fold validates on; the others train."""


@dataclass(frozen=True)
class Case:
    """A toy image (Z, Y, X), its label map, and its number of cubes."""

    image: np.ndarray
    labels: np.ndarray
    num_cubes: int


def draw_case(number: int, seed: int = 0, side: int = SIDE) -> Case:
    """Toy case ``number``: noise, and cubes that are brighter by two of its standard deviations; holed ones lack their inner half."""
    random = generator(seed, "toy cubes", number)
    image = random.standard_normal((side, side, side)).astype(np.float32)
    labels = np.zeros(image.shape, np.uint8)
    taken = np.zeros(image.shape, bool)
    wanted = 0 if number % EMPTY_EVERY == EMPTY_EVERY - 1 else int(random.integers(0, MOST_CUBES + 1))
    placed = 0
    while placed < wanted:
        size = int(random.integers(SMALLEST, LARGEST + 1))
        start = random.integers(2, side - size - 2, 3)
        cube = tuple(slice(s, s + size) for s in start)
        around = tuple(slice(max(0, s - 2), s + size + 2) for s in start)
        if taken[around].any():
            continue
        kind = int(random.integers(1, 3))
        body = np.ones((size,) * 3, bool)
        if kind == LABELS["holed"]:
            hole = max(2, round(size * HOLE))
            low = (size - hole) // 2
            body[low:low + hole, low:low + hole, low:low + hole] = False
        image[cube][body] += 2
        labels[cube][body] = kind
        taken[cube] = True
        placed += 1
    return Case(image, labels, placed)


def write_toy(raw: Path, num_cases: int = NUM_CASES, side: int = SIDE) -> None:
    """The toy set as an nnU-Net raw dataset that asks for detection."""
    import SimpleITK

    for number in range(num_cases):
        case = draw_case(number, side=side)
        for folder, name, array in (("imagesTr", f"toy_{number:02}_0000", case.image), ("labelsTr", f"toy_{number:02}", case.labels)):
            (raw / folder).mkdir(parents=True, exist_ok=True)
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(raw / folder / f"{name}.nii.gz"))
    (raw / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": num_cases, "file_ending": ".nii.gz", "autoreg_detection": {},
    }))


def prepare(kind: str, data: Path | None, work: Path) -> None:
    """Write or copy the dataset, and its fixed folds."""
    dataset = TOY if kind == "toy" else OASIS
    raw = work / "raw" / dataset
    for folder in (work / "preprocessed" / dataset, work / "results"):
        folder.mkdir(parents=True)
    if kind == "toy":
        write_toy(raw)
    else:
        if data is None:
            sys.exit("--set oasis needs --data, the raw dataset")
        shutil.copytree(data, raw)
        described = json.loads((raw / "dataset.json").read_text())
        (raw / "dataset.json").write_text(json.dumps({**described, "autoreg_detection": {}}))
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (raw / "labelsTr").glob("*.nii.gz"))
    if kind == "toy":
        validation = [cases[fold::NUM_TOY_FOLDS] for fold in range(NUM_TOY_FOLDS)]
    else:
        validation = [[cases[place] for place in places] for places in OASIS_FOLDS]
    folds = [{"train": [c for c in cases if c not in held], "val": held} for held in validation]
    (work / "preprocessed" / dataset / "splits_final.json").write_text(json.dumps(folds))


def environment(work: Path, threads: int) -> dict[str, str]:
    """nnU-Net's folders, augmentation in the training's own process, and this interpreter's commands first."""
    folders = {"nnUNet_raw": work / "raw", "nnUNet_preprocessed": work / "preprocessed", "nnUNet_results": work / "results"}
    settings = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "1000",
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return {**os.environ, **settings, **{name: str(folder) for name, folder in folders.items()}}


def run(args: argparse.Namespace) -> None:
    """Pretrain and plan unless that was done, train one fold, add a line to the results."""
    work: Path = args.work
    env = environment(work, args.threads)
    dataset = next(p.name for p in (work / "raw").iterdir())
    number = dataset[len("Dataset"):].split("_")[0]
    plans = f"AutoregPlans_{args.encoder}"
    file = work / "preprocessed" / dataset / f"{plans}.json"
    if not file.is_file():
        plan(env, work, dataset, number, args)
    if args.plan_only:
        return
    shorten(file, args)
    trainer = "AutoregDetectionTrainer" if args.arm == "pretrained" else "AutoregDetectionScratchTrainer"
    start = time.monotonic()
    log = work / f"{args.encoder}_{args.arm}_{args.fold}.log"
    with log.open("w") as handle:
        subprocess.run(["nnUNetv2_train", number, "3d_fullres", str(args.fold), "-tr", trainer, "-p", plans, "-device", "cpu"],
                       env=env, check=True, stdout=handle, stderr=subprocess.STDOUT)
    minutes = (time.monotonic() - start) / 60
    folder = work / "results" / dataset / f"{trainer}__{plans}__3d_fullres" / f"fold_{args.fold}"
    summary = json.loads((folder / "validation_detection" / "summary_detection.json").read_text())
    dice = json.loads((folder / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"]
    planned = json.loads(file.read_text())["configurations"]["3d_fullres"]
    line = {
        "set": dataset, "encoder": args.encoder, "arm": args.arm, "fold": args.fold, "iterations": args.epochs * args.iterations,
        "batch": planned["batch_size"], "patch": planned["patch_size"], "minutes": round(minutes, 2), "threads": args.threads,
        "pretrain_steps": args.pretrain_steps if args.arm == "pretrained" else 0,
        "scans": summary["scans"]["number"], "objects": sum(c["objects"] for c in summary["classes"].values()),
        **{f"ap_{iou}": round(summary["ap"][iou]["mean"], 4) for iou in ("0.1", "0.5")}, "ap_0.1_ci95": summary["ap"]["0.1"]["ci95"],
        "map": round(next(iter(summary["map"].values()))["mean"], 4), "cpm": round(summary["froc"]["cpm"]["mean"], 4),
        "dice": round(dice, 4),
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as handle:
        handle.write(json.dumps(line) + "\n")
    print(json.dumps(line))


def plan(env: dict[str, str], work: Path, dataset: str, number: str, args: argparse.Namespace) -> None:
    """Pretrain on the training images of the fold, then plan and preprocess for that encoder."""
    held = json.loads((work / "preprocessed" / dataset / "splits_final.json").read_text())[args.fold]["val"]
    excluded = work / "held_out.txt"
    excluded.write_text("".join(f"{case}\n" for case in held))
    lines = (
        ["autoreg_pretrain", "-d", number, "--name", args.encoder, "--encoder", args.encoder, "--steps", str(args.pretrain_steps),
         "--batch", "4", "--device", "cpu", "--exclude", str(excluded)],
        ["nnUNetv2_plan_and_preprocess", "-d", number, "-pl", "AutoregPlanner", "-overwrite_plans_name", f"AutoregPlans_{args.encoder}",
         "-c", "3d_fullres", "-np", "1"],
    )
    for line in lines:
        subprocess.run(line, env={**env, "autoreg_weights": args.encoder}, check=True)


def shorten(file: Path, args: argparse.Namespace) -> None:
    """Length, patch and batch into the plans file."""
    plans = json.loads(file.read_text())
    plans["autoreg"]["recipe"] |= {"num_iterations_per_epoch": args.iterations, "num_val_iterations_per_epoch": args.val_iterations}
    configuration = plans["configurations"]["3d_fullres"]
    configuration["autoreg_detection"]["num_epochs"] = args.epochs
    if args.batch:
        configuration["batch_size"] = args.batch
    if args.patch:
        configuration["patch_size"] = args.patch
        configuration["architecture"]["arch_kwargs"]["input_shape"] = args.patch
    file.write_text(json.dumps(plans, indent=2))


def main() -> None:
    """Parse the line and do it."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, dest="command")
    first = commands.add_parser("prepare")
    first.add_argument("--set", choices=["toy", "oasis"], required=True)
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
    second.add_argument("--plan-only", action="store_true", help="pretrain, plan and preprocess, then stop")
    second.add_argument("--pretrain-steps", type=int, default=2)
    second.add_argument("--threads", type=int, default=1)
    second.add_argument("--results", type=Path, default=RESULTS)
    for command in (first, second):
        command.add_argument("--work", type=Path, required=True)
    args = p.parse_args()
    if args.command == "prepare":
        prepare(args.set, args.data, args.work)
    else:
        run(args)


if __name__ == "__main__":
    main()
