"""Does pretraining help with few labels?

Hippocampus, fixed split, equal cost, one JSON line per run.

152 fixed cases are the unlabelled pool, its first 5, 10, 20 are the labelled ones, the next 32 of
it the development split; 40 fixed cases are the test split, never seen in pretraining and scored
for final tables only. Arms: ``pretrained`` and ``scratch`` (our trainers on one plan) and ``stock``
(nnUNetTrainer on nnUNetPlans), all with the same number of optimiser steps and samples. Everything
runs through nnU-Net's own planner, trainer and validation; validation is without mirroring, for
every arm.

    python benchmarks/few_label.py prepare  --data RAW_DATASET --work FOLDER python
    benchmarks/few_label.py pretrain --work FOLDER --configuration raster python
    benchmarks/few_label.py run      --work FOLDER --configuration raster --arms pretrained scratch
    --labels 5 10 20 --seeds 0 1 2 python benchmarks/few_label.py table

``run`` skips what the results file already holds, so that the table can grow over days.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "few_label.jsonl"
DATASET = "Dataset004_Hippocampus"
NUM_TEST, NUM_DEVELOPMENT = 40, 32
LABELS, SPLITS, ARMS = (5, 10, 20), ("development", "test"), ("pretrained", "scratch", "stock")
BATCH_SIZE, STEPS_PER_EPOCH, VAL_STEPS = 2, 25, 8
PRETRAIN_STEPS, PRETRAIN_BATCH = 500, 8
REACHED = (0.1, 0.2, 0.3)


@dataclass(frozen=True)
class Configuration:
    """One thing tried.

    Attributes:
        settings: of the pretraining, for ``--set``.
        length: of the pretraining, as a multiple of PRETRAIN_STEPS.
        recipe: changed values of the fine-tuning recipe.
        weights: the configuration whose pretraining is used; "" for its own, None where there is
            none (scratch).
    """

    settings: tuple[str, ...] = ()
    length: int = 1
    recipe: dict[str, float] = field(default_factory=dict)
    weights: str | None = ""


CROP = "sequence.crop_size_vox=32,48,32"
BLOCKS = (CROP, "sequence.block_tokens=2,2,2")
QUERY, RANDOM = "sequence.predictor=query", "sequence.order=random"
CONFIGURATIONS = {  # Everything tried; "raster" is the default plan.
    "raster": Configuration(),
    "raster, query": Configuration((QUERY,)),
    "random order, query": Configuration((RANDOM, QUERY)),
    "raster, crop 32x48x32": Configuration((CROP,)),
    "raster, blocks of 2": Configuration(BLOCKS),
    "random order, query, blocks of 2": Configuration((*BLOCKS, RANDOM, QUERY)),
    "random order, query, 3x longer": Configuration((RANDOM, QUERY), length=3),
    "raster, rate x 0.3": Configuration(("optim.lr=3e-4",)),
    "raster, variance floor 0.1": Configuration(("objective.variance_floor=0.1",)),
    "raster, no flips": Configuration(("sequence.flip=false", "sequence.swap_axes=false")),
    "raster, fine-tuned at 3e-4": Configuration(recipe={"pretrained_rate": 3e-4}, weights="raster"),
    "raster, fine-tuned at 1e-3": Configuration(recipe={"pretrained_rate": 1e-3}, weights="raster"),
    "raster, fine-tuned at 1e-2": Configuration(recipe={"pretrained_rate": 1e-2}, weights="raster"),
    "raster, layer decay 0.75": Configuration(recipe={"layer_decay": 0.75}, weights="raster"),
    "scratch at 3e-4": Configuration(recipe={"scratch_rate": 3e-4}, weights=None),
    "scratch at 1e-3": Configuration(recipe={"scratch_rate": 1e-3}, weights=None),
    "scratch at 1e-2": Configuration(recipe={"scratch_rate": 1e-2}, weights=None),
}
BASE_RECIPE = {"pretrained_rate": 3e-3, "scratch_rate": 3e-3}
"""Chosen on the development split; the plans' own 1e-3 is for trainings a hundred times longer."""


def environment(work: Path, results: Path, threads: int = 1) -> dict[str, str]:
    """nnU-Net's folders, single-threaded augmentation (so that a seed decides), and this
    interpreter's commands first.
    """
    folders = {
        "nnUNet_raw": work / "raw",
        "nnUNet_preprocessed": work / "preprocessed",
        "nnUNet_results": results,
    }
    settings = {
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "1000",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return {**os.environ, **settings, **{name: str(folder) for name, folder in folders.items()}}


def split_cases(cases: list[str]) -> tuple[list[str], list[str]]:
    """Pool and test cases, by a fixed hash order."""
    ordered = sorted(cases, key=lambda case: hashlib.sha256(case.encode()).hexdigest())
    return ordered[NUM_TEST:], ordered[:NUM_TEST]


def fold_of(labels: int, split: str) -> int:
    """The fold of ``splits_final.json`` that trains on ``labels`` cases and validates on
    ``split``.
    """
    return list(product(LABELS, SPLITS)).index((labels, split))


def plans_name(configuration: str) -> str:
    """Name of the plans file that uses a configuration's weights."""
    return "AutoregPlans_" + run_name(configuration)


def run_name(configuration: str) -> str:
    """Name of the pretraining run of a configuration."""
    return "".join(c if c.isalnum() else "-" for c in configuration)


def prepare(data: Path, work: Path) -> None:
    """Copy the dataset, write splits and the exclusion list, plan and preprocess for our trainers
    and for stock nnU-Net.
    """
    raw = work / "raw" / DATASET
    shutil.copytree(data, raw)
    results = work / "results"
    (work / "preprocessed" / DATASET).mkdir(parents=True)
    results.mkdir()
    pool, test = split_cases(
        [p.name.removesuffix(".nii.gz") for p in (raw / "labelsTr").glob("*.nii.gz")]
    )
    (work / "test_cases.txt").write_text("\n".join(test) + "\n")
    validation = {"development": pool[max(LABELS) : max(LABELS) + NUM_DEVELOPMENT], "test": test}
    folds = [
        {"train": pool[:labels], "val": validation[split]}
        for labels, split in product(LABELS, SPLITS)
    ]
    (work / "preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(folds))
    env = {**environment(work, results), "autoreg_weights": "none", "nnUNet_n_proc_DA": "2"}
    lines = (
        [
            "nnUNetv2_plan_and_preprocess",
            "-d",
            "4",
            "-pl",
            "ExperimentPlanner",
            "-c",
            "3d_fullres",
            "-np",
            "2",
        ],
        [
            "nnUNetv2_plan_and_preprocess",
            "-d",
            "4",
            "-pl",
            "AutoregPlanner",
            "-c",
            "3d_fullres",
            "-np",
            "2",
        ],
    )
    for line in lines:
        subprocess.run(line, env=env, check=True)


def pretrain(work: Path, configuration: str, threads: int) -> None:
    """Pretrain on the pool, unless the configuration uses another's weights, and write a plans file
    for it.
    """
    tried = CONFIGURATIONS[configuration]
    results = work / "results"
    if tried.weights == "":
        line = [
            "autoreg_pretrain",
            "-d",
            "4",
            "--name",
            run_name(configuration),
            "--encoder",
            "primus_tiny",
            "--steps",
            str(tried.length * PRETRAIN_STEPS),
            "--batch",
            str(PRETRAIN_BATCH),
            "--device",
            "cpu",
            "--exclude",
            str(work / "test_cases.txt"),
        ]
        set_values = ["--set", *tried.settings] if tried.settings else []
        subprocess.run([*line, *set_values], env=environment(work, results, threads), check=True)
    write_plans(work, configuration)


def write_plans(work: Path, configuration: str) -> None:
    """A plans file with the configuration's weights and recipe; it shares the preprocessed data."""
    tried = CONFIGURATIONS[configuration]
    folder = work / "preprocessed" / DATASET
    plans = json.loads((folder / "AutoregPlans.json").read_text())
    plans["plans_name"] = plans_name(configuration)
    plans["autoreg"]["recipe"].update({**BASE_RECIPE, **tried.recipe})
    if tried.weights is not None:
        name = run_name(tried.weights or configuration)
        file = f"autoreg_pretraining/{name}/encoder.safetensors"
        digest = hashlib.sha256((work / "results" / file).read_bytes()).hexdigest()
        plans["autoreg"]["weights"] = {"name": name, "file": file, "sha256": digest}
    (folder / f"{plans_name(configuration)}.json").write_text(json.dumps(plans, indent=1))


def pretraining_steps(configuration: str) -> int:
    """Steps of the pretraining whose weights a configuration uses."""
    return (
        CONFIGURATIONS[CONFIGURATIONS[configuration].weights or configuration].length
        * PRETRAIN_STEPS
    )


def tried_by(configuration: str, arm: str) -> str:
    """The configuration that matters to an arm: stock has none, and scratch only those made for it
    (it ignores weights).
    """
    matters = arm == "pretrained" or (
        arm == "scratch" and CONFIGURATIONS[configuration].weights is None
    )
    return configuration if matters else "-"


def train_one(
    work: Path, configuration: str, arm: str, labels: int, seed: int, split: str, steps: int
) -> None:
    """One training in this process (its nnU-Net folders are in the environment), one JSON line."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    for seed_with in (random.seed, np.random.seed, torch.manual_seed):
        seed_with(seed)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    trainers = {
        "pretrained": "AutoregPretrainedTrainer",
        "scratch": "AutoregScratchTrainer",
        "stock": "nnUNetTrainer",
    }
    tried = tried_by(configuration, arm)
    plans = "nnUNetPlans" if arm == "stock" else plans_name(tried if tried != "-" else "raster")
    trainer = get_trainer_from_args(
        "4", "3d_fullres", fold_of(labels, split), trainers[arm], plans, device=torch.device("cpu")
    )
    trainer.num_epochs = steps // STEPS_PER_EPOCH
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = (
        STEPS_PER_EPOCH,
        VAL_STEPS,
    )
    trainer.configuration_manager.configuration["batch_size"] = BATCH_SIZE
    start = time.monotonic()
    trainer.run_training()
    seconds = time.monotonic() - start
    trainer.inference_allowed_mirroring_axes = None
    trainer.perform_actual_validation()
    summary = json.loads((Path(trainer.output_folder) / "validation" / "summary.json").read_text())
    curve = [float(v) for v in trainer.logger.get_value("mean_fg_dice", step=None)]
    dice = [
        [case["metrics"][label]["Dice"] for label in sorted(case["metrics"])]
        for case in summary["metric_per_case"]
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    line = {
        "configuration": tried,
        "arm": arm,
        "labels": labels,
        "seed": seed,
        "split": split,
        "steps": steps,
        "batch": BATCH_SIZE,
        "dice": summary["foreground_mean"]["Dice"],
        "dice_per_case": np.round(dice, 4).tolist(),
        "curve_steps_per_point": STEPS_PER_EPOCH,
        "curve": np.round(curve, 4).tolist(),
        "train_s": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "pretrain_steps": pretraining_steps(tried) if arm == "pretrained" else 0,
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("torch", "nnunetv2", "nnunet-autoreg")},
    }
    with RESULTS.open("a") as handle:
        handle.write(json.dumps(line) + "\n")


def read_results() -> list[dict]:
    """All lines so far."""
    return (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )


def key_of(line: dict) -> tuple:
    """What makes two runs the same run."""
    return tuple(
        line[name] for name in ("configuration", "arm", "labels", "seed", "split", "steps")
    )


def run_all(work: Path, args: argparse.Namespace) -> None:
    """Run what is missing, ``--jobs`` trainings at a time, one thread each."""
    done = {key_of(line) for line in read_results()}
    RESULTS.parent.mkdir(exist_ok=True)

    def one(job: tuple[int, int, str]) -> None:
        seed, labels, arm = job
        if (tried_by(args.configuration, arm), arm, labels, seed, args.split, args.steps) in done:
            return
        results = (
            work
            / "runs"
            / f"{run_name(args.configuration)}-{arm}-{labels}-{seed}-{args.split}-{args.steps}"
        )
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir(parents=True)
        (results / "autoreg_pretraining").symlink_to(work / "results" / "autoreg_pretraining")
        line = [
            sys.executable,
            __file__,
            "one",
            "--work",
            str(work),
            "--configuration",
            args.configuration,
            "--arms",
            arm,
            "--labels",
            str(labels),
            "--seeds",
            str(seed),
            "--split",
            args.split,
            "--steps",
            str(args.steps),
        ]
        with (results / "log.txt").open("w") as log:
            code = subprocess.run(
                line,
                env=environment(work, results),
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        print(
            f"{arm}, {labels} labels, seed {seed}: "
            + ("done" if code == 0 else f"FAILED, see {results / 'log.txt'}"),
            flush=True,
        )

    with ThreadPoolExecutor(args.jobs) as jobs:
        list(jobs.map(one, product(args.seeds, args.labels, args.arms)))


def steps_to(line: dict, dice: float) -> int | None:
    """Steps until the online Dice first reaches a value."""
    reached = [i for i, value in enumerate(line["curve"]) if value >= dice]
    return (reached[0] + 1) * line["curve_steps_per_point"] if reached else None


def paired_interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over cases (differences are averaged over seeds
    first).
    """
    generator = np.random.default_rng(seed)
    means = generator.choice(differences, (10_000, len(differences))).mean(axis=1)
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def table() -> str:
    """Mean and spread over seeds, steps to given Dice, and the paired difference to scratch, as
    Markdown.
    """
    lines = read_results()
    groups = sorted(
        {(x["split"], x["steps"], x["labels"], x["arm"], x["configuration"]) for x in lines}
    )
    columns = [
        "split",
        "steps",
        "labels",
        "arm",
        "pretraining",
        "n",
        "Dice mean (sd over seeds)",
        "steps to " + " / ".join(map(str, REACHED)),
        "paired difference to scratch [95 %]",
    ]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for split, steps, labels, arm, configuration in groups:
        same = {
            x["seed"]: x
            for x in lines
            if (x["split"], x["steps"], x["labels"], x["arm"], x["configuration"])
            == (split, steps, labels, arm, configuration)
        }
        twins = {
            x["seed"]: x
            for x in lines
            if (x["split"], x["steps"], x["labels"], x["arm"], x["configuration"])
            == (split, steps, labels, "scratch", "-")
        }
        dice = [x["dice"] for x in same.values()]
        spread = f"{np.std(dice, ddof=1):.3f}" if len(dice) > 1 else "-"
        reach = " / ".join(
            "-" if None in found else f"{np.mean(found):.0f}"
            for found in ([steps_to(x, d) for x in same.values()] for d in REACHED)
        )
        shared = sorted(set(same) & set(twins)) if (arm, configuration) != ("scratch", "-") else []
        paired = "-"
        if shared:
            case_means = [
                [np.mean(x["dice_per_case"], axis=1) for x in (same[s], twins[s])] for s in shared
            ]
            difference = np.mean([a - b for a, b in case_means], axis=0)
            low, high = paired_interval(difference)
            paired = f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}], n = {len(shared)}"
        cells = [
            split,
            steps,
            labels,
            arm,
            configuration,
            len(dice),
            f"{np.mean(dice):.3f} ({spread})",
            reach,
            paired,
        ]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main() -> None:
    """Parse the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=["prepare", "pretrain", "run", "one", "table"])
    p.add_argument("--data", type=Path, help="the raw dataset folder")
    p.add_argument("--work", type=Path, help="folder for everything that is made")
    p.add_argument("--configuration", choices=CONFIGURATIONS, default="raster")
    p.add_argument("--arms", nargs="+", choices=ARMS, default=["pretrained", "scratch"])
    p.add_argument("--labels", nargs="+", type=int, choices=LABELS, default=list(LABELS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--split", choices=SPLITS, default="development")
    p.add_argument("--steps", type=int, default=400)
    p.add_argument(
        "--threads", type=int, default=2, help="of a pretraining; a fine-tuning takes one"
    )
    p.add_argument("--jobs", type=int, default=2)
    args = p.parse_args()
    if args.what == "prepare":
        prepare(args.data, args.work.resolve())
    elif args.what == "pretrain":
        pretrain(args.work.resolve(), args.configuration, args.threads)
    elif args.what == "run":
        run_all(args.work.resolve(), args)
    elif args.what == "one":
        train_one(
            args.work,
            args.configuration,
            args.arms[0],
            args.labels[0],
            args.seeds[0],
            args.split,
            args.steps,
        )
    else:
        print(table())


if __name__ == "__main__":
    main()
