"""``autoreg_boxes_to_labels``: label maps for a dataset of which only boxes are known."""

import argparse
from dataclasses import dataclass

import nnunet_autoreg.cli.starting  # noqa: F401
from nnunet_autoreg.cli.common import (
    CommandParser,
    command,
    configure_logging,
    prepare_torch,
    print_next,
)
from nnunet_autoreg.cli.options import add_raw_dataset
from nnunet_autoreg.nnunet_api import dataset_folder, dataset_number


@dataclass(frozen=True)
class BoxLabelsRequest:
    """The options of the command, under the names of the parser below."""

    dataset: str


def parser() -> argparse.ArgumentParser:
    """Return the command's parser; its values are the fields of ``BoxLabelsRequest``."""
    p = CommandParser(
        examples=[
            "autoreg_boxes_to_labels -d 4",
        ],
        prog="autoreg_boxes_to_labels",
        description="Write labelsTr/CASE for every case of a raw dataset that has "
        "boxesTr/CASE.json and no label map: an ellipsoid in every box that counts. nnU-Net needs "
        "label maps to plan and preprocess; AutoregDetectionTrainer learns the boxes themselves.",
    )
    add_raw_dataset(p)
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Write the label maps. Returns 0."""
    request = BoxLabelsRequest(**vars(parser().parse_args(argv)))
    prepare_torch()
    configure_logging()
    folder = dataset_folder(request.dataset)
    from nnunet_autoreg.detection.objects import write_box_labels
    from nnunet_autoreg.downstream.label_maps import LABELS

    written = write_box_labels(folder)
    print(f"wrote {len(written)} label maps into {folder / LABELS}")
    print_next(
        f"nnUNetv2_plan_and_preprocess -d {dataset_number(request.dataset)} -pl AutoregPlanner -c "
        "3d_fullres",
    )
    return 0
