"""The files of one scan's detections: JSON, label maps, 3D Slicer's markup, and the common table.

The JSON file has voxels and millimetres side by side, under names that say which. The same file may
hold true boxes, for which ``{"boxes": [{"box_zyx": [...], "label": 1}]}`` is enough.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.geometry import (
    RAS_OF_LPS,
    Box,
    Frame,
    as_box,
    check_inside,
    frame_of_affine,
    to_ijk,
)
from nnunet_autoreg.detection.instances import Ids, ObjectClass, read_objects_file
from nnunet_autoreg.errors import ObjectsError, PlanError
from nnunet_autoreg.geometry import Size, Spacing
from nnunet_autoreg.records import atomic_path, from_jsonable, to_cell, write_json

ADVICE = "correct it, or detect again"
FORMAT, VERSION = "nnunet_autoreg.detections", 1
AXES = (
    "box_zyx: edges z0, y0, x0, z1, y1, x1 of the stored array, half open, "
    "voxel v covers [v, v + 1); "
    "box_ijk: the same as continuous indices i, j, k = x, y, z "
    "with voxel centres at whole numbers; "
    "ras and lps: world mm, x, y, z; "
    "size_mm: along i, j, k; "
    "corners_mm_ras: 8 points, i varying fastest"
)
"""The description of its fields in every file."""

MARKUP_SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/"
    "Schema/markups-schema-v1.0.3.json#"
)
COLUMNS = (
    "seriesuid",
    "coordX",
    "coordY",
    "coordZ",
    "probability",
    "class",
    "label",
    "size_i_mm",
    "size_j_mm",
    "size_k_mm",
    "id",
    "votes",
)
"""LUNA16's columns, mm in LPS, then ours; sides are along the image's own axes."""

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Detection:
    """Hold one detected object, in voxel edges of the original image.

    Attributes:
        label: nnU-Net's label value.
        name: name of that label.
        score: in [0, 1].
        votes: number of predictions that were merged into it.
    """

    box_zyx: Box
    label: int
    name: str
    score: float
    votes: int = 1


@dataclass(frozen=True)
class FileBox:
    """Hold a detection as the file has it; ``AXES`` explains the fields."""

    id: int
    label: int
    name: str
    score: float
    votes: int
    box_zyx: Box
    box_ijk: Box
    center_mm_ras: Point
    center_mm_lps: Point
    size_mm: Point
    corners_mm_ras: tuple[Point, ...]


@dataclass(frozen=True)
class ScanFile:
    """Hold everything that a detector reports about one scan.

    Attributes:
        scan: the case's name, without channel and ending.
        affine_ras: 4 rows of 4 numbers, from i, j, k to mm, as nibabel has them.
        classes: name -> label of all classes of the detector.
        model: the networks that made it (dataset, plans, trainer, folds, checkpoint, sha256 of the
            weights).
        settings: thresholds and switches of the prediction.
        inputs: sizes and times of the input files (``scans.facts_of``).
    """

    scan: str
    shape_zyx: Size
    spacing_mm_zyx: Spacing
    affine_ras: tuple[tuple[float, ...], ...]
    classes: dict[str, int]
    boxes: tuple[FileBox, ...]
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[dict[str, Any], ...] = ()
    axes: str = AXES
    format: str = FORMAT
    version: int = VERSION

    @property
    def frame(self) -> Frame:
        """Return where the scan lies."""
        return frame_of_affine(self.affine_ras, self.shape_zyx)


def make_scan_file(
    scan: str,
    frame: Frame,
    detections: Sequence[Detection],
    classes: Mapping[str, int],
    model: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    inputs: Sequence[dict[str, Any]] = (),
) -> ScanFile:
    """Return the file of a scan; boxes get ids from 1, the highest score first.

    Args:
        scan: the case's name.
        frame: where the scan lies.
        detections: in voxel edges of the stored array.
        classes: name -> label of all classes of the detector.
        model, settings, inputs: see ``ScanFile``.

    Raises:
        ObjectsError: a box without extent, outside the image, of an unknown class, or with a score
            outside [0, 1].
    """
    boxes = []
    for number, found in enumerate(sorted(detections, key=lambda d: -d.score), start=1):
        box = as_box(found.box_zyx)
        middle = [(low + high) / 2 for low, high in zip(box[:3], box[3:], strict=True)]
        boxes.append(
            FileBox(
                id=number,
                label=int(found.label),
                name=found.name,
                score=round(float(found.score), 6),
                votes=int(found.votes),
                box_zyx=_rounded(box),
                box_ijk=_rounded(to_ijk(box)),
                center_mm_ras=_point(frame.to_ras(middle)),
                center_mm_lps=_point(frame.to_lps(middle)),
                size_mm=_point(frame.size_mm(box)),
                corners_mm_ras=tuple(_point(corner) for corner in frame.corners_ras(box)),
            ),
        )

    record = ScanFile(
        scan=scan,
        shape_zyx=frame.shape_vox,
        spacing_mm_zyx=frame.spacing_mm,
        affine_ras=frame.affine_ras,
        classes=dict(classes),
        boxes=tuple(boxes),
        model=dict(model or {}),
        settings=dict(settings or {}),
        inputs=tuple(inputs),
    )
    _check(record, f"detections of {scan}")
    return record


def write_scan_file(path: Path, record: ScanFile) -> None:
    """Write a file of detections, whole or not at all."""
    write_json(path, record)


def is_scan_file(path: Path) -> bool:
    """Return whether a JSON file holds detections, of any version.

    Raises:
        ObjectsError: it cannot be read.
    """
    data = read_objects_file(path, ADVICE)
    return isinstance(data, dict) and data.get("format") == FORMAT


def read_scan_file(path: Path) -> ScanFile:
    """Read and check a file of detections.

    Raises:
        ObjectsError: it cannot be read, is another kind of file, or contradicts itself.
    """
    data = read_objects_file(path, ADVICE)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ObjectsError(
            f'{path} is not a file of detections: its "format" is not "{FORMAT}"; give the '
            "folder that autoreg_detect wrote",
            code="detections-format",
        )
    if data.get("version") != VERSION:
        raise ObjectsError(
            f"{path} has version {data.get('version')!r} of the format, this program reads "
            f"{VERSION}; detect again",
            code="detections-version",
        )
    try:
        record = from_jsonable(ScanFile, data, str(path))
    except PlanError as error:
        raise ObjectsError(str(error), code="objects-unreadable") from error
    _check(record, str(path))
    return record


def _rounded(box: Iterable[float]) -> Box:
    return as_box([round(float(v), 4) for v in box])


def _point(values: Iterable[float]) -> Point:
    x, y, z = (round(float(v), 4) for v in values)
    return (x, y, z)


def _check(record: ScanFile, where: str) -> None:
    """Refuse a file whose values are impossible or contradict each other."""
    rows = record.affine_ras
    is_4x4 = len(rows) == 4 and all(len(row) == 4 for row in rows)
    if not is_4x4 or not np.isfinite(rows).all():
        raise ObjectsError(
            f"{where}: affine_ras must be 4 rows of 4 finite numbers",
            code="detections-affine",
        )

    seen: set[int] = set()
    for box in record.boxes:
        here = f"{where}, box {box.id}"
        check_inside(box.box_zyx, record.shape_zyx, here)
        if box.id in seen:
            raise ObjectsError(f"{here}: another box has the same id", code="detections-same-id")
        seen.add(box.id)
        if not 0 <= box.score <= 1:
            raise ObjectsError(
                f"{here}: score {box.score:g} must lie in [0, 1]",
                code="detections-score",
            )
        if record.classes.get(box.name) != box.label:
            known = ", ".join(f"{name} {label}" for name, label in record.classes.items())
            raise ObjectsError(
                f"{here}: name '{box.name}' with label {box.label} is not one of the classes "
                f"({known})",
                code="detections-unknown-class",
            )


def voxels_of(box_zyx: Sequence[float], shape_vox: Size) -> tuple[slice, slice, slice]:
    """Return the whole voxels nearest to a box, at least one on each axis."""
    slices = []
    for low, high, size in zip(box_zyx[:3], box_zyx[3:], shape_vox, strict=True):
        start = min(max(0, round(low)), size - 1)
        stop = min(size, round(high))
        # A box thinner than a voxel is still drawn.
        slices.append(slice(start, max(start + 1, stop)))
    return (slices[0], slices[1], slices[2])


def draw_boxes(boxes: Sequence[FileBox], shape_vox: Size, filled: bool = False) -> Ids:
    """Draw the ids of the boxes into a map (Z, Y, X), the highest score on top.

    Boxes are drawn as frames one voxel thick, so that overlapping ones stay visible, unless
    ``filled`` is set.
    """
    drawn: Ids = np.zeros(shape_vox, dtype=np.uint16)
    for box in sorted(boxes, key=lambda b: b.score):
        region = drawn[voxels_of(box.box_zyx, shape_vox)]
        if filled:
            region[...] = box.id
            continue
        for axis in range(3):
            # The first and the last layer along every axis.
            layers = np.moveaxis(region, axis, 0)
            layers[0] = box.id
            layers[-1] = box.id
    return drawn


def draw_instances(
    boxes: Sequence[FileBox],
    labels_ZYX: NDArray[Any],
    classes: Sequence[ObjectClass],
) -> Ids:
    """Draw the ids of the boxes into the voxels inside them whose segmentation has their class.

    Where boxes overlap, the highest score is on top.
    """
    values = {object_class.name: object_class.values for object_class in classes}
    drawn: Ids = np.zeros(labels_ZYX.shape, dtype=np.uint16)
    num_z, num_y, num_x = labels_ZYX.shape
    for box in sorted(boxes, key=lambda b: b.score):
        voxels = voxels_of(box.box_zyx, (num_z, num_y, num_x))
        is_object = np.isin(labels_ZYX[voxels], values[box.name])
        drawn[voxels][is_object] = box.id
    return drawn


def write_markup(file: Path, scan: str, boxes: Sequence[FileBox], frame: Frame) -> None:
    """Write boxes as 3D Slicer's regions of interest, which are oblique if the image is."""
    directions_ras = frame.linear / np.linalg.norm(frame.linear, axis=0)
    orientation = (RAS_OF_LPS @ directions_ras).round(9).ravel().tolist()
    markups = []
    for box in boxes:
        label = f"{box.name} {box.score:.2f}"
        centre = list(box.center_mm_lps)
        markups.append(
            {
                "type": "ROI",
                "coordinateSystem": "LPS",
                "coordinateUnits": "mm",
                "locked": True,
                "fixedNumberOfControlPoints": False,
                "labelFormat": "%N",
                "roiType": "Box",
                "insideOut": False,
                "lastUsedControlPointNumber": 1,
                "name": f"{scan} {box.id} {label}",
                "center": centre,
                "orientation": orientation,
                "size": list(box.size_mm),
                "controlPoints": [{"id": "1", "label": label, "position": centre, "locked": True}],
                "measurements": [],
                "display": {
                    "visibility": True,
                    "opacity": 1.0,
                    "fillOpacity": 0.1,
                    "handlesInteractive": False,
                },
            },
        )

    write_json(file, {"@schema": MARKUP_SCHEMA, "markups": markups})


def write_table(file: Path, scans: Iterable[ScanFile], lowest_score: float) -> None:
    """Write every box with at least that score of every scan as a row, in LUNA16's form.

    One scan is held in memory at a time.
    """
    with (
        atomic_path(file) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle,
    ):
        writer = csv.writer(handle)
        writer.writerow(COLUMNS)
        for scan in scans:
            for box in with_score(scan.boxes, lowest_score):
                row = [
                    scan.scan,
                    *box.center_mm_lps,
                    box.score,
                    box.name,
                    box.label,
                    *box.size_mm,
                    box.id,
                    box.votes,
                ]
                # Names may begin with a sign that a spreadsheet takes for a formula.
                writer.writerow([to_cell(str(value)) for value in row])


def with_score(boxes: Sequence[FileBox], lowest_score: float) -> list[FileBox]:
    """Return the boxes with at least that score."""
    return [box for box in boxes if box.score >= lowest_score]
