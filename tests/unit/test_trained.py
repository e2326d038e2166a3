"""Trained nnU-Net models as starting points: what is imported, and what is refused in one line."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file

from nnunet_autoreg.convert.imported import ImportOptions
from nnunet_autoreg.convert.importing import import_weights
from nnunet_autoreg.convert.inspecting import inspect_weights
from nnunet_autoreg.convert.source import checkpoint_of_model, open_source
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.finetune.load import Target, load_encoder
from nnunet_autoreg.finetune.network import GUARD_CLASS
from nnunet_autoreg.model.card import IMPORTED, EncoderCard, read_card
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.sizes import ENCODERS

NARROW: dict[str, Any] = {
    **ENCODERS["resenc_tiny"].arguments,
    "n_stages": 3,
    "features_per_stage": [4, 6, 8],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_blocks_per_stage": [1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1],
}
RESENC = ENCODERS["resenc_tiny"].class_path
IMPORTS = ["conv_op", "norm_op", "dropout_op", "nonlin"]
HU = {
    "mean": 50.0,
    "std": 100.0,
    "median": 40.0,
    "min": -900.0,
    "max": 900.0,
    "percentile_00_5": -800.0,
    "percentile_99_5": 800.0,
}


def plans(**configuration: Any) -> dict[str, Any]:
    full = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "batch_size": 2,
        "patch_size": [16, 32, 32],
        "spacing": [3.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization", "CTNormalization"],
        "architecture": {
            "network_class_name": RESENC,
            "arch_kwargs": NARROW,
            "_kw_requires_import": IMPORTS,
        },
        **configuration,
    }
    # As nnU-Net's users vary a configuration: the rest is inherited.
    own = {"inherits_from": "3d_fullres", "batch_size": 4}
    return {
        # Names that must not reach the card.
        "dataset_name": "Dataset004_Secret",
        "plans_name": "nnUNetPlans",
        "configurations": {"3d_fullres": full, "large_batch": own},
        "foreground_intensity_properties_per_channel": {"0": HU, "1": HU},
    }


def network(arguments: dict[str, Any] = NARROW, channels: int = 2, classes: int = 3) -> Any:
    torch.manual_seed(0)
    return build_network(RESENC, arguments, (16, 32, 32), channels, classes)


def save(file: Path, model_plans: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a checkpoint as nnU-Net does."""
    content = {
        "network_weights": network().state_dict(),
        "logging": {"lrs": [0.1]},
        "init_args": {
            "plans": plans() if model_plans is None else model_plans,
            "configuration": "3d_fullres",
            "fold": 0,
            "dataset_json": {"channel_names": {"0": "T1", "1": "CT"}},
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer",
        **changes,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    return file


def imported(path: Path, results: Path) -> tuple[EncoderCard, dict[str, torch.Tensor]]:
    import_weights(path, "theirs", results, ImportOptions())
    folder = results / "autoreg_pretraining" / "theirs"
    return read_card(folder), load_file(folder / "encoder.safetensors")


@pytest.mark.parametrize("configuration", ["3d_fullres", "large_batch"])
def test_a_checkpoint_brings_network_and_data_of_its_configuration(
    tmp_path: Path,
    configuration: str,
) -> None:
    file = save(tmp_path / "checkpoint_final.pth")
    content = torch.load(file, weights_only=False)
    content["init_args"]["configuration"] = configuration
    torch.save(content, file)

    card, tensors = imported(file, tmp_path)

    assert (card.class_path, card.arguments) == (RESENC, NARROW)
    assert (card.crop_size_vox, card.spacing_mm) == ((16, 32, 32), (3.0, 1.0, 1.0))
    assert card.token_size_vox == (2, 4, 4)
    assert (card.channel_names, card.modalities) == (("T1", "CT"), ("CT", "MR"))
    assert card.ct_window is not None
    assert card.ct_window.percentile_99_5 == 800.0
    assert card.normalization is None
    assert card.has_decoder
    assert IMPORTED in card.extra
    assert "Secret" not in str(card)
    # Heads belong to the labels of another task, and second names to tensors that are there.
    state = network().state_dict()
    assert not [key for key in tensors if "seg_layers" in key or "decoder.encoder" in key]
    assert all(torch.equal(value, state[key]) for key, value in tensors.items())
    parts = ("encoder.stem.", "encoder.stages.2.", "decoder.stages.1.", "decoder.transpconvs.0.")
    for part in parts:
        assert any(key.startswith(part) for key in tensors), part


def test_the_import_fits_other_channels_patches_and_depths(tmp_path: Path) -> None:
    card, tensors = imported(save(tmp_path / "checkpoint_final.pth"), tmp_path)
    deeper = {
        **NARROW,
        "n_stages": 4,
        "features_per_stage": [4, 6, 8, 8],
        "kernel_sizes": [[3, 3, 3]] * 4,
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
        "n_blocks_per_stage": [1, 1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1, 1],
    }
    target = build_network(RESENC, deeper, (16, 64, 64), 1, 5)
    file = tmp_path / "autoreg_pretraining/theirs/encoder.safetensors"

    table = load_encoder(target, file, card, Target(1, (16, 64, 64)), 0.3)

    assert 0.3 < table.encoder_share < 1
    stem = target.state_dict()["encoder.stem.convs.0.conv.weight"]
    given = tensors["encoder.stem.convs.0.conv.weight"]
    # Two channels become one by their sum, and a kernel of 1 is put in the middle of 3.
    assert torch.allclose(stem[:, 0, 1], given.sum(dim=1)[:, 0])


def test_a_model_folder_and_its_zip_give_the_same_weights(tmp_path: Path) -> None:
    model = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    save(model / "fold_0" / "checkpoint_final.pth")
    (model / "plans.json").write_text("{}")
    archive = tmp_path / "model.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in model.rglob("*.*"):
            zipped.write(file, f"Dataset004_Secret/{file.relative_to(tmp_path)}")

    of_folder = imported(model, tmp_path / "a")
    of_archive = imported(archive, tmp_path / "b")

    (card_of_folder, _), (card_of_archive, _) = of_folder, of_archive
    assert card_of_folder.sha256 == card_of_archive.sha256
    assert "Secret" not in str(card_of_archive)
    assert card_of_archive.extra[IMPORTED]["fold"] == "fold_0"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # The lowest number, which is not the first as text; "all" saw all data; the final state
        # before the best one, of whichever fold.
        (["fold_1/checkpoint_final.pth", "fold_0/checkpoint_final.pth"], "fold_0/"),
        (["fold_10/checkpoint_final.pth", "fold_2/checkpoint_final.pth"], "fold_2/"),
        (["fold_0/checkpoint_final.pth", "fold_all/checkpoint_final.pth"], "fold_all/"),
        (["fold_0/checkpoint_best.pth", "fold_1/checkpoint_final.pth"], "fold_1/"),
        (["m/fold_3/checkpoint_best.pth", "m/fold_3/checkpoint_latest.pth"], "m/fold_3/"),
    ],
)
def test_one_fold_of_a_model_is_chosen(names: list[str], expected: str) -> None:
    found = checkpoint_of_model(names, Path("x"))

    assert found.startswith(expected)


def test_several_models_or_none_are_refused(tmp_path: Path) -> None:
    several = ["a/fold_0/checkpoint_final.pth", "b/fold_0/checkpoint_final.pth"]

    with refused(WeightsError, "weights-ambiguous", "x.zip", "a", "b"):
        checkpoint_of_model(several, Path("x.zip"))
    with refused(WeightsError, "weights-missing", "x.zip"):
        checkpoint_of_model(["plans.json"], Path("x.zip"))
    (tmp_path / "broken.zip").write_bytes(b"no archive")
    with refused(WeightsError, "weights-unreadable", tmp_path / "broken.zip"):
        imported(tmp_path / "broken.zip", tmp_path)


PLAIN = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {},
    "_kw_requires_import": [],
}
FLAT = {
    "network_class_name": RESENC,
    "arch_kwargs": {**NARROW, "kernel_sizes": [[3, 3]] * 3},
    "_kw_requires_import": IMPORTS,
}


@pytest.mark.parametrize(
    ("changes", "code", "value"),
    [
        ({"architecture": PLAIN}, "weights-unknown-network", "PlainConvUNet"),
        ({"previous_stage": "3d_lowres"}, "weights-unknown-network", "cascade"),
        ({"architecture": FLAT}, "weights-bad-plans", "kernel_sizes"),
        ({"patch_size": "large"}, "weights-bad-plans", "checkpoint_final.pth"),
    ],
)
def test_other_networks_and_plans_are_refused_in_one_line(
    tmp_path: Path,
    changes: dict[str, Any],
    code: str,
    value: str,
) -> None:
    file = save(tmp_path / "checkpoint_final.pth", plans(**changes))

    with refused(WeightsError, code, file, value):
        imported(file, tmp_path)
    facts, following = inspect_weights(file, ImportOptions())

    # Inspecting says why, and what nnU-Net itself can do with the file.
    assert value in dict(facts)["cannot be imported"]
    assert f"-pretrained_weights {file}" in following
    assert not (tmp_path / "autoreg_pretraining").exists()


def test_a_network_of_our_trainers_is_imported_by_its_class(tmp_path: Path) -> None:
    size = ENCODERS["primus_tiny"]
    arguments = {**size.arguments, "embed_dim": 48, "eva_depth": 2}
    primus = build_network(size.class_path, arguments, (16, 32, 32), 2, 3)
    architecture = {
        "network_class_name": GUARD_CLASS,
        "arch_kwargs": {
            "class_path": size.class_path,
            "input_shape": [16, 32, 32],
            "drop_path_rate": 0.0,
            **arguments,
        },
        "_kw_requires_import": [],
    }
    file = save(
        tmp_path / "checkpoint_final.pth",
        plans(architecture=architecture),
        network_weights=primus.state_dict(),
        trainer_name="AutoregPretrainedTrainer",
    )

    card, tensors = imported(file, tmp_path)

    assert (card.class_path, card.arguments) == (size.class_path, arguments)
    assert not card.has_decoder
    assert torch.equal(tensors["eva.pos_embed"], primus.state_dict()["eva.pos_embed"])


def test_a_zip_that_would_run_code_is_refused_by_its_own_name(tmp_path: Path) -> None:
    file = save(tmp_path / "m" / "fold_0" / "checkpoint_final.pth", logging={"evil": Path("x")})
    archive = Path(shutil.make_archive(str(tmp_path / "model"), "zip", tmp_path / "m"))
    assert file.is_file()

    with refused(WeightsError, "weights-run-code", archive, "fold_0/checkpoint_final.pth"):
        imported(archive, tmp_path)


def test_a_damaged_zip_is_read_or_refused_with_any_byte_wrong(tmp_path: Path) -> None:
    # One byte in ten once gave a traceback.
    save(tmp_path / "m" / "fold_0" / "checkpoint_final.pth")
    archive = Path(shutil.make_archive(str(tmp_path / "model"), "zip", tmp_path / "m"))
    whole = archive.read_bytes()
    rng = np.random.default_rng(0)
    # Most bytes are of the compressed checkpoint; names and sizes are at both ends.
    offsets = [*range(0, 60, 7), *range(-200, 0, 23), *rng.integers(0, len(whole), 20).tolist()]

    refusals = 0
    for offset in offsets:
        damaged = bytearray(whole)
        damaged[offset] ^= 0xFF
        archive.write_bytes(bytes(damaged))
        try:
            open_source(archive)
        except WeightsError as error:
            assert "\n" not in str(error)
            refusals += 1

    # Some bytes, such as those of a date, make no difference.
    assert refusals > len(offsets) / 2


def test_a_small_zip_that_unpacks_to_much_is_refused_unread(tmp_path: Path) -> None:
    # Up to 32 GiB were once unpacked.
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        # 65 MiB of zeros, in a file of some tens of kilobytes.
        zipped.writestr("m/fold_0/checkpoint_final.pth", bytes(65 * 2**20))

    with refused(WeightsError, "weights-unreadable", archive, "unpack"):
        open_source(archive)


def test_a_fold_of_thousands_of_digits_ends_in_no_traceback() -> None:
    # Once a traceback.
    # Python refuses to convert numbers of more than 4300 digits.
    odd, real = (f"m/fold_{fold}/checkpoint_final.pth" for fold in ("1" * 5000, "0"))

    assert checkpoint_of_model([odd], Path("m.zip")) == odd
    assert checkpoint_of_model([real], Path("m.zip")) == real
