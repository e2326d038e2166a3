"""``scans.csv``: one line per scan, read and written as a stream."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from nnunet_autoreg.errors import UsageError, did_you_mean
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing
from nnunet_autoreg.records import atomic_path

OK = "ok"


@dataclass(frozen=True)
class ScanRow:
    """One line of ``scans.csv``.

    Attributes:
        id, dataset, case, channel, part, contrast: as in ``Candidate``; the manifest's contrast counts more.
        modality, modality_rule: "CT", "MR", ... and how that was decided.
        source: the file, or the folder of a DICOM series.
        shape_vox, spacing_mm: as read, (z, y, x), before transposition; None where the scan could not be read.
        cropped_shape_vox: after cropping to non-zero.
        content_hash: of voxels, shape and rounded spacing.
        status: "ok", or why the scan is left out, in one word.
        reason: the same in a sentence.
        subject, session: salted hashes (``identity.salted``); "" where unknown. A session's hash includes its subject.
        label_class: the manifest's class; "" without one.
        percentiles: of the intensities inside the body (``intensity.PERCENTILES``); empty where not known.
        listed_in: as in ``Candidate``; the label map of a listed image is found there.
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


COLUMNS = ("id", "subject", "session", "dataset", "case", "channel", "contrast", "label_class", "modality", "modality_rule",
           "shape_vox", "spacing_mm", "cropped_shape_vox", "percentiles", "source", "part", "content_hash", "status", "reason",
           "listed_in")
NEWER = {f.name for f in fields(ScanRow) if f.default == ""} | {"percentiles"}


def write_index(path: Path, rows: Iterable[ScanRow]) -> None:
    """Write ``scans.csv`` whole or not at all, row by row.

    Sizes are written as 35x51x35 and spacings as 1.0x1.0x1.0, (z, y, x); percentiles with spaces between them.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_cell(name, getattr(row, name)) for name in COLUMNS])


def read_index(path: Path) -> tuple[ScanRow, ...]:
    """Read what ``write_index`` wrote, now or in an earlier version (with fewer columns).

    Raises:
        UsageError: the file is missing or is no index.
    """
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            _check_columns(reader.fieldnames or ())
            return tuple(_rows_of(reader))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UsageError(f"{path} is no index of scans ({error}); remove it to have it written anew") from error


def _check_columns(names: Iterable[str]) -> None:
    found = set(names)
    unknown, missing = sorted(found - set(COLUMNS)), sorted(set(COLUMNS) - NEWER - found)
    if unknown:
        raise ValueError(f"unknown column '{unknown[0]}'; {did_you_mean(unknown[0], COLUMNS)}")
    if missing:
        raise ValueError(f"the column '{missing[0]}' is missing")


def _rows_of(reader: Iterable[dict[str, str]]) -> Iterator[ScanRow]:
    for cells in reader:
        shape, spacing, cropped = (cells.pop(k).split("x") for k in ("shape_vox", "spacing_mm", "cropped_shape_vox"))
        percentiles = (cells.pop("percentiles", "") or "").split()
        yield ScanRow(
            **cells, shape_vox=as_size([int(v) for v in shape]) if shape != [""] else None,
            spacing_mm=as_spacing([float(v) for v in spacing]) if spacing != [""] else None,
            cropped_shape_vox=as_size([int(v) for v in cropped]) if cropped != [""] else None,
            percentiles=tuple(float(v) for v in percentiles))


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return (" " if name == "percentiles" else "x").join(repr(v) for v in value)
    return str(value)
