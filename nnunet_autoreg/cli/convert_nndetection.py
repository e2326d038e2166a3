"""``autoreg_convert_nndetection``: a task prepared for nnDetection becomes an nnU-Net raw dataset
with instances.
"""

import argparse
import re
from pathlib import Path

from nnunet_autoreg.cli.common import command, configure_logging, prepare_torch, print_next
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.nnunet_api import raw_folder


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="autoreg_convert_nndetection",
        description="Writes nnUNet_raw/DatasetNNN_Name from a task of nnDetection: label maps for "
        "nnU-Net, and instance maps for the "
        "detection trainer in instancesTr. nnDetection's class 0 becomes label 1. Images are "
        "linked or copied.",
    )
    p.add_argument(
        "-i",
        metavar="TASK",
        type=Path,
        required=True,
        help="the task's folder, with dataset.json and raw_splitted/",
    )
    p.add_argument(
        "-d", metavar="NUMBER", type=int, required=True, help="number of the new dataset, 1 to 999"
    )
    p.add_argument(
        "--name", metavar="NAME", help="its name (default: the task's, without its number)"
    )
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Convert. Returns 0."""
    arguments = parser().parse_args(argv)
    configure_logging()
    prepare_torch()
    if not 1 <= arguments.d <= 999:
        raise UsageError(f"-d {arguments.d} must lie between 1 and 999")
    root = raw_folder()
    if taken := sorted(p.name for p in root.glob(f"Dataset{arguments.d:03d}_*")):
        raise UsageError(f"-d {arguments.d}: {taken[0]} has this number; choose another")
    name = arguments.name or re.sub(r"^Task\w*?_", "", arguments.i.resolve().name)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UsageError(
            f"'{name}' is no name for a dataset; give --name with letters, digits, _ . or -"
        )
    from nnunet_autoreg.detection.nndetection import convert_task

    dataset = root / f"Dataset{arguments.d:03d}_{name}"
    count = convert_task(arguments.i, dataset)
    print(f"{dataset}: {count} training cases")
    print_next(f"nnUNetv2_plan_and_preprocess -d {arguments.d} -pl AutoregPlanner -c 3d_fullres")
    return 0
