"""Detect in all scans of a request: its options, the results of an earlier run, and the files.

``cli/detect.py`` calls these functions and prints the results.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_autoreg.detection.from_segmentation import Segmentations
from nnunet_autoreg.detection.infer import DEFAULT_NMS, MOST_CANDIDATES, NmsSettings
from nnunet_autoreg.detection.nndetection import write_boxes
from nnunet_autoreg.detection.predict import (
    DRAWING,
    DRAWN_FROM,
    DetectionOptions,
    DetectorModel,
    detect,
    num_mirrorings,
    write,
    write_record,
)
from nnunet_autoreg.detection.scanfile import ScanFile, read_scan_file, write_table
from nnunet_autoreg.downstream.results import (
    check_same_run,
    make_output_folder,
    scans_with_results,
)
from nnunet_autoreg.downstream.scans import Scan
from nnunet_autoreg.errors import ScanError, UsageError
from nnunet_autoreg.records import to_jsonable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectRequest:
    """The options of ``autoreg_detect``, under the names of its parser."""

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


def options_of(request: DetectRequest, model: DetectorModel) -> DetectionOptions:
    """Return the checked options of a detection with a model.

    Raises:
        UsageError: a value is impossible, or two options exclude each other.
    """
    if request.min_score is not None and request.fppi is not None:
        raise UsageError(
            "--min-score and --fppi exclude each other; give one",
            code="detect-two-scores",
        )

    check_score(request)
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


def check_score(request: DetectRequest) -> None:
    """Refuse a ``--min-score`` that no score can reach.

    Raises:
        UsageError: it lies outside [0, 1] (code "detect-min-score").
    """
    if request.min_score is not None and not 0 <= request.min_score <= 1:
        raise UsageError(
            f"--min-score {request.min_score:g} must lie in [0, 1]",
            code="detect-min-score",
        )


def segmentation_options(
    request: DetectRequest,
    source: Segmentations,
) -> tuple[DetectionOptions, dict[str, Any]]:
    """Return the options for segmentations, and the settings by which results are recognised."""
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
    return options, settings


def earlier_results(
    request: DetectRequest,
    inputs: Mapping[str, Sequence[dict[str, Any]]],
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> tuple[set[str], int]:
    """Make the folder of results, and find the scans that an earlier run did already.

    Args:
        inputs: name of the scan -> facts about its files.

    Returns:
        the names of the scans that are done, and the number of others that are done again because
        they are to be drawn differently.

    Raises:
        UsageError: results of another model, of another input, or with other options.
    """
    make_output_folder(request.output)
    existing = scans_with_results(request.output, list(inputs), request.overwrite)
    of_drawing = tuple(f"settings.{name}: " for name in DRAWING)
    done = set()
    for name in existing:
        # One file is read at a time, because its boxes may be many.
        file = request.output / f"{name}.json"
        record = read_scan_file(file)
        present = {"model": record.model, "settings": record.settings, "inputs": record.inputs}
        wanted = {"model": model, "settings": settings, "inputs": inputs[name]}

        # Settings that only change drawings are not a reason to refuse.
        check_same_run(file, present, wanted, lambda change: change.startswith(of_drawing))

        # A segmentation that exists, and is not asked for now, does no harm.
        is_drawn_alike = record.settings.get("filled") == settings["filled"]
        if is_drawn_alike and (record.settings.get("instances") or not settings["instances"]):
            done.add(name)
    return done, len(existing) - len(done)


def detect_one(
    model: DetectorModel,
    scan: Scan,
    options: DetectionOptions,
    folder: Path,
) -> ScanFile | None:
    """Detect in one scan and write its files; return None if it cannot be read."""
    try:
        found = detect(model, scan, options)
    except ScanError as error:
        log.warning("%s is left out (%s): %s", scan.name, error.status, error)
        return None
    write(model, found, folder, options)
    return found.record


def segmented_one(
    source: Segmentations,
    name: str,
    options: DetectionOptions,
    settings: dict[str, Any],
    folder: Path,
) -> ScanFile | None:
    """Write the files of one segmentation's components; return None if it cannot be read."""
    try:
        record, ids, properties = source.read(name, settings["min_score"] or 0.0, settings)
    except ScanError as error:
        log.warning("%s is left out (%s): %s", name, error.status, error)
        return None
    writer = source.manager.image_reader_writer_class()
    instances = ids if options.with_instances else None
    write_record(record, instances, writer, source.ending, properties, folder, options)
    return record


def write_summaries(
    folder: Path,
    table: Path | None,
    options: DetectionOptions,
    names: Sequence[str],
) -> None:
    """Write the table of all scans, and nnDetection's files of scans that were done before.

    They are made from the JSON files, so that only one scan is held in memory.

    Args:
        table: the table to write; None for none.
        names: names of the scans whose files exist.
    """
    for name in names if options.for_nndetection else ():
        file = folder / f"{name}_boxes.pkl"
        if not file.is_file():
            write_boxes(file, read_scan_file(folder / f"{name}.json"))

    if table is not None:
        # A generator: one file is read at a time.
        records = (read_scan_file(folder / f"{name}.json") for name in names)
        write_table(table, records, DRAWN_FROM if options.min_score is None else 0.0)
