"""One preprocessed case on disk: a blosc2 array read crop by crop, described by a JSON file beside it."""

import errno
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.corpus.fingerprint import Axes
from nnunet_autoreg.errors import PlanError, StoreError
from nnunet_autoreg.geometry import Size, Spacing, as_size
from nnunet_autoreg.nnunet_api import Array, map_case_to_blocks
from nnunet_autoreg.plan import IntensityWindow
from nnunet_autoreg.records import atomic_path, from_jsonable, read_json, write_json

FORMAT_VERSION = 1
CROP_VOX = (64, 64, 64)
MAX_OPEN = 128


@dataclass(frozen=True)
class CaseRecord:
    """What a stored case is. ``shape_vox`` and ``spacing_mm`` are (z, y, x) after ``axes`` reordered the scan's own axes.

    Attributes:
        num_bytes: size of the ``.b2nd`` file, by which a torn one is told.
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
    num_bytes: int
    version: int = FORMAT_VERSION


@dataclass(frozen=True)
class StoredCase:
    """A case that is read crop by crop. It holds no open file, so it can be pickled and used in any process."""

    path: Path
    shape_vox: Size
    spacing_mm: Spacing

    def read(self, start_zyx: Sequence[int], size_zyx: Sequence[int]) -> Array:
        """The crop as float32 (1, Z, Y, X).

        Raises:
            ValueError: the crop reaches beyond the case.
            StoreError: the file is missing or damaged.
        """
        start, size = as_size(start_zyx), as_size(size_zyx)
        if any(a < 0 or n < 1 or a + n > m for a, n, m in zip(start, size, self.shape_vox, strict=True)):
            raise ValueError(f"the crop of {size} voxels at {start} reaches beyond the case of {self.shape_vox}")
        (z, y, x), (dz, dy, dx) = start, size
        try:
            crop = _opened(self.path)[0:1, z:z + dz, y:y + dy, x:x + dx]
        except (RuntimeError, OSError, ValueError) as error:
            raise StoreError(f"{self.path} cannot be read ({error}); delete it and rerun to have it made again") from error
        return np.asarray(crop, dtype=np.float32)

    def read_padded(self, start_zyx: Sequence[int], size_zyx: Sequence[int]) -> tuple[Array, npt.NDArray[np.bool_]]:
        """The crop, zero where it reaches beyond the case, and where it lies inside.

        Returns:
            float32 (1, Z, Y, X) and bool (Z, Y, X), True inside the case.
        """
        start, size = as_size(start_zyx), as_size(size_zyx)
        crop = np.zeros((1, *size), dtype=np.float32)
        valid = np.zeros(size, dtype=bool)
        low = [max(0, a) for a in start]
        high = [min(m, a + n) for a, n, m in zip(start, size, self.shape_vox, strict=True)]
        if all(lo < hi for lo, hi in zip(low, high, strict=True)):
            place = tuple(slice(lo - a, hi - a) for lo, hi, a in zip(low, high, start, strict=True))
            crop[0][place] = self.read(low, [hi - lo for lo, hi in zip(low, high, strict=True)])[0]
            valid[place] = True
        return crop, valid


_handles: "OrderedDict[tuple[int, Path], Any]" = OrderedDict()


def _opened(path: Path) -> Any:
    """An open blosc2 array; the last few stay open. Keyed by process, because a forked handle is its parent's."""
    import blosc2

    key = (os.getpid(), path)
    if key in _handles:
        _handles.move_to_end(key)
        return _handles[key]
    # Memory mapping fails on Windows.
    mapped = {} if os.name == "nt" else {"mmap_mode": "r"}
    array = blosc2.open(str(path), mode="r", dparams={"nthreads": 1}, **mapped)
    _handles[key] = array
    while len(_handles) > MAX_OPEN:
        _handles.popitem(last=False)
    return array


def write_case(path: Path, data_CZYX: Array, record: CaseRecord) -> CaseRecord:
    """Write ``path`` (.b2nd), then its JSON, each whole or not at all; returns the record with the file's size.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    import blosc2

    blocks, chunks = map_case_to_blocks(data_CZYX.shape, CROP_VOX)
    settings = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    # Compressed in memory, so that a full disk is met by a plain write with a plain error.
    frame = blosc2.asarray(data_CZYX, blocks=blocks, chunks=chunks, cparams=settings).to_cframe()
    written = CaseRecord(**{**vars(record), "num_bytes": len(frame)})
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(frame)
        write_json(path.with_suffix(".json"), written)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk or your quota is full; finished cases are kept: free space" if full else f"{error.strerror}; mend it"
        raise StoreError(f"{path.parent} cannot be written: {what} and run the same line again") from error
    return written


def read_record(path: Path) -> CaseRecord | None:
    """The record beside a ``.b2nd`` file; None if the case is missing, torn, or of another format."""
    try:
        record = from_jsonable(CaseRecord, read_json(path.with_suffix(".json")), str(path))
        return record if record.version == FORMAT_VERSION and path.stat().st_size == record.num_bytes else None
    except (PlanError, OSError):
        return None
