"""One preprocessed case on disk: a blosc2 array read crop by crop, described by a JSON file beside
it.
"""

import errno
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.corpus.fingerprint import Axes
from nnunet_autoreg.errors import PlanError, StoreError
from nnunet_autoreg.geometry import Size, Spacing, as_size, box_at
from nnunet_autoreg.nnunet_api import Array
from nnunet_autoreg.plan import IntensityWindow
from nnunet_autoreg.records import atomic_path, from_jsonable, read_json, write_json
from nnunet_autoreg.store.layout import chunks_touched, layout_of
from nnunet_autoreg.store.seal import Seal, chunk_damage, frame_damage, seal_of

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
MAX_OPEN = 128
CLEARLY_SMALLER = 0.9


@dataclass(frozen=True)
class CaseRecord:
    """The description of a stored case.

    ``shape_vox`` and ``spacing_mm`` are (z, y, x) after ``axes`` reordered the scan's own axes.

    Attributes:
        seal: checksums of the ``.b2nd`` file; None before it is written.
    """

    content_hash: str
    shape_vox: Size
    spacing_mm: Spacing
    original_shape_vox: Size
    original_spacing_mm: Spacing
    axes: Axes
    scheme: str
    use_mask: bool
    ct_window: IntensityWindow | None
    seal: Seal | None = None
    version: int = FORMAT_VERSION


@dataclass(frozen=True)
class StoredCase:
    """A case that is read crop by crop.

    It holds no open file, so it can be pickled and used in any process.

    Chunks that a process reads for the first time are checked against ``seal``. A damaged case is
    taken out of the store, so that the next run makes it again.
    """

    path: Path
    shape_vox: Size
    spacing_mm: Spacing
    seal: Seal

    def read(self, start_zyx: Sequence[int], size_zyx: Sequence[int]) -> Array:
        """Return the crop as float32 (1, Z, Y, X).

        Raises:
            ValueError: the crop extends beyond the case.
            StoreError: the file is missing or damaged.
        """
        start, size = as_size(start_zyx), as_size(size_zyx)
        for first, length, side in zip(start, size, self.shape_vox, strict=True):
            if first < 0 or length < 1 or first + length > side:
                raise ValueError(
                    f"the crop of {size} voxels at {start} extends beyond the case of "
                    f"{self.shape_vox}",
                )

        z, y, x = box_at(start, size)
        try:
            array = _opened(self)
            _check_chunks(self, array, start, size)
            crop = array[0:1, z, y, x]
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be read ({error.strerror or error}); run the same line again",
                code="case-unreadable",
            ) from error
        except (RuntimeError, ValueError) as error:
            raise _damaged(self.path, f"blosc2 says: {error}") from error

        return np.asarray(crop, dtype=np.float32)

    def read_padded(
        self,
        start_zyx: Sequence[int],
        size_zyx: Sequence[int],
    ) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return the crop, zero where it extends beyond the case, and where it lies inside.

        Returns:
            float32 (1, Z, Y, X) and bool (Z, Y, X), True inside the case.
        """
        start, size = as_size(start_zyx), as_size(size_zyx)
        crop = np.zeros((1, *size), dtype=np.float32)
        valid = np.zeros(size, dtype=bool)

        # The part of the crop that lies inside the case, in voxels of the case.
        low = np.maximum(start, 0)
        high = np.minimum(np.add(start, size), self.shape_vox)
        length = high - low
        if (length > 0).all():
            z, y, x = box_at((low - start).tolist(), length.tolist())
            crop[:, z, y, x] = self.read(low.tolist(), length.tolist())
            valid[z, y, x] = True
        return crop, valid


_handles: "OrderedDict[tuple[int, Path], Any]" = OrderedDict()
"""Open arrays by process and path, the least recently used first."""
_checked: dict[Path, set[int]] = {}
"""Chunks of a file whose checksums are correct."""


def _opened(case: StoredCase) -> Any:
    """Return an open blosc2 array; the last few stay open.

    They are kept per process, because a forked handle belongs to the parent.
    """
    import blosc2

    key = (os.getpid(), case.path)
    if key in _handles:
        _handles.move_to_end(key)
        return _handles[key]

    damage = frame_damage(case.path, case.seal)
    if damage:
        raise _damaged(case.path, damage)
    # Memory mapping fails on Windows.
    mapped = {} if os.name == "nt" else {"mmap_mode": "r"}
    array = blosc2.open(str(case.path), mode="r", dparams={"nthreads": 1}, **mapped)
    if tuple(array.shape) != (1, *case.shape_vox):
        raise _damaged(
            case.path,
            f"it holds {tuple(array.shape[1:])} voxels, its record says {case.shape_vox}",
        )

    # Few files may be open at once.
    _handles[key] = array
    while len(_handles) > MAX_OPEN:
        _handles.popitem(last=False)
    return array


def _check_chunks(case: StoredCase, array: Any, start: Size, size: Size) -> None:
    """Compare the chunks that a crop touches with their checksums, each once in a process.

    Raises:
        StoreError: one differs; the case is then removed from the store.
    """
    checked = _checked.setdefault(case.path, set())
    chunk_vox = as_size(array.chunks[1:])
    touched = chunks_touched(start, size, case.shape_vox, chunk_vox)
    new = [number for number in touched if number not in checked]

    damage = chunk_damage(array, case.seal, new)
    if damage:
        raise _damaged(case.path, damage)
    checked.update(new)


def _damaged(path: Path, what: str) -> StoreError:
    """Remove a case from the store by renaming its record to a mark; return the error to raise."""
    _handles.pop((os.getpid(), path), None)
    _checked.pop(path, None)

    # A case without a record is not a case: the next run makes it again.
    try:
        path.with_suffix(".json").rename(damage_mark(path))
        remedy = "run the same line again so that it is made again"
    except FileNotFoundError:
        remedy = (
            "another process has found that too: run the same line again so that it is made again"
        )
    except OSError as error:
        remedy = (
            f"it cannot be taken out of the store ({error.strerror}): delete it and run the same "
            "line again"
        )
    return StoreError(f"{path} is damaged ({what}); {remedy}", code="case-damaged")


def damage_mark(path: Path) -> Path:
    """Return the file beside a case that marks it as damaged."""
    return path.with_suffix(".damaged")


def is_intact(path: Path) -> bool:
    """Return whether a whole case agrees with its checksums.

    If not, it is removed from the store.
    """
    record = read_record(path)
    if record is None or record.seal is None:
        return False

    case = StoredCase(path, record.shape_vox, record.spacing_mm, record.seal)
    try:
        _check_chunks(case, _opened(case), (0, 0, 0), case.shape_vox)
    except StoreError as error:
        log.warning("%s", error)
        return False
    except (RuntimeError, ValueError) as error:
        log.warning("%s", _damaged(path, f"blosc2 says: {error}"))
        return False
    return True


def write_case(path: Path, data_CZYX: Array, record: CaseRecord) -> CaseRecord:
    """Write ``path`` (.b2nd), then its JSON, each atomically.

    Returns:
        the record with the file's seal.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    # Compressed in memory, so that a full disk is met by a plain write with a plain error.
    array = compressed(data_CZYX)
    frame = array.to_cframe()
    written = replace(record, seal=seal_of(array, frame))

    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(frame)
        # The record comes last: a case without one is not in the store.
        write_json(path.with_suffix(".json"), written)
        damage_mark(path).unlink(missing_ok=True)
    except OSError as error:
        what = f"{error.strerror}; solve this"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what = "the disk or your quota is full; finished cases are kept: free space"
        raise StoreError(
            f"{path.parent} cannot be written: {what} and run the same line again",
            code="store-not-writable",
        ) from error
    return written


def compressed(data_CZYX: Array) -> Any:
    """Return a blosc2 array in memory.

    Bytes are shuffled, which makes reading faster, unless a chunk from the middle is clearly
    smaller without. Resampled voxels are smaller shuffled; native ones, of few distinct values,
    often are not.
    """
    import blosc2

    block, chunk = layout_of(as_size(data_CZYX.shape[1:]))
    shapes: dict[str, Any] = {"blocks": (1, *block), "chunks": (1, *chunk)}

    def packed(data: Array, kind: Any) -> Any:
        settings = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [kind], "nthreads": 1}
        return blosc2.asarray(data, cparams=settings, **shapes)

    # Compress one chunk from the middle of the case both ways.
    starts = []
    for side, length in zip(data_CZYX.shape[1:], chunk, strict=True):
        starts.append(max(side - length, 0) // 2)
    z, y, x = box_at(starts, chunk)
    middle = np.ascontiguousarray(data_CZYX[:, z, y, x])
    shuffled_bytes = packed(middle, blosc2.Filter.SHUFFLE).schunk.cbytes
    plain_bytes = packed(middle, blosc2.Filter.NOFILTER).schunk.cbytes

    if plain_bytes < CLEARLY_SMALLER * shuffled_bytes:
        return packed(data_CZYX, blosc2.Filter.NOFILTER)
    return packed(data_CZYX, blosc2.Filter.SHUFFLE)


def read_record(path: Path) -> CaseRecord | None:
    """Return the record beside a ``.b2nd`` file.

    None if the case is missing, torn, or of another format.
    """
    try:
        record = from_jsonable(CaseRecord, read_json(path.with_suffix(".json")), str(path))
        is_whole_file = record.seal is not None and path.stat().st_size == record.seal.num_bytes
    except (PlanError, OSError):
        return None
    return record if record.version == FORMAT_VERSION and is_whole_file else None
