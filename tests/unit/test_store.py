"""The store: cases found by content, written whole, read crop by crop in any process."""

import errno
import json
import logging
import math
import pickle
import platform
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK
from refusals import refused
from scipy.ndimage import gaussian_filter

from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.index import index_scans
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.errors import PlanError, StoreError, UsageError
from nnunet_autoreg.geometry import volume
from nnunet_autoreg.nnunet_api import crop_resample_normalise, read_scan
from nnunet_autoreg.plan import IntensityWindow
from nnunet_autoreg.records import TEMPORARY_FILES, atomic_path
from nnunet_autoreg.store import case as store_case
from nnunet_autoreg.store.case import CaseRecord, StoredCase, compressed, write_case
from nnunet_autoreg.store.layout import blocks_touched, chunks_touched, layout_of
from nnunet_autoreg.store.store import Store, StorePart, parse_part, plan_task

ISO = (1.0, 1.0, 1.0)
WINDOW = IntensityWindow(
    mean=40.0,
    std=100.0,
    median=35.0,
    min=-900.0,
    max=1500.0,
    percentile_00_5=-160.0,
    percentile_99_5=400.0,
)


def make_rows(
    folder: Path,
    num: int = 2,
    shape: tuple[int, int, int] = (16, 18, 20),
    zyx_mm: tuple[float, ...] = ISO,
) -> list[ScanRow]:
    """``num`` scans of noise in ``folder``, indexed."""
    folder.mkdir(exist_ok=True)
    for seed in range(num):
        voxels = np.random.default_rng(seed).integers(1, 999, shape).astype(np.int16)
        image = SimpleITK.GetImageFromArray(voxels)
        image.SetSpacing(zyx_mm[::-1])
        # RAS, which reading keeps as it is.
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        SimpleITK.WriteImage(image, str(folder / f"{seed}.nii.gz"))
    return list(index_scans(find_scans([], [folder]), set(), 1).usable)


def snapshot(root: Path) -> dict[str, int]:
    """Return when each file below a folder was written."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in files}


def test_a_stored_case_is_what_nnunet_makes_of_the_scan(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "pool", 1, zyx_mm=(2.0, 1.0, 1.0))
    store = Store(tmp_path / "store")
    case = store.open(store.ensure(rows, ISO, None, 1)["pool/0"])
    scan = read_scan(Path(rows[0].source))

    expected = crop_resample_normalise(
        scan.array_CZYX,
        scan.spacing_mm,
        ISO,
        "ZScoreNormalization",
        False,
        None,
    )

    assert case.shape_vox == (32, 18, 20)
    assert case.spacing_mm == ISO
    np.testing.assert_array_equal(case.read((0, 0, 0), case.shape_vox), expected)


def test_the_coarsest_axis_is_moved_to_the_front_and_recorded(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "pool", 1, (18, 20, 8), (1.0, 1.0, 4.0))
    store = Store(tmp_path / "store")
    key = store.ensure(rows, (4.0, 1.0, 1.0), None, 1)["pool/0"]

    record = store.record(key)

    assert (record.shape_vox, record.axes) == ((8, 18, 20), (2, 0, 1))
    assert (record.original_shape_vox, record.original_spacing_mm) == ((18, 20, 8), (1.0, 1.0, 4.0))

    raw = read_scan(Path(rows[0].source)).array_CZYX.transpose(0, 3, 1, 2)
    z_scores = (raw - raw.mean()) / raw.std()
    stored = store.open(key).read((0, 0, 0), (8, 18, 20))

    # The spacing is kept, so nothing is resampled; means are summed in another order.
    np.testing.assert_allclose(stored, z_scores, atol=1e-5)


def test_a_crop_is_the_same_part_of_the_whole_and_may_not_reach_beyond(tmp_path: Path) -> None:
    case = stored_case(tmp_path)
    whole = case.read((0, 0, 0), (16, 18, 20))

    crop = case.read((3, 4, 5), (6, 7, 8))

    assert crop.shape == (1, 6, 7, 8)
    assert crop.dtype == np.float32
    np.testing.assert_array_equal(crop, whole[:, 3:9, 4:11, 5:13])
    for start, size in (((-1, 0, 0), (2, 2, 2)), ((15, 0, 0), (2, 2, 2)), ((0, 0, 0), (1, 0, 1))):
        with pytest.raises(ValueError) as caught:
            case.read(start, size)
        assert str(start) in str(caught.value)


def test_a_padded_crop_is_zero_and_marked_invalid_outside(tmp_path: Path) -> None:
    case = stored_case(tmp_path)

    crop, valid = case.read_padded((-2, 10, -1), (20, 10, 22))

    assert crop.shape == (1, 20, 10, 22)
    assert valid.shape == (20, 10, 22)
    # The case has 16 x 18 x 20 voxels: 2 slices are missing on either side of z, 2 rows behind y,
    # and a column on either side of x.
    np.testing.assert_array_equal(crop[:, 2:18, :8, 1:21], case.read((0, 10, 0), (16, 8, 20)))
    assert int(valid.sum()) == 16 * 8 * 20
    assert valid[2:18, :8, 1:21].all()
    assert not crop[0][~valid].any()

    nothing, outside = case.read_padded((100, 0, 0), (4, 4, 4))

    assert not nothing.any()
    assert not outside.any()


def test_nothing_is_made_twice(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "pool")
    store = Store(tmp_path / "store")
    keys = store.ensure(rows, ISO, None, 1)
    before = snapshot(store.root)

    assert Store(tmp_path / "store").ensure(rows, ISO, None, 1) == keys
    assert snapshot(store.root) == before
    # Two cases of two files each: voxels and their description.
    assert len(before) == 4


def test_the_same_content_under_another_name_is_the_same_case(tmp_path: Path) -> None:
    row = make_rows(tmp_path / "pool", 1)[0]
    keys = Store(tmp_path / "store").ensure([row, replace(row, id="other")], ISO, None, 1)
    assert keys["other"] == keys["pool/0"]


def test_the_key_knows_content_spacing_and_normalisation(tmp_path: Path) -> None:
    row = make_rows(tmp_path / "pool", 1)[0]
    other = replace(WINDOW, mean=0.0)
    tasks = [
        plan_task(row, ISO, None),
        plan_task(row, (2.0, 1.0, 1.0), None),
        plan_task(replace(row, content_hash="0"), ISO, None),
        plan_task(replace(row, modality="CT"), ISO, WINDOW),
        plan_task(replace(row, modality="CT"), ISO, other),
        plan_task(replace(row, cropped_shape_vox=(8, 18, 20)), ISO, None),
    ]

    assert len({task.key for task in tasks}) == len(tasks)
    # A spacing that is rounded differently, and a window that an MR image does not use.
    assert plan_task(row, (1.00001, 1.0, 1.0), WINDOW).key == tasks[0].key


def test_masked_z_scores_are_for_scans_that_cropping_shrinks_much(tmp_path: Path) -> None:
    row = make_rows(tmp_path / "pool", 1)[0]
    ct = replace(row, cropped_shape_vox=(4, 18, 20), modality="CT")

    # nnU-Net's rule: less than three quarters of the voxels are left, 12 of 16 slices.
    assert not plan_task(replace(row, cropped_shape_vox=(12, 18, 20)), ISO, None).use_mask
    assert plan_task(replace(row, cropped_shape_vox=(11, 18, 20)), ISO, None).use_mask
    assert not plan_task(ct, ISO, WINDOW).use_mask


def test_ct_without_a_window_is_refused_before_work(tmp_path: Path) -> None:
    rows = [replace(row, modality="CT") for row in make_rows(tmp_path / "pool", 1)]
    with refused(PlanError, "plan-no-ct-window", "data.ct_window"):
        Store(tmp_path / "store").ensure(rows, ISO, None, 1)


def test_workers_make_the_same_cases(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "pool")
    one = Store(tmp_path / "one")
    two = Store(tmp_path / "two")

    assert one.ensure(rows, ISO, None, 1) == two.ensure(rows, ISO, None, 2)
    for path in one.root.rglob("*.b2nd"):
        assert path.read_bytes() == (two.root / path.relative_to(one.root)).read_bytes()


@pytest.mark.parametrize("damage", ["truncate", "no_json", "torn_json"])
def test_a_torn_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    rows = make_rows(tmp_path / "pool", 1)
    store = Store(tmp_path / "store")
    key = store.ensure(rows, ISO, None, 1)["pool/0"]
    path = store.open(key).path
    whole = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(whole[:100])
    elif damage == "no_json":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text('{"content')

    with refused(StoreError, "case-missing", path):
        store.open(key)

    store.ensure(rows, ISO, None, 1)

    assert path.read_bytes() == whole
    assert store.open(key).shape_vox == (16, 18, 20)


def test_a_full_disk_keeps_finished_cases_and_leaves_nothing_half_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = make_rows(tmp_path / "pool", 3)
    store = Store(tmp_path / "store")
    write = Path.write_bytes
    calls = []

    def full_at_the_second(path: Path, data: Any) -> int:
        calls.append(path)
        if len(calls) > 1:
            write(path, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_at_the_second)

    with refused(StoreError, "store-not-writable", "full"):
        store.ensure(rows, ISO, None, 1)

    # The first case is whole, of the second nothing is left.
    assert sorted(Path(name).suffix for name in snapshot(store.root)) == [".b2nd", ".json"]
    monkeypatch.undo()
    assert len(store.ensure(rows, ISO, None, 1)) == 3


def test_the_space_needed_on_disk_is_shown_before_the_start(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with caplog.at_level(logging.INFO):
        Store(tmp_path / "store").ensure(make_rows(tmp_path / "pool", 1), ISO, None, 1)

    assert "1 of 1 case missing" in caplog.text
    assert "may be full" in caplog.text


def test_scans_that_vanish_or_change_are_left_out_and_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = make_rows(tmp_path / "pool", 3)
    store = Store(tmp_path / "store")
    Path(rows[0].source).unlink()
    # The second file now holds what was indexed as the third.
    shutil.copy(rows[2].source, rows[1].source)

    assert list(store.ensure(rows, ISO, None, 1)) == ["pool/2"]
    failures = {name: error.status for name, error in store.failures.items()}
    assert failures == {"pool/0": "unreadable", "pool/1": "changed"}
    assert "pool/0 is left out" in caplog.text


def test_a_scan_that_vanishes_at_a_coarse_spacing_is_left_out(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "pool", 1)
    store = Store(tmp_path / "store")

    # 16 slices of 1 mm are less than half of one slice of 40 mm.
    assert store.ensure(rows, (40.0, 1.0, 1.0), None, 1) == {}
    assert store.failures["pool/0"].status == "spacing"


def test_temporary_files_of_a_killed_run_are_swept_once_they_are_old(tmp_path: Path) -> None:
    import os
    import time

    (tmp_path / "store" / "ab").mkdir(parents=True)
    old = tmp_path / "store" / "ab" / ".x.b2nd.1.tmp"
    young = tmp_path / "store" / "ab" / ".y.b2nd.2.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    # Two days old: no process that is still running can be writing it.
    os.utime(old, (time.time() - 2 * 86400,) * 2)

    Store(tmp_path / "store").ensure(make_rows(tmp_path / "pool", 1), ISO, None, 1)

    assert not old.exists()
    assert young.exists()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_case_is_pickled_small_and_read_in_other_processes(tmp_path: Path, method: str) -> None:
    case = stored_case(tmp_path)
    here = case.read((1, 2, 3), (4, 5, 6))

    # The pickle names the file; the 5760 voxels are not in it.
    assert len(pickle.dumps(case)) < 1000

    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        there = pool.submit(case.read, (1, 2, 3), (4, 5, 6)).result()
    np.testing.assert_array_equal(there, here)


def stored_case(tmp_path: Path, shape: tuple[int, int, int] = (16, 18, 20)) -> StoredCase:
    store = Store(tmp_path / "store")
    (key,) = store.ensure(make_rows(tmp_path / "pool", 1, shape), ISO, None, 1).values()
    return store.open(key)


def test_a_lost_file_ends_in_a_store_error_and_stays_in_the_store(tmp_path: Path) -> None:
    case = stored_case(tmp_path)
    case.path.rename(tmp_path / "elsewhere")

    with refused(StoreError, "case-unreadable", case.path):
        case.read((0, 0, 0), (4, 4, 4))
    assert case.path.with_suffix(".json").exists()


def test_an_altered_byte_is_noticed_on_reading_and_the_case_made_again(
    tmp_path: Path,
) -> None:
    case = stored_case(tmp_path, (4, 5, 6))
    whole = case.path.read_bytes()
    crop = case.read((0, 0, 0), (4, 5, 6))
    record = case.path.with_suffix(".json").read_bytes()
    for i in range(len(whole)):
        # Whether a case is whole is checked once in each process.
        _forget(case)
        damaged = bytearray(whole)
        damaged[i] ^= 1
        case.path.write_bytes(damaged)
        case.path.with_suffix(".json").write_bytes(record)
        with refused(StoreError, "case-damaged", case.path):
            case.read((0, 0, 0), (4, 5, 6))
        assert not case.path.with_suffix(".json").exists()
        assert case.path.with_suffix(".damaged").exists()

    again = stored_case(tmp_path, (4, 5, 6))

    assert again == case
    assert again.path.read_bytes() == whole
    np.testing.assert_array_equal(again.read((0, 0, 0), (4, 5, 6)), crop)


def test_one_damaged_case_has_all_others_checked_and_made_again(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = make_rows(tmp_path / "pool", 4)
    store = Store(tmp_path / "store")
    cases = [store.open(key) for key in store.ensure(rows, ISO, None, 1).values()]
    before = [case.path.read_bytes() for case in cases]
    for case, data in zip(cases[:3], before, strict=False):
        damaged = bytearray(data)
        damaged[1000] ^= 8
        case.path.write_bytes(damaged)
    with refused(StoreError, "case-damaged", cases[0].path):
        cases[0].read((0, 0, 0), (4, 4, 4))

    keys = store.ensure(rows, ISO, None, 1)
    assert "1 cases were found damaged, so all 3 others of this run are checked" in caplog.text
    assert [store.open(key).path.read_bytes() for key in keys.values()] == before
    assert not list(store.root.glob("*/*.damaged"))

    caplog.clear()
    store.ensure(rows, ISO, None, 1)
    assert "checked" not in caplog.text


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b""])
def test_a_case_torn_during_a_run_is_noticed_before_it_is_mapped(
    tmp_path: Path,
    change: Callable[[bytes], bytes],
) -> None:
    case = stored_case(tmp_path)
    case.path.write_bytes(change(case.path.read_bytes()))
    with refused(StoreError, "case-damaged", case.path):
        case.read((0, 0, 0), (4, 4, 4))


def test_a_flipped_bit_in_one_chunk_harms_no_crop_of_the_others(tmp_path: Path) -> None:
    shape = (40, 90, 150)
    case = written(tmp_path, shape)
    data = bytearray(case.path.read_bytes())
    whole = case.read((0, 0, 0), shape)
    _, (cz, cy, cx) = layout_of(shape)
    _forget(case)
    # The last byte before the seal belongs to the last chunk.
    data[-case.seal.tail_bytes - 1] ^= 1
    case.path.write_bytes(data)

    z, y, x = min(cz, 40), min(cy, 90), min(cx, 150)
    first_chunk = case.read((0, 0, 0), (z, y, x))

    np.testing.assert_array_equal(first_chunk, whole[:, :z, :y, :x])
    with refused(StoreError, "case-damaged", case.path, "chunk"):
        case.read((39, 89, 149), (1, 1, 1))


def written(tmp_path: Path, shape: tuple[int, int, int]) -> StoredCase:
    """A case of smoothed noise, written without going through a scan."""
    data = gaussian_filter(np.random.default_rng(0).normal(size=shape), 1).astype(np.float32)[None]
    record = CaseRecord(
        "hash",
        shape,
        ISO,
        shape,
        ISO,
        (0, 1, 2),
        "ZScoreNormalization",
        False,
        None,
    )
    sealed = write_case(tmp_path / "case.b2nd", data, record)
    assert sealed.seal is not None
    return StoredCase(tmp_path / "case.b2nd", shape, ISO, sealed.seal)


def _forget(case: StoredCase) -> None:
    """As in a process that has not read the case yet."""
    store_case._handles.clear()
    store_case._checked.clear()


def test_a_crop_decompresses_the_blocks_it_touches_and_no_other(tmp_path: Path) -> None:
    shape = (40, 90, 100)
    case = written(tmp_path, shape)
    start = (3, 20, 30)
    size = (20, 40, 36)
    expected = case.read(start, size)
    whole = case.read((0, 0, 0), shape)[None]
    block, chunk = layout_of(shape)
    data = bytearray(case.path.read_bytes())
    array = blosc2.open(str(case.path), mode="r")
    chunks_zyx = [math.ceil(n / c) for n, c in zip(shape, chunk, strict=True)]
    blocks_zyx = [c // b for c, b in zip(chunk, block, strict=True)]

    # Every block that the crop does not touch is overwritten in the file.
    num_spoilt = num_kept = 0
    for number in range(array.schunk.nchunks):
        chunk_index = np.unravel_index(number, chunks_zyx)
        compressed = array.schunk.get_chunk(number)
        at = data.find(compressed)
        # A chunk begins with 32 bytes, followed by the place of each of its blocks.
        begins = [*np.frombuffer(compressed, "<i4", math.prod(blocks_zyx), 32)]
        for i, block_index in enumerate(np.ndindex(*blocks_zyx)):
            touched = True
            for axis in range(3):
                low = chunk_index[axis] * chunk[axis] + block_index[axis] * block[axis]
                ends_after_start = low + block[axis] > start[axis]
                begins_before_end = low < start[axis] + size[axis]
                touched = touched and ends_after_start and begins_before_end
            num_kept += touched
            if not touched and at >= 0:
                end = min((b for b in begins if b > begins[i]), default=len(compressed))
                data[at + begins[i] : at + end] = b"\xff" * (end - begins[i])
                num_spoilt += 1

    assert num_kept == blocks_touched(start, size, block, chunk)
    assert num_spoilt > 20

    case.path.write_bytes(data)
    spoilt = blosc2.open(str(case.path), mode="r")
    z, y, x = (slice(a, a + n) for a, n in zip(start, size, strict=True))

    np.testing.assert_array_equal(spoilt[0:1, z, y, x], expected)
    assert not np.array_equal(spoilt[:], whole)


@pytest.mark.parametrize(
    ("shape", "crop", "at_most"),
    [
        ((192, 192, 192), 128, 1.6),
        ((512, 512, 512), 128, 1.6),
        ((512, 512, 512), 64, 2.4),
        ((30, 512, 512), 128, 1.4),
        ((10, 256, 216), 128, 1.5),
        ((35, 51, 35), 128, 1.1),
        ((60, 150, 150), 128, 1.3),
        ((16, 16, 16), 128, 1.0),
    ],
)
def test_a_crop_decompresses_little_more_than_itself(
    shape: tuple[int, int, int],
    crop: int,
    at_most: float,
) -> None:
    block, chunk = layout_of(shape)
    size = [min(crop, n) for n in shape]
    generator = np.random.default_rng(0)
    room = np.subtract(shape, size)
    starts = [generator.integers(room + 1).tolist() for _ in range(200)]

    voxels = [blocks_touched(start, size, block, chunk) * volume(block) for start in starts]

    # The mean over 200 places of a crop in the scan.
    assert 1.0 <= float(np.mean(voxels)) / volume(size) <= at_most


def test_voxels_of_few_values_are_stored_plainly_and_smooth_ones_shuffled(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    smooth = gaussian_filter(generator.normal(size=(24, 40, 40)), 2).astype(np.float32)[None]
    # Whole numbers divided by 7: few values, with digits that look like noise.
    coarse = (np.round(smooth * 60) / 7).astype(np.float32)

    filters = [compressed(data).schunk.cparams.filters for data in (smooth, coarse)]

    assert [blosc2.Filter.SHUFFLE in used for used in filters] == [True, False]


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (4, 5, 3), (2000, 5, 5), (64, 65, 63), (1500, 1500, 1500), (9, 1024, 1024)],
)
def test_layouts_of_odd_shapes_are_whole_blocks_of_bounded_size(
    shape: tuple[int, int, int],
) -> None:
    block, chunk = layout_of(shape)

    assert volume(block) <= 8192
    assert volume(chunk) <= 64**3
    for b, c, n in zip(block, chunk, shape, strict=True):
        assert b >= 1
        assert c % b == 0
        assert c < n + b


def test_a_crop_names_the_chunks_it_touches_in_c_order() -> None:
    # 10 x 10 x 10 voxels in 3 x 2 x 2 chunks of 4 x 5 x 6; the last one has number 11.
    shape = (10, 10, 10)
    chunk = (4, 5, 6)

    assert chunks_touched((0, 0, 0), (1, 1, 1), shape, chunk) == [0]
    assert chunks_touched((3, 4, 5), (2, 2, 2), shape, chunk) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert chunks_touched((8, 9, 9), (2, 1, 1), shape, chunk) == [11]


def test_parts_share_the_cases_and_meet_in_one_store(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "pool", 9)
    root = tmp_path / "store"
    parts = [StorePart(k, 3) for k in (1, 2, 3)]
    made = [set(Store(root).ensure(rows, ISO, None, 1, part).values()) for part in parts]
    together = set().union(*made)

    # No case is made by two parts, and none by nobody.
    assert sum(len(part) for part in made) == len(together) == 9
    assert Store(root).num_missing(rows, ISO, None) == (0, 9)

    before = snapshot(root)

    assert set(Store(root).ensure(rows, ISO, None, 1).values()) == together
    assert snapshot(root) == before


def test_a_part_knows_what_the_others_have_left_to_do(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "pool", 6)
    store = Store(tmp_path / "store")
    # A copy of a scan is the same case.
    assert store.num_missing([*rows, replace(rows[0], id="copy")], ISO, None) == (6, 6)

    done = store.ensure(rows, ISO, None, 1, StorePart(2, 2))

    assert 0 < len(done) < 6
    assert store.num_missing(rows, ISO, None) == (6 - len(done), 6)


def test_a_part_is_given_as_k_of_n() -> None:
    assert parse_part("3/8") == StorePart(3, 8)
    assert parse_part("1/1") == StorePart()
    for text in ("0/3", "4/3", "1", "a/b", "1/0", "-1/2", "1/3/5"):
        with refused(UsageError, "store-part", text):
            parse_part(text)


def contents(root: Path) -> dict[Path, bytes]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root): path.read_bytes() for path in files}


def test_processes_that_make_the_same_cases_at_once_leave_whole_ones(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "pool", 4)
    root = tmp_path / "store"
    alone = Store(tmp_path / "alone")
    alone.ensure(rows, ISO, None, 1)

    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        results = [pool.submit(Store(root).ensure, rows, ISO, None, 1) for _ in range(3)]
        keys = [result.result() for result in results]

    assert keys[0] == keys[1] == keys[2]
    assert contents(root) == contents(alone.root)


def test_temporary_names_differ_between_machines_with_equal_process_ids(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = []
    for machine in ("node1", "node2"):
        monkeypatch.setattr(platform, "node", lambda machine=machine: machine)
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_bytes(b"x")
            names.append(temporary.name)

    assert len(set(names)) == 2
    assert all(Path(name).match(TEMPORARY_FILES) for name in names)


def test_a_file_that_may_not_grow_ends_like_a_full_disk(tmp_path: Path) -> None:
    """The kernel itself breaks the write off in the middle:

    RLIMIT_FSIZE, in a process of its own.
    """
    rows = make_rows(tmp_path / "pool", 2)
    root = tmp_path / "store"

    with (
        ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool,
        refused(StoreError, "store-not-writable", "full"),
    ):
        pool.submit(_ensure_with_small_files, root, rows).result()
    assert snapshot(root) == {}
    assert len(Store(root).ensure(rows, ISO, None, 1)) == 2


def _ensure_with_small_files(root: Path, rows: list[ScanRow]) -> None:
    resource = pytest.importorskip("resource", reason="Windows knows no such limit")
    # 5000 bytes are less than a case of 5760 voxels needs.
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    Store(root).ensure(rows, ISO, None, 1)


def test_a_giant_scan_is_refused_with_the_figure_before_it_is_read(tmp_path: Path) -> None:
    size = (1500, 1500, 1500)
    row = make_rows(tmp_path / "pool", 1)[0]
    giant = replace(row, shape_vox=size, cropped_shape_vox=size, source="/nowhere.nii.gz")
    store = Store(tmp_path / "store")

    # There is no file: reading it would fail in another way.
    assert store.ensure([giant], ISO, None, 1) == {}
    needed = "1500 x 1500 x 1500 voxels need about 151 GiB of memory"
    assert needed in str(store.failures["pool/0"])


def test_the_default_place_is_in_nnunets_preprocessed_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    assert Store().root == tmp_path / "autoreg_store"


def test_the_json_holds_geometry_and_normalisation_but_no_name_of_the_scan(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "Miller_John", 1)
    store = Store(tmp_path / "store")
    key = store.ensure(rows, ISO, None, 1)["Miller_John/0"]
    text = store.open(key).path.with_suffix(".json").read_text()
    assert "Miller" not in text
    assert json.loads(text)["scheme"] == "ZScoreNormalization"


def test_real_scans_go_through_the_store(tmp_path: Path, shared_data: Path) -> None:
    rows = index_scans(find_scans([], [shared_data / "nifti"]), set(), 1)
    store = Store(tmp_path / "store")
    keys = store.ensure(rows.usable, (3.0, 3.0, 3.0), WINDOW, 1)

    assert {name: store.open(key).shape_vox for name, key in keys.items()} == {
        "nifti/example_ct": (112, 101, 122),
        "nifti/example_mr_sm": (20, 91, 116),
    }

    ct = store.open(keys["nifti/example_ct"]).read((0, 0, 0), (112, 101, 122))

    # Both ends of the window: (-160 - 40) / 100 and (400 - 40) / 100.
    assert ct.min() == pytest.approx(-2.0)
    assert ct.max() == pytest.approx(3.6)
