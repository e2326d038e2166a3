"""``autoreg_probe``: how much of a segmentation do an encoder's frozen features hold already?"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_autoreg.cli.common import command, configure_logging, prepare_torch, print_next
from nnunet_autoreg.errors import UsageError

if TYPE_CHECKING:
    from nnunet_autoreg.benchmark.probe_networks import Encoder
    from nnunet_autoreg.geometry import Spacing

RANDOM_WORD = "random"
LINES_NAME, TABLE_NAME = "probe.jsonl", "probe.md"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="autoreg_probe",
        description="Fits a linear classifier on the frozen features of a few labelled scans and "
        "scores it as Dice on other patients, beside the same network with random weights and "
        "beside raw voxels. Takes minutes and trains no network.",
    )
    p.add_argument(
        "-d",
        required=True,
        metavar="ID",
        help="labelled nnU-Net raw dataset (4 or Dataset004_Name)",
    )
    p.add_argument(
        "--encoder",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="a finished pretraining, its folder or its encoder.safetensors; or an encoder such as "
        "resenc_tiny for random weights alone. Random twins of all of them are added; the word "
        "random may stand for them. May be given several times",
    )
    p.add_argument(
        "--labels",
        nargs="+",
        type=int,
        default=[5],
        metavar="K",
        help="numbers of labelled patients (default 5)",
    )
    p.add_argument(
        "--draws", type=int, default=10, metavar="N", help="sets of labelled patients (default 10)"
    )
    p.add_argument(
        "--random-seeds",
        type=int,
        default=3,
        metavar="N",
        help="random networks to average (default 3)",
    )
    p.add_argument(
        "--score",
        choices=["development", "test"],
        default="development",
        help="patients that are scored: development for choices (default); test once, at the end",
    )
    p.add_argument(
        "--subjects",
        metavar="FILE",
        help="CSV with the columns case and subject; default: see docs/how-to/benchmark.md",
    )
    p.add_argument(
        "--spacing",
        nargs=3,
        type=float,
        metavar=("Z", "Y", "X"),
        help="mm; default: the median of the dataset",
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed of the sampled voxels (default 0)",
    )
    p.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is one")
    p.add_argument(
        "-o",
        metavar="FOLDER",
        help="where the results go; default: $nnUNet_results/autoreg_probe/DATASET",
    )
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parser().parse_args(argv)
    configure_logging()
    prepare_torch()
    _check_numbers(args)

    import torch

    from nnunet_autoreg.benchmark.dense_probe import ProbeSettings
    from nnunet_autoreg.benchmark.prepare import images_of
    from nnunet_autoreg.benchmark.probe_data import common_spacing, load_cases, read_labels
    from nnunet_autoreg.benchmark.probe_report import table
    from nnunet_autoreg.benchmark.probe_run import Probed, probe_all
    from nnunet_autoreg.benchmark.split import divide, find_patients
    from nnunet_autoreg.geometry import as_spacing
    from nnunet_autoreg.model.card import read_card
    from nnunet_autoreg.nnunet_api import dataset_folder, results_folder
    from nnunet_autoreg.pretrain.machine import check_device, default_device
    from nnunet_autoreg.records import write_text

    # The dataset: who is labelled, who is scored, at which spacing.
    dataset = dataset_folder(args.d)
    images, labels = images_of(dataset.name), read_labels(dataset)
    patients = find_patients(
        dataset, sorted(images), Path(args.subjects) if args.subjects else None
    )
    division = divide(patients.patient_of)
    spacing_mm = as_spacing(args.spacing) if args.spacing else common_spacing(images)
    root = Path(args.o).resolve() if args.o else results_folder() / "autoreg_probe" / dataset.name

    scored_names = division.scored(args.score)
    print(f"{dataset.name}: {len(images)} labelled scans; {patients.rule}")
    print(
        f"labelled patients come from {len(division.pool)} scans of the pool; "
        f"{len(scored_names)} scans of {args.score} patients are scored, at "
        f"{' x '.join(f'{size:.3g}' for size in spacing_mm)} mm",
        flush=True,
    )

    # The encoders, and a random twin of every architecture.
    encoders = find_encoders(args, spacing_mm)
    refuse_leaks(encoders, dataset.name, patients.patient_of, scored_names, images, root)
    windows = [read_card(encoder.file.parent).ct_window for encoder in encoders if encoder.file]
    ct_window = next((window for window in windows if window is not None), None)

    settings = ProbeSettings(tuple(sorted(set(args.labels))), args.draws, seed=args.seed)
    device = torch.device(check_device(args.device) if args.device else default_device())
    given = (images, patients.patient_of, labels, spacing_mm, ct_window)
    pool = load_cases(dataset, division.pool, *given)
    scored = load_cases(dataset, scored_names, *given)
    probed = Probed(dataset.name, args.score, pool, scored, labels, spacing_mm)
    root.mkdir(parents=True, exist_ok=True)
    lines = probe_all(probed, encoders, settings, device, root / LINES_NAME)
    text = table(lines, labels.structures)
    write_text(root / TABLE_NAME, text + "\n")
    print(f"\n{text}\n\nlines: {root / LINES_NAME}\ntable: {root / TABLE_NAME}")
    print_next(
        f"autoreg_benchmark -d {args.d} --split development, to see whether fine-tuning agrees"
    )
    return 0


def find_encoders(args: argparse.Namespace, spacing_mm: "Spacing") -> "list[Encoder]":
    """Return the pretrained encoders that were named, then the random ones.

    Raises:
        UsageError: none was named, or only the word ``random``.
    """
    from dataclasses import replace

    from nnunet_autoreg.benchmark.probe_networks import find_encoder

    names = [name for name in dict.fromkeys(args.encoder) if name != RANDOM_WORD]
    if not names:
        raise UsageError(
            "--encoder: name a pretraining, or an encoder such as resenc_tiny for random weights "
            "alone"
        )

    setting = os.environ.get("nnUNet_results", "")  # noqa: SIM112
    results = Path(setting) if setting else None
    found = [find_encoder(results, name, spacing_mm) for name in names]
    pretrained = [encoder for encoder in found if encoder.file is not None]

    # One set of random twins serves all encoders of an architecture.
    twins: list[Encoder] = []
    known = []
    for encoder in found:
        if encoder.architecture not in known:
            known.append(encoder.architecture)
            for seed in range(args.random_seeds):
                twins.append(
                    replace(encoder, name=RANDOM_WORD, file=None, has_decoder=False, seed=seed)
                )
    return [*pretrained, *twins]


def refuse_leaks(
    encoders: "list[Encoder]",
    dataset: str,
    patient_of: dict[str, str],
    scored: tuple[str, ...],
    images: dict[str, list[Path]],
    root: Path,
) -> None:
    """Refuse encoders whose pretraining saw a scored patient; warn where nobody knows.

    Raises:
        AutoregError: a scored patient was seen.
    """
    from nnunet_autoreg.benchmark.leak import Scored, check_pretraining

    exclude = root / "exclude.txt"
    for encoder in encoders:
        if encoder.file is None:
            continue
        if not exclude.is_file():
            root.mkdir(parents=True, exist_ok=True)
            exclude.write_text("".join(f"{dataset}/{name}\n" for name in scored), encoding="utf-8")
        warning = check_pretraining(
            encoder.file.parent, Scored(dataset, patient_of, scored, images), exclude
        )
        if warning:
            print(f"warning: {warning}", flush=True)


def _check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that no probe can be made with."""
    numbers = {
        "--labels": min(args.labels),
        "--draws": args.draws,
        "--random-seeds": args.random_seeds + 1,
    }
    for flag, number in numbers.items():
        if number < 1:
            raise UsageError(f"{flag} {number}: must be at least 1")
    if args.spacing and min(args.spacing) <= 0:
        raise UsageError(f"--spacing {args.spacing}: must be greater than 0")


if __name__ == "__main__":
    raise SystemExit(main())
