"""Read and check every scan that was found: first all headers, then all voxels.

The index has one row per scan. Excluded scans and copies keep their row with a reason.
"""

import base64
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.corpus.candidates import Candidate
from nnunet_autoreg.corpus.content import Signature, content_hash, settle_copies, signature
from nnunet_autoreg.corpus.exclude import excluded_because, outside, series_of, warn_unmatched
from nnunet_autoreg.corpus.identity import salted
from nnunet_autoreg.corpus.images import header_of_scan_or_image, load_scan_or_image
from nnunet_autoreg.corpus.intensity import body_percentiles, modality_of, sample_body
from nnunet_autoreg.corpus.journal import Journal, ScanFacts, journal_key, stamp_of
from nnunet_autoreg.corpus.manifest import Manifest, ManifestEntry, describe
from nnunet_autoreg.corpus.parallel import is_large, parallel_map, workers_for
from nnunet_autoreg.corpus.peek import peek
from nnunet_autoreg.corpus.read import cropped_shape, load_scan, read_header
from nnunet_autoreg.corpus.rows import OK, ScanRow
from nnunet_autoreg.errors import ScanError
from nnunet_autoreg.geometry import Size, Spacing, as_size, volume
from nnunet_autoreg.io.parts import parse_part
from nnunet_autoreg.nnunet_api import Array
from nnunet_autoreg.wording import amount, counted

log = logging.getLogger(__name__)

MAX_SAMPLES, MAX_SAMPLES_PER_SCAN, MIN_SAMPLES_PER_SCAN = 1_000_000, 10_000, 10
HEADERS_PER_CHUNK = 64
EXCLUDED = "excluded"
# Not kept in the journal: at the next call, memory may be free or the file readable.
TRANSIENT = ("huge", "unreadable")
# For these statuses the header is enough. In all other cases the whole file is read, which gives a
# better reason.
SETTLED_BY_HEADER = ("4d", "not3d", "tiny", "huge", "rgb", "complex")
OTHER_NAMES = {"PT": "PET", "MRI": "MR", "MRT": "MR"}
TOO_LARGE = "the scan does not fit into memory; crop or downsample it, or free some memory"


@dataclass(frozen=True)
class Index:
    """The index of all scans.

    Attributes:
        rows: one per candidate, in the same order.
        ct_samples_hu: Hounsfield values inside the body pooled over the usable CT scans, at most
            1e6.
    """

    rows: tuple[ScanRow, ...]
    ct_samples_hu: Array

    @property
    def usable(self) -> tuple[ScanRow, ...]:
        """Return the rows with status "ok"."""
        return tuple(row for row in self.rows if row.status == OK)


@dataclass(frozen=True)
class IndexTask:
    """One scan to read.

    Attributes:
        modality, rule: the modality that the user or the file gives, and which of them; "" if none.
        num_samples: Hounsfield values to draw from a CT.
        images: also read 2D images.
    """

    path: Path
    part: str
    channel: str
    modality: str
    rule: str
    num_samples: int
    images: bool = False


@dataclass(frozen=True)
class Header:
    """Facts from a scan's header (z, y, x), or the reason why it cannot be used.

    Attributes:
        stamp: shows whether the file changes later.
    """

    stamp: str
    shape_vox: Size | None = None
    spacing_mm: Spacing | None = None
    status: str = ""
    reason: str = ""


def index_scans(
    candidates: Sequence[Candidate],
    exclude: set[str],
    num_workers: int,
    modality_override: str | None = None,
    *,
    salt: str = "",
    manifest: Manifest | None = None,
    journal: Path | None = None,
    images: bool = False,
) -> Index:
    """Read, check, identify and hash every candidate.

    Headers come first, then voxels, with one scan in memory per worker.

    Excluded scans are read too, so that copies of them are recognised by their content and excluded
    as well.

    Args:
        exclude: paths of files or folders, scan ids, case ids, ``dataset/case``, or subjects.
        num_workers: processes; at most 1 works in this one.
        modality_override: counts for every scan, regardless of its file or dataset, but not against
            the manifest.
        salt: salt of the hashes of subjects and sessions; without one these are left out.
        manifest: the user's descriptions of scans.
        journal: file in which to keep what was read, so that a killed call continues; the caller
            removes it once the index is written.
        images: read 2D images too; otherwise they are left out with a reason.

    Raises:
        AutoregError: a worker process died.
    """
    described, entries = describe(candidates, manifest)
    # Excluded scans elsewhere are read as well, so that their copies in the pool are recognised.
    others = outside(exclude, described)
    everything = [*described, *others]
    warn_unmatched(exclude, everything, salt)

    # A series is excluded whole, even if only some of its slices lie in an excluded folder.
    series = {series_of(c) for c in others} - {""}
    rows = []
    for candidate in everything:
        excluded = excluded_because(candidate, exclude, series, salt)
        entry = entries.get(candidate.id, ManifestEntry())
        rows.append(first_row(candidate, excluded, salt, entry))

    # All headers before any voxels: they are fast, and show how much there is to read.
    tasks = tasks_of(everything, entries, modality_override, images)
    stamps = read_headers(rows, tasks, num_workers)
    signatures, samples = _read_voxels(rows, tasks, stamps, journal, num_workers)
    rows = settle_copies(rows, signatures)[: len(described)]
    warn_of_one_subject(rows)

    # Only scans that are used count for the window of CT.
    kept = [np.zeros(0, dtype=np.float32)]
    for number, drawn in samples.items():
        if number < len(rows) and rows[number].status == OK:
            kept.append(drawn)
    return Index(tuple(rows), np.concatenate(kept))


def warn_of_one_subject(rows: Sequence[ScanRow]) -> None:
    """Warn if all scans name one patient in several studies, as after some anonymisers."""
    usable = [row for row in rows if row.status == OK]
    subjects = {row.subject for row in usable}
    sessions = {row.session for row in usable}
    if len(subjects) == 1 and "" not in subjects and len(sessions) > 1:
        log.warning(
            "all %d scans name one patient in %d studies, so none can be kept for validation; if "
            "they are of several patients, name these in --manifest (columns path and subject)",
            len(usable),
            len(sessions),
        )


def tasks_of(
    candidates: Sequence[Candidate],
    entries: Mapping[str, ManifestEntry],
    modality_override: str | None,
    images: bool = False,
) -> list[IndexTask]:
    """Return the task of reading each candidate.

    The modality comes from the manifest, --modality, or the file itself, in this order.
    """
    # A power of two: one file more or less then does not change the number, so that the journal
    # stays valid.
    share = MAX_SAMPLES >> max(0, len(candidates) - 1).bit_length()
    num_samples = max(MIN_SAMPLES_PER_SCAN, min(MAX_SAMPLES_PER_SCAN, share))
    tasks = []
    for candidate in candidates:
        # The strongest claim comes last and overrides the others.
        claims = (
            (candidate.modality, "the file says so"),
            (modality_override or "", "--modality"),
            (entries.get(candidate.id, ManifestEntry()).modality, "--manifest"),
        )
        modality, rule = "", ""
        for claimed, source in claims:
            if claimed.strip():
                modality, rule = claimed.strip().upper(), source

        task = IndexTask(
            path=candidate.path,
            part=candidate.part,
            channel=candidate.channel,
            modality=OTHER_NAMES.get(modality, modality),
            rule=rule,
            num_samples=num_samples,
            images=images,
        )
        tasks.append(task)
    return tasks


def first_row(candidate: Candidate, excluded: str, salt: str, entry: ManifestEntry) -> ScanRow:
    """Return the row of a candidate before it is read.

    Its subject and session are replaced by hashes.
    """
    status, reason = candidate.status, candidate.reason
    if excluded and not candidate.status:
        status, reason = EXCLUDED, excluded

    subject, session = candidate.subject.strip(), candidate.session.strip()
    return ScanRow(
        id=salted(candidate.id, salt) if salt else candidate.id,
        dataset=candidate.dataset,
        case=candidate.case,
        channel=candidate.channel,
        modality="",
        source=str(candidate.path),
        shape_vox=None,
        spacing_mm=None,
        cropped_shape_vox=None,
        content_hash="",
        status=status,
        reason=reason,
        part=candidate.part,
        subject=salted(subject, salt) if salt else "",
        # With its subject: sessions of two patients may have one name.
        session=salted(f"{subject}\n{session}", salt) if salt and session else "",
        contrast=candidate.contrast,
        label_class=entry.label_class,
        listed_in=candidate.listed_in,
        name=candidate.id,
    )


def read_headers(
    rows: list[ScanRow],
    tasks: Sequence[IndexTask],
    num_workers: int,
) -> list[str | None]:
    """Fill ``rows`` from the headers; return stamps of the scans whose voxels have to be read.

    The stamp of other scans is None.

    Raises:
        AutoregError: a worker process died.
    """
    numbers = [n for n, row in enumerate(rows) if row.status in ("", EXCLUDED)]
    to_read = [tasks[n] for n in numbers]
    found = parallel_map(header_of, to_read, num_workers, "reading headers", HEADERS_PER_CHUNK)

    stamps: list[str | None] = [None] * len(rows)
    num_vox = 0
    for n, header in zip(numbers, found, strict=True):
        if header.status in SETTLED_BY_HEADER:
            # What the user excluded stays excluded.
            if not rows[n].status:
                rows[n] = replace(rows[n], status=header.status, reason=header.reason)
            continue
        stamps[n] = header.stamp
        if header.shape_vox is not None:
            rows[n] = replace(rows[n], shape_vox=header.shape_vox, spacing_mm=header.spacing_mm)
            num_vox += volume(header.shape_vox)
    log.info(
        "%s read; now reading %s voxels of %s",
        counted(len(numbers), "header"),
        amount(num_vox),
        counted(len(stamps) - stamps.count(None), "scan"),
    )
    return stamps


def header_of(task: IndexTask) -> Header:
    """Read the header of one scan."""
    stamp = stamp_of(task.path, deep=bool(parse_part(task.part).below))
    try:
        read = header_of_scan_or_image if task.images else read_header
        header = peek(task.path, task.part) or read(task.path, task.part)
    except ScanError as error:
        return Header(stamp, status=error.status, reason=str(error))
    return Header(stamp, header.shape_vox, header.spacing_mm)


def _read_voxels(
    rows: list[ScanRow],
    tasks: Sequence[IndexTask],
    stamps: Sequence[str | None],
    journal: Path | None,
    num_workers: int,
) -> tuple[list[Signature | None], dict[int, Array]]:
    """Fill ``rows`` from the voxels.

    Return signatures, and Hounsfield samples by the number of the row.
    """
    signatures: list[Signature | None] = [None] * len(rows)
    samples: dict[int, Array] = {}

    # A key covers everything that the facts depend on.
    keys = {}
    for n, stamp in enumerate(stamps):
        if stamp is not None:
            task = tasks[n]
            keys[n] = journal_key(
                stamp,
                str(task.path),
                task.part,
                task.channel,
                task.modality,
                task.rule,
                task.num_samples,
                # No further entry without images, so that journals of earlier versions stay valid.
                *(["images"] if task.images else []),
            )

    sizes = [row.num_vox for row in rows]
    with Journal(journal) as kept:
        for n, facts in _all_facts(keys, tasks, sizes, kept, num_workers):
            rows[n] = _with_facts(rows[n], facts)
            signatures[n] = decoded(facts.signature, "<i2") if facts.signature else None
            if facts.samples:
                samples[n] = decoded(facts.samples, "<f4")
    return signatures, samples


def _all_facts(
    keys: Mapping[int, str],
    tasks: Sequence[IndexTask],
    sizes: Sequence[int],
    journal: Journal,
    num_workers: int,
) -> Iterator[tuple[int, ScanFacts]]:
    """Yield facts by the number of the row.

    Facts from the journal come first, then the others as they are read.

    Args:
        sizes: voxels of every scan, by its header.
    """
    unread = []
    for n, key in keys.items():
        if key in journal.known:
            yield n, journal.known[key]
        else:
            unread.append(n)

    voxels = [sizes[n] for n in unread]
    to_read = [tasks[n] for n in unread]
    num_fitting = workers_for(num_workers, voxels)
    found = parallel_map(facts_of, to_read, num_fitting, "checking scans", apart=is_large(voxels))
    for n, facts in zip(unread, found, strict=True):
        if facts.status not in TRANSIENT:
            journal.add(keys[n], facts)
        yield n, facts


def _with_facts(row: ScanRow, facts: ScanFacts) -> ScanRow:
    """Return a row with the facts from its voxels; an excluded scan stays excluded."""
    if facts.status:
        return row if row.status else replace(row, status=facts.status, reason=facts.reason)
    return replace(
        row,
        modality=facts.modality,
        modality_rule=facts.modality_rule,
        shape_vox=facts.shape_vox,
        spacing_mm=facts.spacing_mm,
        cropped_shape_vox=facts.cropped_shape_vox,
        content_hash=facts.content_hash,
        percentiles=facts.percentiles,
        status=row.status or OK,
    )


def facts_of(task: IndexTask) -> ScanFacts:
    """Read one scan; return what the index needs of its voxels."""
    try:
        load = load_scan_or_image if task.images else load_scan
        scan = load(task.path, task.part)
        array_ZYX = scan.array_CZYX[0]
        modality, rule = _modality(task, array_ZYX)
        digest = content_hash(scan)
        drawn = sample_body(array_ZYX, task.num_samples, digest) if modality == "CT" else None
        percentiles = body_percentiles(array_ZYX, modality)
        return ScanFacts(
            modality=modality,
            modality_rule=rule,
            shape_vox=as_size(array_ZYX.shape),
            spacing_mm=scan.spacing_mm,
            cropped_shape_vox=cropped_shape(array_ZYX),
            content_hash=digest,
            percentiles=tuple(float(f"{value:.6g}") for value in percentiles),
            signature=encoded(signature(array_ZYX), "<i2"),
            samples=encoded(drawn, "<f4"),
        )
    except ScanError as error:
        return ScanFacts(error.status, str(error))
    except MemoryError:
        return ScanFacts("huge", TOO_LARGE)


def _modality(task: IndexTask, array_ZYX: Array) -> tuple[str, str]:
    """Return (modality, rule), named by the user or the file, else by the values."""
    if not task.modality:
        return modality_of(task.channel, array_ZYX)
    rule = task.rule
    # Only what a file claims is doubted, not what the user says.
    is_claim = task.modality == "CT" and not rule.startswith("--")
    if is_claim and float(array_ZYX.min()) >= 0:
        rule += ", though no value is negative: are these Hounsfield units?"
    return task.modality, rule


def encoded(values: npt.NDArray[Any] | None, kind: str) -> str:
    """Return numbers as base64; "" for none."""
    if values is None:
        return ""
    stored = values.astype(kind).tobytes()
    return base64.b64encode(stored).decode()


def decoded(text: str, kind: str) -> Any:
    """Return the numbers that ``encoded`` has encoded."""
    return np.frombuffer(base64.b64decode(text), kind)
