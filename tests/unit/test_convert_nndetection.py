"""A task of nnDetection becomes an nnU-Net dataset."""

import json

import numpy as np
import pytest
import SimpleITK

from nnunet_autoreg.cli.convert_nndetection import main
from nnunet_autoreg.detection.images import read_array
from nnunet_autoreg.detection.instances import labels_of_instances


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Two training cases, one of them empty, with classes 0 and 1."""
    folder = tmp_path / "Task016_Luna"
    (folder / "raw_splitted" / "imagesTr").mkdir(parents=True)
    (folder / "raw_splitted" / "labelsTr").mkdir()
    (folder / "dataset.json").write_text(
        json.dumps({"labels": {"0": "benign", "1": "malign"}, "modalities": {"0": "CT"}})
    )
    ids = np.zeros((4, 6, 8), np.uint16)
    ids[1, 2:4, 3:5], ids[1, 2:4, 5] = 1, 300
    for case, array, instances in (("a", ids, {"1": 1, "300": 0}), ("b", ids * 0, {})):
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing((1, 2, 3))
        SimpleITK.WriteImage(image, str(folder / f"raw_splitted/labelsTr/{case}.nii.gz"))
        SimpleITK.WriteImage(image, str(folder / f"raw_splitted/imagesTr/{case}_0000.nii.gz"))
        (folder / f"raw_splitted/labelsTr/{case}.json").write_text(
            json.dumps({"instances": instances})
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


def test_test_images_come_along_without_maps_and_training_images_without_are_named(
    task, tmp_path, caplog
):
    raw = task / "raw_splitted"
    (raw / "imagesTs").mkdir()
    for split, case in (("Ts", "t"), ("Ts", "._t"), ("Tr", "c")):
        (raw / f"images{split}" / f"{case}_0000.nii.gz").write_bytes(
            (raw / "imagesTr" / "a_0000.nii.gz").read_bytes()
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
    assert "1 training images have no map of instances and are left out (first: c)" in caplog.text


def fails(capsys, message, *arguments):
    assert main(list(arguments)) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("autoreg_convert_nndetection: ") and message in error


def test_what_cannot_be_converted_leaves_nothing_behind(task, tmp_path, capsys):
    raw, labels = tmp_path / "raw", task / "raw_splitted" / "labelsTr"
    fails(capsys, "must lie between 1 and 999", "-i", str(task), "-d", "0")
    fails(capsys, "there is no", "-i", str(tmp_path), "-d", "16", "--name", "x")
    fails(capsys, "is no name for a dataset", "-i", str(task), "-d", "16", "--name", "a b")
    (labels / "a.json").write_text('{"instances": {"1": 1, "300": 5}}')
    fails(capsys, "instance 300 has label 6, which is no class", "-i", str(task), "-d", "16")
    (labels / "a.json").write_text('{"instances": {"1": 1}}')
    fails(capsys, "the map holds id 300, which the JSON does not list", "-i", str(task), "-d", "16")
    (task / "raw_splitted" / "imagesTs").mkdir()
    (task / "raw_splitted" / "imagesTs" / "t_0001.nii.gz").touch()
    (labels / "a.json").write_text('{"instances": {"1": 1, "300": 0}}')
    fails(capsys, "test case t has no image", "-i", str(task), "-d", "16")
    whole = (labels / "a.nii.gz").read_bytes()
    (labels / "a.nii.gz").write_bytes(whole[:40])
    fails(capsys, "a.nii.gz cannot be read as an image", "-i", str(task), "-d", "16")
    (labels / "a.nii.gz").write_bytes(whole)
    (task / "raw_splitted" / "imagesTr" / "a_0000.nii.gz").unlink()
    fails(capsys, "has no image", "-i", str(task), "-d", "16")
    assert list(raw.iterdir()) == []
    (raw / "Dataset016_Other").mkdir()
    fails(capsys, "Dataset016_Other has this number", "-i", str(task), "-d", "16")
    (task / "dataset.json").write_text("{}")
    fails(capsys, 'must have "labels"', "-i", str(task), "-d", "17")
    for names, message in (
        (["a", "b", "a"], "'a' is the name of several classes"),
        (["ignore"], "'ignore' means something else"),
    ):
        (task / "dataset.json").write_text(
            json.dumps({"labels": dict(enumerate(names)), "modalities": {"0": "CT"}})
        )
        fails(capsys, message, "-i", str(task), "-d", "17")
