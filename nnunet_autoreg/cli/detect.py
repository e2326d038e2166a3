"""``autoreg_detect``: boxes of new scans from a model that AutoregDetectionTrainer made.

The names of input files and of results are the user's own, so that results and messages name scans
by them. Paths, which may contain names of patients, are neither written into results nor into log
lines about a scan.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
)
from nnunet_autoreg.errors import AutoregError, ScanError, UsageError, shell_quoted
from nnunet_autoreg.records import to_jsonable

if TYPE_CHECKING:
    from nnunet_autoreg.detection.from_segmentation import Segmentations
    from nnunet_autoreg.detection.predict import DetectionOptions, DetectorModel
    from nnunet_autoreg.detection.scanfile import ScanFile
    from nnunet_autoreg.downstream.scans import Scan

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class DetectRequest:
    """The options of the command, under the names of the parser below."""

    dataset: str | None
    scans: Path | None
    from_seg: Path | None
    output: Path
    folds: list[str]
    trainer: str
    plans: str
    configuration: str
    checkpoint: str
    device: str | None
    tta: bool | None
    min_score: float | None
    fppi: float | None
    nms_iou: float
    max_boxes: int
    filled: bool
    with_instances: bool
    csv: bool
    nndet: bool
    split_4d: bool
    overwrite: bool


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
        help="do not write NAME_instances (default: write it where the model segments)",
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


def detect_all(request: DetectRequest) -> int:
    """Detect in every scan; those that cannot be read are named and left out."""
    from nnunet_autoreg.detection.predict import DetectorModel, settings_of
    from nnunet_autoreg.downstream.model import prediction_device, trained_folder
    from nnunet_autoreg.downstream.scans import find
    from nnunet_autoreg.nnunet_api import results_folder

    if request.dataset is None or request.scans is None:
        raise UsageError(
            "-d and -i are needed (the dataset the model was trained on, and the scans), or "
            "--from-seg",
            code="detect-no-input",
        )
    device = prediction_device(request.device)
    folder = trained_folder(
        results_folder(),
        request.dataset,
        request.trainer,
        request.plans,
        request.configuration,
    )
    model = DetectorModel(folder, request.folds, device, request.checkpoint)
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
    done = start(request, inputs, model.describe(), settings_of(model, options))
    names = []
    for scan in scans:
        if scan.name in done or detect_one(model, scan, options, request.output):
            names.append(scan.name)
    return finish(request, options, names, len(scans))


def options_of(request: DetectRequest, model: "DetectorModel") -> "DetectionOptions":
    """Return the checked options.

    Raises:
        UsageError: an impossible value.
    """
    from nnunet_autoreg.detection.infer import DEFAULT_NMS, MOST_CANDIDATES, NmsSettings
    from nnunet_autoreg.detection.predict import DetectionOptions, num_mirrorings

    if request.min_score is not None and request.fppi is not None:
        raise UsageError(
            "--min-score and --fppi exclude each other; give one",
            code="detect-two-scores",
        )

    _check_score(request)
    if request.fppi is not None and not request.fppi > 0:
        raise UsageError(f"--fppi {request.fppi:g} must be greater than 0", code="detect-fppi")
    if not 0 <= request.nms_iou < 1:
        raise UsageError(f"--nms-iou {request.nms_iou:g} must lie in [0, 1)", code="detect-nms-iou")
    if not 1 <= request.max_boxes <= MOST_CANDIDATES:
        raise UsageError(
            f"--max-boxes {request.max_boxes} must lie between 1 and {MOST_CANDIDATES}",
            code="detect-max-boxes",
        )

    nms = NmsSettings(
        member_iou=request.nms_iou,
        # A tile that holds all of the scan must be able to give as many.
        most_per_tile=max(DEFAULT_NMS.most_per_tile, request.max_boxes),
        most_boxes=request.max_boxes,
    )
    options = DetectionOptions(
        # Eight passes instead of one are too many for a CPU.
        mirror=model.device.type == "cuda" if request.tta is None else request.tta,
        nms=nms,
        min_score=request.min_score,
        filled=request.filled,
        with_instances=request.with_instances,
        for_nndetection=request.nndet,
    )
    if request.fppi is None:
        return options

    # The thresholds belong to the settings of validation.
    if nms != DEFAULT_NMS:
        log.warning(
            "--fppi: its scores come from a validation with --nms-iou %g and --max-boxes %d; with "
            "other values the number of false positives differs",
            DEFAULT_NMS.member_iou,
            DEFAULT_NMS.most_boxes,
        )

    thresholds = model.thresholds(request.fppi, num_mirrorings(model, options))
    return replace(options, min_score=thresholds)


def _check_score(request: DetectRequest) -> None:
    if request.min_score is not None and not 0 <= request.min_score <= 1:
        raise UsageError(
            f"--min-score {request.min_score:g} must lie in [0, 1]",
            code="detect-min-score",
        )


def detect_from_segmentations(request: DetectRequest, source_folder: Path) -> int:
    """Write the components of segmentations; unreadable ones are named and left out."""
    from nnunet_autoreg.detection.from_segmentation import Segmentations
    from nnunet_autoreg.detection.predict import DetectionOptions

    # What was typed differs from the default.
    defaults = parser()
    for name, option in OF_A_MODEL.items():
        if getattr(request, name) != defaults.get_default(name):
            raise UsageError(
                f"{option} has no meaning with --from-seg; leave it out",
                code="from-seg-option",
            )

    _check_score(request)
    if request.output.resolve() == source_folder.resolve():
        raise UsageError(
            f"-o {request.output} is the folder of --from-seg, and every image in it would be "
            "taken for a segmentation; give another folder",
            code="from-seg-output-is-input",
        )

    source = Segmentations(source_folder)
    options = DetectionOptions(
        min_score=request.min_score,
        filled=request.filled,
        with_instances=request.with_instances,
        for_nndetection=request.nndet,
    )
    settings = {
        "min_score": request.min_score,
        **to_jsonable(source.rules),
        "filled": options.filled,
        "instances": options.with_instances,
    }
    inputs = {name: source.inputs(name) for name in source.names}

    # Resuming compares all of these with the files of the earlier run.
    done = start(request, inputs, source.describe(), settings)
    names = []
    for name in source.names:
        if name in done or segmented_one(source, name, options, settings, request.output):
            names.append(name)
    return finish(request, options, names, len(source.names))


def finish(
    request: DetectRequest,
    options: "DetectionOptions",
    names: Sequence[str],
    num_scans: int,
) -> int:
    """Write the table of all scans, and the wanted files that scans done before do not have.

    They are made from the JSON files, so that no scan is held in memory.

    Args:
        names: names of the scans whose files exist.
        num_scans: number of scans, including those that could not be read.

    Returns:
        1 if one could not be read, else 0.

    Raises:
        AutoregError: none could be read.
    """
    from nnunet_autoreg.detection.nndetection import write_boxes
    from nnunet_autoreg.detection.predict import DRAWN_FROM
    from nnunet_autoreg.detection.scanfile import read_scan_file, write_table

    folder = request.output

    # One scan that cannot be read is a warning; nothing at all is an error.
    if not names:
        raise AutoregError(
            f"none of the {num_scans} scans of {request.from_seg or request.scans} could be read; "
            "the warnings above say why",
            code="detect-none-readable",
        )

    for name in names if options.for_nndetection else ():
        file = folder / f"{name}_boxes.pkl"
        if not file.is_file():
            write_boxes(file, read_scan_file(folder / f"{name}.json"))

    if request.csv:
        # A generator: one file is read at a time.
        records = (read_scan_file(folder / f"{name}.json") for name in names)
        write_table(folder / TABLE, records, DRAWN_FROM if options.min_score is None else 0.0)

    results = shell_quoted(str(folder))
    print_next(
        f"autoreg_evaluate_detection -p {results} -g FOLDER_OF_LABELS -o FILE; or open "
        "NAME.mrk.json over the scan in 3D Slicer",
    )

    # A script that calls the command has to notice that scans are missing.
    return 0 if len(names) == num_scans else 1


def start(
    request: DetectRequest,
    inputs: Mapping[str, Sequence[dict[str, Any]]],
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> set[str]:
    """Make the folder of results, and return the scans that an earlier run did already.

    Args:
        inputs: name of the scan -> facts about its files.

    Raises:
        UsageError: results of another model, of another input, or with other options.
    """
    from nnunet_autoreg.downstream.results import make_output_folder, scans_with_results

    folder = request.output
    make_output_folder(folder)
    existing = scans_with_results(folder, list(inputs), request.overwrite)
    done = set()
    for name in existing:
        wanted = {"model": model, "settings": settings, "inputs": inputs[name]}
        if _is_done(folder / f"{name}.json", wanted):
            done.add(name)
    if done:
        print(f"{len(done)} of {len(inputs)} scans were done before")
    if len(done) < len(existing):
        print(
            f"{len(existing) - len(done)} scans were done before, and are done again because they "
            "are to be drawn differently",
        )
    return done


def _is_done(file: Path, wanted: dict[str, Any]) -> bool:
    """Return whether the results of a scan are those of this request.

    It is False if only drawings differ.
    """
    from nnunet_autoreg.detection.predict import DRAWING
    from nnunet_autoreg.detection.scanfile import read_scan_file
    from nnunet_autoreg.downstream.results import check_same_run

    # Settings that only change drawings are no reason to refuse.
    record = read_scan_file(file)
    present = {"model": record.model, "settings": record.settings, "inputs": record.inputs}
    of_drawing = tuple(f"settings.{name}: " for name in DRAWING)
    check_same_run(file, present, wanted, lambda change: change.startswith(of_drawing))
    old = record.settings
    new = wanted["settings"]

    # A segmentation that exists, and is not asked for now, does no harm.
    has_instances = bool(old.get("instances") or not new["instances"])
    return old.get("filled") == new["filled"] and has_instances


def detect_one(
    model: "DetectorModel",
    scan: "Scan",
    options: "DetectionOptions",
    folder: Path,
) -> bool:
    """Detect in one scan and write its files; returns False if it cannot be read."""
    from nnunet_autoreg.detection.predict import detect, write

    try:
        found = detect(model, scan, options)
    except ScanError as error:
        log.warning("%s is left out (%s): %s", scan.name, error.status, error)
        return False
    write(model, found, folder, options)
    _print_number(found.record)
    return True


def segmented_one(
    source: "Segmentations",
    name: str,
    options: "DetectionOptions",
    settings: dict[str, Any],
    folder: Path,
) -> bool:
    """Write the files of one segmentation's components; returns False if it cannot be read."""
    from nnunet_autoreg.detection.predict import write_record

    try:
        record, ids, properties = source.read(name, settings["min_score"] or 0.0, settings)
    except ScanError as error:
        log.warning("%s is left out (%s): %s", name, error.status, error)
        return False
    writer = source.manager.image_reader_writer_class()
    instances = ids if options.with_instances else None
    write_record(record, instances, writer, source.ending, properties, folder, options)
    _print_number(record)
    return True


def _print_number(record: "ScanFile") -> None:
    from nnunet_autoreg.detection.predict import DRAWN_FROM
    from nnunet_autoreg.detection.scanfile import with_score

    num_strong = len(with_score(record.boxes, DRAWN_FROM))
    print(
        f"{record.scan}: {len(record.boxes)} boxes, {num_strong} of them with a score of "
        f"{DRAWN_FROM} or more",
        flush=True,
    )


@command
def main(argv: list[str] | None = None) -> int:
    """Run ``autoreg_detect``."""
    request = DetectRequest(**vars(parser().parse_args(argv)))
    prepare_torch()
    configure_logging()
    if request.from_seg is not None:
        return detect_from_segmentations(request, request.from_seg)
    return detect_all(request)
