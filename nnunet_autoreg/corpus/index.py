"""Examine every candidate: one row per scan, pooled Hounsfield samples, and the exclusions and duplicates sorted out."""

import csv
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_autoreg.corpus.find import IMAGE_ENDINGS, Candidate, absolute, find_scans
from nnunet_autoreg.corpus.intensity import modality_of, sample_body
from nnunet_autoreg.corpus.parallel import parallel_map
from nnunet_autoreg.corpus.read import cropped_shape, load_scan
from nnunet_autoreg.errors import ScanError, UsageError, did_you_mean
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing
from nnunet_autoreg.nnunet_api import Array, RawScan
from nnunet_autoreg.records import write_text

log = logging.getLogger(__name__)

OK = "ok"
MAX_SAMPLES, MAX_SAMPLES_PER_SCAN, MIN_SAMPLES_PER_SCAN = 1_000_000, 10_000, 10
EXCLUDE_FORMATS = "a text file with one path, scan id or case id per line, a JSON list of ids, or nnU-Net's splits_final.json"


@dataclass(frozen=True)
class ScanRow:
    """One line of ``scans.csv``.

    Attributes:
        id, dataset, case, channel: as in ``Candidate``.
        modality, modality_rule: "CT", "MR", ... and how that was decided.
        source: the file.
        shape_vox, spacing_mm: as read, (z, y, x), before transposition; None where the scan could not be read.
        cropped_shape_vox: after cropping to non-zero.
        content_hash: of voxels, shape and spacing.
        status: "ok", or why the scan is left out, in one word.
        reason: the same in a sentence.
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


@dataclass(frozen=True)
class Index:
    """All rows in candidate order, and Hounsfield values inside the body pooled over the usable CT scans (at most 1e6)."""

    rows: tuple[ScanRow, ...]
    ct_samples_hu: Array

    @property
    def usable(self) -> tuple[ScanRow, ...]:
        """The rows with status "ok"."""
        return tuple(row for row in self.rows if row.status == OK)


def content_hash(scan: RawScan) -> str:
    """Hex SHA-256 of the float32 voxels, the shape and the spacing rounded to 1e-4 mm.

    Origin and direction are left out: nnU-Net ignores them, and a copy that was only moved is still the same scan.
    """
    spacing = [round(s, 4) for s in scan.spacing_mm]
    digest = hashlib.sha256(json.dumps([list(scan.array_CZYX.shape), spacing]).encode())
    for plane in scan.array_CZYX.reshape(-1, *scan.array_CZYX.shape[2:]):
        # + 0 turns -0.0 into 0.0, which equals it but has other bytes.
        digest.update(np.ascontiguousarray(plane + np.float32(0), dtype="<f4").tobytes())
    return digest.hexdigest()


def index_scans(candidates: list[Candidate], exclude: set[str], num_workers: int, modality_override: str | None = None) -> Index:
    """Read, check, identify and hash every candidate; memory stays flat in their number.

    Excluded scans are read too: a copy of one under another name is recognised by content and excluded as well.

    Args:
        exclude: paths of files or folders, scan ids, case ids, or ``dataset/case``.
        num_workers: processes; at most 1 works in this one.
        modality_override: counts for every scan, whatever its dataset says.

    Raises:
        AutoregError: a worker process died.
    """
    outside = _outside(exclude, candidates)
    _warn_unmatched(exclude, candidates, outside)
    num_samples = max(MIN_SAMPLES_PER_SCAN, min(MAX_SAMPLES_PER_SCAN, MAX_SAMPLES // max(1, len(candidates))))
    examine = partial(_examine, override=modality_override, num_samples=num_samples)
    tasks = [(c, min(_names(c) & exclude, default="")) for c in [*candidates, *outside]]
    rows: list[ScanRow] = []
    samples: list[Array] = []
    for row, drawn in parallel_map(examine, tasks, num_workers, "checking scans"):
        rows.append(row)
        samples.append(drawn)
    rows = _settle_copies(rows)[: len(candidates)]
    kept = [s for row, s in zip(rows, samples, strict=False) if row.status == OK and s.size]
    return Index(tuple(rows), np.concatenate(kept) if kept else np.zeros(0, dtype=np.float32))


def _examine(task: tuple[Candidate, str], override: str | None, num_samples: int) -> tuple[ScanRow, Array]:
    """The row of one (candidate, name under which it is excluded), and its Hounsfield samples if it is a usable CT."""
    candidate, named = task
    nothing = np.zeros(0, dtype=np.float32)
    row = ScanRow(candidate.id, candidate.dataset, candidate.case, candidate.channel, "", str(candidate.path), None, None, None,
                  "", candidate.status, candidate.reason)
    if candidate.status:
        return row, nothing
    if named:
        row = replace(row, status="excluded", reason=f"excluded by the user ('{named}')")
    try:
        scan = load_scan(candidate.path)
    except ScanError as error:
        return (row if named else replace(row, status=error.status, reason=str(error))), nothing
    except MemoryError:
        reason = "the scan does not fit into memory; crop or downsample it, or free some memory"
        return replace(row, status="huge", reason=reason), nothing
    array_ZYX = scan.array_CZYX[0]
    modality, rule = (override.strip().upper(), "--modality") if override else modality_of(candidate.channel, array_ZYX)
    row = replace(
        row, modality=modality, modality_rule=rule, shape_vox=as_size(array_ZYX.shape), spacing_mm=scan.spacing_mm,
        cropped_shape_vox=cropped_shape(array_ZYX), content_hash=content_hash(scan), status=row.status or OK)
    wanted = row.status == OK and modality == "CT"
    return row, sample_body(array_ZYX, num_samples, row.content_hash) if wanted else nothing


def _settle_copies(rows: list[ScanRow]) -> list[ScanRow]:
    """Mark copies of excluded scans, then all but the first of equal scans."""
    excluded = {row.content_hash: row.source for row in rows if row.status == "excluded" and row.content_hash}
    first: dict[str, str] = {}
    settled = []
    for row in rows:
        if row.status == OK and row.content_hash in excluded:
            reason = f"same voxels as the excluded {excluded[row.content_hash]}"
            settled.append(replace(row, status="excluded", reason=reason))
        elif row.status == OK and first.setdefault(row.content_hash, row.id) != row.id:
            settled.append(replace(row, status="duplicate", reason=f"same voxels and spacing as {first[row.content_hash]}"))
        else:
            settled.append(row)
    return settled


def _names(candidate: Candidate) -> set[str]:
    """Every name under which a candidate may be excluded."""
    path = candidate.path
    names = {candidate.id, candidate.case, f"{candidate.dataset}/{candidate.case}", path.name}
    for variant in (path, Path(os.path.realpath(path)), _relative(path)):
        names.update(str(p) for p in (variant, *variant.parents) if str(p) not in (".", path.anchor))
    return names - {""}


def _relative(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def _outside(exclude: set[str], candidates: list[Candidate]) -> list[Candidate]:
    """Excluded files that are no candidates themselves, so that copies of them are recognised."""
    paths = [absolute(e) for e in sorted(exclude) if os.sep in e and Path(e).exists()]
    wanted = [p for p in paths if p.is_dir() or p.name.lower().endswith(IMAGE_ENDINGS)]
    known = {os.path.realpath(c.path) for c in candidates}
    found = [c for c in find_scans([], wanted) if not c.status and os.path.realpath(c.path) not in known]
    return [replace(c, id=str(c.path), case=next(e for e in exclude if _is_below(c.path, e))) for c in found]


def _is_below(path: Path, entry: str) -> bool:
    folder = absolute(entry)
    return os.sep in entry and (path == folder or folder in path.parents)


def _warn_unmatched(exclude: set[str], candidates: list[Candidate], outside: list[Candidate]) -> None:
    if not exclude:
        return
    matched = set().union(*(_names(c) for c in [*candidates, *outside]))
    unmatched = sorted(exclude - matched)
    if unmatched:
        hint = did_you_mean(unmatched[0], {c.case for c in candidates} if len(candidates) < 1000 else ())
        log.warning("--exclude: %d of %d names match no scan, the first is '%s'; %s",
                    len(unmatched), len(exclude), unmatched[0], hint)


def read_exclude(path: Path) -> set[str]:
    """Names to leave out: paths, scan ids or case ids.

    Read from a text file (one per line; # begins a comment), a JSON list of ids, or nnU-Net's ``splits_final.json``. Of the
    latter the ``val`` and ``test`` cases of the **first** fold are left out: over all five folds every case is once in ``val``.

    Raises:
        UsageError: the file cannot be read, or is none of these.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--exclude {path} cannot be read ({error}); give {EXCLUDE_FORMATS}") from error
    if path.suffix.lower() != ".json":
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
        return {line for line in lines if line}
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--exclude {path} is not valid JSON ({error}); give {EXCLUDE_FORMATS}") from error
    if isinstance(data, list) and data and isinstance(data[0], dict) and "val" in data[0]:
        return {str(name) for part in ("val", "test") for name in data[0].get(part, [])}
    if isinstance(data, list) and all(isinstance(name, str) for name in data):
        return set(data)
    raise UsageError(f"--exclude {path} holds neither a list of ids nor splits; give {EXCLUDE_FORMATS}")


def write_index(path: Path, rows: Iterable[ScanRow]) -> None:
    """Write ``scans.csv`` whole or not at all; sizes as 35x51x35 and spacings as 1.0x1.0x1.0, (z, y, x)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f.name for f in fields(ScanRow)]
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(getattr(row, name)) for name in names])
    write_text(path, text.getvalue())


def read_index(path: Path) -> tuple[ScanRow, ...]:
    """Read what ``write_index`` wrote.

    Raises:
        UsageError: the file is missing or is no index.
    """
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            return tuple(_rows_of(csv.DictReader(handle)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no index of scans ({error}); remove it to have it written anew") from error


def _rows_of(reader: Iterable[dict[str, str]]) -> Iterator[ScanRow]:
    for cells in reader:
        shape, spacing, cropped = (cells.pop(k).split("x") for k in ("shape_vox", "spacing_mm", "cropped_shape_vox"))
        yield ScanRow(
            **cells, shape_vox=as_size([int(v) for v in shape]) if shape != [""] else None,
            spacing_mm=as_spacing([float(v) for v in spacing]) if spacing != [""] else None,
            cropped_shape_vox=as_size([int(v) for v in cropped]) if cropped != [""] else None)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return "x".join(repr(v) for v in value) if isinstance(value, tuple) else str(value)
