"""``autoreg_classify``: classes of new scans from a model that AutoregClassificationTrainer made.

Names of scans are the user's own. Paths, which may contain names of patients, are not written into
results.
"""

import argparse
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
from nnunet_autoreg.cli.options import (
    add_device,
    add_split_4d,
    add_trained_model,
    local_path,
    open_model,
)
from nnunet_autoreg.errors import AutoregError, shell_quoted


@dataclass(frozen=True)
class ClassifyRequest:
    """The options of the command, under the names of the parser below."""

    dataset: str
    scans: Path
    output: Path
    folds: list[str]
    trainer: str
    plans: str
    configuration: str
    checkpoint: str
    device: str | None
    split_4d: bool
    overwrite: bool


def parser() -> argparse.ArgumentParser:
    """Return the command's parser; its values are the fields of ``ClassifyRequest``."""
    p = CommandParser(
        examples=[
            "autoreg_classify -d 12 -i imagesTs -o classes",
        ],
        prog="autoreg_classify",
        description="Classify scans with a trained model, all its folds together. classes.csv gets "
        "a row per scan: the class of every task, and the probability of each class. NAME.json "
        "holds the same for one scan, so that the command continues where it was interrupted.",
    )
    add = p.add_argument
    add(
        "-d",
        dest="dataset",
        required=True,
        metavar="ID",
        help="the dataset the model was trained on (4 or Dataset004_Name)",
    )
    add(
        "-i",
        dest="scans",
        required=True,
        metavar="FOLDER",
        type=local_path,
        help="scans: files named as nnU-Net does (case_0000.nii.gz); or, for models of one "
        "channel, any folder, file or .zip archive with DICOM, NIfTI, NRRD or MetaImage scans, "
        "which is searched recursively",
    )
    add(
        "-o",
        dest="output",
        required=True,
        metavar="FOLDER",
        type=local_path,
        help="the folder to write results to",
    )
    add_trained_model(p, "AutoregClassificationTrainer")
    add_device(p, "where to classify")
    add_split_4d(p)
    add(
        "--overwrite",
        action="store_true",
        help="classify scans again that have results (default: continue with the others)",
    )
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Classify every scan; those that cannot be read are named and left out."""
    request = ClassifyRequest(**vars(parser().parse_args(argv)))
    prepare_torch()
    configure_logging()
    from nnunet_autoreg.classification.classify_scans import (
        classify_one,
        earlier_results,
        likeliest_line,
        small_scans_message,
    )
    from nnunet_autoreg.classification.predict import ClassifierModel
    from nnunet_autoreg.classification.predictions import NAME, write_predictions
    from nnunet_autoreg.downstream.results import make_output_folder
    from nnunet_autoreg.downstream.scans import find

    model = open_model(request, ClassifierModel)
    scans = find(
        request.scans,
        model.file_ending,
        model.num_channels,
        request.split_4d,
        request.output,
    )

    make_output_folder(request.output)
    results = earlier_results(model, scans, request.output, request.overwrite)
    if results:
        print(f"{len(results)} of {len(scans)} scans were done before")

    # Each is written at once, so that a call that is interrupted continues behind it.
    for scan in scans:
        if scan.name in results:
            continue
        found = classify_one(model, scan, request.output)
        if found is not None:
            results[scan.name] = found
            print(f"{scan.name}: {likeliest_line(found)}", flush=True)
    if not results:
        raise AutoregError(
            f"none of the {len(scans)} scans of {request.scans} could be read; the warnings above "
            "say why",
            code="classify-none-readable",
        )

    small_scans = small_scans_message(model, results)
    if small_scans:
        print(small_scans)

    # The order of the scans, whichever of them were done before.
    in_order = {}
    for scan in scans:
        if scan.name in results:
            in_order[scan.name] = results[scan.name].of_tasks()

    write_predictions(request.output / NAME, model.plan.tasks, in_order)
    print(f"wrote {len(in_order)} scans to {request.output / NAME}")
    print_next(
        f"autoreg_evaluate_classification -p {shell_quoted(str(request.output))} -g CLASSES_CSV -o "
        "metrics.json",
    )

    # A script that calls the command has to notice that scans are missing.
    return 0 if len(in_order) == len(scans) else 1
