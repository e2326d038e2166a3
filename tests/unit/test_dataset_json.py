"""``dataset.json`` by nnU-Net's rules: channels by position, listed files, case ids with dots,
regions.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import SimpleITK

from nnunet_autoreg.benchmark.probe_data import read_labels
from nnunet_autoreg.corpus.candidates import Candidate
from nnunet_autoreg.corpus.dataset_json import read_dataset_json, structures_of
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.index import index_scans
from nnunet_autoreg.corpus.locations import (
    label_map_of,
    locations_of_boxes,
    locations_of_labels,
    read_boxes,
)
from nnunet_autoreg.corpus.rows import ScanRow, read_index, write_index
from nnunet_autoreg.downstream.probe import LabelledCrop, Probe, labelled_crops, stored_labels
from nnunet_autoreg.errors import UsageError

SHAPE = (16, 18, 20)
LABELS = {"background": 0, "a": 1}


def write_image(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))
    return path


def scan(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).integers(1, 1000, SHAPE)
    return values.astype(np.int16)


def label_map() -> np.ndarray:
    """Label 1 in one corner, label 2 in the opposite one."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[:8, :8, :8] = 1
    labels[8:, 8:, 8:] = 2
    return labels


def describe(folder: Path, **content: object) -> Path:
    """Write dataset.json of a dataset with one channel and one label, or with other contents."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"channel_names": {"0": "MRI"}, "labels": LABELS, "file_ending": ".nii.gz", **content}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def make_dataset(root: Path, cases: list[str], **content: object) -> Path:
    folder = describe(root / "Dataset030_Rules", **content)
    for number, case in enumerate(cases):
        write_image(folder / "imagesTr" / f"{case}_0000.nii.gz", scan(number))
        write_image(folder / "labelsTr" / f"{case}.nii.gz", label_map())
    return folder


def usable(folder: Path) -> list[Candidate]:
    return [c for c in find_scans([], [folder]) if not c.status]


def rows_of(folder: Path) -> tuple[ScanRow, ...]:
    return index_scans(find_scans([], [folder]), set(), 1, salt="pepper").usable


@pytest.mark.parametrize("key", ["0", "1", "ct"])
def test_a_channel_has_the_name_at_its_position_for_any_key(tmp_path: Path, key: str) -> None:

    folder = make_dataset(tmp_path, ["x"], channel_names={key: "CT"})

    assert [c.channel for c in usable(folder)] == ["CT"]
    assert read_labels(folder).channel_names == ("CT",)


def test_names_are_taken_in_the_order_of_the_file(tmp_path: Path) -> None:
    # The keys would give the opposite order; nnU-Net goes by the order in the file.
    folder = make_dataset(tmp_path, ["x"], channel_names={"1": "T1", "0": "CT"})
    write_image(folder / "imagesTr" / "x_0001.nii.gz", scan(9))

    assert [c.channel for c in usable(folder)] == ["T1", "CT"]


def test_file_numbers_that_begin_at_1_are_positions_too(tmp_path: Path) -> None:
    folder = describe(tmp_path / "Dataset031_One", channel_names={"1": "T1", "2": "CT"})
    for number in (1, 2):
        write_image(folder / "imagesTr" / f"x_{number:04d}.nii.gz", scan(number))

    assert [c.channel for c in usable(folder)] == ["T1", "CT"]


def listed_dataset(root: Path) -> Path:
    """Two cases outside nnU-Net's folders, listed with paths that begin with a variable."""
    for number in range(2):
        write_image(root / "store" / f"p{number}.nii.gz", scan(number))
        write_image(root / "store" / f"p{number}_truth.nii.gz", label_map())
    entries = {}
    for n in range(2):
        entries[f"p{n}"] = {
            "images": [f"$MY_SCANS/p{n}.nii.gz"],
            "label": f"${{MY_SCANS}}/p{n}_truth.nii.gz",
        }
    return describe(root / "Dataset032_Listed", dataset=entries)


def test_variables_in_listed_paths_are_expanded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = listed_dataset(tmp_path)
    monkeypatch.setenv("MY_SCANS", str(tmp_path / "store"))

    found = usable(folder)

    assert [c.path for c in found] == [tmp_path / "store" / f"p{n}.nii.gz" for n in range(2)]


def test_a_variable_that_is_not_set_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = listed_dataset(tmp_path)
    monkeypatch.delenv("MY_SCANS", raising=False)

    found = find_scans([], [folder])

    assert [c.status for c in found] == ["unreadable"] * 2
    assert all("$MY_SCANS" in c.reason and "export" in c.reason for c in found)


def test_listed_label_maps_give_places_and_are_not_scans(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed_dataset(tmp_path)
    monkeypatch.setenv("MY_SCANS", str(tmp_path / "store"))

    found = find_scans([], [tmp_path])
    index = index_scans(found, set(), 1, salt="pepper")
    write_index(tmp_path / "scans.csv", index.rows)
    # Through the file, as a run that is resumed reads it.
    rows = [row for row in read_index(tmp_path / "scans.csv") if row.status == "ok"]

    truths = [tmp_path / "store" / f"p{n}_truth.nii.gz" for n in range(2)]
    assert [c.status for c in found if c.path in truths] == ["labels"] * 2
    assert [label_map_of(row) for row in rows] == truths
    assert {place.structure for place in locations_of_labels(rows, 1)} == {"Dataset032: a, MRI"}
    # Label 2 of the map is not named in dataset.json: unknown (-1).
    assert set(np.unique(stored_labels(rows[0], SHAPE)).tolist()) == {-1, 0, 1}


def test_a_listed_file_that_is_missing_is_reported(tmp_path: Path) -> None:
    listed = {"p": {"images": ["gone.nii.gz"], "label": "l.nii.gz"}}
    folder = describe(tmp_path / "Dataset033_Gone", dataset=listed)

    (found,) = find_scans([], [folder])

    assert found.status == "unreadable"
    assert "dataset.json lists it" in found.reason


def test_case_ids_with_dots_keep_their_label_maps_and_boxes(tmp_path: Path) -> None:
    # Instance UIDs as case ids: what follows a dot is not an ending of the file.
    cases = [f"1.3.6.1.4.1.{n}" for n in (100, 101)]
    rows = rows_of(make_dataset(tmp_path, cases))
    # The second row names no scan: "1" must not be found as the beginning of "1.3.6...".
    (tmp_path / "boxes.csv").write_text(
        "scan,class,zmin,ymin,xmin,zmax,ymax,xmax\n"
        f"{cases[0]}_0000,a,1,1,1,3,3,3\n"
        "1,b,1,1,1,3,3,3\n",
    )

    boxes = locations_of_boxes(read_boxes(tmp_path / "boxes.csv"), rows)

    assert [row.case for row in rows] == cases
    assert [label_map_of(row).name for row in rows] == [f"{case}.nii.gz" for case in cases]
    assert [(place.scan, place.structure) for place in boxes] == [(rows[0].id, "a, MRI")]


def test_a_value_of_regions_is_named_by_its_smallest_region() -> None:
    # Value 3 belongs to three regions, of which "active" has the fewest values. "ignore" is not a
    # structure.
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": [3], "ignore": 4}

    assert structures_of(regions) == {1: "whole", 2: "core", 3: "active"}
    # A label may be a string; a region of values that have labels of their own adds nothing.
    assert structures_of({"background": 0, "a": 1, "b": "2", "both": [1, 2]}) == {1: "a", 2: "b"}
    # Entries of other types are passed over.
    assert structures_of({"background": 0, "odd": {"x": 1}, "a": 1}) == {1: "a"}
    assert structures_of(["a"]) == {}


def test_regions_serve_places_and_probe(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    folder = make_dataset(tmp_path, ["x", "y"], labels=labels, regions_class_order=[1, 2])
    rows = rows_of(folder)

    names = {place.structure for place in locations_of_labels(rows, 1)}

    assert names == {"Dataset030: whole, MRI", "Dataset030: core, MRI"}
    assert set(np.unique(stored_labels(rows[0], SHAPE)).tolist()) == {0, 1, 2}


# Damaged, a list, channels without numbers, a listed case without files.
@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"channel_names": ["CT"]}', '{"dataset": {"p": 3}}'],
)
def test_a_file_that_is_not_a_dataset_json_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)

    with pytest.raises(UsageError) as refused:
        read_dataset_json(tmp_path)

    assert str(tmp_path / "dataset.json") in str(refused.value)


class Stored:
    """A stored case on the scan's own voxels."""

    shape_vox = SHAPE

    def read_padded(
        self,
        start: tuple[int, ...],
        size: tuple[int, ...],
    ) -> tuple[np.ndarray, np.ndarray]:
        voxels = np.random.default_rng(0).normal(size=size).astype(np.float32)
        return voxels, np.ones(size, bool)


def crops_of(folder: Path) -> list[LabelledCrop]:
    """Return the labelled crops of the probe; the first scan is held out for validation."""
    rows = rows_of(folder)
    plan = SimpleNamespace(
        data=SimpleNamespace(salt_free=True),
        run=SimpleNamespace(seed=0),
        sequence=SimpleNamespace(crop_size_vox=(16, 16, 16)),
        encoder=SimpleNamespace(token_size_vox=(4, 4, 4)),
    )
    cases = {row.id: Stored() for row in rows}
    return labelled_crops(cast(Any, plan), rows, cast(Any, cases), {rows[0].id})


def test_the_probe_works_for_regions_and_for_case_ids_with_dots(tmp_path: Path) -> None:
    cases = [f"1.2.{n}" for n in range(4)]
    folder = make_dataset(tmp_path, cases, labels={"background": 0, "whole": [1, 2], "core": [2]})

    crops = crops_of(folder)

    assert len(crops) == 4
    assert Probe(crops).works


def test_a_probe_that_could_never_give_a_result_is_left_out_with_one_line(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The labels name none of the values of the label maps.
    labels = {"background": 0, "other": 7}
    folder = make_dataset(tmp_path, [f"c{n}" for n in range(4)], labels=labels)

    assert crops_of(folder) == []
    assert [r.levelname for r in caplog.records if "probe" in r.getMessage()] == ["WARNING"]
