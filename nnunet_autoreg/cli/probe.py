"""Run ``autoreg_probe``: how well do the frozen features of an encoder segment already?"""

import argparse
from pathlib import Path

import nnunet_autoreg.cli.starting  # noqa: F401
from nnunet_autoreg.cli.common import (
    CommandParser,
    command,
    configure_logging,
    prepare_torch,
    print_next,
)
from nnunet_autoreg.cli.options import (
    Group,
    add_device,
    add_labelled_dataset,
    add_output_folder,
    add_seed,
    add_subjects,
    chosen_device,
    output_folder,
)
from nnunet_autoreg.corpus.private import public_dataset
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.geometry import size_text

FOLDER = "autoreg_probe"
LINES_NAME, TABLE_NAME = "probe.jsonl", "probe.md"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = CommandParser(
        examples=[
            "autoreg_probe -d 4 --encoder brain --labels 5 --draws 10",
            "autoreg_probe -d 4 --encoder brain brain_masked --random-seeds 3",
        ],
        prog="autoreg_probe",
        description="Fit a linear classifier on the frozen features of a few labelled scans, and "
        "score it as Dice on other patients. The same network with random weights, and raw voxels, "
        "are scored for comparison. The command takes minutes and trains no network.",
    )

    group = p.add_argument_group("encoders")
    add_labelled_dataset(group)
    group.add_argument(
        "--encoder",
        dest="encoders",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="a finished pretraining run, its folder or its encoder.safetensors; or the name of an "
        "encoder, such as resenc_tiny, to probe random weights only. Random weights of the same "
        "networks are always scored as well. The option is required, and may be given several "
        "times (default: none)",
    )
    group.add_argument(
        "--random-seeds",
        type=int,
        default=3,
        metavar="N",
        help="number of random networks to average over (default: %(default)s)",
    )

    _add_scoring_options(p.add_argument_group("scoring"))

    group = p.add_argument_group("compute and output")
    add_device(group, "where features are computed")
    add_output_folder(group, "the results", FOLDER)
    return p


def _add_scoring_options(group: Group) -> None:
    group.add_argument(
        "--labels",
        nargs="+",
        type=int,
        default=[5],
        metavar="K",
        help="numbers of labelled patients (default: 5)",
    )
    group.add_argument(
        "--draws",
        type=int,
        default=10,
        metavar="N",
        help="number of random sets of labelled patients (default: %(default)s)",
    )
    group.add_argument(
        "--score",
        choices=["development", "test"],
        default="development",
        help="patients that are scored. development: for making choices; test: once, at the end "
        "(default: development)",
    )
    add_subjects(group)
    group.add_argument(
        "--spacing",
        nargs=3,
        type=float,
        metavar=("Z", "Y", "X"),
        help="voxel size in mm to which scans are resampled (default: the median of the dataset)",
    )
    add_seed(group, " of the sampled voxels")


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parser().parse_args(argv)
    configure_logging()
    prepare_torch()
    _check_numbers(args)

    import torch

    from nnunet_autoreg.benchmark import probe_encoders
    from nnunet_autoreg.benchmark.dense_probe import ProbeSettings
    from nnunet_autoreg.benchmark.leak import Scored
    from nnunet_autoreg.benchmark.prepare import images_of
    from nnunet_autoreg.benchmark.probe_data import common_spacing, load_cases, read_labels
    from nnunet_autoreg.benchmark.probe_report import table
    from nnunet_autoreg.benchmark.probe_run import Probed, probe_all
    from nnunet_autoreg.benchmark.public_ids import assign_ids
    from nnunet_autoreg.benchmark.split import divide, find_patients
    from nnunet_autoreg.geometry import as_spacing
    from nnunet_autoreg.nnunet_api import dataset_folder
    from nnunet_autoreg.records import write_text

    # The dataset: patients that are labelled, patients that are scored, and the spacing.
    dataset = dataset_folder(args.dataset)
    images, labels = images_of(dataset.name), read_labels(dataset)
    subjects_file = Path(args.subjects) if args.subjects else None
    patients = find_patients(dataset, sorted(images), subjects_file)
    division = divide(patients.patient_of)
    spacing_mm = as_spacing(args.spacing) if args.spacing else common_spacing(images)
    root = output_folder(args.output, FOLDER, dataset.name)
    name = public_dataset(dataset.name)

    scored_names = division.scored(args.score)
    print(f"{name}: {len(images)} labelled scans; {patients.rule}")
    print(
        f"labelled patients come from {len(division.pool)} scans of the pool; "
        f"{len(scored_names)} scans of {args.score} patients are scored, at "
        f"{size_text(spacing_mm, '.3g')} mm",
        flush=True,
    )

    # The encoders, and random networks of every architecture.
    encoders = probe_encoders.find_encoders(args.encoders, spacing_mm, args.random_seeds)
    scans = Scored(dataset.name, patients.patient_of, scored_names, images)
    for warning in probe_encoders.check_leaks(encoders, scans, root):
        print(f"warning: {warning}", flush=True)

    # Raw voxels are scaled by the window of the first encoder that has one.
    ct_window = probe_encoders.first_ct_window(encoders)
    settings = ProbeSettings(tuple(sorted(set(args.labels))), args.draws, seed=args.seed)
    device = torch.device(chosen_device(args.device))
    loading = (images, patients.patient_of, labels, spacing_mm, ct_window)
    pool = load_cases(dataset, division.pool, *loading)
    scored = load_cases(dataset, scored_names, *loading)

    root.mkdir(parents=True, exist_ok=True)
    ids = assign_ids(root, patients.patient_of)
    probed = Probed(name, args.score, pool, scored, labels, spacing_mm, ids)
    lines = probe_all(probed, encoders, settings, device, root / LINES_NAME)
    text = table(lines, labels.structures)
    write_text(root / TABLE_NAME, text + "\n")
    print(f"\n{text}\n\nlines: {root / LINES_NAME}\ntable: {root / TABLE_NAME}")
    print_next(
        f"autoreg_benchmark -d {args.dataset} --split development, to see whether fine-tuning "
        "agrees",
    )
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that no probe can be made with."""
    # --random-seeds may be 0.
    numbers = {
        "--labels": min(args.labels),
        "--draws": args.draws,
        "--random-seeds": args.random_seeds + 1,
    }
    for flag, number in numbers.items():
        if number < 1:
            raise UsageError(f"{flag} {number}: must be at least 1", code="usage-number")
    if args.spacing and min(args.spacing) <= 0:
        raise UsageError(f"--spacing {args.spacing}: must be greater than 0", code="usage-number")


if __name__ == "__main__":
    raise SystemExit(main())
