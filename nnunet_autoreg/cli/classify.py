"""``autoreg_classify``: classes of new scans from a model that AutoregClassificationTrainer made.

Names of scans are the user's own. Paths, which may contain names of patients, are not written into
results.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nnunet_autoreg.cli.starting  # noqa: F401
from nnunet_autoreg.cli.common import (
    CommandParser,
    command,
    configure_logging,
    prepare_torch,
    print_next,
)
from nnunet_autoreg.cli.options import add_device, add_split_4d, add_trained_model, local_path
from nnunet_autoreg.errors import AutoregError, ScanError, shell_quoted

if TYPE_CHECKING:
    from nnunet_autoreg.classification.predict import ClassifierModel, ScanClasses
    from nnunet_autoreg.downstream.scans import Scan

log = logging.getLogger(__name__)


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
    from nnunet_autoreg.classification.predict import ClassifierModel
    from nnunet_autoreg.classification.predictions import NAME, write_predictions
    from nnunet_autoreg.downstream.model import prediction_device, trained_folder
    from nnunet_autoreg.downstream.results import make_output_folder
    from nnunet_autoreg.downstream.scans import find
    from nnunet_autoreg.nnunet_api import results_folder

    device = prediction_device(request.device)
    folder = trained_folder(
        results_folder(),
        request.dataset,
        request.trainer,
        request.plans,
        request.configuration,
    )
    model = ClassifierModel(folder, request.folds, device, request.checkpoint)
    scans = find(
        request.scans,
        model.file_ending,
        model.num_channels,
        request.split_4d,
        request.output,
    )

    make_output_folder(request.output)
    results = _earlier_results(request, model, scans)
    if results:
        print(f"{len(results)} of {len(scans)} scans were done before")
    remaining = [scan for scan in scans if scan.name not in results]
    results |= _classify_all(model, remaining, request.output)
    if not results:
        raise AutoregError(
            f"none of the {len(scans)} scans of {request.scans} could be read; the warnings above "
            "say why",
            code="classify-none-readable",
        )

    _report_small_scans(model, results)

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


def _earlier_results(
    request: ClassifyRequest,
    model: "ClassifierModel",
    scans: "list[Scan]",
) -> "dict[str, ScanClasses]":
    """Return what an earlier call has left, by the name of the scan.

    Raises:
        UsageError: it is of another model or of other scans.
    """
    from nnunet_autoreg.classification.predict import check_tasks, read_scan_classes
    from nnunet_autoreg.downstream.results import check_same_run, scans_with_results

    by_name = {scan.name: scan for scan in scans}
    results = {}
    for name in scans_with_results(request.output, list(by_name), request.overwrite):
        file = request.output / f"{name}.json"
        old = read_scan_classes(file)
        present = {"model": old.model, "settings": old.settings, "inputs": old.inputs}
        inputs = by_name[name].inputs()
        check_same_run(file, present, {"model": model.describe(), "settings": {}, "inputs": inputs})
        check_tasks(file, old, model.plan.tasks)
        results[name] = old
    return results


def _classify_all(
    model: "ClassifierModel",
    scans: "list[Scan]",
    output: Path,
) -> "dict[str, ScanClasses]":
    """Classify, write and print one scan after the other; return the classes of the readable ones.

    Each is written at once, so that a call that is interrupted continues behind it.
    """
    from nnunet_autoreg.classification.predict import classify, write_scan_classes

    results = {}
    for scan in scans:
        try:
            found = classify(model, scan)
        except ScanError as error:
            log.warning("%s is left out (%s): %s", scan.name, error.status, error)
            continue
        write_scan_classes(output / f"{scan.name}.json", found)
        results[scan.name] = found

        # The likeliest class of every task, for whoever watches.
        best = []
        for task, of_classes in found.probabilities.items():
            kind = max(of_classes, key=lambda name: of_classes[name])
            best.append(f"{task} {kind} ({of_classes[kind]:.2f})")
        print(f"{scan.name}: {', '.join(best)}", flush=True)
    return results


def _report_small_scans(model: "ClassifierModel", results: "dict[str, ScanClasses]") -> None:
    """Print one line about scans that are smaller than the model's patch, if there are any."""
    from nnunet_autoreg.classification.predict import small_scans_line
    from nnunet_autoreg.downstream.tiles import is_smaller

    small = []
    for name, found in results.items():
        if found.shape_vox and is_smaller(found.shape_vox, model.patch_size):
            small.append(name)
    if small:
        print(small_scans_line(small, len(results), model.patch_size))
