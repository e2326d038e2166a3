"""Classification through nnU-Net's own planning, preprocessing, training, export and our commands,
on real hippocampi and a mini network, on a CPU.

The classes are made from the real labels: which part of a hippocampus is relatively large? The
second task has missing values.
"""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_cases import copy_cases
from nnunet_folders import plan_and_preprocess, set_folders
from refusals import refused

from nnunet_autoreg.classification.table import read_rows
from nnunet_autoreg.errors import ClassesError, PlanError, UsageError
from nnunet_autoreg.model.sizes import ENCODERS

pytestmark = pytest.mark.integration

# 14 cases in five folds: three or two for validation.
NAME, NUM_CASES, NUM_TESTS = "Dataset961_Hippocampi", 14, 3
MODEL = "AutoregClassificationTrainer__AutoregPlans__3d_fullres"
CPU = torch.device("cpu")
MINI = {
    **ENCODERS["resenc_tiny"].arguments,
    "n_stages": 4,
    "features_per_stage": [4, 6, 8, 8],
    "n_blocks_per_stage": [1, 1, 1, 1],
}


def write_classes(dataset: Path) -> None:
    """Write ``classesTr.csv``: the larger part, and a grade that some cases lack.

    The half of the cases with the relatively largest anterior part is "anterior".
    """
    import SimpleITK

    share_of = {}
    for file in sorted((dataset / "labelsTr").glob("*.nii.gz")):
        labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))
        # Label 1 is the anterior part of a hippocampus.
        share_of[file.name.removesuffix(".nii.gz")] = (labels == 1).sum() / (labels > 0).sum()
    middle = float(np.median(list(share_of.values())))
    with (dataset / "classesTr.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["case", "larger", "grade"])
        for number, (case, share) in enumerate(share_of.items()):
            # Every fifth case has no grade; the others have three.
            grade = "" if number % 5 == 4 else number % 3
            writer.writerow([case, "anterior" if share > middle else "posterior", grade])


@pytest.fixture(scope="module")
def project(
    shared_data: Path,
    write_run: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """nnU-Net's three folders with some cases, planned and preprocessed for a mini encoder."""
    root = tmp_path_factory.mktemp("classification")
    with pytest.MonkeyPatch.context() as patch:
        set_folders(patch, root)
        dataset = root / "nnUNet_raw" / NAME
        source = shared_data / "nnUNet_raw" / "Dataset004_Hippocampus"
        copy_cases(source, dataset, NUM_CASES, NUM_TESTS)
        write_classes(dataset)
        write_run(
            root / "nnUNet_results",
            "mini",
            crop=(32, 32, 32),
            encoder="resenc_tiny",
            arguments=MINI,
        )
        plan_and_preprocess(961)
        shorten(root)
        yield root


def shorten(root: Path) -> None:
    """Give the plan a patch that some scans are larger and some smaller than."""
    file = root / "nnUNet_preprocessed" / NAME / "AutoregPlans.json"
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    patch = [32, 48, 40]
    configuration["patch_size"] = patch
    configuration["architecture"]["arch_kwargs"]["input_shape"] = patch
    configuration["batch_size"] = 2
    file.write_text(json.dumps(plans))


def trained(fold: Any = 0, trainer: str = "AutoregClassificationTrainer_2epochs", **options: Any):
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    continues = options.get("continue_training", False)
    validates = options.get("only_validation", False)
    made = get_trainer_from_args(NAME, "3d_fullres", fold, trainer, "AutoregPlans", continues, CPU)
    maybe_load_checkpoint(made, continues, validates)
    if not validates:
        made.run_training()
    made.perform_actual_validation()
    return made


def model_folder(root: Path, trainer: str = "AutoregClassificationTrainer_2epochs") -> Path:
    return root / "nnUNet_results" / NAME / MODEL.replace("AutoregClassificationTrainer", trainer)


@pytest.fixture(scope="module")
def finished(project: Path) -> Any:
    return trained()


def log_of(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob("training_log_*.txt")))


def test_training_writes_scores_beside_the_baselines(project: Path, finished: Any) -> None:
    folder = model_folder(project) / "fold_0"
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    plans = json.loads((folder.parent / "plans.json").read_text())
    block = plans["configurations"]["3d_fullres"]["autoreg_classification"]

    assert [task["name"] for task in block["tasks"]] == ["larger", "grade"]
    assert block["balance"] == "none"
    assert block["reasons"]["balance"]
    assert set(summary["baselines"]) == {"majority", "size", "linear_probe"}
    assert summary["baselines"]["majority"]["larger"]["auc"]["value"] == 0.5
    # Fold 0 of 14 cases has three for validation.
    assert summary["tasks"]["larger"]["cases"] == 3
    # A score after each of two epochs.
    assert len(finished.logger.local_logger.my_fantastic_logging["cls_auc"]) == 2
    assert "100.0 % of the encoder's parameters come from the file" in log_of(folder)
    assert "AUC of patches per task" in log_of(folder)
    # The patch is larger than some scans, which a line names.
    assert f"of {NUM_CASES} scans are smaller than the patch of 32 x 48 x 40" in log_of(folder)
    assert (folder / "checkpoint_best.pth").is_file()
    # The heads read features that are scaled by the training cases.
    weights = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert bool((weights["feature_scale"] > 1).any())


def test_folds_are_ours_and_foreign_files_stay(project: Path, finished: Any) -> None:
    base = project / "nnUNet_preprocessed" / NAME
    folds = json.loads((base / "splits_autoreg_classification.json").read_text())

    assert len(folds) == 5
    assert not (base / "splits_final.json").exists()
    # The copy in the preprocessed folder has numbers in place of patients.
    copied = read_rows(base / "classesTr.csv")
    assert len({row.pop("patient") for row in copied}) == NUM_CASES
    assert copied == read_rows(project / "nnUNet_raw" / NAME / "classesTr.csv")


def test_validating_again_gives_the_same_scores(project: Path, finished: Any) -> None:
    file = model_folder(project) / "fold_0" / "validation" / "summary.json"
    before = json.loads(file.read_text())
    file.unlink()

    trained(only_validation=True)

    assert json.loads(file.read_text()) == before


def test_a_finished_training_that_is_continued_keeps_its_weights(
    project: Path,
    finished: Any,
) -> None:
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    # As nnUNetv2_train --c does with a training that is finished.
    made = get_trainer_from_args(
        NAME,
        "3d_fullres",
        0,
        "AutoregClassificationTrainer_2epochs",
        "AutoregPlans",
        True,
        CPU,
    )
    maybe_load_checkpoint(made, True, False)

    assert made.current_epoch == 2
    for a, b in zip(made.unwrapped().parameters(), finished.unwrapped().parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_scratch_twin_and_fold_all_train(project: Path, finished: Any) -> None:
    trained("all", "AutoregClassificationScratchTrainer_1epochs")

    folder = model_folder(project, "AutoregClassificationScratchTrainer_1epochs") / "fold_all"
    # Fold "all" validates on its training cases, for which baselines would say nothing.
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert summary["tasks"]["larger"]["cases"] == NUM_CASES
    assert summary["baselines"] is None
    assert "parameters come from the file" not in log_of(folder)


def test_new_scans_are_classified_after_export_and_install(
    project: Path,
    finished: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from nnunetv2.model_sharing import model_export, model_import

    from nnunet_autoreg.cli.classify import main

    trainer = "AutoregClassificationTrainer_2epochs"
    archive = tmp_path / "model.zip"
    model_export.export_pretrained_model(
        NAME,
        str(archive),
        ("3d_fullres",),
        trainer,
        "AutoregPlans",
        (0,),
    )
    # Another clinic: other results, no preprocessed data needed.
    elsewhere = tmp_path / "results"
    elsewhere.mkdir()
    monkeypatch.setenv("nnUNet_results", str(elsewhere))
    monkeypatch.setattr(model_import, "nnUNet_results", str(elsewhere))
    model_import.install_model_from_zip_file(str(archive))

    scans = project / "nnUNet_raw" / NAME / "imagesTs"
    line = ["-d", "961", "-i", str(scans), "-o", str(tmp_path / "out"), "-f", "0", "-tr", trainer]
    assert main([*line, "--device", "cpu"]) == 0

    with (tmp_path / "out" / "classes.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == NUM_TESTS
    for row in rows:
        values = [float(row["larger:anterior"]), float(row["larger:posterior"])]
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert row["larger"] == ("anterior", "posterior")[int(np.argmax(values))]

    capsys.readouterr()
    # The same line finds all results.
    assert main([*line, "--device", "cpu"]) == 0
    assert f"{NUM_TESTS} of {NUM_TESTS} scans were done before" in capsys.readouterr().out

    # A result of another model, and a damaged one.
    name = rows[0]["case"]
    result = tmp_path / "out" / f"{name}.json"
    changed = json.loads(result.read_text())
    changed["model"]["sha256"]["0"] = "other"
    result.write_text(json.dumps(changed))
    with refused(UsageError, "results-of-another-run", result, "sha256"):
        main.__wrapped__([*line, "--device", "cpu"])
    result.write_text("{}")
    with refused(ClassesError, "classes-scan-file", result):
        main.__wrapped__([*line, "--device", "cpu"])


def test_a_classified_training_case_has_the_score_of_validation(
    project: Path,
    finished: Any,
    tmp_path: Path,
) -> None:
    from nnunet_autoreg.cli.classify import main
    from nnunet_autoreg.cli.evaluate_classification import main as evaluate

    folder = model_folder(project) / "fold_0" / "validation"
    with (folder / "classes.csv").open() as handle:
        validated = list(csv.DictReader(handle))
    case = validated[0]["case"]
    scans = tmp_path / "scans"
    scans.mkdir()
    shutil.copy(project / "nnUNet_raw" / NAME / "imagesTr" / f"{case}_0000.nii.gz", scans)

    line = ["-d", "961", "-i", str(scans), "-o", str(tmp_path / "out"), "-f", "0"]
    assert main([*line, "-tr", "AutoregClassificationTrainer_2epochs", "--device", "cpu"]) == 0

    with (tmp_path / "out" / "classes.csv").open() as handle:
        # Tables hold rounded numbers.
        (row,) = csv.DictReader(handle)
    assert float(row["larger:anterior"]) == pytest.approx(
        float(validated[0]["larger:anterior"]),
        abs=1e-4,
    )
    # The same scores come from the table of predictions and the true classes.
    truth = project / "nnUNet_raw" / NAME / "classesTr.csv"
    scores = tmp_path / "metrics.json"
    assert evaluate(["-p", str(folder), "-g", str(truth), "-o", str(scores)]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    expected = summary["tasks"]["larger"]["accuracy"]["value"]
    assert json.loads(scores.read_text())["tasks"]["larger"]["accuracy"]["value"] == expected


def test_stock_prediction_names_the_right_command(project: Path, finished: Any) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_mirroring=False,
        perform_everything_on_device=False,
        device=CPU,
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(
        str(model_folder(project)),
        (0,),
        "checkpoint_final.pth",
    )

    with refused(PlanError, "classification-no-segmentation", "autoreg_classify"):
        predictor.predict_single_npy_array(
            np.ones((1, 32, 48, 40), np.float32),
            {"spacing": [1.0, 1.0, 1.0]},
        )


def test_wrong_models_are_refused_with_a_remedy(
    project: Path,
    finished: Any,
    tmp_path: Path,
) -> None:
    from nnunet_autoreg.cli.classify import main

    line = ["-d", "961", "-i", str(tmp_path), "-o", str(tmp_path / "out"), "--device", "cpu"]
    with refused(UsageError, "model-not-found", "AutoregClassificationTrainer_2epochs"):
        main.__wrapped__(line)

    other = model_folder(project, "AutoregPretrainedTrainer")
    shutil.copytree(model_folder(project), other)
    plans = json.loads((other / "plans.json").read_text())
    del plans["configurations"]["3d_fullres"]["autoreg_classification"]
    (other / "plans.json").write_text(json.dumps(plans))
    with refused(PlanError, "model-of-other-task", other):
        main.__wrapped__([*line, "-tr", "AutoregPretrainedTrainer"])


def test_a_table_that_was_changed_is_refused_in_one_line(project: Path, finished: Any) -> None:
    file = project / "nnUNet_raw" / NAME / "classesTr.csv"
    content = file.read_text()
    try:
        # The plan was made for the classes of before.
        file.write_text(content.replace("posterior", "behind"))
        with pytest.raises(SystemExit) as caught:
            trained(1)
        assert "autoreg_classification" in str(caught.value)
    finally:
        file.write_text(content)
