"""Does pretraining help? A fast harness around the project's own networks, objectives and recipe.

    python benchmarks/evidence.py prepare  --raw RAW --data ixi
    python benchmarks/evidence.py pretrain --data ixi --arm ar --seeds 0 1 --steps 2000 --minutes 30
    python benchmarks/evidence.py finetune --data ixi --init scratch ar --seeds 0 1 --labels 5 \\
        --draws 0 1 2 3 4 --steps 1000 --minutes 60
    python benchmarks/evidence.py table    --data ixi

Every command does the runs that are still missing, and stops after ``--minutes``. If it is typed
again, it continues at the step at which it stopped. Each finished run is one JSON line in
``evidence_work/evidence.jsonl``. ``docs/how-to/evidence.md`` explains the numbers.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from evidence_data import SETS, load_set, prepare, set_path
from evidence_finetune import SCRATCH, FinetuneJob, finetune
from evidence_lines import Deadline, ResultFile, circumstances
from evidence_pretrain import PretrainJob, pretrain
from evidence_probe import RANDOM, ProbeJob, probe
from evidence_table import table

from nnunet_autoreg.benchmark.split import SPLITS
from nnunet_autoreg.cli.common import configure_logging
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.finetune.block import OPTIMIZERS
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.machine import check_device, default_device
from nnunet_autoreg.objective_kinds import objective_kinds
from nnunet_autoreg.plan import DEFAULT_OBJECTIVE

log = logging.getLogger("nnunet_autoreg.evidence")

RESULTS = "evidence.jsonl"
"""Name of the file of results in the folder of ``--work``."""
TEST = "test"


def prepare_all(args: argparse.Namespace) -> None:
    """Prepare the sets that are missing."""
    results, deadline = ResultFile(args.out), Deadline(args.minutes)
    for name in args.data:
        if set_path(args.work, name).is_file():
            log.info("%s is prepared: %s", name, set_path(args.work, name))
            continue
        if deadline.has_passed():
            break
        started = time.monotonic()
        facts = prepare(name, args.raw.resolve(), args.work, args.workers)
        seconds = round(time.monotonic() - started, 1)
        line = {"command": "prepare", "set": name, **facts, "seconds": seconds}
        results.append({**line, **circumstances(torch.device("cpu"))})
        log.info("%s: %s", name, line)


def pretrain_all(args: argparse.Namespace) -> None:
    """Train the runs of an arm that are not finished, seed by seed."""
    device = torch.device(args.device)
    results, deadline = ResultFile(args.out), Deadline(args.minutes)
    data = load_set(args.work, args.data)
    for seed in args.seeds:
        job = PretrainJob(
            data=args.data,
            arm=args.arm,
            encoder=args.encoder,
            objective=args.objective,
            seed=seed,
            steps=args.steps,
            batch=args.batch or SETS[args.data].batch,
            crop_vox=args.crop,
            settings=tuple(args.settings),
            half=args.half,
        )
        if deadline.has_passed() or not pretrain(job, data, args.work, results, deadline, device):
            log.info("the time is up; type the same line again to continue")
            return
        log.info("%s is finished", job.name)


def finetune_all(args: argparse.Namespace) -> None:
    """Train and score the runs that have no line yet.

    They are done draw by draw, so that complete comparisons are available early.
    """
    device = torch.device(args.device)
    results, deadline = ResultFile(args.out), Deadline(args.minutes)
    check_split(args)
    data = load_set(args.work, args.data)
    jobs = list(finetune_jobs(args))
    for number, job in enumerate(jobs):
        if deadline.has_passed() or not finetune(job, data, args.work, results, deadline, device):
            left = f"{len(jobs) - number} of {len(jobs)} runs are left"
            log.info("the time is up, %s; type the same line again to continue", left)
            return


def check_split(args: argparse.Namespace) -> None:
    """Refuse to score the test patients by accident.

    Raises:
        UsageError: the flag that confirms it is missing.
    """
    if args.score == TEST and not args.score_test_patients:
        raise UsageError(
            "--score test: the test patients are scored once, after every choice was made on "
            "development patients; add --score-test-patients if this is that time",
        )


def probe_all(args: argparse.Namespace) -> None:
    """Probe the networks that have no line yet."""
    device = torch.device(args.device)
    results, deadline = ResultFile(args.out), Deadline(args.minutes)
    check_split(args)
    data = load_set(args.work, args.data)
    for init in args.init:
        for seed in (None,) if init == RANDOM else args.seeds:
            if deadline.has_passed():
                log.info("the time is up; type the same line again to continue")
                return
            job = ProbeJob(
                data=args.data,
                init=init,
                pretraining_seed=seed,
                encoder=args.encoder,
                labels=tuple(args.labels),
                num_draws=args.num_draws,
                split=args.score,
                voxels_per_class=args.voxels_per_class,
                like=args.like if init == RANDOM else None,
            )
            probe(job, data, args.work, results, device)


def finetune_jobs(args: argparse.Namespace) -> Iterator[FinetuneJob]:
    """Yield the runs of a command line. From scratch there is one for all pretraining seeds."""
    for draw, labels, init in product(args.draws, args.labels, args.init):
        recipe = list(args.recipe)
        is_named = any(item.startswith("transfer_decoder=") for item in recipe)
        if init != SCRATCH and args.encoder.startswith("resenc") and not is_named:
            # The results always name it, since its planned value has changed once.
            recipe.append("transfer_decoder=false")
        for seed in (None,) if init == SCRATCH else args.seeds:
            yield FinetuneJob(
                data=args.data,
                init=init,
                pretraining_seed=seed,
                encoder=args.encoder,
                labels=labels,
                draw=draw,
                split=args.score,
                steps=args.steps,
                at=tuple(args.at),
                batch=args.batch or SETS[args.data].batch,
                crop_vox=args.crop,
                optimizer=args.optimizer,
                lr=args.lr,
                encoder_lr=args.encoder_lr,
                recipe=tuple(recipe),
                tolerance_mm=args.tolerance_mm,
                half=args.half,
                like=args.like if init == SCRATCH else None,
            )


def show_table(args: argparse.Namespace) -> None:
    """Print the results as Markdown."""
    lines = ResultFile(args.out).lines()
    print(table(lines, data=args.data, split=args.score, wanted=args.wanted))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    described = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=described)
    commands = p.add_subparsers(dest="command", required=True)
    add_prepare(commands)
    add_pretrain(commands)
    add_finetune(commands)
    add_probe(commands)
    add_table(commands)
    return p


Commands = Any
"""The type of argparse's subcommands."""


def add_prepare(commands: Commands) -> None:
    """Add the command that preprocesses."""
    p = commands.add_parser("prepare", help="preprocess datasets, once")
    add_common(p, in_slices=True)
    p.add_argument("--raw", type=Path, required=True, help="folder of nnU-Net's raw datasets")
    p.add_argument("--data", choices=SETS, nargs="+", default=list(SETS))
    p.add_argument("--workers", type=whole, default=1, help="processes")
    p.set_defaults(run=prepare_all)


def add_pretrain(commands: Commands) -> None:
    """Add the command that pretrains."""
    p = commands.add_parser("pretrain", help="train encoders on the pool")
    add_common(p, in_slices=True)
    add_networks(p)
    add_length(p)
    p.add_argument("--arm", required=True, help="name of the arm; its runs differ in their seeds")
    p.add_argument("--objective", choices=list(objective_kinds()), default=DEFAULT_OBJECTIVE)
    p.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value of the plan, e.g. optim.lr=3e-4",
    )
    p.set_defaults(run=pretrain_all)


def add_finetune(commands: Commands) -> None:
    """Add the command that fine-tunes."""
    p = commands.add_parser("finetune", help="fine-tune and score")
    add_common(p, in_slices=True)
    add_networks(p)
    add_length(p)
    add_scored(p)
    p.add_argument("--init", nargs="+", default=[SCRATCH], help="arms to start from, and scratch")
    p.add_argument("--draws", type=int, nargs="+", default=[0], help="draws of labelled patients")
    p.add_argument("--at", type=whole, nargs="*", default=[], help="earlier steps to score after")
    p.add_argument("--optimizer", choices=OPTIMIZERS, help="(default: by the recipe)")
    p.add_argument("--lr", type=positive, help="peak rate (default: by the recipe)")
    p.add_argument("--encoder-lr", type=positive, help="peak rate of the encoder (default: --lr)")
    p.add_argument(
        "--recipe",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value of the recipe, e.g. transfer_decoder=false",
    )
    p.add_argument(
        "--tolerance-mm",
        type=positive,
        help="of surface Dice (default: the finest spacing)",
    )
    p.set_defaults(run=finetune_all)


def add_probe(commands: Commands) -> None:
    """Add the command that probes frozen features."""
    p = commands.add_parser("probe", help="score frozen features with a linear classifier")
    add_common(p, in_slices=True)
    add_networks(p)
    add_scored(p)
    p.add_argument("--init", nargs="+", default=[RANDOM], help="arms to probe, and random")
    p.add_argument("--num-draws", type=whole, default=10, help="draws of labelled patients")
    p.add_argument("--voxels-per-class", type=whole, default=100, help="of each labelled scan")
    p.set_defaults(run=probe_all)


def add_table(commands: Commands) -> None:
    """Add the command that prints the results."""
    p = commands.add_parser("table", help="print the results as Markdown")
    add_common(p, in_slices=False)
    p.add_argument("--data", choices=SETS, help="(default: all)")
    p.add_argument("--score", choices=SPLITS, help="(default: both)")
    p.add_argument(
        "--wanted",
        type=positive,
        default=0.02,
        help="difference to show (default: %(default)s)",
    )
    p.set_defaults(run=show_table)


def add_common(p: argparse.ArgumentParser, in_slices: bool) -> None:
    """Add the options for folders, and for the time after which to stop."""
    work = Path("evidence_work")
    p.add_argument("--work", type=Path, default=work, help="folder of prepared sets and runs")
    p.add_argument("--out", type=Path, help=f"file of JSON lines (default: {RESULTS} in --work)")
    if in_slices:
        p.add_argument("--minutes", type=positive, help="stop cleanly after this many minutes")


def add_networks(p: argparse.ArgumentParser) -> None:
    """Add the options for set, network and device."""
    p.add_argument("--data", choices=SETS, required=True)
    p.add_argument("--encoder", default="resenc_tiny", help="(default: %(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of pretraining (default: 0)")
    p.add_argument("--device", choices=("cpu", "cuda", "mps"), help="(default: the best there is)")
    p.add_argument(
        "--threads",
        type=whole,
        default=1,
        help="on a CPU (default: 1: run jobs side by side)",
    )


def add_length(p: argparse.ArgumentParser) -> None:
    """Add the options for the length of a training and for its crops."""
    p.add_argument("--steps", type=whole, default=1000)
    p.add_argument("--batch", type=whole, help="crops of a step (default: by the set)")
    p.add_argument("--crop", type=crop, help="Z,Y,X voxels, e.g. 48,48,48 (default: by the set)")
    p.add_argument("--half", action="store_true", help="compute in bfloat16 also on a CPU")


def add_scored(p: argparse.ArgumentParser) -> None:
    """Add the options for labelled and scored patients."""
    p.add_argument("--labels", type=whole, nargs="+", default=[5], help="labelled patients")
    p.add_argument("--score", choices=SPLITS, default=SPLITS[0], help="(default: %(default)s)")
    p.add_argument("--score-test-patients", action="store_true", help="needed for --score test")
    p.add_argument(
        "--like",
        metavar="ARM",
        help="random weights take the architecture of this arm (default: --encoder as named)",
    )


def positive(text: str) -> float:
    """Return a number greater than 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
    return number


def whole(text: str) -> int:
    """Return a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def crop(text: str) -> Size:
    """Return three sizes in voxels."""
    sizes = [whole(part) for part in text.split(",")]
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text}: give three sizes, Z,Y,X, e.g. 48,48,48")
    return as_size(sizes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. An error that the user can correct is one line on stderr."""
    args = parser().parse_args(argv)
    args.out = args.out or args.work / RESULTS
    configure_logging()
    try:
        if hasattr(args, "threads"):
            args.device = check_device(args.device or default_device())
            torch.set_num_threads(args.threads)
            # As in nnU-Net: all crops have one shape, and cuDNN finds the fastest kernel for it.
            torch.backends.cudnn.benchmark = args.device == "cuda"
        args.run(args)
    except AutoregError as error:
        print(f"evidence.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
