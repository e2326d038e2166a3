"""Run ``autoreg_demo``: the whole chain on generated scans.

The chain is: pretrain, probe the features, plan, train, predict, compare with the truth.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import nnunet_autoreg.cli.starting  # noqa: F401
from nnunet_autoreg.benchmark.commands import last_line
from nnunet_autoreg.benchmark.probe_report import RANDOM, RAW, Interval, dice_by_draw, t_interval
from nnunet_autoreg.children import run_guarded
from nnunet_autoreg.cli.common import CommandParser, command, prepare_torch, print_next
from nnunet_autoreg.cli.options import add_device, chosen_device, local_path
from nnunet_autoreg.cli.phantom import LABELS, draw_phantom, write_image
from nnunet_autoreg.errors import AutoregError, InterruptedRunError, UsageError
from nnunet_autoreg.phases import phase
from nnunet_autoreg.records import atomic_path, read_json, write_json
from nnunet_autoreg.report.palette import GRID, SERIES, STRUCTURES
from nnunet_autoreg.wording import counted, duration

DATASET, DATASET_ID = "Dataset901_Phantom", "901"
NUM_UNLABELLED, NUM_LABELLED, NUM_TEST = 24, 40, 4
NAME = "demo"
PRETRAIN_STEPS = 300
# The probe fits a classifier to a few of the labelled scans and scores it on others.
PROBE_LABELS, PROBE_DRAWS = 1, 10
RECIPE: dict[str, Any] = {
    "num_epochs": 10,
    "num_iterations_per_epoch": 40,
    "num_val_iterations_per_epoch": 2,
    # nnU-Net's SGD needs several times as many steps for a small CNN.
    "optimizer": "adamw",
    "pretrained_rate": 1e-2,
}

NUM_STEPS = 6
"""Commands of the chain."""

PROGRESS_EVERY_S = 20.0
"""How often the last line of a command's output is shown while the command runs."""
LINE_WIDTH = 110

CONTENTS = {
    "unlabelled": "generated scans without labels",
    "nnUNet_raw": "generated scans with labels, and test scans",
    "nnUNet_results/autoreg_pretraining/demo": "the pretraining, as far as it came",
    f"nnUNet_preprocessed/{DATASET}": "plans and preprocessed scans",
    f"nnUNet_results/{DATASET}": "fine-tuned models, as far as they came",
    "probe": "the comparison of the pretrained features with random weights",
    "predicted": "segmented test scans",
    "demo.log": "the output of all commands",
}
"""What the demo's folder may hold."""


@dataclass
class Demo:
    """Hold the folder of a demonstration and the device it runs on.

    Attributes:
        num_done: commands that have ended.
    """

    folder: Path
    device: str
    num_done: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of the commands that are run.

        nnU-Net's folders lie inside the demo's folder, and the commands of this interpreter come
        first in PATH.
        """
        folders = {}
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            folders[name] = str(self.folder / name)
        commands = Path(sys.executable).parent
        path = f"{commands}{os.pathsep}{os.environ.get('PATH', '')}"
        settings = {"nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "2", "autoreg_weights": NAME}
        return {**os.environ, **folders, **settings, "PATH": path}

    def run(self, title: str, *line: str) -> None:
        """Run one command as a user would type it, and write its output to ``demo.log``.

        Args:
            title: what the command is for.

        Raises:
            AutoregError: the command failed (code "demo-command-failed"); the last lines of its
                output are printed.
        """
        print(f"step {self.num_done + 1} of {NUM_STEPS}: {title}")
        print(f"  $ {shlex.join(line)}", flush=True)
        start = time.monotonic()
        log = self.folder / "demo.log"

        with log.open("a", encoding="utf-8", errors="backslashreplace") as handle:
            handle.write(f"$ {' '.join(line)}\n")
            handle.flush()
            program = shutil.which(line[0], path=self.environment["PATH"])
            if program is None:
                raise AutoregError(
                    f"the command {line[0]} is not installed; run autoreg_doctor",
                    code="demo-command-missing",
                )
            with phase(f"running {line[0]}"), following(log):
                code = run_guarded([program, *line[1:]], self.environment, handle)

        # Somebody has stopped the command itself. This is not a failure of the command.
        if code == InterruptedRunError.exit_code:
            raise InterruptedRunError(f"{line[0]} was stopped")

        self.num_done += 1
        print(f"  done in {duration(time.monotonic() - start)}", flush=True)

        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-15:]), file=sys.stderr)
            raise AutoregError(
                f"{line[0]} ended with exit code {code}; its whole output is in {log}",
                code="demo-command-failed",
            )

    def remaining(self) -> str:
        """Return one line about the files and folders that were made, with their content."""
        found = []
        for name, content in CONTENTS.items():
            if (self.folder / name).exists():
                found.append(f"{name} ({content})")
        return ", ".join(found)


@contextmanager
def following(log: Path) -> Iterator[None]:
    """Show the last line of a log every few seconds, whenever it has changed."""
    has_ended = threading.Event()
    shown = last_line(log)

    def follow() -> None:
        nonlocal shown
        while not has_ended.wait(PROGRESS_EVERY_S):
            line = last_line(log)
            if line != shown:
                print(f"  {line[:LINE_WIDTH]}", flush=True)
                shown = line

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def generate(demo: Demo) -> None:
    """Write the unlabelled scans, and an nnU-Net raw dataset of the labelled and the test scans."""
    raw = demo.folder / "nnUNet_raw" / DATASET
    for number in range(NUM_UNLABELLED):
        scan, _ = draw_phantom(0, number)
        write_image(demo.folder / "unlabelled" / f"scan_{number:02d}.nii.gz", scan)

    # Numbers continue, so that no test scan repeats an unlabelled one.
    first_test = NUM_UNLABELLED + NUM_LABELLED
    for number in range(NUM_UNLABELLED, first_test + NUM_TEST):
        part = "Tr" if number < first_test else "Ts"
        scan, truth = draw_phantom(0, number)
        write_image(raw / f"images{part}" / f"phantom_{number}_0000.nii.gz", scan)
        write_image(raw / f"labels{part}" / f"phantom_{number}.nii.gz", truth)

    description = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": NUM_LABELLED,
        "file_ending": ".nii.gz",
    }
    write_json(raw / "dataset.json", description)
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        (demo.folder / name).mkdir()


@dataclass(frozen=True)
class FrozenFeatures:
    """Hold the Dice of linear classifiers on frozen features, one value per draw.

    Attributes:
        raw_voxels, random, pretrained: draws of labelled scans are in the same order.
    """

    raw_voxels: list[float]
    random: list[float]
    pretrained: list[float]

    @property
    def gain(self) -> Interval:
        """Return pretrained minus random weights, with its interval over draws."""
        pairs = zip(self.pretrained, self.random, strict=True)
        return t_interval([pretrained - random for pretrained, random in pairs])


def read_probe(lines: Sequence[Mapping[str, Any]]) -> FrozenFeatures:
    """Return the probe's results from its lines of JSON.

    Pretrained and random weights are compared on the same levels. They include the decoder if the
    encoder has one.
    """
    all_levels = {line["levels"] for line in lines if line["encoder"] == NAME}
    most_levels = max(all_levels, key=len)

    dice: dict[str, list[float]] = {}
    for encoder in (RAW, RANDOM, NAME):
        # Raw voxels have one set of levels only.
        chosen = [line for line in lines if line["encoder"] == encoder]
        if encoder != RAW:
            chosen = [line for line in chosen if line["levels"] == most_levels]
        draws = [(line["draw"], line["dice"]) for line in chosen]
        dice[encoder] = list(dice_by_draw(draws).values())
    return FrozenFeatures(dice[RAW], dice[RANDOM], dice[NAME])


def run_chain(demo: Demo) -> tuple[FrozenFeatures, float]:
    """Run the commands of the workflow; return what the probe found, and the mean test Dice."""
    raw = demo.folder / "nnUNet_raw" / DATASET
    predicted = demo.folder / "predicted"
    # For fine-tuning and prediction.
    choice = ("-tr", "AutoregPretrainedTrainer", "-p", "AutoregPlans", "-device", demo.device)
    demo.run(
        "pretrain on the unlabelled scans",
        "autoreg_pretrain",
        *("-i", str(demo.folder / "unlabelled"), "--name", NAME, "--batch", "4"),
        *("--steps", str(PRETRAIN_STEPS), "--device", demo.device),
    )
    demo.run(
        "compare the pretrained features with random weights",
        "autoreg_probe",
        *("-d", DATASET_ID, "--encoder", NAME, "--labels", str(PROBE_LABELS)),
        *("--draws", str(PROBE_DRAWS), "--device", demo.device, "-o", str(demo.folder / "probe")),
    )
    demo.run(
        "plan and preprocess the labelled scans",
        "nnUNetv2_plan_and_preprocess",
        *("-d", DATASET_ID, "-pl", "AutoregPlanner", "-c", "3d_fullres", "-np", "2"),
        "--verify_dataset_integrity",
    )
    # nnU-Net's own length would take days on a CPU.
    shorten_recipe(demo.folder / "nnUNet_preprocessed" / DATASET / "AutoregPlans.json")

    demo.run("fine-tune", "nnUNetv2_train", DATASET_ID, "3d_fullres", "0", *choice)
    demo.run(
        "segment the test scans",
        "nnUNetv2_predict",
        *("-d", DATASET_ID, "-i", str(raw / "imagesTs"), "-o", str(predicted)),
        *("-f", "0", "-c", "3d_fullres", "-npp", "2", "-nps", "2"),
        *choice,
    )

    # Labels of test scans are used here for the first time.
    summary = demo.folder / "dice.json"
    demo.run(
        "compare with the truth",
        "nnUNetv2_evaluate_folder",
        *(str(raw / "labelsTs"), str(predicted)),
        *("-djfile", str(predicted / "dataset.json"), "-pfile", str(predicted / "plans.json")),
        *("-o", str(summary), "-np", "2"),
    )

    lines = (demo.folder / "probe" / "probe.jsonl").read_text(encoding="utf-8").splitlines()
    features = read_probe([json.loads(line) for line in lines])
    means = json.loads(summary.read_text(encoding="utf-8"))["foreground_mean"]
    return features, float(means["Dice"])


def shorten_recipe(plans_file: Path) -> None:
    """Shorten the training in the plans file, as a user would, for a demonstration."""
    plans = read_json(plans_file)
    plans["autoreg"]["recipe"].update(RECIPE)
    write_json(plans_file, plans)


def draw(demo: Demo, features: FrozenFeatures, dice: float) -> Path:
    """Draw the result of the probe, and the truth and the prediction of every test scan."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 2.4))
    left, right = parts
    draw_probe(left.subplots(), features)
    draw_segmentations(right, demo, dice)

    handles = []
    for style, name in zip(STRUCTURES, list(LABELS)[1:], strict=True):
        handles.append(Line2D([], [], label=name, **style.line()))
    right.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    with atomic_path(demo.folder / "demo.png") as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return demo.folder / "demo.png"


def draw_probe(axis: Any, features: FrozenFeatures) -> None:
    """Draw one point per draw of labelled scans; a line joins the points of one draw."""
    columns = {
        "raw voxels": features.raw_voxels,
        "random\nweights": features.random,
        "pretrained\nweights": features.pretrained,
    }
    values = list(columns.values())
    for of_draw in zip(*values, strict=True):
        axis.plot(range(len(values)), of_draw, color=GRID, zorder=1)
    styles = SERIES[2::-1]
    for position, (style, of_column) in enumerate(zip(styles, values, strict=True)):
        axis.plot(
            [position] * len(of_column),
            of_column,
            color=style.colour,
            marker=style.marker,
            linestyle="none",
        )
        mean = fmean(of_column)
        axis.text(position + 0.12, mean, f"{mean:.3f}", va="center")

    labelled = counted(PROBE_LABELS, "labelled scan")
    axis.set_title(f"frozen features, {labelled}:\ngain {features.gain}")
    axis.set_xticks(range(len(columns)), list(columns))
    axis.set(xlim=(-0.4, len(columns) - 0.3), ylabel="Dice of a linear classifier")
    axis.grid(axis="y", color=GRID)


def draw_segmentations(figure: Any, demo: Demo, dice: float) -> None:
    """Draw the truth above the prediction, one column per test scan."""
    from SimpleITK import GetArrayFromImage, ReadImage

    raw = demo.folder / "nnUNet_raw" / DATASET
    scans = sorted((raw / "imagesTs").glob("*.nii.gz"))
    rows = {"truth": raw / "labelsTs", f"fine-tuned:\nDice {dice:.3f}": demo.folder / "predicted"}
    axes = figure.subplots(len(rows), len(scans))  # (rows, scans)

    for row, (title, folder) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(title)
        for axis, scan in zip(row, scans, strict=True):
            voxels = GetArrayFromImage(ReadImage(str(scan)))  # (Z, Y, X)
            label_map = ReadImage(str(folder / scan.name.replace("_0000", "")))
            # A little above the middle slice, where all organs are cut.
            middle = voxels.shape[0] // 2 + 3
            labels = GetArrayFromImage(label_map)[middle]  # (Y, X)

            axis.imshow(voxels[middle], cmap="gray", vmin=-160, vmax=240)
            axis.set(xticks=[], yticks=[])
            for label, style in zip(range(1, len(LABELS)), STRUCTURES, strict=True):
                if (labels == label).any():
                    axis.contour(
                        labels == label,
                        levels=[0.5],
                        colors=style.colour,
                        linestyles=[style.dash],
                        linewidths=1.5,
                    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = CommandParser(
        examples=[
            "autoreg_demo",
            "autoreg_demo --out demo --device cpu",
        ],
        prog="autoreg_demo",
        description="Run the whole chain on generated CT-like scans, in minutes on two CPU cores: "
        "pretraining, a comparison of the features with random weights, then nnU-Net's own "
        "commands. autoreg_benchmark measures on your data what fine-tuning gains.",
    )
    p.add_argument(
        "--out",
        metavar="FOLDER",
        type=local_path,
        help="new or empty folder for all files (default: a temporary folder, which is kept)",
    )
    add_device(p)
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parser().parse_args(argv)
    prepare_torch()
    if args.out:
        folder = Path(args.out).resolve()
    else:
        folder = Path(tempfile.mkdtemp(prefix="autoreg_demo_"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"--out {folder} is not an empty folder; give the name of a new one",
            code="usage-folder-not-empty",
        )

    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(folder, chosen_device(args.device))
    print(
        f"generating {NUM_UNLABELLED} unlabelled, {NUM_LABELLED} labelled and {NUM_TEST} test "
        f"scans in {folder}",
        flush=True,
    )
    try:
        generate(demo)
        features, dice = run_chain(demo)
    except InterruptedRunError as error:
        raise InterruptedRunError(
            f"stopped in step {demo.num_done + 1} of {NUM_STEPS}. The demo cannot be continued; it "
            f"always starts in a new folder. In {folder} remain: {demo.remaining()}. Remove "
            "that folder when you no longer need it",
        ) from error

    picture = draw(demo, features, dice)
    print(
        f"frozen features, a linear classifier on {counted(PROBE_LABELS, 'labelled scan')}: Dice "
        f"{fmean(features.pretrained):.3f} with pretrained weights, {fmean(features.random):.3f} "
        f"with random ones; difference {features.gain} over {PROBE_DRAWS} draws",
    )
    steps = RECIPE["num_epochs"] * RECIPE["num_iterations_per_epoch"]
    print(f"fine-tuned for {steps} steps: mean Dice {dice:.3f} on {NUM_TEST} test scans")
    print(f"picture: {picture}")
    print_next("autoreg_pretrain -i FOLDER_WITH_YOUR_SCANS --name NAME")
    return 0
