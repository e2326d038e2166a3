"""The store of preprocessed cases, which runs share.

A case is found by its content, spacing and normalisation.
"""

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from nnunet_autoreg.corpus.content import has_content
from nnunet_autoreg.corpus.fingerprint import relative_size, transpose_axes, transposed_geometry
from nnunet_autoreg.corpus.images import load_scan_or_image
from nnunet_autoreg.corpus.parallel import is_large, parallel_map, workers_for
from nnunet_autoreg.corpus.read import check_memory, load_scan
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.errors import PlanError, ScanError, StoreError, UsageError
from nnunet_autoreg.geometry import Spacing, as_size, as_spacing, volume
from nnunet_autoreg.nnunet_api import (
    CT_SCHEME,
    RawScan,
    crop_resample_normalise,
    preprocessed_folder,
    resampled_shape,
    scheme_of,
)
from nnunet_autoreg.plan import IntensityWindow
from nnunet_autoreg.store.case import (
    FORMAT_VERSION,
    CaseRecord,
    StoredCase,
    damage_mark,
    is_intact,
    read_record,
    write_case,
)
from nnunet_autoreg.wording import counted, storage

log = logging.getLogger(__name__)

FOLDER = "autoreg_store"
MASK_BELOW = 3 / 4
# An upper bound: float32 shrank to 1.6 .. 3.4 bytes on the average of a dataset, and to 1.1 .. 3.6
# in single cases.
BYTES_PER_VOXEL = 3.6
BYTES_PER_CASE = 8192
STALE_AFTER_S = 24 * 3600


@dataclass(frozen=True)
class StoreTask:
    """One scan to preprocess, and how."""

    row: ScanRow
    key: str
    spacing_mm: Spacing
    scheme: str
    use_mask: bool
    ct_window: IntensityWindow | None


@dataclass(frozen=True)
class StorePart:
    """Share ``number`` (from 1) of ``count``.

    The part of a case follows from its key, so parts need no coordinator.
    """

    number: int = 1
    count: int = 1

    def takes(self, key: str) -> bool:
        """Return whether the case of this key is in this share."""
        return int(key, 16) % self.count == self.number - 1


ALL = StorePart()
SpacingOf = Spacing | Callable[[ScanRow], Spacing]
"""Target spacing for transposed axes (z, y, x), or a function that gives it for a row."""


def parse_part(text: str) -> StorePart:
    """Return a share given as K/N.

    Raises:
        UsageError: the text is not such a share.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(
            f"--part {text}: give K/N with K from 1 to N, e.g. 1/4, 2/4, 3/4 and 4/4 in four jobs",
            code="store-part",
        )
    return StorePart(number, count)


class Store:
    """Preprocessed cases below one folder, ``<key[:2]>/<key>.b2nd`` and ``.json`` each.

    Attributes:
        failures: id -> error of the scans that the last ``ensure`` had to leave out.
    """

    def __init__(self, root: Path | None = None):
        self.root = root or preprocessed_folder() / FOLDER
        self.failures: dict[str, ScanError] = {}

    def ensure(
        self,
        rows: Sequence[ScanRow],
        spacing_mm: SpacingOf,
        ct_window: IntensityWindow | None,
        num_workers: int,
        part: StorePart = ALL,
    ) -> dict[str, str]:
        """Preprocess all cases that are missing.

        The call may be killed at any moment, repeated, and made by several processes at once.

        A scan that can no longer be preprocessed (vanished, changed, too large at this spacing) is
        logged, listed in ``failures``, and absent from the result.

        Args:
            rows: usable rows of an index.
            num_workers: largest number of processes; fewer are used if memory is short.
            part: preprocess only the cases of this part.

        Returns:
            scan id -> key for ``open``, of this part.

        Raises:
            PlanError: a CT scan without ``ct_window``.
            StoreError: the disk is full, or the store cannot be written; finished cases stay.
            AutoregError: a worker died.
        """
        self.failures = {}
        of_rows = plan_tasks(rows, spacing_mm, ct_window)
        tasks = [task for task in of_rows if part.takes(task.key)]
        missing = self._missing_after_check(tasks, self._missing(tasks), num_workers)

        lost: dict[str, ScanError] = {}
        if missing:
            self._prepare(missing, len(tasks))
            voxels = [largest_volume(task) for task in missing]
            made = parallel_map(
                partial(_preprocess, self.root),
                missing,
                workers_for(num_workers, voxels),
                "preprocessing",
                apart=is_large(voxels),
            )
            for key, error in made:
                if error:
                    lost[key] = ScanError(*error)

        # Several scans may have one key: copies of one image are one case.
        self.failures = {t.row.id: lost[t.key] for t in tasks if t.key in lost}
        for name, failure in self.failures.items():
            log.warning("%s is left out (%s): %s", name, failure.status, failure)
        return {t.row.id: t.key for t in tasks if t.key not in lost}

    def num_missing(
        self,
        rows: Sequence[ScanRow],
        spacing_mm: SpacingOf,
        ct_window: IntensityWindow | None,
    ) -> tuple[int, int]:
        """Count cases that ``ensure`` would have to make now, and all cases of these rows."""
        tasks = plan_tasks(rows, spacing_mm, ct_window)
        return len(self._missing(tasks)), len({task.key for task in tasks})

    def _missing(self, tasks: Sequence[StoreTask]) -> list[StoreTask]:
        """Return one task for every key that is not in the store."""
        by_key = {task.key: task for task in tasks}
        missing = []
        for key, task in by_key.items():
            if read_record(self._path(key)) is None:
                missing.append(task)
        return missing

    def _missing_after_check(
        self,
        tasks: Sequence[StoreTask],
        missing: list[StoreTask],
        num_workers: int,
    ) -> list[StoreTask]:
        """Return the missing cases. If one of them was found damaged, check all others first."""
        num_damaged = sum(damage_mark(self._path(task.key)).exists() for task in missing)
        missing_paths = {self._path(task.key) for task in missing}
        paths = sorted({self._path(task.key) for task in tasks} - missing_paths)
        if not num_damaged or not paths:
            return missing

        # A disk that damaged one case may have damaged others.
        log.warning(
            "store: %d cases were found damaged, so all %d others of this run are checked",
            num_damaged,
            len(paths),
        )
        are_intact = list(parallel_map(is_intact, paths, num_workers, "checking the store"))
        num_more = are_intact.count(False)
        log.info("store: %d more are damaged; all are made again", num_more)
        return self._missing(tasks)

    def open(self, key: str) -> StoredCase:
        """Return the case of a key that ``ensure`` returned.

        Raises:
            StoreError: there is no such case, or it is damaged.
        """
        record = self.record(key)
        assert record.seal is not None, "read_record returns sealed records only"
        return StoredCase(self._path(key), record.shape_vox, record.spacing_mm, record.seal)

    def record(self, key: str) -> CaseRecord:
        """Return the record of a stored case.

        Raises:
            StoreError: there is no such case, or it is damaged.
        """
        record = read_record(self._path(key))
        if record is None:
            raise StoreError(
                f"{self._path(key)} is missing or damaged; run the same command again to make it",
                code="case-missing",
            )
        return record

    def _path(self, key: str) -> Path:
        return case_path(self.root, key)

    def _prepare(self, missing: Sequence[StoreTask], num_all: int) -> None:
        """Make the folder, remove unfinished files of killed runs, log the disk space needed."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.root).free
        except OSError as error:
            raise StoreError(
                f"{self.root} cannot be made: {error.strerror}; correct nnUNet_preprocessed",
                code="store-not-writable",
            ) from error

        # Another run may be writing a younger file now.
        for stale in self.root.glob("*/.*.tmp"):
            if time.time() - stale.stat().st_mtime > STALE_AFTER_S:
                stale.unlink(missing_ok=True)

        num_voxels = 0
        for task in missing:
            shape, spacing = transposed_geometry(task.row)
            num_voxels += volume(resampled_shape(shape, spacing, task.spacing_mm))

        needed = num_voxels * BYTES_PER_VOXEL + len(missing) * BYTES_PER_CASE
        log.info(
            "store: %d of %s missing; preprocessing them needs at most about %s in %s (%s free)",
            len(missing),
            counted(num_all, "case"),
            storage(needed),
            self.root,
            storage(free),
        )
        if needed > free:
            log.warning(
                "store: the disk may be full before the end; finished cases are kept, and the same "
                "command continues later",
            )


def largest_volume(task: StoreTask) -> int:
    """Return the number of voxels of a scan or of the case made from it, whichever is larger."""
    shape, spacing = transposed_geometry(task.row)
    return max(
        volume(task.row.shape_vox or shape),
        volume(resampled_shape(shape, spacing, task.spacing_mm)),
    )


def case_path(root: Path, key: str) -> Path:
    """Return the ``.b2nd`` file of a key."""
    return root / key[:2] / f"{key}.b2nd"


def plan_tasks(
    rows: Sequence[ScanRow],
    spacing_mm: SpacingOf,
    ct_window: IntensityWindow | None,
) -> list[StoreTask]:
    """Return how each scan is preprocessed.

    Raises:
        PlanError: a CT scan without ``ct_window``.
    """
    tasks = []
    for row in rows:
        target_mm = spacing_mm(row) if callable(spacing_mm) else spacing_mm
        tasks.append(plan_task(row, as_spacing(target_mm), ct_window))
    return tasks


def plan_task(row: ScanRow, spacing_mm: Spacing, ct_window: IntensityWindow | None) -> StoreTask:
    """Return how a scan is preprocessed, and the key of the result.

    Raises:
        PlanError: a CT scan without ``ct_window``.
    """
    scheme = scheme_of(row.modality)
    window = ct_window if scheme == CT_SCHEME else None
    if scheme == CT_SCHEME and window is None:
        raise PlanError(
            f"{row.id} is a CT scan and there is no Hounsfield window; set data.ct_window, or "
            "index CT scans",
            code="plan-no-ct-window",
        )

    # As in nnU-Net, an image that cropping shrinks by a quarter is normalised by its foreground.
    use_mask = scheme != CT_SCHEME and relative_size(row) < MASK_BELOW

    # The stored voxels depend on exactly these values.
    known = [
        FORMAT_VERSION,
        row.content_hash,
        [round(s, 4) for s in spacing_mm],
        scheme,
        use_mask,
        asdict(window) if window else None,
    ]
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return StoreTask(row, key, spacing_mm, scheme, use_mask, window)


def _preprocess(root: Path, task: StoreTask) -> tuple[str, tuple[str, str] | None]:
    """Make one case; return its key and, if it cannot be made, (status, reason)."""
    too_large = (
        "the scan does not fit into memory at this spacing; free some memory or use a coarser "
        "spacing"
    )
    return task.key, failure_of(partial(_make_case, root, task), too_large)


def failure_of(make: Callable[[], None], too_large: str) -> tuple[str, str] | None:
    """Call ``make``; return (status, reason) if it cannot use a scan, else None.

    Errors are returned as plain text, because they come from another process.

    Args:
        too_large: the reason if there is not enough memory.
    """
    try:
        make()
    except ScanError as error:
        return error.status, str(error)
    except MemoryError:
        return "huge", too_large
    return None


def load_unchanged(row: ScanRow) -> RawScan:
    """Read the scan of a row.

    Raises:
        ScanError: it cannot be read, or holds other voxels than when the index was made.
    """
    load = load_scan_or_image if row.is_image else load_scan
    scan = load(Path(row.source), row.part)
    if not has_content(scan, row.content_hash):
        raise ScanError(
            "changed",
            f"{row.id} changed after it was checked; run the same line again",
        )
    return scan


def _make_case(root: Path, task: StoreTask) -> None:
    if read_record(case_path(root, task.key)):
        return  # Another run or machine has made it in the meantime.

    # Refuse impossible cases before any voxel is read.
    shape, spacing = transposed_geometry(task.row)
    new_shape = resampled_shape(shape, spacing, task.spacing_mm)
    if min(new_shape) < 1:
        raise ScanError(
            "spacing",
            f"{shape} voxels of {spacing} mm vanish at the target spacing {task.spacing_mm} mm",
        )

    check_memory(max(new_shape, shape, key=volume))

    scan = load_unchanged(task.row)
    axes = transpose_axes(scan.spacing_mm)
    array_CZYX = scan.array_CZYX.transpose(0, *(axis + 1 for axis in axes))
    source_mm = [scan.spacing_mm[axis] for axis in axes]
    data_CZYX = crop_resample_normalise(
        array_CZYX,
        source_mm,
        task.spacing_mm,
        task.scheme,
        task.use_mask,
        task.ct_window,
    )

    record = CaseRecord(
        content_hash=task.row.content_hash,
        shape_vox=as_size(data_CZYX.shape[1:]),
        spacing_mm=task.spacing_mm,
        original_shape_vox=as_size(scan.array_CZYX.shape[1:]),
        original_spacing_mm=scan.spacing_mm,
        axes=axes,
        scheme=task.scheme,
        use_mask=task.use_mask,
        ct_window=task.ct_window,
    )
    write_case(case_path(root, task.key), data_CZYX, record)
