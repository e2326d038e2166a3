"""``autoreg_detect``: boxes of new scans from a model that AutoregDetectionTrainer made.

The names of input files and of results are the user's own, so that results and messages name scans
by them. Paths, which may contain names of patients, are neither written into results nor into log
lines about a scan.
"""

import argparse
from collections.abc import Sequence
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
from nnunet_autoreg.cli.options import (
    Group,
    add_device,
    add_split_4d,
    add_trained_model,
    local_path,
    open_model,
)
from nnunet_autoreg.errors import AutoregError, UsageError, shell_quoted

if TYPE_CHECKING:
    from nnunet_autoreg.detection.detect_scans import DetectRequest
    from nnunet_autoreg.detection.predict import DetectionOptions
    from nnunet_autoreg.detection.scanfile import ScanFile

TABLE = "detections.csv"
OF_A_MODEL = {
    "dataset": "-d",
    "scans": "-i",
    "folds": "-f",
    "trainer": "-tr",
    "plans": "-p",
    "configuration": "-c",
    "checkpoint": "--checkpoint",
    "device": "--device",
    "tta": "--tta",
    "fppi": "--fppi",
    "nms_iou": "--nms-iou",
    "max_boxes": "--max-boxes",
    "split_4d": "--split-4d",
}
"""Field of the request -> option, of those that mean nothing together with ``--from-seg``."""


def parser() -> argparse.ArgumentParser:
    """Return the command's parser; its values are the fields of ``DetectRequest``."""
    p = CommandParser(
        examples=[
            "autoreg_detect -d 4 -i imagesTs -o found -f 0",
        ],
        prog="autoreg_detect",
        description="Detect objects with a trained model, all its folds together. Every scan gets "
        "NAME.json with boxes in voxels and in mm, NAME_boxes (frames, a label map), "
        "NAME_instances (segmentation inside the boxes), and NAME.mrk.json (for 3D Slicer).",
    )
    _add_input_options(p.add_argument_group("input"))

    group = p.add_argument_group("model")
    add_trained_model(group, "AutoregDetectionTrainer")
    add_device(group, "where to detect")
    group.add_argument(
        "--tta",
        action=argparse.BooleanOptionalAction,
        help="mirror along every axis too, which takes eight times as long (default: on a "
        "GPU only)",
    )

    _add_box_options(p.add_argument_group("selection of boxes"))
    _add_output_options(p.add_argument_group("output"))
    return p


def _add_input_options(group: Group) -> None:
    group.add_argument(
        "-d",
        dest="dataset",
        metavar="ID",
        help="the dataset the model was trained on (4 or Dataset004_Name)",
    )
    group.add_argument(
        "-i",
        dest="scans",
        metavar="FOLDER",
        type=local_path,
        help="scans: files named as nnU-Net does (case_0000.nii.gz); or, for models of one "
        "channel, any folder, file or .zip archive with DICOM, NIfTI, NRRD or MetaImage scans, "
        "which is searched recursively",
    )
    group.add_argument(
        "--from-seg",
        metavar="FOLDER",
        type=local_path,
        help="instead of -d and -i: folder that nnUNetv2_predict --save_probabilities wrote; every "
        "connected component becomes a detection, scored by its highest probability",
    )
    add_split_4d(group)


def _add_box_options(group: Group) -> None:
    group.add_argument(
        "--min-score",
        type=float,
        metavar="S",
        help="leave out boxes below this score, from 0 to 1 (default: the JSON file has all boxes; "
        "drawings and the table start at 0.5)",
    )
    group.add_argument(
        "--fppi",
        type=float,
        metavar="N",
        help="instead of --min-score: use for each class the score that gave N false positives per "
        "scan in validation",
    )
    group.add_argument(
        "--nms-iou",
        type=float,
        default=0.1,
        metavar="IOU",
        help="boxes of a class that overlap more are one object (default: %(default)s)",
    )
    group.add_argument(
        "--max-boxes",
        type=int,
        default=100,
        metavar="N",
        help="keep at most this many boxes of a scan, all classes and folds together "
        "(default: %(default)s)",
    )


def _add_output_options(group: Group) -> None:
    group.add_argument(
        "-o",
        dest="output",
        required=True,
        metavar="FOLDER",
        type=local_path,
        help="the folder to write results to",
    )
    group.add_argument("--filled", action="store_true", help="draw solid boxes instead of frames")
    group.add_argument(
        "--no-instances",
        dest="with_instances",
        action="store_false",
        help="do not write NAME_instances (default: write it if the model segments)",
    )
    group.add_argument(
        "--csv",
        action="store_true",
        help=f"also write {TABLE}, with LUNA16's columns (mm, LPS) first. It has the boxes with a "
        "score of at least 0.5, or all that --min-score or --fppi keep",
    )
    group.add_argument(
        "--nndet",
        action="store_true",
        help="also write NAME_boxes.pkl as nnDetection does",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="detect again in scans that have results (default: continue with the others)",
    )


def detect_all(request: "DetectRequest") -> int:
    """Detect in every scan; return the exit code."""
    from nnunet_autoreg.detection.detect_scans import detect_one, earlier_results, options_of
    from nnunet_autoreg.detection.predict import DetectorModel, settings_of
    from nnunet_autoreg.downstream.scans import find

    if request.dataset is None or request.scans is None:
        raise UsageError(
            "-d and -i are needed (the dataset the model was trained on, and the scans), or "
            "--from-seg",
            code="detect-no-input",
        )
    model = open_model(request, DetectorModel)
    options = options_of(request, model)

    scans = find(
        request.scans,
        model.file_ending,
        model.num_channels,
        request.split_4d,
        request.output,
    )

    # By these, a later call sees whether a scan has changed.
    inputs = {scan.name: scan.inputs() for scan in scans}
    settings = settings_of(model, options)
    done, num_again = earlier_results(request, inputs, model.describe(), settings)
    _print_done(len(done), num_again, len(scans))

    # Scans that cannot be read are named and left out.
    names = []
    for scan in scans:
        if scan.name not in done:
            record = detect_one(model, scan, options, request.output)
            if record is None:
                continue
            _print_number(record)
        names.append(scan.name)
    return _finish(request, options, names, len(scans))


def detect_from_segmentations(request: "DetectRequest", source_folder: Path) -> int:
    """Write the components of segmentations as detections; return the exit code."""
    from nnunet_autoreg.detection.detect_scans import (
        check_score,
        earlier_results,
        segmentation_options,
        segmented_one,
    )
    from nnunet_autoreg.detection.from_segmentation import Segmentations

    # The user has typed an option if its value differs from the default.
    defaults = parser()
    for name, option in OF_A_MODEL.items():
        if getattr(request, name) != defaults.get_default(name):
            raise UsageError(
                f"{option} has no meaning with --from-seg; leave it out",
                code="from-seg-option",
            )

    check_score(request)
    if request.output.resolve() == source_folder.resolve():
        raise UsageError(
            f"-o {request.output} is the folder of --from-seg, and every image in it would be "
            "taken for a segmentation; give another folder",
            code="from-seg-output-is-input",
        )

    source = Segmentations(source_folder)
    options, settings = segmentation_options(request, source)

    # Resuming compares all of these with the files of the earlier run.
    inputs = {name: source.inputs(name) for name in source.names}
    done, num_again = earlier_results(request, inputs, source.describe(), settings)
    _print_done(len(done), num_again, len(inputs))

    # Segmentations that cannot be read are named and left out.
    names = []
    for name in source.names:
        if name not in done:
            record = segmented_one(source, name, options, settings, request.output)
            if record is None:
                continue
            _print_number(record)
        names.append(name)
    return _finish(request, options, names, len(source.names))


def _print_done(num_done: int, num_again: int, num_scans: int) -> None:
    """Print how many scans an earlier run has done, and how many of them are done again."""
    if num_done:
        print(f"{num_done} of {num_scans} scans were done before")
    if num_again:
        print(
            f"{num_again} scans were done before, and are done again because they are to be drawn "
            "differently",
        )


def _print_number(record: "ScanFile") -> None:
    """Print how many boxes a scan has."""
    from nnunet_autoreg.detection.predict import DRAWN_FROM
    from nnunet_autoreg.detection.scanfile import with_score

    num_strong = len(with_score(record.boxes, DRAWN_FROM))
    print(
        f"{record.scan}: {len(record.boxes)} boxes, {num_strong} of them with a score of "
        f"{DRAWN_FROM} or more",
        flush=True,
    )


def _finish(
    request: "DetectRequest",
    options: "DetectionOptions",
    names: Sequence[str],
    num_scans: int,
) -> int:
    """Write the files that are made from all scans, and print the next command.

    Args:
        names: names of the scans whose files exist.
        num_scans: number of scans, including those that could not be read.

    Returns:
        1 if one could not be read, else 0.

    Raises:
        AutoregError: none could be read.
    """
    from nnunet_autoreg.detection.detect_scans import write_summaries

    # One scan that cannot be read is a warning; nothing at all is an error.
    if not names:
        raise AutoregError(
            f"none of the {num_scans} scans of {request.from_seg or request.scans} could be read; "
            "the warnings above say why",
            code="detect-none-readable",
        )

    table = request.output / TABLE if request.csv else None
    write_summaries(request.output, table, options, names)
    results = shell_quoted(str(request.output))
    print_next(
        f"autoreg_evaluate_detection -p {results} -g FOLDER_OF_LABELS -o FILE; or open "
        "NAME.mrk.json over the scan in 3D Slicer",
    )

    # A script that calls the command has to notice that scans are missing.
    return 0 if len(names) == num_scans else 1


@command
def main(argv: list[str] | None = None) -> int:
    """Run ``autoreg_detect``."""
    arguments = parser().parse_args(argv)
    prepare_torch()
    configure_logging()
    from nnunet_autoreg.detection.detect_scans import DetectRequest

    request = DetectRequest(**vars(arguments))
    if request.from_seg is not None:
        return detect_from_segmentations(request, request.from_seg)
    return detect_all(request)
