"""``autoreg_boxes_to_labels``: label maps for a dataset of which only boxes are known."""

import argparse

from nnunet_autoreg.cli.common import command, configure_logging, prepare_torch, print_next
from nnunet_autoreg.nnunet_api import dataset_folder, dataset_number


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="autoreg_boxes_to_labels",
        description="For every case of a raw dataset that has boxesTr/CASE.json and no label map: "
        "write labelsTr/CASE with an ellipsoid in "
        "every box that counts, so that nnU-Net plans and preprocesses it. AutoregDetectionTrainer "
        "takes the boxes themselves.",
    )
    p.add_argument("-d", metavar="ID", required=True, help="the raw dataset (4 or Dataset004_Name)")
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Write them. Returns 0."""
    arguments = parser().parse_args(argv)
    prepare_torch()
    configure_logging()
    dataset = dataset_folder(arguments.d)
    from nnunet_autoreg.detection.box_labels import write_box_labels

    print(f"{len(write_box_labels(dataset))} label maps written into {dataset / 'labelsTr'}")
    print_next(
        f"nnUNetv2_plan_and_preprocess -d {dataset_number(arguments.d)} -pl AutoregPlanner -c "
        "3d_fullres"
    )
    return 0
