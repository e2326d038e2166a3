"""What separates the volumes of one DICOM series, and which derived images are used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dicom_files as d
import numpy as np
import pytest

from nnunet_autoreg.corpus.candidates import Candidate
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.grid import grid_of_scan
from nnunet_autoreg.corpus.index import index_scans
from nnunet_autoreg.corpus.manifest import describe, read_manifest
from nnunet_autoreg.corpus.read import load_scan

# Tags of the elements that may separate volumes.
ACQUISITION, TEMPORAL, TRIGGER, ECHO = "t00200012", "t00200100", "t00181060", "t00180081"
INVERSION, FLIP, B_VALUE, GRADIENT, THICKNESS, DISTANCE = (
    "t00180082",
    "t00181314",
    "t00189087",
    "t00189089",
    "t00180050",
    "t00180088",
)
IMAGE_TYPE, AGENT, ACQUISITION_TIME = "t00080008", "t00180010", "t00080032"


def write_pass(folder: Path, array: Any, first: int, heights: Sequence[float], **tags: Any) -> None:
    """One pass of the series 1.2.3: slices at ``heights`` mm, numbered from ``first`` on."""
    for number, (pixels, height) in enumerate(zip(array, heights, strict=True), start=first):
        uid = {"t00080018": ("UI", f"1.2.3.9.{number}"), "t00200013": ("IS", str(number)), **tags}
        sop_class = uid.pop("sop_class", d.MR)
        values = d.slice_values(number, sop_class=sop_class, z_mm=height, **uid)
        d.write(folder / f"{number:04d}.dcm", values, pixels)


def usable(folder: Path, split_4d: bool = False) -> list[Candidate]:
    return [c for c in find_scans([], [folder], split_4d=split_4d) if not c.status]


def voxels(found: Candidate) -> np.ndarray:
    return load_scan(found.path, found.part).array_CZYX[0]


def turned(array: Any) -> np.ndarray:
    return array[:, ::-1, ::-1].astype(np.float32)


def is_one_of(array: np.ndarray, others: Sequence[Any]) -> bool:
    for other in others:
        if array.shape == other.shape and bool((array == turned(other)).all()):
            return True
    return False


# The elements of the first and of the second volume. "instance number": only the numbers differ.
MARKS = {
    "acquisition": [{ACQUISITION: ("IS", str(n))} for n in (1, 2)],
    "time": [{TEMPORAL: ("IS", str(n))} for n in (1, 2)],
    "echo": [{ECHO: ("DS", str(n))} for n in (10, 80)],
    "inversion time": [{INVERSION: ("DS", str(n))} for n in (100, 2500)],
    "trigger": [{TRIGGER: ("DS", str(n))} for n in (50, 350)],
    "flip angle": [{FLIP: ("DS", str(n))} for n in (5, 26)],
    "b-value": [{B_VALUE: ("FD", [n])} for n in (0.0, 800.0)],
    "gradient direction": [{GRADIENT: ("FD", n)} for n in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])],
    "contrast agent": [{}, {AGENT: ("LO", "Gadobutrol")}],
    # Magnitude and phase of one acquisition.
    "phase": [{IMAGE_TYPE: ("CS", f"ORIGINAL\\PRIMARY\\{part}")} for part in "MP"],
    "acquisition time": [{ACQUISITION_TIME: ("TM", time)} for time in ("101530", "101531.5")],
    "instance number": [{}, {}],
}
# Where the slices of the second volume lie; the first has 8 slices from 0 to 14 mm.
COVERAGES = {
    "shifted": [4.0 + 2 * k for k in range(8)],
    "longer": [2.0 * k for k in range(8)] + [16.0],
}


@pytest.mark.parametrize("coverage", COVERAGES)
@pytest.mark.parametrize("mark", MARKS)
def test_volumes_of_other_coverage_are_separate_stacks(
    tmp_path: Path,
    mark: str,
    coverage: str,
) -> None:
    second = COVERAGES[coverage]
    arrays = [d.volume(8), d.volume(len(second), seed=1)]
    write_pass(tmp_path / "pool", arrays[0], 1, [2.0 * k for k in range(8)], **MARKS[mark][0])
    write_pass(tmp_path / "pool", arrays[1], 101, second, **MARKS[mark][1])

    found = usable(tmp_path / "pool")

    # A mixture of both would have other voxels than either.
    assert len(found) == 2
    assert all(is_one_of(voxels(one), arrays) for one in found)


@pytest.mark.parametrize(
    ("mark", "size"),
    [
        *((mark, THICKNESS) for mark in MARKS),
        *((mark, DISTANCE) for mark in ("acquisition time", "instance number")),
    ],
)
def test_two_stacks_are_never_interleaved_into_one(tmp_path: Path, mark: str, size: str) -> None:
    arrays = [d.volume(8), d.volume(8, seed=1)]
    # Slices 2 mm thick. The second stack is 1 mm higher, so its slices overlap those of the first.
    for number, offset in enumerate((0.0, 1.0)):
        heights = [offset + 2.0 * k for k in range(8)]
        tags = {size: ("DS", "2.0"), **MARKS[mark][number]}
        write_pass(tmp_path / "pool", arrays[number], 1 + 100 * number, heights, **tags)

    found = usable(tmp_path / "pool")

    assert len(found) == 2
    assert all(is_one_of(voxels(one), arrays) for one in found)


def test_every_stack_of_a_series_has_its_own_origin(tmp_path: Path) -> None:
    for number, first in enumerate((0.0, 5.0)):
        heights = [first + 2.0 * k for k in range(8)]
        array = d.volume(8, seed=number)
        write_pass(tmp_path / "pool", array, 1 + 100 * number, heights, **MARKS["echo"][number])

    grids = [grid_of_scan(c.path, c.part) for c in usable(tmp_path / "pool")]

    assert sorted(grid.origin_mm[2] for grid in grids) == [0.0, 5.0]
    for grid in grids:
        assert (grid.shape_vox, grid.spacing_mm) == ((8, 18, 20), (2.0, 1.5, 1.0))


@pytest.mark.parametrize("mark", ["acquisition", "trigger", "acquisition time", "instance number"])
def test_packages_that_fit_between_each_other_stay_one_volume(tmp_path: Path, mark: str) -> None:
    array = d.volume(16)
    # Odd and even slices are measured one after the other, 1 mm thick: together they fill the
    # volume.
    for number in range(2):
        heights = [2.0 * k + number for k in range(8)]
        tags = {THICKNESS: ("DS", "1.0"), **MARKS[mark][number]}
        write_pass(tmp_path / "pool", array[number::2], 1 + 100 * number, heights, **tags)

    (found,) = usable(tmp_path / "pool")

    np.testing.assert_array_equal(voxels(found), turned(array))


# Nothing, the distance of the slices in one volume, and the empty gap that some files state.
@pytest.mark.parametrize("distance", [{}, {DISTANCE: ("DS", "1.0")}, {DISTANCE: ("DS", "0.1")}])
@pytest.mark.parametrize("mark", ["acquisition time", "instance number"])
def test_packages_of_unknown_thickness_stay_one_volume(
    tmp_path: Path,
    mark: str,
    distance: dict[str, Any],
) -> None:
    array = d.volume(16)
    for number in range(2):
        heights = [2.0 * k + number for k in range(8)]
        tags = {**distance, **MARKS[mark][number]}
        write_pass(tmp_path / "pool", array[number::2], 1 + 100 * number, heights, **tags)

    (found,) = usable(tmp_path / "pool")

    np.testing.assert_array_equal(voxels(found), turned(array))


def test_slabs_side_by_side_stay_one_volume(tmp_path: Path) -> None:
    array = d.volume(16)
    for number in range(4):
        heights = [2.0 * (4 * number + k) for k in range(4)]
        slab = array[4 * number : 4 * number + 4]
        tags = {ACQUISITION: ("IS", str(number + 1))}
        write_pass(tmp_path / "pool", slab, 1 + 4 * number, heights, **tags)

    (found,) = usable(tmp_path / "pool")

    np.testing.assert_array_equal(voxels(found), turned(array))


def test_a_missing_slice_is_not_hidden_by_cutting_the_series(tmp_path: Path) -> None:
    d.write_series(tmp_path / "pool", d.volume(16), skip=(8,))

    (found,) = find_scans([], [tmp_path / "pool"])

    assert found.status == "slices"
    assert "missing" in found.reason


def test_the_second_pass_may_run_backwards(tmp_path: Path) -> None:
    arrays = [d.volume(8), d.volume(8, seed=1)]
    forwards = [2.0 * k for k in range(8)]
    backwards = [4.0 + height for height in reversed(forwards)]
    write_pass(tmp_path / "pool", arrays[0], 1, forwards)
    write_pass(tmp_path / "pool", arrays[1][::-1], 101, backwards)

    found = usable(tmp_path / "pool")

    assert len(found) == 2
    assert all(is_one_of(voxels(one), arrays) for one in found)


@pytest.mark.parametrize(
    "mark",
    [
        "acquisition",
        "trigger",
        "inversion time",
        "flip angle",
        "gradient direction",
        "contrast agent",
        "acquisition time",
    ],
)
def test_volumes_at_the_same_places_are_split_by_what_separates_them(
    tmp_path: Path,
    mark: str,
) -> None:
    arrays = [d.volume(8), d.volume(8, seed=1)]
    # Trigger times also differ from slice to slice of one volume, so they separate volumes only
    # at one position.
    trigger = [{TRIGGER: ("DS", str(n))} for n in (0, 300)]
    marks = MARKS.get(mark, trigger)
    for number in range(2):
        for k in range(8):
            # Instance numbers run through both volumes of a slice before the next slice.
            first = 1 + 2 * k + number
            one_slice = arrays[number][k : k + 1]
            write_pass(tmp_path / "pool", one_slice, first, [2.0 * k], **marks[number])

    (refused,) = find_scans([], [tmp_path / "pool"])
    found = usable(tmp_path / "pool", split_4d=True)

    assert refused.status == "4d"
    assert mark in refused.reason
    assert [is_one_of(voxels(one), arrays) for one in found] == [True, True]


def test_instance_numbers_that_run_slice_by_slice_give_the_order(tmp_path: Path) -> None:
    arrays = [d.volume(8, seed=n) for n in range(3)]
    for k in range(8):
        for number in range(3):
            one_slice = arrays[number][k : k + 1]
            write_pass(tmp_path / "pool", one_slice, 1 + 3 * k + number, [2.0 * k])

    found = usable(tmp_path / "pool", split_4d=True)

    assert len(found) == 3
    for one, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(voxels(one), turned(array))


def test_diffusion_directions_of_several_b_values_are_split(tmp_path: Path) -> None:
    marks = [
        (0.0, None),
        (500.0, [1.0, 0.0, 0.0]),
        (500.0, [0.0, 1.0, 0.0]),
        (1000.0, [1.0, 0.0, 0.0]),
        (1000.0, [0.0, 1.0, 0.0]),
    ]
    arrays = [d.volume(8, seed=n) for n in range(len(marks))]
    # Nothing follows from the instance numbers here.
    numbers = np.random.default_rng(0).permutation(len(marks) * 8).reshape(len(marks), 8)
    for (b_value, direction), array, of_volume in zip(marks, arrays, numbers, strict=True):
        tags: dict[str, Any] = {B_VALUE: ("FD", [b_value])}
        # Volumes without diffusion weighting have no direction.
        if direction is not None:
            tags[GRADIENT] = ("FD", direction)
        for k in range(8):
            write_pass(tmp_path / "pool", array[k : k + 1], int(of_volume[k]), [2.0 * k], **tags)

    (refused,) = find_scans([], [tmp_path / "pool"])
    found = usable(tmp_path / "pool", split_4d=True)

    assert refused.status == "4d"
    assert f"{len(marks)} volumes" in refused.reason
    assert len(found) == len(marks)
    assert all(is_one_of(voxels(one), arrays) for one in found)


def test_one_sop_instance_for_all_files_does_not_make_them_copies(tmp_path: Path) -> None:
    # The id that must be unique is the same in all files, as after a faulty anonymisation.
    arrays = [d.volume(8, seed=n) for n in range(2)]
    for number, array in enumerate(arrays):
        tags = {"t00080018": ("UI", "1.2.3.9"), TEMPORAL: ("IS", str(number + 1))}
        write_pass(tmp_path / "pool", array, 1 + 100 * number, [2.0 * k for k in range(8)], **tags)

    (refused,) = find_scans([], [tmp_path / "pool"])
    found = usable(tmp_path / "pool", split_4d=True)

    assert refused.status == "4d"
    assert len(found) == 2
    assert all(is_one_of(voxels(one), arrays) for one in found)


# Positions are written with one decimal or none, so the distances of slices alternate.
@pytest.mark.parametrize(
    ("step", "decimals"),
    [
        (0.625, 1),
        (1.25, 1),
        (0.7, 1),
        (3.3, 0),
    ],
)
def test_rounded_positions_are_even_within_their_rounding(
    tmp_path: Path,
    step: float,
    decimals: int,
) -> None:
    heights = [round(-50 + step * k, decimals) for k in range(32)]
    write_pass(tmp_path / "pool", d.volume(32), 1, heights, sop_class=d.CT)

    (found,) = usable(tmp_path / "pool")

    # Over 31 steps the two ends are each rounded by at most half a unit of the last decimal.
    tolerance = 10**-decimals / 31
    spacing = load_scan(found.path, found.part).spacing_mm
    assert spacing[0] == pytest.approx(step, abs=tolerance)


@pytest.mark.parametrize(
    "heights",
    [
        # Steps of 0.6 and then of 0.7 mm; a missing slice at 3 mm; one slice half a millimetre too
        # high.
        [0.0, 0.6, 1.2, 1.8, 2.4, 3.1, 3.8, 4.5, 5.2],
        [0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        [0.0, 2.0, 4.0, 6.5, 8.0, 10.0],
    ],
)
def test_gaps_that_rounding_does_not_explain_are_still_refused(
    tmp_path: Path,
    heights: list[float],
) -> None:
    write_pass(tmp_path / "pool", d.volume(len(heights)), 1, heights)

    (found,) = find_scans([], [tmp_path / "pool"])

    assert found.status == "slices"


def derived(folder: Path, words: str, **tags: Any) -> Path:
    """Write a series that the scanner derived from others, in the study of ``write_series``."""
    return d.write_series(
        folder,
        d.volume(seed=5),
        sop_class=d.MR,
        series="1.4",
        **{IMAGE_TYPE: ("CS", words)},
        **tags,
    )


def test_secondary_images_are_used_if_nothing_better_is_there(tmp_path: Path) -> None:
    derived(tmp_path / "pool", "DERIVED\\SECONDARY")

    (found,) = find_scans([], [tmp_path / "pool"])

    assert found.status == ""
    assert voxels(found).shape == (8, 18, 20)


def test_secondary_images_give_way_to_originals_of_their_study_only(tmp_path: Path) -> None:
    derived(tmp_path / "pool" / "a", "DERIVED\\SECONDARY")
    other_study = {"t0020000D": ("UI", "1.2.78")}
    array = d.volume(seed=6)
    d.write_series(tmp_path / "pool" / "b", array, sop_class=d.MR, series="1.5", **other_study)
    assert len(usable(tmp_path / "pool")) == 2

    # An original of the same study.
    d.write_series(tmp_path / "pool" / "c", d.volume(seed=7), sop_class=d.MR, series="1.6")
    found = find_scans([], [tmp_path / "pool"])

    assert sorted(c.status for c in found) == ["", "", "derived"]
    assert next(c for c in found if c.status).path == tmp_path / "pool" / "a"


@pytest.mark.parametrize("words", ["DERIVED\\SECONDARY", "DERIVED\\PRIMARY\\DIFFUSION\\ADC"])
def test_a_manifest_overrules_that_images_are_derived(tmp_path: Path, words: str) -> None:
    derived(tmp_path / "pool" / "a", words)
    d.write_series(tmp_path / "pool" / "b", sop_class=d.MR, series="1.6")
    (tmp_path / "m.csv").write_text("path,modality\npool/a,MR\n")
    (tmp_path / "whole.csv").write_text("path,modality\npool,MR\n")
    found = find_scans([], [tmp_path / "pool"])
    manifest = read_manifest(tmp_path / "m.csv")

    described, _ = describe(found, manifest)
    of_all, _ = describe(found, read_manifest(tmp_path / "whole.csv"))

    assert [c.status for c in described] == ["", ""]
    # A row for the whole pool does not mean this series in particular.
    assert sorted(c.status for c in found) == ["", "derived"] == sorted(c.status for c in of_all)
    rows = index_scans(found, set(), 1, salt="x", manifest=manifest).rows
    assert [row.status for row in rows] == ["ok", "ok"]


def test_a_mosaic_is_named_with_the_tool_that_converts_it(tmp_path: Path) -> None:
    # A mosaic of Siemens shows all slices of a volume as tiles of one picture.
    for number in range(3):
        tags = {
            IMAGE_TYPE: ("CS", "ORIGINAL\\PRIMARY\\M\\ND\\MOSAIC"),
            ACQUISITION: ("IS", str(number)),
        }
        write_pass(tmp_path / "pool", d.volume(1, seed=number), number, [0.0], **tags)

    (found,) = find_scans([], [tmp_path / "pool"])

    assert found.status == "mosaic"
    # Splitting by time would not help.
    assert "dcm2niix" in found.reason
    assert "--split-4d" not in found.reason


@pytest.mark.parametrize(("same_patient", "warned"), [(True, True), (False, False)])
def test_one_patient_id_for_everybody_is_warned_of(
    tmp_path: Path,
    caplog: Any,
    same_patient: bool,
    warned: bool,
) -> None:
    # Three studies. With one id for all of them, validation patients cannot be separated.
    for number in range(3):
        tags = {
            "t00100020": ("LO", "ANONYMOUS" if same_patient else f"P{number}"),
            "t0020000D": ("UI", f"1.7.{number}"),
        }
        folder = tmp_path / "pool" / str(number)
        d.write_series(folder, d.volume(seed=number), series=f"1.8.{number}", **tags)

    index_scans(find_scans([], [tmp_path / "pool"], salt="x"), set(), 1, salt="x")

    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == int(warned)
    assert all("--manifest" in message for message in warnings)
