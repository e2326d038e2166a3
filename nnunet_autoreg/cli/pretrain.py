"""Run ``autoreg_pretrain``: unlabelled scans in, a pretrained encoder out."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import nnunet_autoreg.cli.starting  # noqa: F401
from nnunet_autoreg.cli.common import (
    CommandParser,
    command,
    configure_logging,
    options_for,
    prepare_torch,
    print_next,
    warn_of_violations,
)
from nnunet_autoreg.cli.options import Group, add_device, add_seed, add_split_4d, chosen_device
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.finetune.resolve import VARIABLE, objection_to_verdict
from nnunet_autoreg.io.addresses import is_address
from nnunet_autoreg.model.card import EncoderCard, read_card
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.model.verdict import NO_VERDICT, NOT_LEARNT, longer_training
from nnunet_autoreg.nnunet_api import dataset_folder, dataset_number, results_folder
from nnunet_autoreg.objective_kinds import ObjectiveKind, Preset, objective_kinds, presets
from nnunet_autoreg.plan import DEFAULT_OBJECTIVE

if TYPE_CHECKING:
    from nnunet_autoreg.pretrain.launcher import Launcher
    from nnunet_autoreg.pretrain.request import Request


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line.

    The name of every option that belongs to the request is that of the request's field.
    """
    p = CommandParser(
        examples=[
            "autoreg_pretrain -i /data/scans --name brain",
            "autoreg_pretrain -d 4 -i /data/scans --name brain --dry-run --show",
            "autoreg_pretrain -d 4 --name brain --encoder resenc_l --hours 24",
            "autoreg_pretrain -d 4 --name brain --set optim.lr=3e-4",
        ],
        prog="autoreg_pretrain",
        description="Pretrain a 3D encoder on unlabelled scans by autoregressive sequence "
        "modelling. The command finds and checks the scans, plans, preprocesses and trains. It "
        "leaves weights that nnUNetv2_plan_and_preprocess -pl AutoregPlanner finds. If it was "
        "interrupted, type the same command again: it continues where it stopped.",
    )
    p.add_argument(
        "--name",
        required=True,
        help="name of the run. Results are written to $nnUNet_results/autoreg_pretraining/NAME",
    )
    _add_input_options(p.add_argument_group("input"))
    _add_training_options(p.add_argument_group("training"))

    group = p.add_argument_group("compute")
    add_device(group)
    group.add_argument(
        "--gpu-memory",
        dest="gpu_memory_gib",
        type=float,
        metavar="GIB",
        help="GPU memory to plan for. The batch size does not change: gradients are accumulated "
        "if a batch does not fit (default: all of the GPU's memory)",
    )
    group.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="train on N GPUs of this machine, which share every batch. With --device cpu: in N "
        "processes. A run can be continued with another number. For several machines, start the "
        "command with torchrun and without this option (default: 1)",
    )

    _add_output_options(p.add_argument_group("steps and output"))
    return p


def _add_input_options(group: Group) -> None:
    group.add_argument(
        "-d",
        dest="datasets",
        nargs="+",
        default=[],
        metavar="ID",
        help="nnU-Net raw datasets, by number or name (4 or Dataset004_Name). Every channel is a "
        "separate scan. Labels are never trained on: they only locate structures, and serve the "
        "probe (default: none; give -d, -i or both)",
    )
    group.add_argument(
        "-i",
        dest="folders",
        nargs="+",
        default=[],
        type=absolute,
        metavar="FOLDER",
        help="folders with DICOM, NIfTI, NRRD or MetaImage scans, or with .zip archives of "
        "them; --objective joint also takes PNG and JPEG images. Subfolders are searched as well "
        "(default: none; give -d, -i or both)",
    )
    group.add_argument(
        "--modality",
        metavar="NAME",
        help="modality of all scans: CT, MR, ... (default: from dataset.json or the DICOM header, "
        "else CT if the values look like Hounsfield units)",
    )
    add_split_4d(group)
    group.add_argument(
        "--exclude",
        type=absolute,
        metavar="FILE",
        help="text file with paths or ids of scans to leave out, one per line; or an nnU-Net "
        "splits_final.json, of which the validation cases of the first fold are left out "
        "(default: use all scans)",
    )
    group.add_argument(
        "--manifest",
        type=absolute,
        metavar="FILE",
        help="CSV that describes scans. The column path names a file or folder; further columns "
        "may be subject, session, contrast, class and modality (default: from folder names and "
        "headers)",
    )
    group.add_argument(
        "--boxes",
        type=absolute,
        metavar="FILE",
        help="CSV with the positions of structures, for semantic sequences. Columns: scan, class, "
        "zmin, ymin, xmin, zmax, ymax, xmax, in voxels (default: from the labels of -d)",
    )


def _add_training_options(group: Group) -> None:
    group.add_argument(
        "--encoder",
        default="auto",
        choices=["auto", *ENCODERS],
        metavar="NAME",
        help=f"network to pretrain: {', '.join(ENCODERS)} (default: auto, chosen by device, image "
        "size and memory)",
    )
    group.add_argument(
        "--init",
        type=absolute,
        metavar="FILE|FOLDER|hf://OWNER/NAME",
        help="start from these weights: an encoder.safetensors with its encoder.json beside it, "
        "or anything that autoreg_weights import reads, such as the folder or zip of a trained "
        "nnU-Net model, or a repository on Hugging Face. Their encoder is used "
        "unless --encoder names one (default: random weights)",
    )
    _add_length_options(group)
    _add_sequence_options(group)
    add_seed(group)
    group.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override values of the plan, e.g. optim.lr=3e-4 (default: none)",
    )


def _add_length_options(group: Group) -> None:
    group.add_argument(
        "--steps",
        dest="num_steps",
        type=int,
        metavar="N",
        help="length of the training in optimiser steps (default: planned from the amount of data)",
    )
    group.add_argument(
        "--epochs",
        dest="num_epochs",
        type=float,
        metavar="E",
        help="length in passes over all voxels of the scans, instead of --steps (default: planned)",
    )
    group.add_argument(
        "--hours",
        dest="num_hours",
        type=float,
        metavar="H",
        help="length of the training in hours, without preprocessing, instead of --steps. One "
        "step is timed, and the number of steps is written into plan.json (default: planned)",
    )
    group.add_argument(
        "--batch",
        dest="batch_size",
        type=int,
        metavar="N",
        help="crops per optimiser step (default: 32 on a GPU, else 8)",
    )


def _add_sequence_options(group: Group) -> None:
    group.add_argument(
        "--spacing",
        default="median",
        metavar="POLICY",
        help="target voxel size. Scans of similar voxel size form a group. median: the median of "
        "each group; finest: its 10th percentile; isotropic; or z,y,x in mm for all scans "
        "(default: median)",
    )
    group.add_argument(
        "--sequences",
        nargs="+",
        default=[],
        metavar="KIND[=W]",
        help="what a sequence is made of, with optional weights: spatial (blocks of one crop), "
        "strided (overlapping sub-volumes), contrast (the same region in several contrasts of a "
        "patient), semantic (one structure in several patients) (default: spatial for one "
        "dataset, all kinds that the scans allow for several)",
    )
    group.add_argument(
        "--objective",
        default=DEFAULT_OBJECTIVE,
        choices=list(objective_kinds()),
        help=f"{_list_of(objective_kinds().values())} (default: %(default)s)",
    )
    group.add_argument(
        "--preset",
        default="",
        choices=list(presets()),
        help=f"{_list_of(preset for _, preset in presets().values())} (default: our own settings)",
    )


def _list_of(named: Iterable[ObjectiveKind | Preset]) -> str:
    """Return the help lines of objectives or presets as one text."""
    lines = [f"{entry.name}: {entry.help}" for entry in named]
    return ". ".join(lines)


def _add_output_options(group: Group) -> None:
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="write plan.json and scans.csv, then stop (default: also preprocess and train)",
    )
    group.add_argument(
        "--show",
        action="store_true",
        help="with --dry-run: also preprocess a few scans and draw sequences.png, which shows what "
        "the network sees and what it has to predict (default: no picture)",
    )
    group.add_argument(
        "--part",
        metavar="K/N",
        help="preprocess the K-th of N parts of the scans, then stop. For job arrays: first "
        "plan with --dry-run, then run all parts, then train with the same command without --part "
        "(default: preprocess all scans, then train)",
    )


def absolute(path: str) -> str:
    """Return the absolute form of a path; an address on the web stays as it is.

    Whether it exists is checked later, because a continued run may not need it any more.
    """
    return path if is_address(path) else str(Path(path).resolve())


def preprocess(request: "Request", part: str, dry_run: bool) -> int:
    """Preprocess one part of the scans; return the exit code."""
    from nnunet_autoreg.pretrain.preprocessing import preprocess_part
    from nnunet_autoreg.store.store import parse_part

    if dry_run:
        raise UsageError(
            f"--part {part} and --dry-run exclude each other: run --dry-run once first, which "
            "plans for all parts",
            code="usage-part-with-dry-run",
        )

    num_left = preprocess_part(request, parse_part(part))
    if num_left:
        print_next(
            f"run the other parts ({num_left} cases are missing), then type the same line "
            "without --part to train",
        )
    else:
        print_next("type the same line without --part to train")
    return 0


def request_of(args: argparse.Namespace) -> "Request":
    """Return the checked request.

    Raises:
        UsageError: a value is impossible, or two options contradict each other.
    """
    from nnunet_autoreg.nnunet_api import without_dataset_name
    from nnunet_autoreg.pretrain.request import Request

    options = options_for(Request, args)
    # The name of a dataset may be a person's name, which a plan must not contain.
    options["datasets"] = tuple(map(without_dataset_name, args.datasets or ()))
    return Request(**options).check()


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parser().parse_args(argv)
    configure_logging()
    prepare_torch()

    if args.num_gpus or "WORLD_SIZE" in os.environ:
        # Otherwise torch prints a warning in every process, although nothing is wrong.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    # Wrong values are refused before the device is looked for, which takes seconds.
    request = request_of(args)
    if args.show and not args.dry_run:
        raise UsageError(
            "--show needs --dry-run: it draws what training would see, and stops before training",
            code="usage-show-without-dry-run",
        )

    from nnunet_autoreg.pretrain.launcher import (
        Launcher,
        launch_of,
        launch_processes,
        wait_and_train,
    )

    # Preprocessing and planning are done by one process, and preprocessing needs no GPU.
    needs_one_process = bool(args.part) or args.dry_run
    num_gpus = None if needs_one_process else args.num_gpus
    device = "cpu" if args.part else chosen_device(args.device)
    launch = launch_of(num_gpus, device, os.environ)
    if launch.size > 1 and not launch.launcher:
        return launch_processes(main, sys.argv[1:] if argv is None else argv, launch.size)
    # All but the main process wait until it has made everything ready.
    if launch.rank > 0:
        return wait_and_train(launch, device)

    warn_of_violations()
    with Launcher(launch, device) as launcher:
        return run(request, args, launcher)


def run(request: "Request", args: argparse.Namespace, launcher: "Launcher") -> int:
    """Do the work of the main process; return the exit code."""
    from nnunet_autoreg.pretrain.pipeline import pretrain
    from nnunet_autoreg.pretrain.request import run_folder

    if args.part:
        return preprocess(request, args.part, args.dry_run)

    is_finished = pretrain(request, launcher.device, args.dry_run, args.show, launcher)
    folder = run_folder(results_folder(), request.name)
    if not is_finished:
        picture = "sequences.png, " if args.show else ""
        options = " --show" if args.show else ""
        print_next(
            f"look at {picture}plan.json and scans.csv in {folder}, edit the plan if you like, "
            f"then type the same line without --dry-run{options}",
        )
        return 0

    following = "nnUNetv2_plan_and_preprocess -d ID -pl AutoregPlanner"
    if args.datasets:
        following = fine_tuning(args.datasets[0])
    print_next(next_step(read_card(folder), following))
    return 0


def next_step(card: EncoderCard, fine_tuning: str) -> str:
    """Return the next step after a run: fine-tune, by name if necessary, or train longer.

    Args:
        fine_tuning: the first command of fine-tuning.
    """
    reason_against = objection_to_verdict(card)
    if reason_against is None:
        return fine_tuning

    by_name = f"export {VARIABLE}={card.name}; {fine_tuning}"
    verdict = card.verdict or NO_VERDICT
    if verdict.outcome == NOT_LEARNT:
        return f"train longer: {longer_training(card.num_steps)} (to fine-tune anyway: {by_name})"
    return f"{by_name} (by name, because it was {reason_against})"


def fine_tuning(dataset: str) -> str:
    """Return the first command of fine-tuning on a raw dataset.

    nnU-Net plans only datasets with label maps, so a dataset that has only boxes needs one more
    step.
    """
    from nnunet_autoreg.detection.objects import has_only_boxes

    number = dataset_number(dataset)
    if has_only_boxes(dataset_folder(dataset)):
        return (
            f"autoreg_boxes_to_labels -d {number} (nnU-Net cannot plan without label maps, and "
            "this dataset has only boxes)"
        )
    return f"nnUNetv2_plan_and_preprocess -d {number} -pl AutoregPlanner"


if __name__ == "__main__":
    sys.exit(main())
