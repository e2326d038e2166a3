"""Run ``autoreg_benchmark``: does pretraining help on a dataset with few labels?

Pretrained encoders are compared with random weights, masked autoencoding and stock nnU-Net, at
equal cost and with the spread over seeds.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import nnunet_autoreg.cli.starting  # noqa: F401
from nnunet_autoreg.benchmark.split import CROSS_VALIDATION, NUM_FOLDS, SCORED_SPLITS
from nnunet_autoreg.cli.common import (
    CommandParser,
    command,
    configure_logging,
    options_for,
    prepare_torch,
    print_next,
)
from nnunet_autoreg.cli.options import (
    Group,
    add_device,
    add_labelled_dataset,
    add_output_folder,
    add_subjects,
    chosen_device,
    output_folder,
)
from nnunet_autoreg.corpus.private import public_dataset
from nnunet_autoreg.errors import AutoregError, UsageError, shell_quoted
from nnunet_autoreg.objective_kinds import objective_kinds
from nnunet_autoreg.wording import counted

if TYPE_CHECKING:
    from nnunet_autoreg.benchmark.prepare import Bench
    from nnunet_autoreg.benchmark.protocol import BenchmarkRequest

DEFAULT_BUDGET_MIN = 30.0
EXCLUSION = "exclude.txt"
FOLDER = "autoreg_benchmark"
CURVE, PICTURE = "learning_curve.png", "benchmark.png"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line.

    The name of every option that belongs to the request is that of the request's field.
    """
    p = CommandParser(
        examples=[
            "autoreg_benchmark -d 4 --labels 5 20 --seeds 3 --encoders resenc_tiny --dry-run",
            "autoreg_benchmark -d 4 --labels 5 --seeds 3 --arms pretrained scratch stock",
        ],
        prog="autoreg_benchmark",
        description="Measure whether pretraining helps on a dataset. Networks are trained on a few "
        "labelled cases, from pretrained and from random weights, with stock nnU-Net beside them: "
        "the same patients, the same number of steps and patches per step, with nnU-Net's own "
        "planner, trainers and validation. The results are a table with paired differences and "
        "confidence intervals, a plot, and one line per run. If the command was interrupted, type "
        "it again: it continues where it stopped.",
    )
    _add_comparison_options(p.add_argument_group("comparison"))
    _add_length_options(p.add_argument_group("length of the trainings"))
    _add_scoring_options(p.add_argument_group("scoring"))
    _add_run_options(p.add_argument_group("compute and output"))
    return p


def _add_comparison_options(group: Group) -> None:
    add_labelled_dataset(group)
    group.add_argument(
        "--labels",
        nargs="+",
        type=int,
        default=[],
        metavar="K",
        help="numbers of labelled patients (default: those of 5, 10 and 20 that the pool has; if "
        "it has fewer than 5, all of its patients)",
    )
    group.add_argument(
        "--seeds",
        dest="num_seeds",
        type=int,
        default=3,
        metavar="N",
        help="number of seeds. Each seed labels different random patients (default: %(default)s)",
    )
    group.add_argument(
        "--arms",
        nargs="+",
        default=["pretrained", "scratch", "stock"],
        metavar="ARM",
        help="networks to compare: pretrained; the name of an objective "
        f"({', '.join(objective_kinds())}), the same pretraining with that --objective; scratch, "
        "random weights; stock, nnU-Net itself (default: pretrained scratch stock)",
    )
    group.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="NAME",
        help="finished pretraining runs to compare. None of them may have seen the patients that "
        "are scored (default: pretrain --encoders on this dataset, without those patients)",
    )
    group.add_argument(
        "--encoders",
        nargs="+",
        default=["auto"],
        metavar="NAME",
        help="encoders to pretrain if no --weights are given (default: auto)",
    )
    group.add_argument(
        "--recipe",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="changed values of the fine-tuning recipe of our arms, e.g. pretrained_rate=3e-3 "
        "scratch_rate=3e-3 (default: as planned)",
    )


def _add_length_options(group: Group) -> None:
    group.add_argument(
        "--budget",
        dest="budget_min",
        nargs="+",
        type=float,
        default=[],
        metavar="MIN",
        help="minutes of training per run; one or several lengths. All arms train for the number "
        f"of steps that the slowest one makes in this time (default: {DEFAULT_BUDGET_MIN:g})",
    )
    group.add_argument(
        "--steps",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="steps per run, instead of --budget; one or several lengths (default: none)",
    )
    group.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="patches per step, for all arms (default: the smallest batch size of the plans)",
    )
    group.add_argument(
        "--pretrain-steps",
        type=int,
        metavar="N",
        help="steps of the benchmark's own pretrainings (default: planned)",
    )
    group.add_argument(
        "--pretrain-batch",
        type=int,
        metavar="N",
        help="crops per step of the benchmark's own pretrainings (default: planned)",
    )


def _add_scoring_options(group: Group) -> None:
    group.add_argument(
        "--split",
        default="test",
        choices=SCORED_SPLITS,
        help="patients that are scored. development: for making choices; test: for the final "
        "table; cross-validation: every patient once, in --folds parts, for fewer than about 50 "
        "patients and with --weights (default: test)",
    )
    group.add_argument(
        "--folds",
        dest="num_folds",
        type=int,
        default=NUM_FOLDS,
        metavar="N",
        help="folds of --split cross-validation (default: %(default)s)",
    )
    add_subjects(group)
    group.add_argument(
        "--surface-tolerance",
        dest="surface_tolerance_mm",
        type=float,
        metavar="MM",
        help="tolerance of the surface Dice (default: the smallest voxel edge of a case, median "
        "over the cases)",
    )


def _add_run_options(group: Group) -> None:
    add_device(group)
    group.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="trainings that run at the same time (default: %(default)s)",
    )
    add_output_folder(group, "all results", FOLDER)
    group.add_argument(
        "--dry-run",
        action="store_true",
        help=f"only split the patients, and write {EXCLUSION} for autoreg_pretrain --exclude",
    )
    group.add_argument(
        "--measure",
        action="store_true",
        help="pretrain, plan, preprocess and time a step of every network, then stop",
    )


def read_request(args: argparse.Namespace) -> "BenchmarkRequest":
    """Return the checked request.

    Raises:
        UsageError: the dataset is unknown, or a value is impossible.
    """
    from nnunet_autoreg.benchmark.protocol import BenchmarkRequest
    from nnunet_autoreg.nnunet_api import dataset_folder

    # The pace is what the number of steps follows from.
    if args.measure and args.steps and not args.budget_min:
        raise UsageError(
            "--measure needs --budget: with --steps there is nothing to measure",
            code="usage-measure-with-steps",
        )
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: must be at least 1", code="usage-number")

    # Repetitions on the command line would be runs of the same name.
    options = options_for(BenchmarkRequest, args)
    options["dataset"] = dataset_folder(args.dataset).name
    # Without numbers they follow from the pool, which is known after the patients are split.
    for name in ("labels", "steps", "budget_min"):
        options[name] = tuple(sorted(set(options[name])))
    for name in ("arms", "weights", "encoders"):
        options[name] = tuple(dict.fromkeys(options[name]))

    if not args.steps and not args.budget_min:
        options["budget_min"] = (DEFAULT_BUDGET_MIN,)
    return BenchmarkRequest(**options).check()


def run(bench: "Bench", num_jobs: int, only_measure: bool) -> int:
    """Prepare, train what is missing and print the results; return how many trainings failed."""
    from nnunet_autoreg.benchmark.announce import pretraining_lines
    from nnunet_autoreg.benchmark.picture import draw, draw_curve
    from nnunet_autoreg.benchmark.prepare import prepare, surface_tolerance_mm
    from nnunet_autoreg.benchmark.protocol import runs_of
    from nnunet_autoreg.benchmark.results import RESULTS_NAME, read_results
    from nnunet_autoreg.benchmark.run import run_missing, settle_lengths, time_left
    from nnunet_autoreg.benchmark.table import markdown, summary
    from nnunet_autoreg.records import write_text

    root = bench.layout.root
    for line in pretraining_lines(bench, num_jobs):
        print(line, flush=True)

    # One step of one patch, because the length is only known after the preparations.
    prepare(bench, [*runs_of(bench.request, [1], 1)])
    lengths, batch = settle_lengths(bench)
    keys = [*runs_of(bench.request, lengths, batch)]

    tolerance_mm = surface_tolerance_mm(bench)
    if tolerance_mm is not None:
        print(f"surface Dice at a tolerance of {tolerance_mm:g} mm")
    steps = " or ".join(f"{number:,}" for number in lengths)
    print(f"{counted(len(keys), 'training')} of {steps} steps of {counted(batch, 'patch')}")
    left = time_left(bench, keys, num_jobs)
    if left is not None and left.num_runs:
        print(f"still to do: {left}", flush=True)
    if only_measure:
        return 0

    failed = run_missing(bench, keys, num_jobs)
    lines = read_results(root / RESULTS_NAME)
    if lines:
        title = public_dataset(bench.request.dataset)
        table, picture, curve = root / "table.md", root / PICTURE, root / CURVE
        write_text(table, markdown(lines))
        draw(picture, lines, title)
        draw_curve(curve, lines, title)
        print(summary(lines, lengths))
        print(f"table: {table}\npictures: {curve}, {picture}\nruns: {root / RESULTS_NAME}")
    return len(failed)


def after_division(request: "BenchmarkRequest", dataset: str, exclude: Path) -> str:
    """Return what to type after a dry run.

    Args:
        dataset: as the user typed it.
        exclude: the file that names the cases that are scored.
    """
    following = "this command without --dry-run"
    if request.weights:
        return following
    # A cross-validation leaves no labelled scan to pretrain on.
    is_crossed = request.split == CROSS_VALIDATION
    scans = "-i FOLDER" if is_crossed else f"-d {shell_quoted(dataset)}"
    return (
        f"autoreg_pretrain {scans} --name NAME --exclude {shell_quoted(str(exclude))}   and then "
        f"{following} and with --weights NAME"
    )


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parser().parse_args(argv)
    configure_logging()
    prepare_torch()

    # Wrong values are refused before torch is imported, which takes seconds.
    request = read_request(args)

    from nnunet_autoreg.benchmark.announce import division_lines, trainings_line
    from nnunet_autoreg.benchmark.opening import open_bench
    from nnunet_autoreg.pretrain.request import locked

    device = chosen_device(args.device)
    root = output_folder(args.output, FOLDER, request.dataset)

    # One process at a time works in the folder.
    with locked(root, "name another -o"):
        bench = open_bench(request, root, device, args.jobs)
        for line in division_lines(bench):
            print(line)
        print(trainings_line(bench.request, args.jobs), flush=True)
        if args.dry_run:
            print_next(after_division(request, args.dataset, bench.layout.exclude))
            return 0
        num_failed = run(bench, args.jobs, args.measure)

    if num_failed:
        raise AutoregError(
            f"{num_failed} trainings failed; the log above names them and the reasons. Type the "
            "same command again to repeat them",
            code="benchmark-trainings-failed",
        )

    following = "the same command with more --seeds, --labels or --arms: existing runs are kept"
    if args.measure:
        following = "the same command without --measure"
    print_next(following)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
