"""What was found in a scan, as files that viewers and other programs read: label maps, 3D Slicer's
markup, a table.

The JSON file of a scan is ``detection.scanfile``'s.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.geometry import Frame
from nnunet_autoreg.detection.instances import ObjectClass
from nnunet_autoreg.detection.scanfile import FileBox, ScanFile
from nnunet_autoreg.geometry import Size
from nnunet_autoreg.records import atomic_path, write_json

MARKUP_SCHEMA = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/markups-schema-v1.0.3.json#"
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

Ids = NDArray[np.uint16]


def voxels_of(box_zyx: Sequence[float], shape_vox: Size) -> tuple[slice, slice, slice]:
    """The whole voxels nearest to a box, at least one on each axis."""
    slices = []
    for low, high, size in zip(box_zyx[:3], box_zyx[3:], shape_vox, strict=True):
        start = min(max(0, round(low)), size - 1)
        slices.append(slice(start, max(start + 1, min(size, round(high)))))
    return (slices[0], slices[1], slices[2])


def draw_boxes(boxes: Sequence[FileBox], shape_vox: Size, filled: bool = False) -> Ids:
    """Ids of the boxes in a map (Z, Y, X), the highest score on top: frames one voxel thick, so
    that what overlaps stays visible.
    """
    drawn: Ids = np.zeros(shape_vox, dtype=np.uint16)
    for box in sorted(boxes, key=lambda b: b.score):
        place = voxels_of(box.box_zyx, shape_vox)
        region = drawn[place]
        if filled:
            region[...] = box.id
        else:
            for axis in range(3):
                for end in (0, -1):
                    np.moveaxis(region, axis, 0)[end] = box.id
    return drawn


def draw_instances(
    boxes: Sequence[FileBox], labels_ZYX: NDArray[Any], classes: Sequence[ObjectClass]
) -> Ids:
    """Ids of the boxes where the segmentation inside of them says their class; where boxes overlap,
    the highest score's.
    """
    values = {kind.name: kind.values for kind in classes}
    drawn: Ids = np.zeros(labels_ZYX.shape, dtype=np.uint16)
    for box in sorted(boxes, key=lambda b: b.score):
        z, y, x = labels_ZYX.shape
        place = voxels_of(box.box_zyx, (z, y, x))
        drawn[place][np.isin(labels_ZYX[place], values[box.name])] = box.id
    return drawn


def write_markup(file: Path, scan: str, boxes: Sequence[FileBox], frame: Frame) -> None:
    """Boxes as 3D Slicer's regions of interest, which lie obliquely where the image does."""
    linear = np.array(frame.affine_ras)[:3, :3] / np.linalg.norm(
        np.array(frame.affine_ras)[:3, :3], axis=0
    )
    orientation = (np.diag([-1.0, -1.0, 1.0]) @ linear).round(9).ravel().tolist()
    write_json(
        file,
        {
            "@schema": MARKUP_SCHEMA,
            "markups": [
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
                    "name": f"{scan} {box.id} {box.name} {box.score:.2f}",
                    "center": list(box.center_mm_lps),
                    "orientation": orientation,
                    "size": list(box.size_mm),
                    "controlPoints": [
                        {
                            "id": "1",
                            "label": f"{box.name} {box.score:.2f}",
                            "position": list(box.center_mm_lps),
                            "locked": True,
                        }
                    ],
                    "measurements": [],
                    "display": {
                        "visibility": True,
                        "opacity": 1.0,
                        "fillOpacity": 0.1,
                        "handlesInteractive": False,
                    },
                }
                for box in boxes
            ],
        },
    )


def write_table(file: Path, scans: Iterable[ScanFile], lowest_score: float) -> None:
    """Every box with at least that score of every scan, a line each, in LUNA16's form; one scan is
    held at a time.
    """
    with (
        atomic_path(file) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as handle,
    ):
        writer = csv.writer(handle)
        writer.writerow(COLUMNS)
        for scan in scans:
            for box in shown(scan.boxes, lowest_score):
                writer.writerow(
                    [
                        scan.scan,
                        *box.center_mm_lps,
                        box.score,
                        box.name,
                        box.label,
                        *box.size_mm,
                        box.id,
                        box.votes,
                    ]
                )


def shown(boxes: Sequence[FileBox], lowest_score: float) -> list[FileBox]:
    """The boxes with at least that score."""
    return [box for box in boxes if box.score >= lowest_score]
