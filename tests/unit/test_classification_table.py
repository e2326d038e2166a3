"""The table of classes, its folds, and autoreg_classes_to_labels."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from class_tables import write_dataset, write_table
from refusals import logged, refused

from nnunet_autoreg.classification.body_labels import body_of, write_body_labels
from nnunet_autoreg.classification.folds import (
    OUR_FILE,
    STOCK_FILE,
    check_fold,
    find_folds,
    make_folds,
    patients_in_two_parts,
)
from nnunet_autoreg.classification.table import ClassTable, public_table, read_table
from nnunet_autoreg.cli.classes_to_labels import main
from nnunet_autoreg.errors import ClassesError, ScanError

CASES = ["a1", "a2", "b1", "c1", "d1"]
ROWS = ["a1,A,x", "a2,A,x", "b1,B,x", "c1,C,y", "d1,D,y"]


def read(
    folder: Path,
    rows: list[str],
    header: str = "case,patient,diagnosis",
    **dataset: Any,
) -> ClassTable:
    table = write_table(folder / "classesTr.csv", rows, header)
    return read_table(table, dataset, CASES)


def test_columns_with_few_values_are_tasks_and_the_others_are_listed(tmp_path: Path) -> None:
    # Two values, three values, and 30 different ones, which cannot be classes.
    rows = [f"case{n},{n % 2},{n % 3},{n}.5" for n in range(30)]
    file = write_table(tmp_path / "classesTr.csv", rows, "case,sex,grade,size")

    table = read_table(file, {}, [f"case{n}" for n in range(30)])

    sex, grade = table.tasks
    assert (sex.name, sex.classes, sex.ordinal) == ("sex", ("0", "1"), False)
    # Three or more numbers have an order.
    assert (grade.name, grade.classes, grade.ordinal) == ("grade", ("0", "1", "2"), True)
    assert list(table.ignored) == ["size"]
    # 5 % 2 = 1 and 5 % 3 = 2.
    assert table.labels["case5"] == (1, 2)


def test_dataset_json_names_tasks_and_the_order_of_classes(tmp_path: Path) -> None:
    described = {"diagnosis": {"classes": ["y", "x"], "ordinal": True}}

    table = read(tmp_path, ROWS, classification=described)

    (task,) = table.tasks
    assert (task.classes, task.ordinal) == (("y", "x"), True)
    # The file names y first, so y is class 0.
    assert table.labels == {"a1": (1,), "a2": (1,), "b1": (1,), "c1": (0,), "d1": (0,)}


def test_the_public_table_holds_only_tasks_and_numbers_of_patients(tmp_path: Path) -> None:
    # Two scans per patient, a class that is not known, and a column that is not a task.
    rows = [f"case{n},DOE_{n // 2},{'' if n == 3 else n % 3},DOE_{n}" for n in range(30)]
    file = write_table(tmp_path / "classesTr.csv", rows, "case,patient,grade,name")
    cases = [f"case{n}" for n in range(30)]
    table = read_table(file, {}, cases)
    copy = tmp_path / "copy.csv"

    copy.write_text(public_table(table))

    again = read_table(copy, {}, cases)
    assert "DOE" not in copy.read_text()
    assert (again.tasks, again.labels) == (table.tasks, table.labels)
    assert again.patient_of["case7"] == again.patient_of["case6"] != again.patient_of["case8"]


def test_an_empty_cell_is_a_class_that_is_not_known(tmp_path: Path) -> None:
    table = read(tmp_path, [*ROWS[:1], "a2,A,", *ROWS[2:]])

    assert table.labels["a2"] == (-1,)
    # Of five cases a1 and b1 are x, c1 and d1 are y; a2 does not count.
    assert table.counts(0) == [2, 2]


def test_patients_come_from_the_table_or_from_the_names(tmp_path: Path) -> None:
    named = read(tmp_path, ROWS)
    rows = ["a1,x", "a2,x", "b1,x", "c1,y", "d1,y"]
    by_name = read(tmp_path, rows, "case,diagnosis")

    assert named.patient_of == {"a1": "A", "a2": "A", "b1": "B", "c1": "C", "d1": "D"}
    assert by_name.patient_of["a1"] == "a1"
    assert "5 patients" in by_name.patient_rule


@pytest.mark.parametrize(
    ("rows", "code", "named"),
    [
        (ROWS[:-1], "classes-case-without-row", "d1"),
        ([*ROWS, "e1,E,y"], "classes-row-without-case", "e1"),
        # Line 1 is the header, so the first row of a1 is line 2.
        ([*ROWS, "a1,A,x"], "classes-duplicate-row", "lines 2 and 7"),
        ([row.replace("y", "x") for row in ROWS], "classes-single-class", "'x'"),
        ([row[:-1] for row in ROWS], "classes-all-missing", "diagnosis"),
        # One patient with y cannot be in both training and validation.
        ([*ROWS[:3], "c1,C,x", ROWS[4]], "classes-one-fold", "'y'"),
        ([*ROWS[:4], "d1,D"], "classes-unreadable", "line 6"),
        ([], "classes-no-row", "below its first line"),
    ],
)
def test_a_wrong_table_is_refused_with_file_and_value(
    tmp_path: Path,
    rows: list[str],
    code: str,
    named: str,
) -> None:
    with refused(ClassesError, code, tmp_path / "classesTr.csv", named):
        read(tmp_path, rows)


def test_other_faults_of_the_table_are_refused(tmp_path: Path) -> None:

    with refused(ClassesError, "classes-no-file", tmp_path / "none.csv", "case,diagnosis"):
        read_table(tmp_path / "none.csv", {}, CASES)
    with refused(ClassesError, "classes-no-case-column", "scan"):
        read(tmp_path, ROWS, "scan,patient,diagnosis")
    with refused(ClassesError, "classes-duplicate-column", "'diagnosis'", "2 times"):
        read(tmp_path, [f"{row},z" for row in ROWS], "case,patient,diagnosis, diagnosis")
    with refused(ClassesError, "classes-no-task", "only cases"):
        read(tmp_path, [row.split(",")[0] for row in ROWS], "case")
    with refused(ClassesError, "classes-unknown-class", "'y'", "c1", "x, z"):
        read(tmp_path, ROWS, classification={"diagnosis": ["x", "z"]})
    with refused(ClassesError, "classes-no-column", "'diagnoses'", "'diagnosis'"):
        read(tmp_path, ROWS, classification={"diagnoses": ["x", "y"]})
    with refused(ClassesError, "classes-dataset-json", "classification"):
        read(tmp_path, ROWS, classification={"diagnosis": ["x", "x"]})

    (tmp_path / "classesTr.csv").write_bytes(b"case,diagnosis\n\xff,x\n")
    with refused(ClassesError, "classes-unreadable", tmp_path / "classesTr.csv"):
        read_table(tmp_path / "classesTr.csv", {}, CASES)


def many(counts: dict[str, int], scans: int = 2) -> ClassTable:
    """A table with this number of patients of each class, each with some scans."""
    from nnunet_autoreg.classification.table import ClassificationTask

    labels = {}
    patient_of = {}
    for index, (kind, number) in enumerate(counts.items()):
        for n in range(number):
            for scan in range(scans):
                case = f"{kind}{n:03}_{scan}"
                labels[case] = (index,)
                patient_of[case] = f"{kind}{n}"
    tasks = (ClassificationTask("kind", tuple(counts)),)
    return ClassTable(tasks, labels, patient_of, "", {})


def test_folds_are_stratified_and_keep_patients_together() -> None:
    table = many({"rare": 5, "usual": 50})

    folds = make_folds(table)

    assert folds == make_folds(table)
    assert patients_in_two_parts(folds, table.patient_of) == []
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(table.labels)
        # Each of five folds: 5 / 5 = 1 patient and 50 / 5 = 10 patients, with two scans each.
        kinds = Counter(table.labels[case][0] for case in fold["val"])
        assert kinds == {0: 2, 1: 20}

    # Every case is validated exactly once.
    validated = [case for fold in folds for case in fold["val"]]
    assert sorted(validated) == sorted(table.labels)


def test_a_foreign_file_of_folds_is_used_or_left_unchanged(tmp_path: Path) -> None:
    table = many({"x": 5, "y": 5})
    cases = sorted(table.labels)
    whole = [{"train": cases[4:], "val": cases[:4]}]
    # The two scans of patient x0 lie in different parts.
    torn = [{"train": cases[1:], "val": cases[:1]}]
    stock = tmp_path / STOCK_FILE

    stock.write_text(json.dumps(whole))
    assert find_folds(tmp_path, table)[0] == whole
    assert not (tmp_path / OUR_FILE).exists()

    stock.write_text(json.dumps(torn))
    folds, source = find_folds(tmp_path, table)
    assert len(folds) == 5
    assert "x0" in source
    assert json.loads(stock.read_text()) == torn
    # The second time our own file is read.
    assert find_folds(tmp_path, table)[0] == folds


def test_folds_of_other_cases_are_refused(tmp_path: Path) -> None:
    find_folds(tmp_path, many({"x": 5, "y": 5}))

    with refused(ClassesError, "classes-other-folds", tmp_path / OUR_FILE):
        find_folds(tmp_path, many({"x": 5, "y": 6}))

    (tmp_path / OUR_FILE).write_text("[1]")
    with refused(ClassesError, "classes-damaged-folds", tmp_path / OUR_FILE):
        find_folds(tmp_path, many({"x": 5, "y": 5}))

    with refused(ClassesError, "classes-few-patients", 4):
        make_folds(many({"x": 2, "y": 2}))


def test_a_fold_that_cannot_be_trained_is_refused() -> None:
    table = many({"x": 2, "y": 2}, scans=1)

    with refused(ClassesError, "classes-empty-fold", "fold 3"):
        check_fold({"train": list(table.labels), "val": []}, table, "3")
    with refused(ClassesError, "classes-single-class-fold", "kind"):
        check_fold({"train": ["x000_0"], "val": ["y000_0"]}, table, "0")
    with refused(ClassesError, "classes-case-without-row", "z"):
        check_fold({"train": ["z"], "val": ["y000_0"]}, table, "0")

    # Class x is not validated, which is allowed with a warning.
    warnings = check_fold({"train": ["x000_0", "y000_0"], "val": ["y001_0"]}, table, "0")

    assert len(warnings) == 1
    assert "'x'" in warnings[0]


def test_label_maps_are_written_only_for_cases_without_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import SimpleITK

    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    dataset = write_dataset(tmp_path, {row[:2]: row[3:] for row in ROWS})
    (dataset / "labelsTr").mkdir()
    # A label map that somebody has drawn must not be overwritten, even if it cannot be read.
    (dataset / "labelsTr" / "a1.nii.gz").write_bytes(b"mine")

    assert main(["-d", "960"]) == 0

    printed = capsys.readouterr().out
    assert "wrote 4 label maps" in printed
    assert "diagnosis (categorical): 3 x, 2 y" in printed
    assert (dataset / "labelsTr" / "a1.nii.gz").read_bytes() == b"mine"
    written = SimpleITK.ReadImage(str(dataset / "labelsTr" / "b1.nii.gz"))
    # The body in the scans of write_dataset is a cube of 8 voxels.
    assert SimpleITK.GetArrayFromImage(written).sum() == 8**3
    # The second time nothing is left to write.
    assert write_body_labels(dataset)[1] == []


def test_label_maps_are_written_without_a_name_of_the_channel(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, {row[:2]: row[3:] for row in ROWS})
    file = dataset / "dataset.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described | {"channel_names": {}}))

    assert len(write_body_labels(dataset)[1]) == len(ROWS)


def test_the_body_is_found_in_ct_and_in_scans_without_zeros() -> None:
    random = np.random.default_rng(0)
    ct = np.full((12, 12, 12), -1000, dtype=np.float32)
    # The body at 40 HU with a lung at -800 HU inside, which belongs to the body.
    ct[3:9, 3:9, 3:9] = 40
    ct[5:7, 5:7, 5:7] = -800
    # A scan whose background is noise and never 0.
    noisy = random.uniform(1, 3, (12, 12, 12)).astype(np.float32)
    noisy[3:9, 3:9, 3:9] += 100

    assert body_of(ct, is_ct=True).sum() == 6**3
    assert body_of(noisy, is_ct=False).sum() == pytest.approx(6**3, rel=0.1)


def test_datasets_that_cannot_be_prepared_are_refused(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = {row[:2]: row[3:] for row in ROWS}

    dataset = write_dataset(tmp_path, rows, labels={"background": 0})
    with refused(ClassesError, "classes-no-label", dataset / "dataset.json", '"body"'):
        write_body_labels(dataset)

    dataset = write_dataset(tmp_path, rows)
    (dataset / "imagesTr" / "a1_0000.nii.gz").write_bytes(b"no image")
    with refused(ScanError, "scan-unreadable", "a1_0000.nii.gz"):
        write_body_labels(dataset)

    for image in (dataset / "imagesTr").iterdir():
        image.unlink()
    with refused(ClassesError, "classes-no-images", dataset / "imagesTr"):
        write_body_labels(dataset)


def test_a_class_of_dataset_json_that_no_case_has_is_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read(tmp_path, ROWS, classification={"diagnosis": ["x", "y", "z"]})

    assert logged(caplog, "diagnosis", "z")


def test_classes_of_thousands_of_digits_are_names_and_not_grades(tmp_path: Path) -> None:
    # int() refuses more than 4300 digits with a ValueError.
    long = "1" * 5000
    rows = ["a1,A,1", "a2,B,2", "b1,C,1", "c1,D,2", f"d1,E,{long}"]

    with refused(ClassesError, "classes-one-fold", "diagnosis"):
        read(tmp_path, rows)
