"""The pool in numbers, checked by hand."""

import numpy as np
import pytest

from nnunet_autoreg.corpus.fingerprint import Fingerprint, fingerprint, transpose_axes
from nnunet_autoreg.corpus.index import Index, ScanRow
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.records import from_jsonable, to_jsonable


def row(name: str, shape: tuple[int, int, int], spacing: tuple[float, float, float], **changes: object) -> ScanRow:
    values: dict[str, object] = {
        "id": name, "dataset": "d", "case": name, "channel": "", "modality": "MR", "source": name, "shape_vox": shape,
        "spacing_mm": spacing, "cropped_shape_vox": shape, "content_hash": name, "status": "ok", "reason": ""}
    return ScanRow(**{**values, **changes})  # type: ignore[arg-type]


def make_index(*rows: ScanRow, hu: tuple[float, ...] = ()) -> Index:
    return Index(rows, np.array(hu, dtype=np.float32))


@pytest.mark.parametrize(("spacing", "axes"), [
    ((1.0, 1.0, 1.0), (0, 1, 2)), ((10.0, 1.5, 1.5), (0, 1, 2)), ((1.0, 1.0, 3.0), (2, 0, 1)), ((0.5, 3.0, 1.0), (1, 0, 2)),
    ((1.0, 1.04, 1.0), (0, 1, 2)), ((1.0, 1.06, 1.0), (1, 0, 2)),
])
def test_a_clearly_coarser_axis_comes_to_the_front(spacing: tuple[float, ...], axes: tuple[int, ...]) -> None:
    assert transpose_axes(spacing) == axes


def test_medians_are_taken_over_transposed_scans() -> None:
    found = fingerprint(make_index(row("a", (10, 20, 30), (4.0, 1.0, 1.0)), row("b", (20, 30, 10), (1.0, 1.0, 4.0)),
                                   row("c", (10, 20, 30), (4.0, 1.0, 1.0))))
    assert found.spacing_mm == found.resampled_to_mm == (4.0, 1.0, 1.0)
    assert found.median_shape_vox == (10, 20, 30)
    assert found.total_vox == 3 * 6000


def test_shapes_are_those_at_the_asked_spacing() -> None:
    found = fingerprint(make_index(row("a", (10, 20, 30), (4.0, 1.0, 1.0))), (2.0, 2.0, 2.0))
    assert found.median_shape_vox == (20, 10, 15) and found.total_vox == 3000
    assert found.spacing_mm == (4.0, 1.0, 1.0) and found.resampled_to_mm == (2.0, 2.0, 2.0)


def test_one_odd_scan_does_not_move_the_medians() -> None:
    ordinary = [row(str(n), (40, 50, 60), (1.0, 1.0, 1.0)) for n in range(4)]
    assert fingerprint(make_index(*ordinary, row("odd", (4, 900, 900), (25.0, 1.0, 1.0)))).median_shape_vox == (40, 50, 60)


def test_only_usable_rows_count_and_channels_of_a_case_are_one_case() -> None:
    rows = [row("a", (9, 9, 9), (1.0, 1.0, 1.0), case="p", channel="T1"),
            row("b", (9, 9, 9), (1.0, 1.0, 1.0), case="p", channel="CT", modality="CT", cropped_shape_vox=(9, 9, 3)),
            row("c", (9, 9, 9), (1.0, 1.0, 1.0), case="q", status="duplicate")]
    found = fingerprint(make_index(*rows, hu=(0.0, 100.0)))
    assert (found.num_scans, found.num_cases, found.channel_names) == (2, 1, ("CT", "T1"))
    assert set(found.modalities) == {"CT", "MR"} and found.scans_per_modality == {"CT": 1, "MR": 1}
    assert found.relative_size_after_cropping == pytest.approx(2 / 3)
    assert found.ct_window is not None and (found.ct_window.mean, found.ct_window.std, found.ct_window.max) == (50.0, 50.0, 100.0)


def test_a_fingerprint_survives_json() -> None:
    found = fingerprint(make_index(row("a", (10, 20, 30), (4.0, 1.0, 1.0))))
    assert from_jsonable(Fingerprint, to_jsonable(found), "test") == found


def test_a_pool_without_usable_scans_says_what_was_met() -> None:
    with pytest.raises(UsageError, match=r"none of the 2 .* \(2 labelmap\)"):
        fingerprint(make_index(*(row(n, (9, 9, 9), (1.0, 1.0, 1.0), status="labelmap") for n in "ab")))
    with pytest.raises(UsageError, match="give other datasets"):
        fingerprint(make_index())
