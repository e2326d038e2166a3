"""``scans.csv``: one line per scan, read and written as a stream.

What may identify a patient is in a separate file beside it (``private``).
"""

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nnunet_autoreg.corpus.private import (
    HIDDEN_NAME,
    PRIVATE_NAME,
    missing_line,
    public_dataset,
    read_private,
    without_names,
    write_private,
)
from nnunet_autoreg.errors import UsageError, did_you_mean, printable
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing, volume
from nnunet_autoreg.records import atomic_path, from_cell, regular, to_cell

OK = "ok"
MAX_SIZE = 10**6
"""Voxels along an axis, or mm of a voxel: far more than any scan has."""
COPY_OF = "the excluded "
"""Text before the path of an excluded scan in a reason; the path is private."""


@dataclass(frozen=True)
class ScanRow:
    """One scan of the index.

    ``case``, ``part``, ``source``, ``listed_in`` and ``name`` may name a patient. They are written
    to ``paths_do_not_share.csv`` only.

    Attributes:
        id: salted hash that represents the scan in all outputs.
        dataset: number of the nnU-Net dataset, or a hash of the folder.
        case: groups the channels of one nnU-Net case. In other folders it is the path below the
            folder, without ending. Only in ``paths_do_not_share.csv``.
        channel: name in dataset.json; "" in other folders.
        modality: "CT", "MR", ...
        source: the file, or the folder of a DICOM series. Only in ``paths_do_not_share.csv``.
        shape_vox: size as read, (z, y, x); None if the scan could not be read.
        spacing_mm: spacing as read, (z, y, x); None if the scan could not be read.
        cropped_shape_vox: size after cropping to non-zero voxels.
        content_hash: hash of voxels, shape and rounded spacing.
        status: "ok", or one word for the reason why the scan is left out.
        reason: the same in a sentence.
        modality_rule: how the modality was found.
        part: the image inside the source: a DICOM series, a volume of a 4D file, or a file of an
            archive; "" is the file itself. Only in ``paths_do_not_share.csv``.
        subject: salted hash of the subject; "" if unknown.
        session: salted hash of the session and its subject; "" if unknown.
        contrast: T1w, FLAIR, ...; the contrast of a manifest has priority.
        label_class: class in the manifest; "" without one.
        percentiles: percentiles of the intensities inside the body (``intensity.PERCENTILES``);
            empty if unknown.
        listed_in: folder of the dataset.json that lists the file; the label map is found there.
            Only in ``paths_do_not_share.csv``.
        name: made of folder and file names. Only in ``paths_do_not_share.csv``. "" in an index of
            an earlier version, whose ids are these names.
    """

    id: str
    dataset: str
    case: str
    channel: str
    modality: str
    source: str
    shape_vox: Size | None
    spacing_mm: Spacing | None
    cropped_shape_vox: Size | None
    content_hash: str
    status: str
    reason: str
    modality_rule: str = ""
    part: str = ""
    subject: str = ""
    session: str = ""
    contrast: str = ""
    label_class: str = ""
    percentiles: tuple[float, ...] = ()
    listed_in: str = ""
    name: str = ""

    @property
    def is_image(self) -> bool:
        """Whether the scan is a 2D image, which is read as a volume of one slice."""
        return self.shape_vox is not None and self.shape_vox[0] == 1

    @property
    def num_vox(self) -> int:
        """Number of voxels as read; 0 if the scan could not be read."""
        return 0 if self.shape_vox is None else volume(self.shape_vox)


COLUMNS = (
    "id",
    "subject",
    "session",
    "dataset",
    "case",
    "channel",
    "contrast",
    "label_class",
    "modality",
    "modality_rule",
    "shape_vox",
    "spacing_mm",
    "cropped_shape_vox",
    "percentiles",
    "source",
    "part",
    "content_hash",
    "status",
    "reason",
    "listed_in",
)
PRIVATE_COLUMNS = ("id", "name", "dataset", "case", "part", "source", "listed_in", "reason")
NEWER = {f.name for f in fields(ScanRow) if f.default == ""} | {"percentiles"}
"""Columns that indexes of earlier versions may lack."""


def write_index(
    path: Path,
    rows: Iterable[ScanRow],
    paths: Mapping[str, str] | None = None,
) -> None:
    """Write ``scans.csv`` atomically, row by row.

    The private file beside it is written before.

    Args:
        paths: further paths for the private file, by id; None keeps those that it has.

    Sizes are written as 35x51x35 and spacings as 1.0x1.0x1.0, (z, y, x); percentiles with spaces
    between them.
    """
    # The private file first: without it, nobody could find the scan of an id.
    rows = list(rows)
    if paths is None:
        scans = {row.id for row in rows}
        has_private = (path.parent / PRIVATE_NAME).is_file()
        known = read_private(path.parent) if has_private else ()
        paths = {cells["id"]: cells["source"] for cells in known if cells["id"] not in scans}
    private = [{"id": key, "source": value} for key, value in paths.items()]
    for row in rows:
        private.append({name: getattr(row, name) for name in PRIVATE_COLUMNS})
    write_private(path.parent, private)

    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as handle,
    ):
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            public = public_row(row)
            writer.writerow([_cell(name, getattr(public, name)) for name in COLUMNS])


def public_row(row: ScanRow) -> ScanRow:
    """Return a row without anything that may identify a patient."""
    reason, copy_of, _ = row.reason.partition(COPY_OF)
    if copy_of:
        reason += "an excluded scan"
    else:
        if row.status == "excluded":
            # The user's own name of the scan is in brackets.
            reason = re.sub(r" \('.*'\)", "", reason)
        reason = public_message(reason, row)

    return replace(
        row,
        dataset=public_dataset(row.dataset),
        case="",
        part="",
        source="",
        listed_in="",
        name="",
        reason=reason,
    )


def public_message(text: str, row: ScanRow, *files: Path) -> str:
    """Return a message about a scan without its names and paths.

    Args:
        files: further files that the message may name, such as the scan's label map.
    """
    return without_names(text, {*_names(row), *map(str, files)})


def _names(row: ScanRow) -> set[str]:
    """Return all names of a row's scan, including its folders."""
    source = Path(row.source)
    folders = {folder.name for folder in source.parents}
    # "/" is not a name: it would be replaced in every path and fraction.
    folders |= {str(folder) for folder in source.parents if folder != folder.parent}
    names = {
        row.name,
        row.listed_in,
        row.case,
        f"{row.dataset}/{row.case}",
        row.source,
        source.name,
    }
    for piece in row.part.split(";"):
        names |= {piece, piece.partition("=")[2]}
    names.add(row.dataset)
    # In an index of an earlier version the id is a name.
    if not row.name:
        names.add(row.id)
    return (folders | names) - {"", HIDDEN_NAME}


def read_index(path: Path, is_private: bool = True) -> tuple[ScanRow, ...]:
    """Read an index that ``write_index`` wrote, now or in an earlier version (with fewer columns).

    Args:
        is_private: read paths and names from the private file beside it.

    Raises:
        UsageError: the file is missing or is not an index, or the private file beside it is
            missing.
    """
    try:
        with regular(path).open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            _check_columns(reader.fieldnames or ())
            rows = tuple(_rows_of(reader))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UsageError(
            f"{path} is not an index of scans ({error}); remove it so that it is written again",
            code="index-unreadable",
        ) from error

    if not is_private:
        return tuple(map(public_row, rows))
    # An index of an earlier version has everything itself.
    if all(row.source for row in rows):
        return rows
    private: dict[str, dict[str, Any]] = {
        cells["id"]: dict(cells) for cells in read_private(path.parent)
    }
    lost = [row.id for row in rows if row.id not in private]
    if lost:
        raise missing_line(path.parent, lost[0])
    return tuple(replace(row, **private[row.id]) for row in rows)


def _check_columns(names: Iterable[str]) -> None:
    found = set(names)
    unknown = sorted(found - set(COLUMNS))
    missing = sorted(set(COLUMNS) - NEWER - found)
    if unknown:
        raise ValueError(f"unknown column '{unknown[0]}'; {did_you_mean(unknown[0], COLUMNS)}")
    if missing:
        raise ValueError(f"the column '{missing[0]}' is missing")


def _rows_of(reader: Iterable[dict[str, str]]) -> Iterator[ScanRow]:
    for line in reader:
        cells = {name: from_cell(cell) for name, cell in line.items()}
        shape, spacing = cells.pop("shape_vox"), cells.pop("spacing_mm")
        cropped = cells.pop("cropped_shape_vox")
        # Indexes of earlier versions lack this column.
        percentiles = cells.pop("percentiles", "") or ""
        row = ScanRow(
            **cells,
            shape_vox=as_size(_numbers(shape, int)) if shape else None,
            spacing_mm=as_spacing(_numbers(spacing, float)) if spacing else None,
            cropped_shape_vox=as_size(_numbers(cropped, int)) if cropped else None,
            percentiles=tuple(float(number) for number in percentiles.split()),
        )
        _check_numbers(row)
        yield row


def _check_numbers(row: ScanRow) -> None:
    """Refuse impossible sizes; a usable scan must have all of them."""
    sizes = (row.shape_vox, row.spacing_mm, row.cropped_shape_vox)
    if row.status == OK and None in sizes:
        raise ValueError(f"the scan {row.id} has status {OK}, but a size of it is empty")

    numbers = [number for size in sizes if size is not None for number in size]
    is_possible = all(0 < number <= MAX_SIZE for number in numbers)
    if not is_possible or not all(map(math.isfinite, row.percentiles)):
        raise ValueError(f"a size or percentile of the scan {row.id} is impossible")


def _numbers(cell: str, kind: Callable[[str], Any]) -> list[Any]:
    return [kind(number) for number in cell.split("x")]


def _cell(name: str, value: object) -> str:
    """Return the text of a cell; the inverse of what ``_rows_of`` does."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        separator = " " if name == "percentiles" else "x"
        return separator.join(map(repr, value))
    return to_cell(printable(str(value)))
