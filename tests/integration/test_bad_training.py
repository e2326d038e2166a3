"""Wrong plans, weights and names given to nnU-Net's commands, as a user types them: one clear line,
exit code 1, nothing lost.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_forgotten_plans_end_in_one_line_with_and_without_stock_plans(home, planned):
    said = home.refused(
        home.train(plans=None),
        1,
        "nnUNetPlans.json does not exist",
        "-p AutoregPlans",
        "-pl AutoregPlanner",
    )

    assert home.dataset in said

    # The same plans under the name of stock plans, without what our planner adds.
    stock = planned.with_name("nnUNetPlans.json")
    content = {
        key: value for key, value in json.loads(planned.read_text()).items() if key != "autoreg"
    }
    stock.write_text(json.dumps({**content, "plans_name": "nnUNetPlans"}))
    try:
        home.refused(
            home.train(plans=None),
            1,
            'nnUNetPlans.json has no "autoreg" block',
            "-p AutoregPlans",
        )
    finally:
        stock.unlink()


def test_plans_that_do_not_exist_are_named_with_the_line_that_makes_them(home, planned):
    home.refused(
        home.train(plans="OtherPlans"),
        1,
        "OtherPlans.json does not exist",
        "-pl AutoregPlanner",
    )


def test_the_stock_trainer_on_our_plans_ends_in_one_line(home, planned):
    home.refused(home.train(trainer="nnUNetTrainer"), 1, "-tr AutoregPretrainedTrainer")


def test_training_from_truncated_weights_ends_in_one_line(home, plans, base):
    weights = base / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    home.refused(home.train(), 1, "encoder.safetensors", "sha256")


def test_training_from_weights_of_another_encoder_ends_in_one_line(home, plans):
    changed = json.loads(plans.read_text())
    changed["autoreg"]["encoder"]["arguments"]["eva_depth"] = 3
    plans.write_text(json.dumps(changed))

    home.refused(home.train(), 1, "eva_depth")


def test_planning_with_weights_whose_card_was_edited_ends_in_one_line(home, plans):
    before = plans.read_bytes()
    good = (home.folder() / "encoder.safetensors").read_bytes()
    # The card is damaged in two ways; the first one is named.
    odd = Path(home.with_card(home.root / "odd card", good, version="one", arguments={})).parent

    home.refused(home.plan_again(odd), 1, "encoder.json", "version")
    assert plans.read_bytes() == before


def test_training_with_an_impossible_patch_ends_in_one_line(home, plans):
    changed = json.loads(plans.read_text())
    # 41 is not a multiple of 8.
    changed["configurations"]["3d_fullres"]["patch_size"][0] = 41
    plans.write_text(json.dumps(changed))
    home.refused(home.train(), 1, "41", "axis z", "multiple of the token size 8", "40 or 48")


def test_training_with_weights_of_another_shape_ends_in_one_line(home, plans, base):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(base / "encoder.safetensors")
    key = "eva.blocks.0.attn.q_proj.weight"
    # The hash in the plans is that of the changed file, so that only the shape is wrong.
    save_file({**tensors, key: tensors[key][:40].copy()}, base / "encoder.safetensors")
    changed = json.loads(plans.read_text())
    changed["autoreg"]["weights"]["sha256"] = hashlib.sha256(
        (base / "encoder.safetensors").read_bytes(),
    ).hexdigest()
    plans.write_text(json.dumps(changed))
    home.refused(home.train(), 1, key, "(40, 48)", "(48, 48)")


def test_killed_and_finished_trainings_continue_with_c(home, planned, tmp_path):
    fold = (
        home.root
        / "nnUNet_results"
        / home.dataset
        / "AutoregPretrainedTrainer__AutoregPlans__3d_fullres/fold_0"
    )
    shutil.rmtree(fold, ignore_errors=True)
    command = [
        home.program("nnUNetv2_train"),
        "4",
        "3d_fullres",
        "0",
        "-tr",
        "AutoregPretrainedTrainer",
        "-p",
        "AutoregPlans",
        "-device",
        "cpu",
    ]
    process = home.started(
        command,
        tmp_path / "log",
        lambda _: (fold / "checkpoint_best.pth").exists(),
        # The first epoch is finished as soon as this file exists.
    )
    process.kill()
    process.wait()

    continued = home.train("--c")

    assert continued.returncode == 0, continued.stderr[-2000:]
    assert "Epoch 1" in continued.stdout
    # The weights come from the checkpoint, and not from the pretraining again.
    assert "Epoch 0" not in continued.stdout
    assert "encoder weights from" not in continued.stdout

    finished = home.train("--c")

    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "Epoch 1" not in finished.stdout
    assert "Mean Validation Dice" in finished.stdout
    assert (fold / "checkpoint_final.pth").is_file()
