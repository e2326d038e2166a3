"""The store: cases found by content, written whole, read crop by crop in any process."""

import errno
import json
import logging
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.index import ScanRow, index_scans
from nnunet_autoreg.errors import PlanError, StoreError
from nnunet_autoreg.nnunet_api import crop_resample_normalise, read_scan
from nnunet_autoreg.plan import IntensityWindow
from nnunet_autoreg.store.case import StoredCase
from nnunet_autoreg.store.store import Store, plan_task

ISO = (1.0, 1.0, 1.0)
WINDOW = IntensityWindow(mean=40.0, std=100.0, median=35.0, min=-900.0, max=1500.0, percentile_00_5=-160.0, percentile_99_5=400.0)


def make_rows(folder: Path, num: int = 2, shape: tuple[int, int, int] = (16, 18, 20), zyx_mm: tuple[float, ...] = ISO) -> list[ScanRow]:
    """``num`` scans of noise in ``folder``, indexed."""
    folder.mkdir(exist_ok=True)
    for seed in range(num):
        image = SimpleITK.GetImageFromArray(np.random.default_rng(seed).integers(1, 999, shape).astype(np.int16))
        image.SetSpacing(zyx_mm[::-1])
        SimpleITK.WriteImage(image, str(folder / f"{seed}.nii.gz"))
    return list(index_scans(find_scans([], [folder]), set(), 1).usable)


def snapshot(root: Path) -> dict[str, int]:
    return {p.relative_to(root).as_posix(): p.stat().st_mtime_ns for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_stored_case_is_what_nnunet_makes_of_the_scan(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "pool", 1, zyx_mm=(2.0, 1.0, 1.0))
    store = Store(tmp_path / "store")
    case = store.open(store.ensure(rows, ISO, None, 1)["pool/0"])
    scan = read_scan(Path(rows[0].source))
    expected = crop_resample_normalise(scan.array_CZYX, scan.spacing_mm, ISO, "ZScoreNormalization", False, None)
    assert case.shape_vox == (32, 18, 20) and case.spacing_mm == ISO
    np.testing.assert_array_equal(case.read((0, 0, 0), case.shape_vox), expected)


def test_the_coarsest_axis_is_moved_to_the_front_and_recorded(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "pool", 1, (18, 20, 8), (1.0, 1.0, 4.0))
    store = Store(tmp_path / "store")
    key = store.ensure(rows, (4.0, 1.0, 1.0), None, 1)["pool/0"]
    record = store.record(key)
    assert (record.shape_vox, record.axes) == ((8, 18, 20), (2, 0, 1))
    assert (record.original_shape_vox, record.original_spacing_mm) == ((18, 20, 8), (1.0, 1.0, 4.0))
    raw = read_scan(Path(rows[0].source)).array_CZYX.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(store.open(key).read((0, 0, 0), (8, 18, 20)), (raw - raw.mean()) / raw.std(), atol=1e-5)


def test_a_crop_is_the_same_part_of_the_whole_and_may_not_reach_beyond(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    case = store.open(next(iter(store.ensure(make_rows(tmp_path / "pool", 1), ISO, None, 1).values())))
    whole = case.read((0, 0, 0), (16, 18, 20))
    crop = case.read((3, 4, 5), (6, 7, 8))
    assert crop.shape == (1, 6, 7, 8) and crop.dtype == np.float32
    np.testing.assert_array_equal(crop, whole[:, 3:9, 4:11, 5:13])
    for start, size in (((-1, 0, 0), (2, 2, 2)), ((15, 0, 0), (2, 2, 2)), ((0, 0, 0), (1, 0, 1))):
        with pytest.raises(ValueError, match="beyond"):
            case.read(start, size)


def test_a_padded_crop_is_zero_and_marked_invalid_outside(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    case = store.open(next(iter(store.ensure(make_rows(tmp_path / "pool", 1), ISO, None, 1).values())))
    crop, valid = case.read_padded((-2, 10, -1), (20, 10, 22))
    assert crop.shape == (1, 20, 10, 22) and valid.shape == (20, 10, 22)
    np.testing.assert_array_equal(crop[:, 2:18, :8, 1:21], case.read((0, 10, 0), (16, 8, 20)))
    assert int(valid.sum()) == 16 * 8 * 20 and valid[2:18, :8, 1:21].all()
    assert not crop[0][~valid].any()
    nothing, outside = case.read_padded((100, 0, 0), (4, 4, 4))
    assert not nothing.any() and not outside.any()


def test_nothing_is_made_twice(tmp_path: Path) -> None:
    rows, store = make_rows(tmp_path / "pool"), Store(tmp_path / "store")
    keys = store.ensure(rows, ISO, None, 1)
    before = snapshot(store.root)
    assert Store(tmp_path / "store").ensure(rows, ISO, None, 1) == keys
    assert snapshot(store.root) == before and len(before) == 4


def test_the_same_content_under_another_name_is_the_same_case(tmp_path: Path) -> None:
    row = make_rows(tmp_path / "pool", 1)[0]
    keys = Store(tmp_path / "store").ensure([row, replace(row, id="other")], ISO, None, 1)
    assert keys["other"] == keys["pool/0"]


def test_the_key_knows_content_spacing_and_normalisation(tmp_path: Path) -> None:
    row = make_rows(tmp_path / "pool", 1)[0]
    other = replace(WINDOW, mean=0.0)
    tasks = [
        plan_task(row, ISO, None), plan_task(row, (2.0, 1.0, 1.0), None), plan_task(replace(row, content_hash="0"), ISO, None),
        plan_task(replace(row, modality="CT"), ISO, WINDOW), plan_task(replace(row, modality="CT"), ISO, other),
        plan_task(replace(row, cropped_shape_vox=(8, 18, 20)), ISO, None)]
    assert len({task.key for task in tasks}) == len(tasks)
    assert plan_task(row, (1.00001, 1.0, 1.0), WINDOW).key == tasks[0].key


def test_masked_z_scores_are_for_scans_that_cropping_shrinks_below_three_quarters(tmp_path: Path) -> None:
    row = make_rows(tmp_path / "pool", 1)[0]
    assert not plan_task(replace(row, cropped_shape_vox=(12, 18, 20)), ISO, None).use_mask
    assert plan_task(replace(row, cropped_shape_vox=(11, 18, 20)), ISO, None).use_mask
    assert not plan_task(replace(row, cropped_shape_vox=(4, 18, 20), modality="CT"), ISO, WINDOW).use_mask


def test_ct_without_a_window_is_refused_before_work(tmp_path: Path) -> None:
    rows = [replace(row, modality="CT") for row in make_rows(tmp_path / "pool", 1)]
    with pytest.raises(PlanError, match="ct_window"):
        Store(tmp_path / "store").ensure(rows, ISO, None, 1)


def test_workers_make_the_same_cases(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "pool")
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    assert one.ensure(rows, ISO, None, 1) == two.ensure(rows, ISO, None, 2)
    for path in one.root.rglob("*.b2nd"):
        assert path.read_bytes() == (two.root / path.relative_to(one.root)).read_bytes()


@pytest.mark.parametrize("damage", ["truncate", "no_json", "torn_json"])
def test_a_torn_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    rows, store = make_rows(tmp_path / "pool", 1), Store(tmp_path / "store")
    key = store.ensure(rows, ISO, None, 1)["pool/0"]
    path = store.open(key).path
    whole = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(whole[:100])
    elif damage == "no_json":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text('{"content')
    with pytest.raises(StoreError, match="missing or damaged"):
        store.open(key)
    store.ensure(rows, ISO, None, 1)
    assert path.read_bytes() == whole and store.open(key).shape_vox == (16, 18, 20)


def test_a_full_disk_keeps_finished_cases_and_leaves_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, store = make_rows(tmp_path / "pool", 3), Store(tmp_path / "store")
    write, calls = Path.write_bytes, []

    def full_at_the_second(path: Path, data: Any) -> int:
        calls.append(path)
        if len(calls) > 1:
            write(path, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_at_the_second)
    with pytest.raises(StoreError, match="full; finished cases are kept"):
        store.ensure(rows, ISO, None, 1)
    assert sorted(Path(name).suffix for name in snapshot(store.root)) == [".b2nd", ".json"]
    monkeypatch.undo()
    assert len(store.ensure(rows, ISO, None, 1)) == 3


def test_the_disk_need_is_told_before_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with caplog.at_level(logging.INFO):
        Store(tmp_path / "store").ensure(make_rows(tmp_path / "pool", 1), ISO, None, 1)
    assert "1 of 1 cases are missing; they need about" in caplog.text and "will probably be full" in caplog.text


def test_scans_that_vanish_or_change_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, store = make_rows(tmp_path / "pool", 3), Store(tmp_path / "store")
    Path(rows[0].source).unlink()
    shutil.copy(rows[2].source, rows[1].source)
    assert list(store.ensure(rows, ISO, None, 1)) == ["pool/2"]
    assert {name: error.status for name, error in store.failures.items()} == {"pool/0": "unreadable", "pool/1": "changed"}
    assert "pool/0 is left out" in caplog.text


def test_a_scan_that_vanishes_at_a_coarse_spacing_is_left_out(tmp_path: Path) -> None:
    rows, store = make_rows(tmp_path / "pool", 1), Store(tmp_path / "store")
    assert store.ensure(rows, (40.0, 1.0, 1.0), None, 1) == {}
    assert store.failures["pool/0"].status == "spacing"


def test_temporary_files_of_a_killed_run_are_swept_once_they_are_old(tmp_path: Path) -> None:
    import os
    import time

    (tmp_path / "store" / "ab").mkdir(parents=True)
    old, young = tmp_path / "store" / "ab" / ".x.b2nd.1.tmp", tmp_path / "store" / "ab" / ".y.b2nd.2.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    Store(tmp_path / "store").ensure(make_rows(tmp_path / "pool", 1), ISO, None, 1)
    assert not old.exists() and young.exists()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_case_is_pickled_small_and_read_in_other_processes(tmp_path: Path, method: str) -> None:
    store = Store(tmp_path / "store")
    case = store.open(next(iter(store.ensure(make_rows(tmp_path / "pool", 1), ISO, None, 1).values())))
    here = case.read((1, 2, 3), (4, 5, 6))
    assert len(pickle.dumps(case)) < 1000
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        np.testing.assert_array_equal(pool.submit(case.read, (1, 2, 3), (4, 5, 6)).result(), here)


def test_damaged_bytes_and_lost_files_end_in_a_store_error(tmp_path: Path) -> None:
    case = StoredCase(tmp_path / "gone.b2nd", (8, 8, 8), ISO)
    with pytest.raises(StoreError, match="delete it and rerun"):
        case.read((0, 0, 0), (4, 4, 4))


def test_the_default_place_is_in_nnunets_preprocessed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    assert Store().root == tmp_path / "autoreg_store"


def test_the_json_holds_geometry_and_normalisation_but_no_name_of_the_scan(tmp_path: Path) -> None:
    rows, store = make_rows(tmp_path / "Miller_John", 1), Store(tmp_path / "store")
    key = store.ensure(rows, ISO, None, 1)["Miller_John/0"]
    text = store.open(key).path.with_suffix(".json").read_text()
    assert "Miller" not in text and json.loads(text)["scheme"] == "ZScoreNormalization"


def test_real_scans_go_through_the_store(tmp_path: Path, shared_data: Path) -> None:
    rows = index_scans(find_scans([], [shared_data / "nifti"]), set(), 1)
    store = Store(tmp_path / "store")
    keys = store.ensure(rows.usable, (3.0, 3.0, 3.0), WINDOW, 1)
    assert {name: store.open(key).shape_vox for name, key in keys.items()} == {
        "nifti/example_ct": (112, 101, 122), "nifti/example_mr_sm": (20, 91, 116)}
    ct = store.open(keys["nifti/example_ct"]).read((0, 0, 0), (112, 101, 122))
    assert ct.min() == pytest.approx(-2.0) and ct.max() == pytest.approx(3.6)
