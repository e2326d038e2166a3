"""Finding scans: nnU-Net datasets, plain folders, and a row for everything that is left out."""

import json
from pathlib import Path

import pytest
from refusals import logged, refused

from nnunet_autoreg.corpus.candidates import Candidate
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.io.names import natural_key


def touch(path: Path) -> Path:
    """Write a file that is found by its name and cannot be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def make_dataset(root: Path, name: str = "Dataset007_Brain", cases: int = 2) -> Path:
    """Write a dataset of nnU-Net with two channels per case and its labels."""
    folder = root / name
    for case in range(1, cases + 1):
        for channel in range(2):
            touch(folder / "imagesTr" / f"b_{case}_{channel:04d}.nii.gz")
        touch(folder / "labelsTr" / f"b_{case}.nii.gz")
    described = {"channel_names": {"0": "T1", "1": "CT"}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


def scans(found: list[Candidate]) -> list[str]:
    return [c.id for c in found if not c.status]


def left_out(found: list[Candidate]) -> dict[str, str]:
    return {c.id: c.status for c in found if c.status}


def test_every_channel_of_a_dataset_is_a_scan_with_its_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    touch(make_dataset(tmp_path) / "imagesTs" / "b_9_0000.nii.gz")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))

    found = find_scans(["7"], [])

    # Two training cases of two channels and a test case of one.
    names = ("1_0000", "1_0001", "2_0000", "2_0001", "9_0000")
    assert scans(found) == [f"Dataset007_Brain/b_{name}" for name in names]
    assert [(c.case, c.channel) for c in found[:2]] == [("b_1", "T1"), ("b_1", "CT")]
    assert left_out(found) == {"Dataset007_Brain/labelsTr": "labels"}


def test_labels_are_never_taken_when_a_parent_of_datasets_is_given(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    make_dataset(tmp_path, "Dataset008_Other", 1)

    found = find_scans([], [tmp_path])

    # Two cases and one case with two channels each.
    assert len(scans(found)) == 6
    assert {c.path.parent.name for c in found if not c.status} == {"imagesTr"}


@pytest.mark.parametrize(
    ("part", "num"),
    [
        ("imagesTr", 4),
        ("labelsTr", 0),
        (".", 4),
    ],
)
def test_a_part_of_a_dataset_is_recognised(tmp_path: Path, part: str, num: int) -> None:
    folder = make_dataset(tmp_path) / part

    assert len(scans(find_scans([], [folder]))) == num


def test_a_file_reached_twice_is_one_candidate(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_dataset(tmp_path / "raw")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "again.nii.gz").symlink_to(folder / "imagesTr" / "b_1_0000.nii.gz")

    # The dataset by name, its parent, itself, and a folder with a link to one of its files, twice.
    inputs = [tmp_path / "raw", folder, tmp_path / "links", tmp_path / "links"]
    found = find_scans(["Dataset007_Brain"], inputs)

    assert len(scans(found)) == 4


def test_the_file_list_of_a_dataset_json_is_followed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "Dataset007_Brain"
    folder.mkdir()
    touch(tmp_path / "elsewhere" / "x.nii.gz")
    data = {
        "channel_names": {"0": "T1"},
        "dataset": {"p1": {"images": ["../elsewhere/x.nii.gz"], "label": "y.nii.gz"}},
    }
    (folder / "dataset.json").write_text(json.dumps(data))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))

    (one,) = find_scans(["7"], [])

    assert (one.id, one.case, one.channel) == ("Dataset007_Brain/p1_0000", "p1", "T1")


def test_plain_folders_are_searched_deeply_in_natural_order(
    tmp_path: Path,
) -> None:
    # Numbers by value, endings in any case, spaces and umlauts in folders. b.raw belongs to b.mhd.
    names = ("s10.nii.gz", "s2.NII.GZ", "deep er/ü/s1.Nrrd", "a.mha", "b.mhd")
    for name in (*names, "b.raw", "notes.txt", "c.json", "README"):
        touch(tmp_path / "pool" / name)

    found = find_scans([], [tmp_path / "pool"])

    assert scans(found) == ["pool/a", "pool/b", "pool/s2", "pool/s10", "pool/deep er/ü/s1"]
    assert left_out(found) == {"pool/(other files)": "ignored"}
    assert found[-1].reason == "no image endings: 1 without ending, 1 .json, 1 .txt"


def test_hidden_files_get_a_row_each(tmp_path: Path) -> None:
    # "._x" is a file of macOS beside x, not a scan.
    touch(tmp_path / "pool" / "._x.nii.gz")
    touch(tmp_path / "pool" / ".cache" / "y.nii.gz")

    assert left_out(find_scans([], [tmp_path / "pool"])) == {
        "pool/._x.nii.gz": "hidden",
        "pool/.cache": "hidden",
    }


def test_link_loops_end_and_are_reported(tmp_path: Path) -> None:
    touch(tmp_path / "pool" / "sub" / "x.nii.gz")
    (tmp_path / "pool" / "sub" / "up").symlink_to(tmp_path / "pool")

    found = find_scans([], [tmp_path / "pool"])

    assert scans(found) == ["pool/sub/x"]
    assert left_out(found) == {"pool/sub/up": "link"}


def test_broken_dicom_gets_one_row_per_folder_without_any_file_name(
    tmp_path: Path,
) -> None:
    touch(tmp_path / "pool" / "a" / "Doe_1.dcm")
    touch(tmp_path / "pool" / "a" / "Doe_2.DCM")
    # The mark is right and nothing follows it.
    touch(tmp_path / "pool" / "b" / "IM0001").write_bytes(b"\0" * 128 + b"DICM")

    found = find_scans([], [tmp_path / "pool"])

    assert [(c.status, c.path.name, c.reason) for c in found] == [
        (
            "unreadable",
            "a",
            "not DICOM: the mark at byte 128 is missing; is it another kind of file? (2 files)",
        ),
        (
            "unreadable",
            "b",
            "its DICOM header cannot be parsed: it is damaged, cut short, or does not say what it "
            "is (0008,0016); copy or export the file again (1 file)",
        ),
    ]
    # Names of files often hold names of patients.
    assert all(c.id.startswith("pool/DICOM-") and "Doe" not in c.id for c in found)


def test_ids_stay_unique_when_names_meet(tmp_path: Path) -> None:
    for name in ("one/pool/x.nii.gz", "one/pool/x.nii", "two/pool/x.nii.gz"):
        touch(tmp_path / name)

    found = find_scans([], [tmp_path / "one" / "pool", tmp_path / "two" / "pool"])

    assert scans(found) == ["pool/x", "pool/x#2", "pool/x#3"]


def test_a_single_file_may_be_given(tmp_path: Path) -> None:
    touch(tmp_path / "pool" / "other.nii.gz")
    wanted = touch(tmp_path / "pool" / "x.nii.gz")

    assert scans(find_scans([], [wanted])) == ["pool/x"]


def test_a_missing_folder_is_refused_with_a_close_match(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()

    with refused(UsageError, "input-missing", tmp_path / "scan", "'scans'"):
        find_scans([], [tmp_path / "scan"])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_that_is_not_utf8_is_reported_and_can_be_printed(
    encoding: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: encoding)
    folder = tmp_path / "pool"
    folder.mkdir()
    # The name in Latin-1, as old file servers have it.
    try:
        (folder / b"sch\xe4del.nii.gz".decode("utf-8", "surrogateescape")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")

    found = find_scans([], [folder])

    assert found[0].status == "unreadable" and found[0].id.encode(
        "utf-8",
    )  # raises an error if it cannot
    # Another encoding of the shell would not help.
    assert "rename" in found[0].reason
    assert "PYTHONUTF8" not in found[0].reason


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1"])
def test_a_shell_of_another_encoding_is_named_with_its_remedy(
    encoding: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Under such a shell Python cannot decode the first name.
    for name in ("schädel.nii.gz", "skull.nii.gz"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: encoding)

    found = {one.path.name: one for one in find_scans([], [tmp_path])}

    reason = found.pop("schädel.nii.gz").reason
    assert encoding in reason
    assert "export PYTHONUTF8=1" in reason
    assert [one.status for one in found.values()] == [""]


def test_natural_order_counts_numbers() -> None:
    assert sorted(["s10", "s9", "S1", "t"], key=natural_key) == ["S1", "s9", "s10", "t"]
    # Python itself converts no number of more than 4300 digits.
    assert sorted(["s" + "1" * 5000, "s007", "s8"], key=natural_key)[:2] == ["s007", "s8"]


def test_a_damaged_dataset_json_of_a_dataset_asked_for_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_dataset(tmp_path)
    (folder / "dataset.json").write_text("{")
    monkeypatch.setenv("nnUNet_raw", str(folder.parent))

    with refused(UsageError, "dataset-json-unreadable", "dataset.json"):
        find_scans([folder.name], [])


@pytest.mark.parametrize(
    ("reader", "is_own"),
    [("MyReader", True), ("NibabelIOWithReorient", False)],
)
def test_a_custom_reader_of_a_dataset_is_warned_of(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    reader: str,
    is_own: bool,
) -> None:
    folder = make_dataset(tmp_path)
    described = json.loads((folder / "dataset.json").read_text())
    described["overwrite_image_reader_writer"] = reader
    (folder / "dataset.json").write_text(json.dumps(described))

    find_scans([], [folder])

    assert logged(caplog, "overwrite_image_reader_writer", reader) == is_own
