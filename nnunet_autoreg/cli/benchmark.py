"""``autoreg_benchmark``: pretrained against scratch, masked and stock at a few labels, at equal
cost, with spread.
"""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_autoreg.cli.common import command, configure_logging, prepare_torch, print_next
from nnunet_autoreg.errors import AutoregError, UsageError

if TYPE_CHECKING:
    from nnunet_autoreg.benchmark.prepare import Bench
    from nnunet_autoreg.benchmark.protocol import Request

DEFAULT_BUDGET_MIN = 30.0
EXCLUSION = "exclude.txt"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="autoreg_benchmark",
        description="Does pretraining help on this dataset? Trains with a few labelled cases from "
        "pretrained and from random weights, and "
        "stock nnU-Net beside them: same patients, same steps and patches a step, by nnU-Net's own "
        "planner, trainers and validation. "
        "Leaves a table with paired differences and intervals, a picture, and a line per run. The "
        "same line typed again goes on where it "
        "stopped.",
    )
    p.add_argument(
        "-d",
        required=True,
        metavar="ID",
        help="labelled nnU-Net raw dataset (4 or Dataset004_Name)",
    )
    p.add_argument(
        "--labels",
        nargs="+",
        type=int,
        default=[5, 10, 20],
        metavar="K",
        help="numbers of labelled patients (default 5 10 20)",
    )
    p.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="seeds 0 to N-1; each labels other patients (default 3)",
    )
    p.add_argument(
        "--arms",
        nargs="+",
        default=["pretrained", "scratch", "stock"],
        metavar="ARM",
        help="of pretrained, masked (the same pretraining with masked autoencoding), scratch, "
        "stock; default: all but masked",
    )
    p.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="NAME",
        help="finished pretraining runs, each with arms of its own; none of them may have seen the "
        "patients that are scored. "
        "Default: pretrain --encoders on the dataset itself, without those",
    )
    p.add_argument(
        "--encoders",
        nargs="+",
        default=["auto"],
        metavar="NAME",
        help="encoders to pretrain, without --weights",
    )
    p.add_argument(
        "--pretrain-steps",
        type=int,
        metavar="N",
        help="length of those pretrainings; default: planned",
    )
    p.add_argument(
        "--pretrain-batch",
        type=int,
        metavar="N",
        help="crops per step of those pretrainings; default: planned",
    )
    p.add_argument(
        "--budget",
        type=float,
        metavar="MIN",
        help="minutes of training per run; all arms get the steps that the slowest makes "
        f"in that time (default {DEFAULT_BUDGET_MIN:g})",
    )
    p.add_argument("--steps", type=int, metavar="N", help="steps per run, instead of --budget")
    p.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="patches per step, for all arms; default: the smallest of the plans",
    )
    p.add_argument(
        "--split",
        default="test",
        choices=["development", "test"],
        help="patients that are scored: development for choices, test for the final table "
        "(default)",
    )
    p.add_argument(
        "--recipe",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="changed values of the fine-tuning recipe of our arms, e.g. pretrained_rate=3e-3 "
        "scratch_rate=3e-3",
    )
    p.add_argument(
        "--subjects",
        metavar="FILE",
        help="CSV with the columns case and subject; default: cases.csv of the dataset, or the "
        "cases' names",
    )
    p.add_argument(
        "--surface-tolerance",
        type=float,
        metavar="MM",
        help="tolerance of the surface Dice (default: the median over the cases of the smallest "
        "voxel edge)",
    )
    p.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="trainings at a time (default 1)"
    )
    p.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is one")
    p.add_argument(
        "-o",
        metavar="FOLDER",
        help="where everything goes; default: $nnUNet_results/autoreg_benchmark/DATASET",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help=f"only divide the patients and write {EXCLUSION} for autoreg_pretrain --exclude",
    )
    p.add_argument(
        "--measure",
        action="store_true",
        help="pretrain, plan, preprocess and time a step of every network, then stop",
    )
    return p


def read_request(args: argparse.Namespace) -> "Request":
    """What was typed, checked.

    Raises:
        UsageError: an unknown dataset, or an impossible request.
    """
    from nnunet_autoreg.benchmark.protocol import Request
    from nnunet_autoreg.nnunet_api import dataset_folder

    if args.measure and args.budget is None and args.steps is not None:
        raise UsageError("--measure goes with --budget: with --steps there is nothing to measure")
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: must be at least 1")
    return Request(
        dataset=dataset_folder(args.d).name,
        labels=tuple(sorted(set(args.labels))),
        num_seeds=args.seeds,
        arms=tuple(dict.fromkeys(args.arms)),
        weights=tuple(dict.fromkeys(args.weights)),
        encoders=tuple(dict.fromkeys(args.encoders)),
        pretrain_steps=args.pretrain_steps,
        pretrain_batch=args.pretrain_batch,
        budget_min=DEFAULT_BUDGET_MIN
        if args.steps is None and args.budget is None
        else args.budget,
        steps=args.steps,
        batch=args.batch,
        split=args.split,
        recipe=tuple(args.recipe),
        subjects=args.subjects,
        surface_tolerance_mm=args.surface_tolerance,
    ).check()


def open_bench(request: "Request", root: Path, device: str, num_jobs: int) -> "Bench":
    """The benchmark in ``root``: its patients divided, and the list of those that no pretraining
    may see.
    """
    from nnunet_autoreg.benchmark.commands import Commands
    from nnunet_autoreg.benchmark.prepare import (
        Bench,
        available_cores,
        images_of,
        open_record,
        write_exclude,
    )
    from nnunet_autoreg.benchmark.protocol import Layout
    from nnunet_autoreg.nnunet_api import dataset_folder, preprocessed_folder, results_folder

    layout, images = Layout(root, request.dataset), images_of(request.dataset)
    folders = {"nnUNet_preprocessed": layout.preprocessed, "nnUNet_results": layout.results}
    commands = Commands(
        root / "commands.log", device, max(1, available_cores() // num_jobs), folders
    )
    record = open_record(root, request, sorted(images), dataset_folder(request.dataset))
    write_exclude(layout, record.division)
    return Bench(
        request,
        layout,
        record,
        images,
        commands,
        preprocessed_folder(),
        results_folder(),
        min(8, available_cores()),
    )


def describe(bench: "Bench") -> None:
    """Say how the patients are divided."""
    d, subjects = bench.record.division, bench.record.subjects
    patients = [len({subjects[case] for case in part}) for part in (d.pool, d.development, d.test)]
    if bench.record.rule:
        print(bench.record.rule)
    print(f"--labels counts {bench.record.label_unit}")
    print(
        f"{bench.request.dataset}: {len(subjects)} labelled cases of {len(set(subjects.values()))} "
        f"patients; pool {len(d.pool)} "
        f"({patients[0]} patients), development {len(d.development)} ({patients[1]}), test "
        f"{len(d.test)} ({patients[2]})",
        flush=True,
    )


def run(bench: "Bench", num_jobs: int, only_measure: bool) -> int:
    """Prepare, train what is missing, show what is there; return how many trainings failed."""
    from nnunet_autoreg.benchmark.picture import draw
    from nnunet_autoreg.benchmark.prepare import prepare, surface_tolerance_mm
    from nnunet_autoreg.benchmark.protocol import runs_of
    from nnunet_autoreg.benchmark.results import RESULTS_NAME, read_results
    from nnunet_autoreg.benchmark.run import run_missing, settle_length
    from nnunet_autoreg.benchmark.table import markdown
    from nnunet_autoreg.records import write_text

    root = bench.layout.root
    prepare(bench, [*runs_of(bench.request, 1, 1)])
    steps, batch = settle_length(bench)
    keys = [*runs_of(bench.request, steps, batch)]
    tolerance_mm = surface_tolerance_mm(bench)
    if tolerance_mm is not None:
        print(f"surface Dice at a tolerance of {tolerance_mm:g} mm")
    print(f"{len(keys)} trainings of {steps} steps of {batch} patches", flush=True)
    if only_measure:
        return 0
    failed = run_missing(bench, keys, num_jobs)
    lines = read_results(root / RESULTS_NAME)
    if lines:
        write_text(root / "table.md", markdown(lines))
        draw(root / "benchmark.png", lines, bench.request.dataset)
        print(markdown(lines))
        print(
            f"table: {root / 'table.md'}\npicture: {root / 'benchmark.png'}\nruns: "
            f"{root / RESULTS_NAME}"
        )
    return len(failed)


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parser().parse_args(argv)
    configure_logging()
    prepare_torch()
    from nnunet_autoreg.nnunet_api import results_folder
    from nnunet_autoreg.pretrain.folder import locked
    from nnunet_autoreg.pretrain.machine import check_device, default_device

    request = read_request(args)
    device = check_device(args.device) if args.device else default_device()
    root = (
        Path(args.o).resolve()
        if args.o
        else results_folder() / "autoreg_benchmark" / request.dataset
    )
    with locked(root, "name another -o"):
        bench = open_bench(request, root, device, args.jobs)
        describe(bench)
        if args.dry_run:
            print_next(
                f"autoreg_pretrain -d {shlex.quote(args.d)} --name NAME --exclude "
                f"{shlex.quote(str(bench.layout.exclude))}"
            )
            return 0
        num_failed = run(bench, args.jobs, args.measure)
    if num_failed:
        raise AutoregError(
            f"{num_failed} trainings failed, the log above says which and why; type the same line "
            "again to repeat them"
        )
    print_next(
        "the same line without --measure"
        if args.measure
        else "the same line with more --seeds, --labels or --arms: what is there is kept"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
