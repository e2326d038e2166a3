"""Detection through nnU-Net's own planning, preprocessing, training and prediction, on generated
cubes and a mini network, on a CPU.
"""

import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_folders import plan_and_preprocess, set_folders
from refusals import refused

from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.model.sizes import ENCODERS

pytestmark = pytest.mark.integration

NAME, NUM_CASES, SIDE = "Dataset902_ToyCubes", 10, 40
CPU = torch.device("cpu")
# Four stages of one block: an epoch of three steps takes seconds on a CPU.
MINI = {
    **ENCODERS["resenc_tiny"].arguments,
    "n_stages": 4,
    "features_per_stage": [4, 6, 8, 8],
    "n_blocks_per_stage": [1, 1, 1, 1],
}
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "detection.py"


@pytest.fixture(scope="module")
def project(
    write_run: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """nnU-Net's three folders with ten toy cases, planned and preprocessed for a mini encoder."""
    root = tmp_path_factory.mktemp("detection")
    with pytest.MonkeyPatch.context() as patch:
        set_folders(patch, root)
        runpy.run_path(str(BENCHMARK))["write_toy"](root / "nnUNet_raw" / NAME, NUM_CASES, SIDE)
        write_run(
            root / "nnUNet_results",
            "mini",
            crop=(32, 32, 32),
            encoder="resenc_tiny",
            arguments=MINI,
        )
        plan_and_preprocess(902)
        shorten(root)
        yield root


def plans_file(root: Path) -> Path:
    return root / "nnUNet_preprocessed" / NAME / "AutoregPlans.json"


def shorten(root: Path) -> None:
    """Plan two epochs of three steps with small patches."""
    plans = json.loads(plans_file(root).read_text())
    plans["autoreg"]["recipe"] |= {"num_iterations_per_epoch": 3, "num_val_iterations_per_epoch": 2}
    configuration = plans["configurations"]["3d_fullres"]
    configuration["autoreg_detection"]["num_epochs"] = 2
    configuration["patch_size"] = [32, 32, 32]
    configuration["architecture"]["arch_kwargs"]["input_shape"] = [32, 32, 32]
    configuration["batch_size"] = 2
    plans_file(root).write_text(json.dumps(plans))


def trained(fold: int = 0, trainer: str = "AutoregDetectionTrainer", **options: Any) -> Any:
    """Train and validate as ``nnUNetv2_train`` does; return the trainer."""
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    continues = options.get("continue_training", False)
    validates = options.get("only_validation", False)
    made = get_trainer_from_args(NAME, "3d_fullres", fold, trainer, "AutoregPlans", continues, CPU)
    maybe_load_checkpoint(made, continues, validates)
    if not validates:
        made.run_training()
    made.perform_actual_validation()
    return made


@pytest.fixture(scope="module")
def finished(project: Path) -> Any:
    return trained()


def fold_folder(root: Path) -> Path:
    model = "AutoregDetectionTrainer__AutoregPlans__3d_fullres"
    return root / "nnUNet_results" / NAME / model / "fold_0"


def test_the_planner_writes_the_detection_block_that_dataset_json_asks_for(project: Path) -> None:
    configuration = json.loads(plans_file(project).read_text())["configurations"]["3d_fullres"]
    block = configuration["autoreg_detection"]

    assert [c["name"] for c in block["classes"]] == ["solid", "holed"]
    assert block["has_masks"]
    assert block["anchors"]["mean_iou"] >= 0.7
    # The size of the heads for an encoder of the size tiny.
    assert block["head_channels"] == 64


def test_training_writes_boxes_and_scores_and_val_reproduces_them(
    project: Path,
    finished: Any,
) -> None:
    folder = fold_folder(project)
    summary = json.loads((folder / "validation_detection" / "summary_detection.json").read_text())

    # Fold 0 of ten cases has two for validation.
    assert summary["scans"]["number"] == 2
    assert "0.1" in summary["ap"]
    assert summary["sweep"]["tried"]
    for case in summary["scans"]["names"]:
        found = json.loads((folder / "validation_detection" / f"{case}.json").read_text())
        assert found["shape_zyx"] == [SIDE] * 3
        assert (folder / "validation" / f"{case}.nii.gz").is_file()

    # A score of patches after each of two epochs.
    assert len(finished.logger.local_logger.my_fantastic_logging["det_map"]) == 2

    (folder / "validation_detection" / "summary_detection.json").unlink()
    trained(only_validation=True)
    again = json.loads((folder / "validation_detection" / "summary_detection.json").read_text())

    assert again == summary


def test_a_checkpoint_holds_the_average_and_the_weights_of_training(
    project: Path,
    finished: Any,
) -> None:
    saved = torch.load(fold_folder(project) / "checkpoint_final.pth", weights_only=False)
    names = [name for name, _ in finished.unwrapped().named_parameters()]
    own = saved["optimizer_state"]["autoreg_training_weights"]
    network = finished.unwrapped()

    # nnU-Net predicts with the average, and a training continues with the trained weights.
    averaged = [saved["network_weights"][name] for name in names]
    trained_pairs = zip(own, network.parameters(), strict=True)
    assert all(torch.equal(value, p) for value, p in trained_pairs)
    assert any(not torch.equal(a, b) for a, b in zip(averaged, own, strict=True))
    average_pairs = zip(averaged, finished.average.values, strict=True)
    assert all(torch.equal(a, b) for a, b in average_pairs)


def test_a_stopped_training_continues_with_its_own_weights(project: Path, finished: Any) -> None:
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    made = get_trainer_from_args(
        NAME,
        "3d_fullres",
        0,
        "AutoregDetectionTrainer",
        "AutoregPlans",
        True,
        CPU,
    )
    maybe_load_checkpoint(made, True, False)

    assert made.current_epoch == 2

    for a, b in zip(made.unwrapped().parameters(), finished.unwrapped().parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(made.average.values, finished.average.values, strict=True):
        assert torch.equal(a, b)


def test_stock_prediction_gives_the_auxiliary_segmentation(
    project: Path,
    finished: Any,
    tmp_path: Path,
) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_mirroring=False,
        perform_everything_on_device=False,
        device=CPU,
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(
        str(fold_folder(project).parent),
        (0,),
        "checkpoint_final.pth",
    )
    # A diagonal of ones: not constant, so that it can be normalised.
    segmentation = predictor.predict_single_npy_array(
        np.zeros((1, SIDE, SIDE, SIDE), np.float32) + np.eye(SIDE, dtype=np.float32),
        {"spacing": [1.0, 1.0, 1.0]},
    )

    assert segmentation.shape == (SIDE, SIDE, SIDE)


def test_the_pretrained_encoder_is_loaded_and_the_heads_are_not_part_of_it(
    project: Path,
    finished: Any,
) -> None:
    log = "".join(file.read_text() for file in fold_folder(project).glob("training_log_*.txt"))

    assert "100.0 % of the encoder's parameters come from the file" in log
    assert "decoder, detection (random)" in log


def test_a_folder_of_scans_becomes_files_of_boxes_and_runs_continue(
    project: Path,
    finished: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import SimpleITK

    from nnunet_autoreg.cli.detect import main
    from nnunet_autoreg.cli.evaluate_detection import main as evaluate

    scans = tmp_path / "scans"
    scans.mkdir()
    for number in (0, 1):
        name = f"toy_{number:02}_0000.nii.gz"
        (scans / name).symlink_to(project / "nnUNet_raw" / NAME / "imagesTr" / name)
    line = ["-d", "902", "-i", str(scans), "-o", str(tmp_path / "out"), "--device", "cpu", "--csv"]

    assert main(line) == 0

    found = json.loads((tmp_path / "out" / "toy_00.json").read_text())

    assert found["shape_zyx"] == [SIDE] * 3
    assert found["classes"] == {"solid": 1, "holed": 2}
    assert found["model"]["folds"] == ["0"]
    for kind in ("boxes", "instances"):
        image = SimpleITK.ReadImage(str(tmp_path / "out" / f"toy_00_{kind}.nii.gz"))
        assert image.GetSize() == (SIDE,) * 3
    assert (tmp_path / "out" / "toy_01.mrk.json").is_file()
    assert (tmp_path / "out" / "detections.csv").is_file()

    # The same line finds both results; another limit of the score needs others.
    assert main(line) == 0
    assert "2 of 2" in capsys.readouterr().out
    with refused(UsageError, "results-of-another-run", "toy_00.json", "settings.min_score: "):
        main.__wrapped__([*line, "--min-score", "0.9"])
    assert main([*line, "--fppi", "1", "--overwrite"]) == 0

    labels = project / "nnUNet_raw" / NAME / "labelsTr"

    scores = tmp_path / "scores.json"
    assert evaluate(["-p", str(tmp_path / "out"), "-g", str(labels), "-o", str(scores)]) == 0
    assert json.loads(scores.read_text())["scans"]["names"] == ["toy_00", "toy_01"]


def test_wrong_models_and_scans_are_refused_with_a_remedy(
    project: Path,
    finished: Any,
    tmp_path: Path,
) -> None:
    from nnunet_autoreg.cli.detect import main

    line = ["-d", "902", "-i", str(tmp_path), "-o", str(tmp_path / "out"), "--device", "cpu"]
    for changes, code, value in [
        (["-f", "3"], "model-fold-unfinished", "-f 3"),
        (["-tr", "AutoregDetectionScratchTrainer"], "model-not-found", "AutoregDetectionTrainer"),
        (["-d", "903"], "model-dataset-unknown", NAME),
        (["-i", str(tmp_path / "no")], "scans-no-folder", tmp_path / "no"),
    ]:
        with refused(UsageError, code, value):
            main.__wrapped__([*line, *changes])
