"""``autoreg_convert_nndetection``: a task of nnDetection becomes an nnU-Net dataset."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import nnunet_autoreg.cli.starting  # noqa: F401
from nnunet_autoreg.cli.common import (
    CommandParser,
    command,
    configure_logging,
    prepare_torch,
    print_next,
)
from nnunet_autoreg.cli.options import local_path
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.nnunet_api import raw_folder


@dataclass(frozen=True)
class ConvertTaskRequest:
    """The options of the command, under the names of the parser below."""

    task: Path
    number: int
    name: str | None


def parser() -> argparse.ArgumentParser:
    """Return the command's parser; its values are the fields of ``ConvertTaskRequest``."""
    p = CommandParser(
        examples=[
            "autoreg_convert_nndetection -i Task001_Lesions -d 12",
        ],
        prog="autoreg_convert_nndetection",
        description="Write nnUNet_raw/DatasetNNN_Name from a task of nnDetection: label maps for "
        "nnU-Net, and instance maps for the detection trainer in instancesTr. nnDetection's class "
        "0 becomes label 1. Images are linked or copied.",
    )
    p.add_argument(
        "-i",
        dest="task",
        metavar="TASK",
        type=local_path,
        required=True,
        help="the task's folder, with dataset.json and raw_splitted/",
    )
    p.add_argument(
        "-d",
        dest="number",
        metavar="NUMBER",
        type=int,
        required=True,
        help="number of the new dataset, 1 to 999",
    )
    p.add_argument(
        "--name",
        metavar="NAME",
        help="name of the new dataset (default: the task's, without its number)",
    )
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Convert the task. Returns 0."""
    request = ConvertTaskRequest(**vars(parser().parse_args(argv)))
    configure_logging()
    prepare_torch()
    if not 1 <= request.number <= 999:
        raise UsageError(
            f"-d {request.number} must lie between 1 and 999",
            code="convert-number-range",
        )

    # nnU-Net finds a dataset by its number, so that two of one number are ambiguous.
    root = raw_folder()
    prefix = f"Dataset{request.number:03d}_"
    others = sorted(p.name for p in root.glob(f"{prefix}*"))
    if others:
        raise UsageError(
            f"-d {request.number}: {others[0]} has this number; choose another",
            code="convert-number-used",
        )

    # Task016_Luna -> Luna.
    name = request.name or re.sub(r"^Task\w*?_", "", request.task.resolve().name)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UsageError(
            f"'{name}' cannot be the name of a dataset; give --name with letters, digits, _ . or -",
            code="convert-dataset-name",
        )

    from nnunet_autoreg.detection.nndetection import convert_task

    dataset = root / f"{prefix}{name}"
    num_cases = convert_task(request.task, dataset)
    print(f"{dataset}: {num_cases} training cases")
    print_next(f"nnUNetv2_plan_and_preprocess -d {request.number} -pl AutoregPlanner -c 3d_fullres")
    return 0
