"""``autoreg_classes_to_labels``: check a table of classes, and write the label maps that lack."""

import argparse
import logging
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

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassLabelsRequest:
    """The options of the command, under the names of the parser below."""

    dataset: str


def parser() -> argparse.ArgumentParser:
    """Return the command's parser; its values are the fields of ``ClassLabelsRequest``."""
    p = CommandParser(
        examples=[
            "autoreg_classes_to_labels -d 4",
        ],
        prog="autoreg_classes_to_labels",
        description="Check classesTr.csv of a raw dataset, and write labelsTr/CASE for every case "
        "that has no label map: 1 inside the body. nnU-Net needs label maps to plan and preprocess;"
        " AutoregClassificationTrainer learns the classes of the table.",
    )
    add_raw_dataset(p)
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Check the table and write the label maps. Returns 0."""
    request = ClassLabelsRequest(**vars(parser().parse_args(argv)))
    prepare_torch()
    configure_logging()
    folder = dataset_folder(request.dataset)
    from nnunet_autoreg.classification.body_labels import write_body_labels
    from nnunet_autoreg.downstream.label_maps import LABELS

    table, written = write_body_labels(folder)
    print(f"{len(table.labels)} cases, {table.patient_rule}")
    for number, task in enumerate(table.tasks):
        counts = table.counts(number)
        listed = [f"{count} {kind}" for kind, count in zip(task.classes, counts, strict=True)]
        num_unknown = len(table.labels) - sum(counts)
        kind = "ordinal" if task.ordinal else "categorical"
        print(f"{task.name} ({kind}): {', '.join(listed)}; {num_unknown} not known")
    for column, reason in table.ignored.items():
        print(f"not a task: column {column} ({reason})")
    print(f"wrote {len(written)} label maps into {folder / LABELS}")
    print_next(
        f"nnUNetv2_plan_and_preprocess -d {dataset_number(request.dataset)} -pl AutoregPlanner -c "
        "3d_fullres",
    )
    return 0
