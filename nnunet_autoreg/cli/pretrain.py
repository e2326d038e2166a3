"""``autoreg_pretrain``: unlabelled scans in, a pretrained encoder out."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_autoreg.cli.common import (
    command,
    configure_logging,
    prepare_torch,
    print_next,
    warn_of_violations,
)
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.nnunet_api import dataset_folder, dataset_number
from nnunet_autoreg.plan import OBJECTIVES
from nnunet_autoreg.presets import PRESETS

if TYPE_CHECKING:
    from nnunet_autoreg.pretrain.folder import Request
    from nnunet_autoreg.pretrain.launch import Crew


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="autoreg_pretrain",
        description="Pretrain a 3D encoder on unlabelled scans by autoregressive sequence "
        "modelling. Finds, checks, plans, "
        "preprocesses, trains and leaves weights that nnUNetv2_plan_and_preprocess -pl "
        "AutoregPlanner picks up. "
        "The same line typed again continues where it stopped.",
    )
    p.add_argument(
        "-d",
        nargs="+",
        default=[],
        metavar="ID",
        help="nnU-Net raw datasets (4 or Dataset004_Name): every channel a scan; labels only say "
        "where structures lie, "
        "and serve the probe",
    )
    p.add_argument(
        "-i",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folders with DICOM, NIfTI, NRRD or MetaImage scans, or .zip archives of them, "
        "searched recursively",
    )
    p.add_argument(
        "--name",
        required=True,
        help="name of the run: results go to $nnUNet_results/autoreg_pretraining/NAME",
    )
    p.add_argument(
        "--encoder",
        default="auto",
        choices=["auto", *ENCODERS],
        help="default: chosen by device, image size and memory",
    )
    p.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="optimiser steps; default: planned from the amount of data",
    )
    p.add_argument(
        "--epochs",
        type=float,
        metavar="E",
        help="length in passes over all voxels of the scans, instead of --steps",
    )
    p.add_argument(
        "--hours",
        type=float,
        metavar="H",
        help="length of the training in hours, preprocessing apart, instead of --steps: "
        "a step is measured once and the number of steps written into plan.json",
    )
    p.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="crops per optimiser step; default: 32 on a GPU, else 8",
    )
    p.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="memory to plan for; default: all there is. The batch stays, "
        "in as many parts as it takes",
    )
    p.add_argument(
        "--spacing",
        default="median",
        metavar="POLICY",
        help="target spacing: median of each group of like spacing (default), finest (its 10th "
        "percentile), isotropic, or "
        "z,y,x in mm for all scans",
    )
    p.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is one")
    p.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="train on N GPUs of this machine, each taking its share of every batch (with "
        "--device cpu: in N processes); default: one. A run may be continued with another number. "
        "torchrun starts them itself, "
        "also on several machines",
    )
    p.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of everything random (default 0)"
    )
    p.add_argument(
        "--modality",
        metavar="NAME",
        help="CT, MR, ... for all scans; default: dataset.json, else by Hounsfield-like values",
    )
    p.add_argument(
        "--exclude",
        metavar="FILE",
        help="paths or ids to leave out, one a line, or an nnU-Net splits_final.json "
        "(leaves out the validation cases of its first fold)",
    )
    p.add_argument(
        "--manifest",
        metavar="FILE",
        help="CSV that says of scans what they are: path (of a file or folder), and any of "
        "subject, session, contrast, class, modality",
    )
    p.add_argument(
        "--split-4d",
        action="store_true",
        help="take every volume of a 4D file or series (cine, diffusion, fMRI) as a scan",
    )
    p.add_argument(
        "--init",
        metavar="FILE",
        help="start from these weights (encoder.safetensors with its encoder.json beside it); "
        "their encoder is taken where --encoder names none",
    )
    p.add_argument(
        "--sequences",
        nargs="+",
        default=[],
        metavar="KIND[=W]",
        help="what sequences are made of, and how often: spatial (blocks of one crop), strided "
        "(overlapping sub-volumes), "
        "contrast (one place in several contrasts of a subject), semantic (one structure in "
        "several subjects). Default: spatial "
        "for one dataset, all that the scans offer for several",
    )
    p.add_argument(
        "--boxes",
        metavar="FILE",
        help="a CSV that says where structures lie, for semantic sequences: scan, class, zmin, "
        "ymin, "
        "xmin, zmax, ymax, xmax in voxels",
    )
    p.add_argument(
        "--objective",
        default="autoregressive",
        choices=OBJECTIVES,
        help="masked: the yardstick of the simplest kind, a random "
        "three quarters of the blocks from the others, by the same encoder and loop",
    )
    p.add_argument(
        "--preset",
        default="",
        choices=PRESETS,
        help="faithful: AR-SSL4M's own settings, as far as the encoder has them "
        "(--encoder vit_b16 has all)",
    )
    p.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override planned values, e.g. optim.lr=3e-4",
    )
    p.add_argument(
        "--part",
        metavar="K/N",
        help="preprocess the K-th of N parts of the scans, then stop: for job arrays. Needs a run "
        "that "
        "--dry-run has planned; when all parts are done, the same line without --part trains",
    )
    p.add_argument(
        "--dry-run", action="store_true", help="write plan.json and scans.csv, then stop"
    )
    p.add_argument(
        "--show",
        action="store_true",
        help="with --dry-run: also preprocess a few scans and draw sequences.png, what the "
        "network will be given and asked for",
    )
    return p


def absolute(path: str | None) -> str | None:
    """The absolute form of a path; whether it exists is asked when it is needed, which a continued
    run may not.
    """
    return None if path is None else str(Path(path).resolve())


def preprocess(request: "Request", part: str, dry_run: bool) -> int:
    """Do one part of the preprocessing; return the exit code."""
    from nnunet_autoreg.pretrain.part import preprocess_part
    from nnunet_autoreg.store.store import parse_part

    if dry_run:
        raise UsageError(
            f"--part {part} and --dry-run exclude each other; --dry-run comes first, once, and "
            "plans for all parts"
        )
    outcome = preprocess_part(request, parse_part(part))
    if outcome.num_missing > outcome.num_failed:
        num_missing = outcome.num_missing - outcome.num_failed
        print_next(
            f"run the other parts ({num_missing} cases are missing), then type the same line "
            "without --part to train"
        )
    else:
        print_next("type the same line without --part to train")
    return 0


def request_of(args: argparse.Namespace) -> "Request":
    """What was typed, checked.

    Raises:
        UsageError: it makes no sense.
    """
    from nnunet_autoreg.pretrain.folder import Request

    return Request(
        name=args.name,
        datasets=tuple(args.d),
        folders=tuple(str(absolute(folder)) for folder in args.i),
        encoder=args.encoder,
        num_steps=args.steps,
        batch_size=args.batch,
        num_epochs=args.epochs,
        num_hours=args.hours,
        gpu_memory_gib=args.gpu_memory,
        spacing=args.spacing,
        seed=args.seed,
        modality=args.modality,
        split_4d=args.split_4d,
        exclude=absolute(args.exclude),
        manifest=absolute(args.manifest),
        init=absolute(args.init),
        settings=tuple(args.set),
        sequences=tuple(args.sequences),
        objective=args.objective,
        preset=args.preset,
        boxes=absolute(args.boxes),
    ).check()


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parser().parse_args(argv)
    configure_logging()
    warn_of_violations()
    prepare_torch()
    if args.num_gpus or "WORLD_SIZE" in os.environ:
        os.environ.setdefault(
            "TORCH_CPP_LOG_LEVEL", "ERROR"
        )  # torch warns in every process of what is as it should be
    request = request_of(args)
    if args.show and not args.dry_run:
        raise UsageError(
            "--show goes with --dry-run: it draws what training would see, and stops before it"
        )
    from nnunet_autoreg.pretrain.launch import Crew, launch_of, stand_by
    from nnunet_autoreg.pretrain.machine import check_device, default_device

    # Known to every process that torchrun started; all but the main one wait until it has made
    # everything ready.
    alone = bool(args.part) or args.dry_run
    device = "cpu" if args.part else check_device(args.device) if args.device else default_device()
    launch = launch_of(None if alone else args.num_gpus, device, os.environ)
    if launch.rank > 0:
        return stand_by(launch, device)
    with Crew(launch, device) as crew:
        return run(request, args, crew)


def run(request: "Request", args: argparse.Namespace, crew: "Crew") -> int:
    """What the main process does; returns the exit code."""
    from nnunet_autoreg.pretrain.run import pretrain

    if args.part:
        return preprocess(request, args.part, args.dry_run)
    outcome = pretrain(request, crew.device, args.dry_run, args.show, crew)
    if not outcome.finished:
        pictures = f"{outcome.folder / 'sequences.png'}, " if args.show else ""
        print_next(
            f"look at {pictures}{outcome.folder / 'plan.json'} and {outcome.folder / 'scans.csv'}, "
            "edit the plan if you like, "
            "then type the same line without --dry-run"
        )
        return 0
    print_next(
        fine_tuning(args.d[0])
        if args.d
        else "nnUNetv2_plan_and_preprocess -d ID -pl AutoregPlanner"
    )
    return 0


def fine_tuning(dataset: str) -> str:
    """The first line of fine-tuning on a raw dataset, which nnU-Net can only plan with label
    maps.
    """
    from nnunet_autoreg.detection.box_labels import has_boxes_alone

    number = dataset_number(dataset)
    if has_boxes_alone(dataset_folder(dataset)):
        return (
            f"autoreg_boxes_to_labels -d {number} (nnU-Net plans no dataset without label maps, "
            "and this one has boxes alone)"
        )
    return f"nnUNetv2_plan_and_preprocess -d {number} -pl AutoregPlanner"


if __name__ == "__main__":
    sys.exit(main())
