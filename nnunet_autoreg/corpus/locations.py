"""Positions of structures: from label maps beside the scans, from boxes in a CSV, from classes in a
manifest. Only positions are kept; training never sees a label.
"""

import csv
import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.corpus.dataset_json import read_dataset_json
from nnunet_autoreg.corpus.fingerprint import transpose_axes
from nnunet_autoreg.corpus.grid import oriented_voxel, read_label_map
from nnunet_autoreg.corpus.parallel import parallel_map
from nnunet_autoreg.corpus.private import public_dataset, terminal_only
from nnunet_autoreg.corpus.read import box_around, load_scan
from nnunet_autoreg.corpus.rows import ScanRow, public_message
from nnunet_autoreg.errors import ScanError, UsageError, did_you_mean
from nnunet_autoreg.geometry import Size
from nnunet_autoreg.io.dicom import claims_dicom
from nnunet_autoreg.io.names import case_and_channel, strip_ending
from nnunet_autoreg.records import from_jsonable, read_json, regular

log = logging.getLogger(__name__)

PLACES_NAME = "places.json"
"""File of a run with the locations of structures. The name is part of the format of runs."""

Point = tuple[float, float, float]

MAX_PARTS = 16
"""Separate parts of a structure in one scan (lesions, left and right) that count, the largest
first.
"""
MIN_PART_VOX = 8
BOX_COLUMNS = ("scan", "class", "zmin", "ymin", "xmin", "zmax", "ymax", "xmax")
SAME_COLUMN = {
    "series": "scan",
    "id": "scan",
    "path": "scan",
    "case": "scan",
    "label": "class",
    "z_index": "z",
    "z": "z",
}


@dataclass(frozen=True)
class StructureLocation:
    """The position of a structure in one scan.

    Attributes:
        scan: id of its row.
        subject: identifies the patient.
        structure: name, with dataset and channel, because a label need not mean the same in another
            dataset.
        centre: position as shares of the scan's cropped and transposed box, (z, y, x), each 0..1.
    """

    scan: str
    subject: str
    structure: str
    centre: Point


def subject_of(row: ScanRow) -> str:
    """Return the patient of a scan: the subject if it is known, else the case."""
    if row.subject or not row.name:
        return row.subject or f"{row.dataset}/{row.case}"
    # A case of one channel is one scan, and its id does not identify a person.
    return f"{public_dataset(row.dataset)}/{row.case}" if row.channel else row.id


def label_map_of(row: ScanRow) -> Path | None:
    """Return the label map of a training image of an nnU-Net dataset; None if there is none."""
    if row.part:
        return None

    image = Path(row.source)
    path = None
    if row.listed_in:
        # Labels are optional: without a readable list the scan is still trained on.
        with suppress(UsageError):
            listed = read_dataset_json(Path(row.listed_in)).listed
            path = listed[row.case].label if row.case in listed else None
    elif image.parent.name == "imagesTr":
        case, _ = case_and_channel(image)
        ending = image.name.removeprefix(strip_ending(image.name))
        path = image.parent.parent / "labelsTr" / f"{case}{ending}"
    return path if path is not None and path.is_file() else None


def dataset_of(row: ScanRow) -> Path:
    """Return the folder of the raw dataset that a scan belongs to."""
    return Path(row.listed_in) if row.listed_in else Path(row.source).parent.parent


def label_names(dataset: Path) -> dict[int, str]:
    """Return the values of a dataset's labels and their names.

    Background and ignored label are left out.

    Values of regions have the name of the smallest region; several values may share one.

    Raises:
        UsageError: dataset.json cannot be read.
    """
    return dict(read_dataset_json(dataset).structures)


def values_of_structures(dataset: Path) -> dict[str, list[int]]:
    """Return name -> label values, the inverse of ``label_names``.

    Raises:
        UsageError: dataset.json cannot be read.
    """
    found: dict[str, list[int]] = {}
    for value, name in label_names(dataset).items():
        found.setdefault(name, []).append(value)
    return found


def locations_of_labels(rows: Sequence[ScanRow], num_workers: int) -> list[StructureLocation]:
    """Return the centre of every structure that a label map shows.

    A structure in several parts has a centre for each.

    A label map that cannot be used is logged and left out; its scan still takes part in other
    sequences.
    """
    tasks = [row for row in rows if label_map_of(row) is not None]
    results = parallel_map(_labelled, tasks, num_workers, "reading positions")

    found: list[StructureLocation] = []
    for row, (locations, problem) in zip(tasks, results, strict=True):
        found += locations
        if problem:
            path = label_map_of(row)
            assert path is not None, "only rows with a label map were read"
            log.warning(
                "positions: the label map of %s is left out: %s",
                row.id,
                public_message(problem, row, path),
                extra=terminal_only(f" ({path})"),
            )
    return found


def _labelled(row: ScanRow) -> tuple[list[StructureLocation], str]:
    """Return the structures of one scan, or why its label map cannot be used."""
    path = label_map_of(row)
    assert path is not None and row.shape_vox is not None and row.spacing_mm is not None, (
        "only labelled, usable rows come here"
    )
    try:
        labels_ZYX, grid = read_label_map(path)
        if grid.shape_vox != row.shape_vox:
            return [], f"it has {grid.shape_vox} voxels, its scan {row.shape_vox}"
        values_of = values_of_structures(dataset_of(row))
        low, high = nonzero_box(row)
    except (ScanError, UsageError) as error:
        return [], str(error)

    # The same name may mean another thing in another dataset, and looks different in a channel.
    dataset, subject = public_dataset(row.dataset), subject_of(row)
    channel = f", {row.channel}" if row.channel else ""
    locations = []
    for name, values in values_of.items():
        structure = f"{dataset}: {name}{channel}"
        for centre in part_centres(np.isin(labels_ZYX, values)):
            share = _share(row, low, high, centre)
            locations.append(StructureLocation(row.id, subject, structure, share))
    return locations, ""


def part_centres(mask_ZYX: npt.NDArray[np.bool_]) -> list[Point]:
    """Return centres of a structure's connected parts in voxels, the largest first.

    Each is moved onto the part itself.
    """
    from scipy import ndimage

    numbered, num_parts = ndimage.label(mask_ZYX, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(numbered.ravel(), minlength=num_parts + 1)[1:]
    # A structure whose largest part is tiny is still shown.
    min_size = min(MIN_PART_VOX, sizes.max(initial=0))
    largest = np.argsort(-sizes, kind="stable")[:MAX_PARTS]
    boxes = ndimage.find_objects(numbered)

    centres = []
    for part in largest.tolist():
        if sizes[part] < min_size:
            continue
        box = boxes[part]
        corner = [side.start for side in box]
        voxels = np.argwhere(numbered[box] == part + 1) + corner  # (N, ZYX)
        # The mean of a hollow or bent part may lie outside of it, so its nearest voxel is taken.
        distances = np.square(voxels - voxels.mean(axis=0)).sum(axis=1)
        z, y, x = voxels[distances.argmin()].tolist()
        centres.append((float(z), float(y), float(x)))
    return centres


def nonzero_box(row: ScanRow) -> tuple[Size, Size]:
    """Return the box that preprocessing crops a scan to.

    It is the first voxel, and the one after the last.

    Raises:
        ScanError: the scan cannot be read any more.
    """
    assert row.shape_vox is not None, "only usable rows come here"
    if row.cropped_shape_vox == row.shape_vox:
        return (0, 0, 0), row.shape_vox
    scan = load_scan(Path(row.source), row.part)
    return box_around(scan.array_CZYX[0] != 0)


def _share(row: ScanRow, low: Sequence[int], high: Sequence[int], voxel: Sequence[float]) -> Point:
    """Return the position of a voxel in the box from ``low`` to ``high``, with the axes
    transposed."""
    assert row.spacing_mm is not None, "only usable rows come here"
    shares = []
    for index, start, end in zip(voxel, low, high, strict=True):
        # The middle of the voxel; a centre may lie outside what cropping keeps.
        share = (index + 0.5 - start) / (end - start)
        shares.append(min(max(share, 0.0), 1.0))
    z, y, x = (shares[axis] for axis in transpose_axes(row.spacing_mm))
    return (z, y, x)


def locations_of_classes(rows: Iterable[ScanRow]) -> list[StructureLocation]:
    """Return the middle of every scan to which the manifest gives a class."""
    return [
        StructureLocation(row.id, subject_of(row), row.label_class, (0.5, 0.5, 0.5))
        for row in rows
        if row.label_class
    ]


@dataclass(frozen=True)
class Box:
    """A box in a scan.

    It holds the voxels from ``low`` to ``high``, both included, (z, y, x) in the file's own axes.
    """

    scan: str
    structure: str
    low: tuple[float, float, float]
    high: tuple[float, float, float]


def read_boxes(path: Path) -> list[Box]:
    """Read boxes from a CSV.

    Its columns are scan, class, zmin, ymin, xmin, zmax, ymax, xmax, in voxels counted from 0.

    With one column z_index instead of zmin and zmax, each line is one slice, and lines of one scan
    and class make one box.

    Raises:
        UsageError: it cannot be read, a column is missing, or a cell is not a number.
    """
    try:
        with regular(path).open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            names = {}
            for written in reader.fieldnames or ():
                plain = written.strip().lower()
                names[written] = SAME_COLUMN.get(plain, plain)
            _check_box_columns(path, set(names.values()))

            lines = []
            for cells in reader:
                # Cells beyond the last column have no name.
                lines.append({names[name]: cell for name, cell in cells.items() if name in names})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"--boxes {path} cannot be read ({error}); give a CSV with the columns "
            f"{', '.join(BOX_COLUMNS)}",
            code="boxes-unreadable",
        ) from error

    # Lines of single slices are joined by scan and class; every other line is a separate box.
    joined: dict[tuple[str, str, int], list[Box]] = {}
    for number, line in enumerate(lines):
        box = _box(path, number + 2, line)
        key = (box.scan, box.structure, 0 if "z" in line else number)
        joined.setdefault(key, []).append(box)

    # All boxes of one scan and structure become the one box around them.
    surrounding = []
    for boxes in joined.values():
        low = np.min([box.low for box in boxes], axis=0).tolist()
        high = np.max([box.high for box in boxes], axis=0).tolist()
        first = boxes[0]
        surrounding.append(Box(first.scan, first.structure, tuple(low), tuple(high)))
    return surrounding


def _check_box_columns(path: Path, names: set[str]) -> None:
    wanted = list(BOX_COLUMNS)
    if "z" in names:
        wanted = [column for column in wanted if column not in ("zmin", "zmax")]
    missing = [column for column in wanted if column not in names]
    if missing:
        raise UsageError(
            f"--boxes {path} has no column '{missing[0]}' ({did_you_mean(missing[0], names)}); "
            f"needed are {', '.join(wanted)}",
            code="boxes-missing-column",
        )


def _box(path: Path, number: int, line: dict[str, Any]) -> Box:
    try:
        first, last = ("z", "z") if "z" in line else ("zmin", "zmax")
        low = (float(line[first]), float(line["ymin"]), float(line["xmin"]))
        high = (float(line[last]), float(line["ymax"]), float(line["xmax"]))
        if not all(map(math.isfinite, (*low, *high))):
            raise ValueError(f"{low} to {high} is not finite")
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"--boxes {path}, line {number}: {error}; give numbers of voxels",
            code="boxes-number",
        ) from error
    if any(a > b for a, b in zip(low, high, strict=True)):
        raise UsageError(
            f"--boxes {path}, line {number}: the box ends before it begins ({low} to {high}, z y "
            "x); correct it",
            code="boxes-reversed",
        )
    return Box(str(line["scan"]), str(line["class"]), low, high)


def locations_of_boxes(boxes: Sequence[Box], rows: Sequence[ScanRow]) -> list[StructureLocation]:
    """Return the middle of every box whose scan is among the rows.

    A box names its scan by id, case, file or folder name.

    Boxes of no scan are counted and logged.
    """
    by_name: dict[str, list[ScanRow]] = {}
    for row in rows:
        for name in _names(row):
            by_name.setdefault(name, []).append(row)

    found, unmatched = [], []
    for box in boxes:
        if box.scan not in by_name:
            unmatched.append(box.scan)
        for row in by_name.get(box.scan, ()):
            # The box counts voxels in the file's own axes, everything else in the turned ones.
            middle = [(a + b) / 2 for a, b in zip(box.low, box.high, strict=True)]
            voxel = oriented_voxel(Path(row.source), row.part, middle)
            low, high = nonzero_box(row)
            structure = f"{box.structure}, {row.channel}" if row.channel else box.structure
            share = _share(row, low, high, voxel)
            found.append(StructureLocation(row.id, subject_of(row), structure, share))

    if unmatched:
        log.warning(
            "--boxes: %d of %d boxes are of no scan here",
            len(unmatched),
            len(boxes),
            extra=terminal_only(f"; the first is of '{unmatched[0]}'"),
        )
    return found


def _names(row: ScanRow) -> set[str]:
    """Return all names that a box may use for a scan."""
    path = Path(row.source)
    # A UID is full of dots, so only an ending that is one is taken off.
    stem = path.stem if claims_dicom(path.name) else strip_ending(path.name)
    of_row = {row.id, row.name, row.case, f"{row.dataset}/{row.case}"}
    of_file = {str(path), path.name, stem}
    return (of_row | of_file) - {""}


def read_places(path: Path) -> list[StructureLocation]:
    """Return the locations in a run's ``places.json``.

    Raises:
        PlanError: the file is damaged.
    """
    found = from_jsonable(tuple[StructureLocation, ...], read_json(path), str(path))
    return list(found)
