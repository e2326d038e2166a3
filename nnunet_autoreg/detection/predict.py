"""Detect objects in new scans with a trained detector.

nnU-Net preprocesses the scans, the boxes of all folds and mirrorings are merged, and results are
given in the original image.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)
from numpy.typing import NDArray

from nnunet_autoreg.detection.geometry import as_box, preprocessing_of, reader_turn, stored_array
from nnunet_autoreg.detection.infer import (
    DEFAULT_NMS,
    Candidates,
    MergedBoxes,
    NmsSettings,
    ScanDetector,
    concatenate,
    merge,
)
from nnunet_autoreg.detection.instances import Ids
from nnunet_autoreg.detection.net import Detector
from nnunet_autoreg.detection.nndetection import write_boxes
from nnunet_autoreg.detection.plan import DetectionPlan, read_plan
from nnunet_autoreg.detection.scanfile import (
    FileBox,
    ScanFile,
    draw_boxes,
    draw_instances,
    make_scan_file,
    with_score,
    write_markup,
    write_scan_file,
)
from nnunet_autoreg.detection.validate import as_stored, in_original, score_thresholds
from nnunet_autoreg.downstream.model import TrainedModel, original_shape
from nnunet_autoreg.downstream.scans import Scan, ready
from nnunet_autoreg.geometry import as_size
from nnunet_autoreg.io.orientation import turned

DRAWN_FROM = 0.5
"""Lowest score of boxes that are drawn, unless the user gives a score or an operating point."""
DRAWING = ("filled", "instances")
"""The settings on which only the drawings depend, and no box does."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionOptions:
    """Hold the settings of a detection, and which files are written.

    Attributes:
        mirror: predict mirrored scans too, along every axis, which takes eight times as long.
        nms: overlaps, and how many boxes are kept.
        min_score: lowest score for all classes, or by class; lower scores are left out of every
            file. None keeps all.
        filled: boxes are solid in label maps, and not frames.
        with_instances: write the segmentation inside the boxes.
        for_nndetection: write nnDetection's pickle too.
    """

    mirror: bool = False
    nms: NmsSettings = DEFAULT_NMS
    min_score: float | Mapping[str, float] | None = None
    filled: bool = False
    with_instances: bool = True
    for_nndetection: bool = False


class DetectorModel(TrainedModel[DetectionPlan]):
    """A trained detector: a folder of ``nnUNetv2_train``."""

    kind = "Detection"
    noun = "detector"
    read_plan = staticmethod(read_plan)

    def __init__(
        self,
        folder: Path,
        folds: Sequence[str],
        device: torch.device,
        checkpoint: str = "checkpoint_final.pth",
    ):
        super().__init__(folder, folds, device, checkpoint)
        assert isinstance(self.network, Detector)
        # In evaluation mode it would return only the segmentation.
        self.network.detect = True

    def thresholds(self, fp_per_scan: float, num_mirrorings: int) -> dict[str, float]:
        """Return class -> the threshold with this many false positives per scan in validation.

        The validations of all folds are counted together.

        Args:
            num_mirrorings: number of mirrorings of the prediction; validation may have used another
                one.

        Raises:
            UsageError: a fold has no usable validation, or is ``all``.
        """
        classes = list(self.plan.labels)
        return score_thresholds(self.folder, self.folds, classes, fp_per_scan, num_mirrorings)


@dataclass(frozen=True)
class Detected:
    """Hold the result of one scan.

    Attributes:
        record: its file of detections.
        labels_ZYX: its segmentation in the array that nnU-Net's reader gave; None if not wanted.
        properties: the image's properties, from nnU-Net's reader and preprocessing.
    """

    record: ScanFile
    labels_ZYX: NDArray[Any] | None  # noqa: N815
    properties: dict[str, Any]


def detect(model: DetectorModel, scan: Scan, options: DetectionOptions) -> Detected:
    """Find the objects of a scan.

    Raises:
        ScanError: it cannot be read, or does not fit the model.
        WeightsError: the network gives numbers that are not finite.
    """
    inputs = scan.inputs()
    with ready(scan) as files:
        image, properties = model.preprocess(files, scan.name)  # (C, Z, Y, X)

    merged, logits = _merged(model, image, options)

    manager = model.stock.plans_manager
    shape = original_shape(properties, manager.transpose_backward)
    geometry = preprocessing_of(properties, as_size(image.shape[1:]), manager.transpose_backward)
    detections = []
    for found in in_original(merged, geometry, shape, model.plan.classes):
        if found.score >= lowest_score(options.min_score, found.name):
            detections.append(found)

    stored = stored_array(properties, shape)
    record = make_scan_file(
        scan.name,
        stored.frame,
        as_stored(detections, stored),
        model.plan.labels,
        model.describe(),
        settings_of(model, options),
        inputs,
    )
    labels = None
    if logits is not None:
        labels = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            manager,
            model.configuration,
            model.stock.label_manager,
            properties,
            num_threads_torch=torch.get_num_threads(),
        )
    return Detected(record, labels, properties)


def _merged(
    model: DetectorModel,
    image_CZYX: torch.Tensor,
    options: DetectionOptions,
) -> tuple[MergedBoxes, torch.Tensor | None]:
    """Return the merged boxes of all folds and mirrorings, in the preprocessed image.

    Also return the mean of their segmentation logits (C, Z, Y, X), or None if no segmentation is
    wanted.
    """
    detector = ScanDetector(
        cast(Detector, model.network),
        model.plan.anchors,
        as_size(model.configuration.patch_size),
        model.device,
        mirror_axes=_mirror_axes(model, options),
        nms=options.nms,
        autocast=model.autocast,
    )
    needs_logits = _with_instances(model, options)
    parts: list[Candidates] = []
    logits: torch.Tensor | None = None
    for number, _ in enumerate(model.weights()):
        found, of_fold = detector.candidates(image_CZYX, with_logits=needs_logits)
        # Members of later folds have higher numbers.
        members = found.members_N + number * detector.num_members
        parts.append(replace(found, members_N=members))
        if of_fold is not None:
            logits = of_fold if logits is None else logits + of_fold

    merged = merge(concatenate(parts), len(parts) * detector.num_members, options.nms)
    return merged, None if logits is None else logits / len(parts)


def settings_of(model: DetectorModel, options: DetectionOptions) -> dict[str, Any]:
    """Return the options as results state them.

    Only the drawings depend on the last two (``DRAWING``).
    """
    return {
        "thinning": options.nms.for_file(),
        "mirrorings": num_mirrorings(model, options),
        "min_score": options.min_score,
        "filled": options.filled,
        "instances": _with_instances(model, options),
    }


def _with_instances(model: DetectorModel, options: DetectionOptions) -> bool:
    return options.with_instances and model.plan.has_masks


def num_mirrorings(model: DetectorModel, options: DetectionOptions) -> int:
    """Return the number of mirrorings of a scan that every model reads."""
    return int(2 ** len(_mirror_axes(model, options)))


def _mirror_axes(model: DetectorModel, options: DetectionOptions) -> tuple[int, ...]:
    trained_axes = model.stock.allowed_mirroring_axes or ()
    return tuple(trained_axes) if options.mirror else ()


def lowest_score(min_score: float | Mapping[str, float] | None, name: str) -> float:
    """Return the lowest score of a class that is kept."""
    if min_score is None:
        return 0.0
    return min_score[name] if isinstance(min_score, Mapping) else min_score


def write(model: DetectorModel, found: Detected, folder: Path, options: DetectionOptions) -> None:
    """Write the files of a scan; its JSON file comes last, so if it exists, all of them do."""
    instances = None
    if found.labels_ZYX is not None:
        labels_ZYX = np.asarray(found.labels_ZYX)
        stored = stored_array(found.properties, labels_ZYX.shape)
        # The segmentation lies in the reader's array, the boxes of the file in the stored one.
        boxes = []
        for box in _drawn(found.record, options):
            box_zyx = as_box(stored.to_reader(box.box_zyx))
            boxes.append(replace(box, box_zyx=box_zyx))
        instances = draw_instances(boxes, labels_ZYX, model.plan.classes)
    writer = model.stock.plans_manager.image_reader_writer_class()
    write_record(
        found.record,
        instances,
        writer,
        model.file_ending,
        found.properties,
        folder,
        options,
    )


def write_record(
    record: ScanFile,
    instances_ZYX: Ids | None,
    writer: Any,
    file_ending: str,
    properties: dict[str, Any],
    folder: Path,
    options: DetectionOptions,
) -> None:
    """Write the files of a scan, its JSON file last, and remove those of an earlier run.

    Args:
        record: the scan's detections.
        instances_ZYX: ids of the boxes in the array that nnU-Net's reader gave; None if not wanted.
        writer: nnU-Net's writer for the images of the dataset.
        file_ending: file ending of these images.
        properties: the image's properties, from nnU-Net's reader.
    """
    name = record.scan
    boxes = _drawn(record, options)
    # The JSON file is removed first: if it exists, all files do, and they are of one run.
    for old in (f"{name}.json", f"{name}_instances{file_ending}", f"{name}_boxes.pkl"):
        (folder / old).unlink(missing_ok=True)

    drawn = draw_boxes(boxes, record.shape_zyx, options.filled)
    # The writer takes the array that the reader gave, and turns it back into the stored one.
    drawn = turned(drawn, reader_turn(properties))
    writer.write_seg(drawn, str(folder / f"{name}_boxes{file_ending}"), properties)
    if instances_ZYX is not None:
        writer.write_seg(instances_ZYX, str(folder / f"{name}_instances{file_ending}"), properties)
    write_markup(folder / f"{name}.mrk.json", name, boxes, record.frame)
    if options.for_nndetection:
        write_boxes(folder / f"{name}_boxes.pkl", record)
    write_scan_file(folder / f"{name}.json", record)


def _drawn(record: ScanFile, options: DetectionOptions) -> list[FileBox]:
    # If the user gave a lowest score, the record holds only boxes to draw. Otherwise it also holds
    # boxes with low scores, which are there for an evaluation.
    return with_score(record.boxes, DRAWN_FROM if options.min_score is None else 0.0)
