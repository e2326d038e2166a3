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
    described = {"labels": {"0": "benign", "1": "malign"}, "modalities": {"0": "CT"}}
    (folder / "dataset.json").write_text(json.dumps(described))
    # Two objects that touch each other. Id 300 does not fit into 8 bits.
    ids = np.zeros((4, 6, 8), np.uint16)
    ids[1, 2:4, 3:5], ids[1, 2:4, 5] = 1, 300
    for case, array, instances in (("a", ids, {"1": 1, "300": 0}), ("b", ids * 0, {})):
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing((1, 2, 3))
        SimpleITK.WriteImage(image, str(folder / f"raw_splitted/labelsTr/{case}.nii.gz"))
        SimpleITK.WriteImage(image, str(folder / f"raw_splitted/imagesTr/{case}_0000.nii.gz"))
        classes = json.dumps({"instances": instances})
        (folder / f"raw_splitted/labelsTr/{case}.json").write_text(classes)
    (tmp_path / "raw").mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    return folder


def test_classes_from_0_become_labels_from_1_and_instances_stay_apart(task, tmp_path, capsys):
    assert main(["-i", str(task), "-d", "16"]) == 0

    made = tmp_path / "raw" / "Dataset016_Luna"
    dataset = json.loads((made / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "benign": 1, "malign": 2}
    assert dataset["numTraining"] == 2

    # Object 1 has class 1 and so label 2, object 300 has class 0 and so label 1.
    labels, frame = read_array(made / "labelsTr" / "a.nii.gz")
    assert labels[1, 2, 3:6].tolist() == [2, 2, 1]
    assert labels.dtype == np.uint8
    # SimpleITK's order is x, y, z; ours is z, y, x.
    assert frame.spacing_mm == (3, 2, 1)

    ids, _ = read_array(made / "instancesTr" / "a.nii.gz")
    assert ids[1, 2, 3:6].tolist() == [1, 1, 300]
    assert labels_of_instances(made / "instancesTr" / "a.json") == {1: 2, 300: 1}

    images = sorted(p.name for p in (made / "imagesTr").iterdir())
    assert images == ["a_0000.nii.gz", "b_0000.nii.gz"]
    assert "2 training cases" in capsys.readouterr().out


def test_test_images_need_no_maps_and_training_images_do(task, tmp_path, caplog):
    raw = task / "raw_splitted"
    (raw / "imagesTs").mkdir()
    # Files that begin with "._" are made by macOS when it copies to other disks. Training case c
    # has no label map.
    image = (raw / "imagesTr" / "a_0000.nii.gz").read_bytes()
    for split, case in (("Ts", "t"), ("Ts", "._t"), ("Tr", "c")):
        (raw / f"images{split}" / f"{case}_0000.nii.gz").write_bytes(image)
    (raw / "labelsTr" / "._a.nii.gz").write_bytes(b"x")

    assert main(["-i", str(task), "-d", "16"]) == 0

    made = tmp_path / "raw" / "Dataset016_Luna"
    assert [p.name for p in (made / "imagesTs").iterdir()] == ["t_0000.nii.gz"]
    assert not (made / "labelsTs").exists()
    training = sorted(p.name for p in (made / "imagesTr").iterdir())
    assert training == ["a_0000.nii.gz", "b_0000.nii.gz"]
    assert logged(caplog, "1 training images", "(first: c)")


def fails(error_class, code, values, *arguments):
    """Run the command's function without what turns errors into lines, and expect an error."""
    with refused(error_class, code, *values):
        main.__wrapped__(list(arguments))


def test_an_error_is_one_line_and_an_exit_code(task, capsys):
    assert main(["-i", str(task), "-d", "0"]) == 2

    lines = capsys.readouterr().err.strip().splitlines()

    assert len(lines) == 1
    assert lines[0].startswith("autoreg_convert_nndetection: ")
    assert "-d 0" in lines[0]


def test_a_task_that_cannot_be_converted_leaves_nothing_behind(task, tmp_path):
    line = ["-i", str(task), "-d", "16"]
    raw = tmp_path / "raw"
    labels = task / "raw_splitted" / "labelsTr"
    images = task / "raw_splitted"

    fails(UsageError, "convert-number-range", ["-d 0", 999], "-i", str(task), "-d", "0")
    fails(UsageError, "convert-no-task", ["dataset.json"], *line, "-i", str(raw), "--name", "x")
    fails(UsageError, "convert-dataset-name", ["'a b'", "--name"], *line, "--name", "a b")

    # Class 5 becomes label 6, which the task does not have.
    (labels / "a.json").write_text('{"instances": {"1": 1, "300": 5}}')
    fails(ObjectsError, "objects-unknown-label", ["a.nii.gz", 300, "label 6"], *line)
    (labels / "a.json").write_text('{"instances": {"1": 1}}')
    fails(ObjectsError, "objects-unlisted", ["a.nii.gz", "id 300"], *line)
    (labels / "a.json").write_text('{"instances": {"1": 1, "300": 0}}')

    # Test case t has its second channel only.
    (images / "imagesTs").mkdir()
    (images / "imagesTs" / "t_0001.nii.gz").touch()
    fails(ObjectsError, "convert-no-image", ["test case t", "t_0000.nii.gz"], *line)

    whole = (labels / "a.nii.gz").read_bytes()
    (labels / "a.nii.gz").write_bytes(whole[:40])
    fails(ObjectsError, "objects-image-unreadable", ["a.nii.gz"], *line)
    (labels / "a.nii.gz").write_bytes(whole)

    (images / "imagesTr" / "a_0000.nii.gz").unlink()
    fails(ObjectsError, "convert-no-image", ["a_0000.nii.gz"], *line)

    assert list(raw.iterdir()) == []

    (raw / "Dataset016_Other").mkdir()
    fails(UsageError, "convert-number-used", ["-d 16", "Dataset016_Other"], *line)

    # The number 17 is free.
    (task / "dataset.json").write_text("{}")
    fails(PlanError, "convert-task-format", ["dataset.json", '"labels"'], *line[:-1], "17")
    for names, wrong in ((["a", "b", "a"], "'a'"), (["ignore"], "'ignore'")):
        described = {"labels": dict(enumerate(names)), "modalities": {"0": "CT"}}
        (task / "dataset.json").write_text(json.dumps(described))
        fails(PlanError, "convert-class-name", ["dataset.json", wrong], *line[:-1], "17")
