"""The detections of one scan as a JSON file: voxels and millimetres side by side, under names that
say which.

The same file may hold true boxes: it needs no more than ``{"boxes": [{"box_zyx": [...], "label":
    1}]}`` then.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_autoreg.detection.geometry import Frame, check_inside, frame_of_affine, to_ijk
from nnunet_autoreg.errors import ObjectsError, PlanError
from nnunet_autoreg.geometry import Size, Spacing
from nnunet_autoreg.records import from_jsonable, read_json, write_json

MEND = "mend it, or detect anew"
FORMAT, VERSION = "nnunet_autoreg.detections", 1
AXES = (
    "box_zyx: edges z0, y0, x0, z1, y1, x1 of the stored array, half open, voxel v covers [v, v + "
    "1); box_ijk: the same as continuous "
    "indices i, j, k = x, y, z with voxel centres at whole numbers; ras and lps: world mm, x, y, "
    "z; size_mm: along i, j, k; "
    "corners_mm_ras: 8 points, i varying fastest"
)

Box = tuple[float, float, float, float, float, float]
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Detection:
    """One thing found, in voxel edges of the original image.

    Attributes:
        label: nnU-Net's label value, and its ``name``.
        score: in [0, 1].
        votes: how many predictions were merged into it.
    """

    box_zyx: Box
    label: int
    name: str
    score: float
    votes: int = 1


@dataclass(frozen=True)
class FileBox:
    """A detection as the file has it; ``AXES`` explains the fields."""

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
    """Everything a detector says of one scan.

    Attributes:
        scan: the case's name, without channel and ending.
        affine_ras: 4 x 4, from i, j, k to mm, as nibabel's.
        classes: name -> label of all that could have been found.
        model: which networks found it (dataset, plans, trainer, folds, checkpoint, sha256 of the
            weights).
        settings: thresholds and switches of the prediction.
        inputs: the files it was detected in (``scans.facts_of``).
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
        """Where the scan lies."""
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
    """The file of a scan; boxes get ids from 1, the highest score first.

    Raises:
        ObjectsError: a box that is none, outside of the image, of an unknown class, or with a score
            outside [0, 1].
    """
    ordered = sorted(detections, key=lambda d: -d.score)
    boxes = tuple(_file_box(i, found, frame) for i, found in enumerate(ordered, start=1))
    place = (frame.shape_vox, frame.spacing_mm, frame.affine_ras)
    made = ScanFile(
        scan, *place, dict(classes), boxes, dict(model or {}), dict(settings or {}), tuple(inputs)
    )
    _check(made, f"detections of {scan}")
    return made


def write_scan_file(path: Path, record: ScanFile) -> None:
    """Write it whole or not at all."""
    write_json(path, record)


def is_scan_file(path: Path) -> bool:
    """Whether a JSON file says that it holds detections, of whatever version.

    Raises:
        ObjectsError: it cannot be read.
    """
    try:
        data = read_json(path, MEND)
    except PlanError as error:
        raise ObjectsError(str(error)) from error
    return isinstance(data, dict) and data.get("format") == FORMAT


def read_scan_file(path: Path) -> ScanFile:
    """Read and check one.

    Raises:
        ObjectsError: it cannot be read, is another kind of file, or contradicts itself.
    """
    try:
        data = read_json(path, MEND)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ObjectsError(
                f'{path} is no file of detections: its "format" is not "{FORMAT}"; give the folder '
                "autoreg_detect wrote"
            )
        if data.get("version") != VERSION:
            raise ObjectsError(
                f"{path} has version {data.get('version')!r} of the format, this program reads "
                f"{VERSION}; detect anew"
            )
        record = from_jsonable(ScanFile, data, str(path))
    except PlanError as error:
        raise ObjectsError(str(error)) from error
    _check(record, str(path))
    return record


def _file_box(number: int, found: Detection, frame: Frame) -> FileBox:
    box = tuple(float(v) for v in found.box_zyx)
    middle = [(low + high) / 2 for low, high in zip(box[:3], box[3:], strict=True)]
    corners = tuple(_point(corner) for corner in frame.corners_ras(box))
    return FileBox(
        number,
        int(found.label),
        found.name,
        round(float(found.score), 6),
        int(found.votes),
        _rounded(box),
        _rounded(to_ijk(box)),
        _point(frame.to_ras(middle)),
        _point(frame.to_lps(middle)),
        _point(frame.size_mm(box)),
        corners,
    )


def _rounded(box: Iterable[float]) -> Box:
    a, b, c, d, e, f = (round(float(v), 4) for v in box)
    return (a, b, c, d, e, f)


def _point(values: Iterable[float]) -> Point:
    x, y, z = (round(float(v), 4) for v in values)
    return (x, y, z)


def _check(record: ScanFile, where: str) -> None:
    if len(record.affine_ras) != 4 or any(
        len(row) != 4 or not all(map(math.isfinite, row)) for row in record.affine_ras
    ):
        raise ObjectsError(f"{where}: affine_ras must be 4 rows of 4 finite numbers")
    seen: set[int] = set()
    for box in record.boxes:
        here = f"{where}, box {box.id}"
        check_inside(box.box_zyx, record.shape_zyx, here)
        if box.id in seen:
            raise ObjectsError(f"{here}: the id is there twice")
        seen.add(box.id)
        if not 0 <= box.score <= 1:
            raise ObjectsError(f"{here}: score {box.score:g} must lie in [0, 1]")
        if record.classes.get(box.name) != box.label:
            known = ", ".join(f"{name} {label}" for name, label in record.classes.items())
            raise ObjectsError(
                f"{here}: name '{box.name}' with label {box.label} is none of the classes ({known})"
            )
