"""Scores of a classification against scikit-learn, baselines, tables of predictions, pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from class_tables import write_table
from refusals import logged, refused
from sklearn import metrics as oracle

from nnunet_autoreg.classification import metrics as mt
from nnunet_autoreg.classification.baselines import (
    MAJORITY,
    PROBE,
    fit_predict,
    predict_baselines,
    score_baselines,
    size_features,
)
from nnunet_autoreg.classification.predict import (
    ScanClasses,
    check_tasks,
    read_scan_classes,
    write_scan_classes,
)
from nnunet_autoreg.classification.predictions import read_predictions, write_predictions
from nnunet_autoreg.classification.table import ClassificationTask, ClassTable
from nnunet_autoreg.cli.evaluate_classification import main
from nnunet_autoreg.downstream.results import check_same_run
from nnunet_autoreg.errors import ClassesError, UsageError

TWO = ClassificationTask("sex", ("F", "M"))
THREE = ClassificationTask("grade", ("1", "2", "3"), ordinal=True)


def random_predictions(
    task: ClassificationTask,
    num_cases: int = 40,
    seed: int = 0,
) -> tuple[list[int], np.ndarray]:
    """Classes and probabilities that agree somewhat; some probabilities are tied."""
    random = np.random.default_rng(seed)
    K = len(task.classes)
    truth = random.integers(0, K, num_cases)
    scores = random.uniform(size=(num_cases, K)) + 0.5 * np.eye(K)[truth]
    # Rounding makes ties, which the AUC counts half; adding 0.05 keeps probabilities above 0.
    scores = np.round(scores, 1) + 0.05
    return truth.tolist(), scores / scores.sum(1, keepdims=True)


def judged(
    task: ClassificationTask,
    resamples: int = 20,
    patients: list[str] | None = None,
) -> mt.Judged:
    truth, probabilities = random_predictions(task)
    names = patients or [f"p{n}" for n in range(len(truth))]
    found = mt.judge(task, truth, probabilities, names, resamples)
    assert found is not None
    return found


# Row 0 counts every case once; row 3 is a resample with other weights.
@pytest.mark.parametrize("row", [0, 3])
def test_scores_of_two_classes_equal_those_of_scikit_learn(row: int) -> None:
    found = judged(TWO)
    weights = found.weights_BS[row]
    positive = found.probabilities_SK[:, 1]

    auc = oracle.roc_auc_score(found.truth_S, positive, sample_weight=weights)
    decided = (found.truth_S, found.predicted_S)
    accuracy = oracle.balanced_accuracy_score(*decided, sample_weight=weights)
    f1 = oracle.f1_score(*decided, average="macro", sample_weight=weights)
    brier = oracle.brier_score_loss(found.truth_S, positive, sample_weight=weights)

    assert mt.auc(found)[row] == pytest.approx(auc)
    assert mt.balanced_accuracy(found)[row] == pytest.approx(accuracy)
    assert mt.macro_f1(found)[row] == pytest.approx(f1)
    # Ours is summed over both classes, scikit-learn's is that of the positive class.
    assert mt.brier(found)[row] == pytest.approx(2 * brier)


@pytest.mark.parametrize("row", [0, 3])
def test_scores_of_three_classes_equal_those_of_scikit_learn(row: int) -> None:
    found = judged(THREE)
    weights = found.weights_BS[row]

    each = []
    for index in range(3):
        is_own = found.truth_S == index
        score = found.probabilities_SK[:, index]
        each.append(oracle.roc_auc_score(is_own, score, sample_weight=weights))

    decided = (found.truth_S, found.predicted_S)
    confusion = oracle.confusion_matrix(*decided, sample_weight=weights)
    f1 = oracle.f1_score(*decided, average="macro", sample_weight=weights)

    assert mt.auc(found)[row] == pytest.approx(np.mean(each))
    assert mt.confusion(found)[row] == pytest.approx(confusion)
    assert mt.macro_f1(found)[row] == pytest.approx(f1)


def test_calibration_and_grades_have_values_computed_by_hand() -> None:
    probabilities = np.array([[0.1, 0.9], [0.1, 0.9], [0.85, 0.15], [0.4, 0.6]])
    found = mt.judge(TWO, [1, 0, 0, 1], probabilities, list("abcd"), 0)
    assert found is not None

    # Bins of confidence: two cases of 0.9 (one is right), 0.85 (right), 0.6 (right). Each bin adds
    # |right - summed confidence|, over 4 cases.
    expected = (abs(1 - 1.8) + abs(1 - 0.85) + abs(1 - 0.6)) / 4
    assert mt.calibration_error(found)[0] == pytest.approx(expected)
    bins = mt.calibration(found)["bins"]
    assert [(row["cases"], row["true"]) for row in bins] == [(1, 0.0), (1, 1.0), (2, 0.5)]

    # The expected grade of a is 0.5 where 0 is true, that of b is exact: a mean error of 0.25.
    graded = mt.judge(THREE, [0, 2], np.array([[0.5, 0.5, 0], [0, 0, 1.0]]), list("ab"), 0)
    assert graded is not None
    assert mt.ordinal_error(graded)[0] == pytest.approx(0.25)


def test_the_roc_curve_has_the_area_of_the_auc() -> None:
    found = judged(TWO)

    curve = mt.roc(found)

    area = np.trapezoid(curve["sensitivity"], curve["false_positive_rate"])
    # The curve is drawn at a limited number of points.
    assert area == pytest.approx(mt.auc(found)[0], abs=0.01)
    assert all(low <= high for low, high in curve["ci95"])


def test_resamples_draw_patients_and_not_scans() -> None:
    truth, probabilities = random_predictions(TWO)
    patients = [f"p{n // 2}" for n in range(len(truth))]

    found = mt.judge(TWO, truth, probabilities, patients, 50)

    assert found is not None
    assert found.num_patients == 20
    assert np.array_equal(found.weights_BS[:, ::2], found.weights_BS[:, 1::2])

    # With one patient there is nothing to draw: only the row of the scores themselves.
    of_one_patient = mt.judge(TWO, truth, probabilities, ["p"] * 40, 50)
    assert of_one_patient is not None
    assert of_one_patient.weights_BS.shape == (1, 40)


def test_scores_of_different_models_are_not_compared_with_each_other() -> None:
    truth, probabilities = random_predictions(TWO)
    patients = [f"p{n}" for n in range(40)]
    folds = [n % 2 for n in range(40)]
    # The network of fold 0 gives all its cases lower scores, in the same order.
    shifted = probabilities.copy()
    shifted[::2] = (shifted[::2] + np.array([9, 0])) / 10

    found = []
    for values in (probabilities, shifted):
        found.append(mt.judge(TWO, truth, values, patients, 0, strata=folds))

    # The AUC counts pairs of a positive and a negative case, here only pairs of one fold.
    areas, pairs = [], []
    for fold in (0, 1):
        areas.append(oracle.roc_auc_score(truth[fold::2], probabilities[fold::2, 1]))
        num_positive = sum(truth[fold::2])
        pairs.append(num_positive * (20 - num_positive))
    expected = np.average(areas, weights=pairs)
    for judged_fold in found:
        assert judged_fold is not None
        assert mt.auc(judged_fold)[0] == pytest.approx(expected)


def test_cases_without_a_known_class_are_left_out() -> None:
    truth, probabilities = random_predictions(TWO)
    more = [*truth, -1]
    names = [f"p{n}" for n in range(41)]

    with_one_more = np.vstack([probabilities, [[1.0, 0.0]]])

    with_unknown = mt.judge(TWO, more, with_one_more, names, 5)

    assert with_unknown is not None
    assert mt.scores_of(with_unknown)["cases"] == 40
    assert mt.auc(with_unknown)[0] == mt.auc(judged(TWO))[0]
    assert mt.judge(TWO, [-1], np.array([[1.0, 0.0]]), ["a"]) is None


def test_a_single_class_has_no_auc_and_its_other_scores_are_finite() -> None:
    found = mt.judge(TWO, [1, 1, 1], np.full((3, 2), 0.5), list("abc"), 10)
    assert found is not None

    scores = mt.evaluate_task(found)

    assert scores["auc"]["value"] is None
    # A tie of 0.5 and 0.5 is decided as the first class, F, and all cases are M.
    assert scores["balanced_accuracy"]["value"] == 0.0
    json.dumps(scores, allow_nan=False)


def table_of(num: int = 30) -> tuple[ClassTable, list[str], list[str], dict[str, np.ndarray]]:
    """Cases whose second feature depends on the class; a tenth of the classes is not known."""
    random = np.random.default_rng(0)
    cases = [f"c{n:02}" for n in range(num)]
    labels = {}
    features = {}
    for n, case in enumerate(cases):
        label = n % 2
        labels[case] = (-1,) if n % 10 == 9 else (label,)
        features[case] = np.array([random.normal(), 3 * label + random.normal(), 0.0])
    table = ClassTable((TWO,), labels, {case: case for case in cases}, "", {})
    return table, cases[:20], cases[20:], features


def test_a_linear_probe_finds_the_class_and_the_majority_does_not() -> None:
    table, train, validation, features = table_of()

    predicted = predict_baselines(table, train, validation, {PROBE: features})
    found = score_baselines(table, validation, predicted, num_resamples=20)

    # The majority has the same probabilities for every case, so all pairs are ties.
    assert found[MAJORITY]["sex"]["auc"]["value"] == 0.5
    assert found[PROBE]["sex"]["auc"]["value"] > 0.9
    # Ten cases for validation, of which the class of c29 is unknown.
    assert found[PROBE]["sex"]["cases"] == 9


def test_a_class_without_training_cases_gets_the_probability_0() -> None:
    # Class 1 of three never occurs.
    train = np.array([[0.0], [1.0], [0.1], [0.9]])

    found = fit_predict(train, [0, 2, 0, 2], list("abcd"), np.array([[0.0], [1.0]]), 3)

    assert found[:, 1].tolist() == [0, 0]
    assert found.argmax(1).tolist() == [0, 2]
    assert found.sum(1) == pytest.approx([1, 1])


def test_sizes_are_those_of_the_labels_in_mm() -> None:
    labels = np.zeros((10, 10, 10), dtype=np.int8)
    labels[2:5, 2:6, 2:4] = 1
    labels[8, 8, 8] = 2

    found = np.exp(size_features(labels, (2.0, 1.0, 1.0), [1, 2]))

    # A voxel has 2 mm3. Label 1 has 3 x 4 x 2 = 24 voxels, label 2 has 1; one is added to each
    # number.
    # The box around both spans 7 voxels on every axis: 7, 7 and 14 mm, the shortest first.
    assert found == pytest.approx([2 * 25, 2 * 2, 2 * 26, 7, 7, 14])


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    # A spreadsheet would run a cell that begins with "=" or "-" as a formula; the apostrophe stops
    # it.
    task = ClassificationTask("=kind", ("-a", "b"))
    file = tmp_path / "classes.csv"

    write_predictions(file, [task], {"=x": [np.array([0.25, 0.75])]})
    found = read_predictions(file)

    assert file.read_text().splitlines()[1].startswith("'=x,b,0.250000")
    assert found.tasks == (task,)
    assert found.probabilities["=x"][0].tolist() == [0.25, 0.75]


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    """A folder of predictions for 40 scans, and true classes of two scans per patient."""
    folder = tmp_path / "out"
    folder.mkdir()
    truth, sexes = random_predictions(TWO)
    grades, of_grades = random_predictions(THREE, seed=1)
    rows_of_scans = {f"c{n}": [sexes[n], of_grades[n]] for n in range(40)}
    write_predictions(folder / "classes.csv", [TWO, THREE], rows_of_scans)
    # The table lacks c39 and has another scan instead.
    rows = [f"c{n},p{n // 2},{'FM'[truth[n]]},{grades[n] + 1}" for n in range(39)]
    write_table(tmp_path / "true.csv", [*rows, "other,p9,F,1"], "case,patient,sex,grade")
    return tmp_path


def test_the_command_writes_scores_and_a_picture(
    predictions: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    import matplotlib.image

    line = ["-p", str(predictions / "out"), "-g", str(predictions / "true.csv")]

    assert main([*line, "-o", str(predictions / "metrics.json"), "--bootstrap", "50"]) == 0

    found = json.loads((predictions / "metrics.json").read_text())
    truth, sexes = random_predictions(TWO)
    # Probabilities were written with 6 digits.
    expected = oracle.roc_auc_score(truth[:39], sexes[:39, 1])
    assert found["tasks"]["sex"]["auc"]["value"] == pytest.approx(expected, abs=1e-4)
    assert found["tasks"]["sex"]["patients"] == 20
    assert found["scans"]["without_truth"] == ["c39"]
    assert found["scans"]["without_prediction"] == ["other"]
    assert found["tasks"]["grade"]["classes"] == ["1", "2", "3"]
    picture = matplotlib.image.imread(predictions / "metrics.png")
    # Large enough to read, and not an empty page.
    assert picture.shape[1] > 1000
    assert picture.std() > 0.05
    assert "39 scans, 20 patients" in capsys.readouterr().out


def test_predictions_that_cannot_be_scored_are_refused(predictions: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "metrics.json")
    out = str(predictions / "out")
    changes = [
        (["a,p,F"], "case,patient,sex", "classes-no-common-case", "c0"),
        (["c0,p,x"], "case,patient,sex", "classes-unknown-class", "'x'"),
        (["c0,p,F"], "case,patient,size", "classes-no-common-task", "sex"),
    ]
    for rows, header, code, value in changes:
        truth = write_table(tmp_path / "wrong.csv", rows, header)
        with refused(ClassesError, code, value):
            # __wrapped__: the command without what turns errors into one line and an exit code.
            main.__wrapped__(["-p", out, "-g", str(truth), "-o", output])

    true = str(predictions / "true.csv")
    with refused(ClassesError, "classes-predictions-format", predictions / "true.csv"):
        main.__wrapped__(["-p", true, "-g", true, "-o", output])

    wrong = write_table(tmp_path / "classes.csv", ["c0,F,0.7,0.7"], "case,sex,sex:F,sex:M")
    with refused(ClassesError, "classes-probability", "c0", "0.7"):
        main.__wrapped__(["-p", str(wrong), "-g", true, "-o", output])

    with refused(ClassesError, "classes-no-predictions", tmp_path / "classes", "autoreg_classify"):
        main.__wrapped__(["-p", str(tmp_path / "classes"), "-g", true, "-o", output])

    line = ["-p", out, "-g", true, "-o", output]
    assert main([*line, "--bootstrap", "-1"]) == 2
    assert main([*line, "--bootstrap", "9" * 9]) == 2
    assert main([*line, "--seed", "-1"]) == 2
    # A folder instead of a file.
    assert main(["-p", out, "-g", true, "-o", str(tmp_path)]) == 2


def test_a_task_without_a_known_class_is_named_and_left_out(
    predictions: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    truth = write_table(tmp_path / "some.csv", ["c0,p0,F,", "c1,p1,M,"], "case,patient,sex,grade")
    line = ["-p", str(predictions / "out"), "-g", str(truth), "-o", str(tmp_path / "m.json")]

    assert main.__wrapped__([*line, "--bootstrap", "0"]) == 0

    assert list(json.loads((tmp_path / "m.json").read_text())["tasks"]) == ["sex"]
    assert logged(caplog, "grade")


# In this order: no task, a task too few, a class too few, other classes, a sum above 1, no number.
EDITS: list[dict[str, dict[str, float]]] = [
    {},
    {"sex": {"F": 0.3, "M": 0.7}},
    {"sex": {"F": 0.3, "M": 0.7}, "grade": {"1": 0.5, "3": 0.5}},
    {"sex": {"F": 0.3, "M": 0.7}, "grade": {"a": 0.2, "b": 0.3, "c": 0.5}},
    {"sex": {"F": 0.3, "M": 0.7}, "grade": {"1": 0.2, "2": 0.3, "3": 7.0}},
    {"sex": {"F": 0.3, "M": float("nan")}, "grade": {"1": 0.2, "2": 0.3, "3": 0.5}},
]


@pytest.mark.parametrize("edited", EDITS)
def test_an_edited_result_of_a_scan_never_reaches_the_table(
    tmp_path: Path,
    edited: dict[str, dict[str, float]],
) -> None:
    file = tmp_path / "a.json"
    whole = {"sex": {"F": 0.3, "M": 0.7}, "grade": {"1": 0.2, "2": 0.3, "3": 0.5}}

    write_scan_classes(file, ScanClasses("a", {}, {}, (), whole))
    check_tasks(file, read_scan_classes(file), (TWO, THREE))

    write_scan_classes(file, ScanClasses("a", {}, {}, (), edited))
    with refused(ClassesError, "classes-scan-file", file):
        check_tasks(file, read_scan_classes(file), (TWO, THREE))


@pytest.mark.parametrize("model", ["x", 5, ["x"], None])
def test_an_edited_model_in_a_result_is_another_model(tmp_path: Path, model: object) -> None:
    wanted = {"model": {"dataset": "Dataset004"}, "settings": {}, "inputs": ()}

    with refused(UsageError, "results-of-another-run", tmp_path / "a.json"):
        check_same_run(tmp_path / "a.json", {**wanted, "model": model}, wanted)
