"""A task of nnDetection becomes an nnU-Net dataset."""

import json

import numpy as np
import pytest
import SimpleITK
from refusals import logged, refused

from nnunet_autoreg.cli.convert_nndetection import main
from nnunet_autoreg.detection.images import read_array
from nnunet_autoreg.detection.instances import labels_of_instances
from nnunet_autoreg.errors import ObjectsError, PlanError, UsageError


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Two training cases, one of them empty, with classes 0 and 1."""
    folder = tmp_path / "Task016_Luna"
    (folder / "raw_splitted" / "imagesTr").mkdir(parents=True)
    (folder / "raw_splitted" / "labelsTr").mkdir()
    (folder / "dataset.json").write_text(
        json.dumps({"labels": {"0": "benign", "1": "malign"}, "modalities": {"0": "CT"}}),
    )
    ids = np.zeros((4, 6, 8), np.uint16)
    ids[1, 2:4, 3:5], ids[1, 2:4, 5] = 1, 300
    for case, array, instances in (("a", ids, {"1": 1, "300": 0}), ("b", ids * 0, {})):
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing((1, 2, 3))
        SimpleITK.WriteImage(image, str(folder / f"raw_splitted/labelsTr/{case}.nii.gz"))
        SimpleITK.WriteImage(image, str(folder / f"raw_splitted/imagesTr/{case}_0000.nii.gz"))
        (folder / f"raw_splitted/labelsTr/{case}.json").write_text(
            json.dumps({"instances": instances}),
        )
    (tmp_path / "raw").mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    return folder


def test_classes_from_0_become_labels_from_1_and_instances_stay_apart(task, tmp_path, capsys):
    assert main(["-i", str(task), "-d", "16"]) == 0

    made = tmp_path / "raw" / "Dataset016_Luna"
    dataset = json.loads((made / "dataset.json").read_text())

    assert (
        dataset["labels"] == {"background": 0, "benign": 1, "malign": 2}
        and dataset["numTraining"] == 2
    )

    labels, frame = read_array(made / "labelsTr" / "a.nii.gz")

    assert (
        labels[1, 2, 3:6].tolist() == [2, 2, 1]
        and labels.dtype == np.uint8
        and frame.spacing_mm == (3, 2, 1)
    )

    ids, _ = read_array(made / "instancesTr" / "a.nii.gz")

    assert ids[1, 2, 3:6].tolist() == [1, 1, 300]
    assert labels_of_instances(made / "instancesTr" / "a.json") == {1: 2, 300: 1}
    assert sorted(p.name for p in (made / "imagesTr").iterdir()) == [
        "a_0000.nii.gz",
        "b_0000.nii.gz",
    ]
    assert "2 training cases" in capsys.readouterr().out


def test_test_images_need_no_maps_and_training_images_do(task, tmp_path, caplog):
    raw = task / "raw_splitted"
    (raw / "imagesTs").mkdir()
    for split, case in (("Ts", "t"), ("Ts", "._t"), ("Tr", "c")):
        (raw / f"images{split}" / f"{case}_0000.nii.gz").write_bytes(
            (raw / "imagesTr" / "a_0000.nii.gz").read_bytes(),
        )
    (raw / "labelsTr" / "._a.nii.gz").write_bytes(b"x")

    assert main(["-i", str(task), "-d", "16"]) == 0

    made = tmp_path / "raw" / "Dataset016_Luna"

    assert [p.name for p in (made / "imagesTs").iterdir()] == ["t_0000.nii.gz"] and not (
        made / "labelsTs"
    ).exists()
    assert sorted(p.name for p in (made / "imagesTr").iterdir()) == [
        "a_0000.nii.gz",
        "b_0000.nii.gz",
    ]
    assert logged(caplog, "1 training images", "(first: c)")


def fails(error_class, code, values, *arguments):
    """Run the command's function without what turns errors into lines, and expect an error."""
    with refused(error_class, code, *values):
        main.__wrapped__(list(arguments))


def test_an_error_is_one_line_and_an_exit_code(task, capsys):
    assert main(["-i", str(task), "-d", "0"]) == 2

    lines = capsys.readouterr().err.strip().splitlines()

    assert len(lines) == 1 and lines[0].startswith("autoreg_convert_nndetection: ")
    assert "-d 0" in lines[0]


def test_what_cannot_be_converted_leaves_nothing_behind(task, tmp_path):
    line = ["-i", str(task), "-d", "16"]
    raw, labels = tmp_path / "raw", task / "raw_splitted" / "labelsTr"
    fails(UsageError, "convert-number-range", ["-d 0", 999], "-i", str(task), "-d", "0")
    fails(UsageError, "convert-no-task", ["dataset.json"], *line, "-i", str(raw), "--name", "x")
    fails(UsageError, "convert-dataset-name", ["'a b'", "--name"], *line, "--name", "a b")
    (labels / "a.json").write_text('{"instances": {"1": 1, "300": 5}}')
    fails(ObjectsError, "objects-unknown-label", ["a.nii.gz", 300, "label 6"], *line)
    (labels / "a.json").write_text('{"instances": {"1": 1}}')
    fails(ObjectsError, "objects-unlisted", ["a.nii.gz", "id 300"], *line)
    (task / "raw_splitted" / "imagesTs").mkdir()
    (task / "raw_splitted" / "imagesTs" / "t_0001.nii.gz").touch()
    (labels / "a.json").write_text('{"instances": {"1": 1, "300": 0}}')
    fails(ObjectsError, "convert-no-image", ["test case t", "t_0000.nii.gz"], *line)
    whole = (labels / "a.nii.gz").read_bytes()
    (labels / "a.nii.gz").write_bytes(whole[:40])
    fails(ObjectsError, "objects-image-unreadable", ["a.nii.gz"], *line)
    (labels / "a.nii.gz").write_bytes(whole)
    (task / "raw_splitted" / "imagesTr" / "a_0000.nii.gz").unlink()
    fails(ObjectsError, "convert-no-image", ["a_0000.nii.gz"], *line)

    assert list(raw.iterdir()) == []

    (raw / "Dataset016_Other").mkdir()
    fails(UsageError, "convert-number-used", ["-d 16", "Dataset016_Other"], *line)
    (task / "dataset.json").write_text("{}")
    fails(PlanError, "convert-task-format", ["dataset.json", '"labels"'], *line[:-1], "17")
    for names, wrong in ((["a", "b", "a"], "'a'"), (["ignore"], "'ignore'")):
        (task / "dataset.json").write_text(
            json.dumps({"labels": dict(enumerate(names)), "modalities": {"0": "CT"}}),
        )
        fails(PlanError, "convert-class-name", ["dataset.json", wrong], *line[:-1], "17")
