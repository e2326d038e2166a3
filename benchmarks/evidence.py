"""Does pretraining help? A fast harness around the project's own networks, objectives, recipe and loading of weights.

    python benchmarks/evidence.py prepare  --raw RAW --data ixi
    python benchmarks/evidence.py pretrain --data ixi --arm ar --seeds 0 1 --steps 2000 --minutes 30
    python benchmarks/evidence.py finetune --data ixi --init scratch ar --seeds 0 1 --labels 5 --draws 0 1 2 3 4 --minutes 60
    python benchmarks/evidence.py table    --data ixi

Every command does what is still missing, stops after ``--minutes`` and goes on where it stopped when it is typed again. Each
finished run is one JSON line in ``benchmarks/results/evidence.jsonl``. ``docs/evidence.md`` explains the numbers.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from evidence_data import SETS, load_set, prepare, set_path
from evidence_finetune import SCRATCH, FinetuneJob, finetune
from evidence_lines import Deadline, Journal, circumstances
from evidence_pretrain import PretrainJob, pretrain
from evidence_table import table

from nnunet_autoreg.benchmark.split import SPLITS
from nnunet_autoreg.cli.common import configure_logging
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.plan import OBJECTIVES
from nnunet_autoreg.pretrain.machine import check_device, default_device
from nnunet_autoreg.transfer.block import OPTIMIZERS

log = logging.getLogger("evidence")

RESULTS = Path(__file__).parent / "results" / "evidence.jsonl"
TEST = "test"


def prepare_all(args: argparse.Namespace) -> None:
    """Prepare the sets that are missing."""
    journal, deadline = Journal(args.out), Deadline(args.minutes)
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
        journal.append({**line, **circumstances(torch.device("cpu"))})
        log.info("%s: %s", name, line)


def pretrain_all(args: argparse.Namespace) -> None:
    """Train the runs of an arm that are not finished, seed by seed."""
    device, journal, deadline = torch.device(args.device), Journal(args.out), Deadline(args.minutes)
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
        )
        if deadline.has_passed() or not pretrain(job, data, args.work, journal, deadline, device):
            log.info("the time is up; type the same line again to go on")
            return
        log.info("%s is finished", job.name)


def finetune_all(args: argparse.Namespace) -> None:
    """Train and score the runs that have no line yet, draw by draw, so that whole comparisons are there early."""
    device, journal, deadline = torch.device(args.device), Journal(args.out), Deadline(args.minutes)
    if args.score == TEST and not args.score_test_patients:
        raise UsageError(
            "--score test: the test patients are for the final numbers and are scored once, after every choice was made on "
            "development patients; add --score-test-patients if this is that time"
        )
    data = load_set(args.work, args.data)
    jobs = list(finetune_jobs(args))
    for number, job in enumerate(jobs):
        if deadline.has_passed() or not finetune(job, data, args.work, journal, deadline, device):
            log.info("the time is up, %d of %d runs are left; type the same line again to go on", len(jobs) - number, len(jobs))
            return


def finetune_jobs(args: argparse.Namespace) -> Iterator[FinetuneJob]:
    """Yield the runs of a command line; from scratch there is one for all pretraining seeds."""
    for draw, labels, init in product(args.draws, args.labels, args.init):
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
                recipe=tuple(args.recipe),
                tolerance_mm=args.tolerance_mm,
            )


def show_table(args: argparse.Namespace) -> None:
    """Print the results as Markdown."""
    print(table(Journal(args.out).lines(), data=args.data, split=args.score, wanted_difference=args.wanted))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--work", type=Path, default=Path("evidence_work"), help="folder of prepared sets and runs")
    common.add_argument("--out", type=Path, default=RESULTS, help="file of JSON lines")

    slices = argparse.ArgumentParser(add_help=False)
    slices.add_argument("--minutes", type=positive, help="stop cleanly after so many minutes")
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("--data", choices=SETS, required=True)
    training.add_argument("--encoder", default="resenc_tiny", help="name of an encoder (default: %(default)s)")
    training.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of pretraining (default: 0)")
    training.add_argument("--steps", type=whole, default=1000)
    training.add_argument("--batch", type=whole, help="crops of a step (default: by the set)")
    training.add_argument("--crop", type=crop, help="Z,Y,X voxels, e.g. 48,48,48 (default: by the set)")
    training.add_argument("--device", choices=("cpu", "cuda", "mps"), default=None)
    training.add_argument("--threads", type=whole, default=1, help="on a CPU (default: 1, so that jobs run side by side)")

    made = commands.add_parser("prepare", parents=[common, slices], help="preprocess datasets, once")
    made.add_argument("--raw", type=Path, required=True, help="folder of nnU-Net's raw datasets")
    made.add_argument("--data", choices=SETS, nargs="+", default=list(SETS))
    made.add_argument("--workers", type=whole, default=1, help="processes")
    made.set_defaults(run=prepare_all)

    pre = commands.add_parser("pretrain", parents=[common, slices, training], help="train encoders on the pool")
    pre.add_argument("--arm", required=True, help="name of the arm, e.g. ar; one pretraining run per seed belongs to it")
    pre.add_argument("--objective", choices=OBJECTIVES, default=OBJECTIVES[0])
    pre.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="a value of the plan")
    pre.set_defaults(run=pretrain_all)

    fine = commands.add_parser("finetune", parents=[common, slices, training], help="fine-tune and score")
    fine.add_argument("--init", nargs="+", default=[SCRATCH], help="arms to start from, and scratch")
    fine.add_argument("--labels", type=whole, nargs="+", default=[5], help="labelled patients")
    fine.add_argument("--draws", type=int, nargs="+", default=[0], help="draws of labelled patients")
    fine.add_argument("--at", type=whole, nargs="*", default=[], help="steps after which to score besides the last")
    fine.add_argument("--score", choices=SPLITS, default=SPLITS[0], help="patients to score (default: %(default)s)")
    fine.add_argument("--score-test-patients", action="store_true", help="needed for --score test")
    fine.add_argument("--optimizer", choices=OPTIMIZERS, help="(default: by the recipe)")
    fine.add_argument("--lr", type=positive, help="peak rate (default: by the recipe)")
    fine.add_argument("--encoder-lr", type=positive, help="peak rate of the encoder (default: that of the rest)")
    fine.add_argument("--recipe", action="append", default=[], metavar="KEY=VALUE", help="a value of the recipe")
    fine.add_argument("--tolerance-mm", type=positive, help="of surface Dice (default: the finest spacing, one voxel)")
    fine.set_defaults(run=finetune_all)

    shown = commands.add_parser("table", parents=[common], help="print the results as Markdown")
    shown.add_argument("--data", choices=SETS, help="(default: all)")
    shown.add_argument("--score", choices=SPLITS, help="(default: both)")
    shown.add_argument("--wanted", type=positive, default=0.02, help="difference that is to be shown (default: %(default)s)")
    shown.set_defaults(run=show_table)
    return p


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
    """Run a command; what the user can mend is one line on stderr."""
    args = parser().parse_args(argv)
    configure_logging()
    # The weight table of every fine-tuning would bury the results.
    log.setLevel(logging.INFO)
    try:
        if hasattr(args, "threads"):
            args.device = check_device(args.device or default_device())
            torch.set_num_threads(args.threads)
        args.run(args)
    except AutoregError as error:
        print(f"evidence.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
