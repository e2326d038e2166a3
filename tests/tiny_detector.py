"""A trained model's folder as nnU-Net leaves it, of a tiny network with random weights, and images
for it: detection without a training.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_autoreg.detection.anchors import AnchorPlan
from nnunet_autoreg.detection.instances import ObjectClass, Rules
from nnunet_autoreg.detection.plan import DetectionPlan
from nnunet_autoreg.finetune.block import AutoregBlock, Recipe
from nnunet_autoreg.finetune.families import recipe_values
from nnunet_autoreg.finetune.network import architecture_entry
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import to_jsonable

PATCH = (16, 16, 16)
SHAPE = (16, 20, 24)
NAME = "AutoregDetectionTrainer__AutoregPlans__3d_fullres"
CLASSES = (ObjectClass("solid", 1, (1,)), ObjectClass("holed", 2, (2,)))
# Three stages of one block: the smallest network that has a level of stride 4.
ARGUMENTS: dict[str, Any] = {
    **ENCODERS["resenc_tiny"].arguments,
    "n_stages": 3,
    "features_per_stage": [4, 6, 8],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "n_blocks_per_stage": [1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1],
}
ANCHORS = AnchorPlan((2,), ((4, 4, 4),), ((6.0, 6.0, 6.0),), 0.7, {})
RESAMPLING = "resample_data_or_seg_to_shape"


def make_plans(num_channels: int = 1) -> dict[str, Any]:
    """What plans.json holds."""
    encoder = EncoderPlan("resenc_tiny", ENCODERS["resenc_tiny"].class_path, ARGUMENTS, (4, 4, 4))
    block = AutoregBlock(encoder, None, Recipe(1, **recipe_values(encoder)))
    kwargs = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration: dict[str, Any] = {
        "data_identifier": "x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(PATCH),
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * num_channels,
        "use_mask_for_norm": [False] * num_channels,
        "architecture": architecture_entry(block, PATCH),
        "batch_dice": False,
        "autoreg_detection": to_jsonable(DetectionPlan(CLASSES, Rules(), ANCHORS, 32, True)),
    }
    for data in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{data}"] = RESAMPLING
        configuration[f"resampling_fn_{data}_kwargs"] = {**kwargs, "is_seg": data == "seg"}
    return {
        "dataset_name": "Dataset950_Tiny",
        "plans_name": "AutoregPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {str(i): {} for i in range(num_channels)},
        "configurations": {"3d_fullres": configuration},
        "autoreg": to_jsonable(block),
    }


def write_model(results: Path, folds: tuple[str, ...] = ("0",), num_channels: int = 1) -> Path:
    """A model's folder below ``results``; its folds have different weights."""
    folder = results / "Dataset950_Tiny" / NAME
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(make_plans(num_channels)))
    description = {
        "channel_names": {str(i): "MRI" for i in range(num_channels)},
        "labels": {"background": 0, "solid": 1, "holed": 2},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    for seed, fold in enumerate(folds):
        write_checkpoint(folder, fold, seed)
    return folder


def write_checkpoint(
    folder: Path,
    fold: str,
    seed: int,
    name: str = "checkpoint_final.pth",
    damaged: bool = False,
) -> None:
    """A checkpoint of a network with weights of this seed, all of them NaN if ``damaged``."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_autoreg.trainers.autoreg_detection_trainers import AutoregDetectionTrainer

    manager = PlansManager(json.loads((folder / "plans.json").read_text()))
    configuration = manager.get_configuration("3d_fullres")
    torch.manual_seed(seed)
    num_channels = len(configuration.normalization_schemes)
    build = AutoregDetectionTrainer.build_network_architecture
    network: Any = build(manager, configuration, num_channels, 3)
    # Scores around 0.5, far enough apart that boxes have an order.
    last = network.detection["heads"].classifier[-1]
    torch.nn.init.normal_(last.weight, std=0.5)
    torch.nn.init.zeros_(last.bias)
    state = network.state_dict()
    if damaged:
        state = {key: torch.full_like(value, torch.nan) for key, value in state.items()}
    content = {
        "network_weights": state,
        "trainer_name": "AutoregDetectionTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    (folder / f"fold_{fold}").mkdir(exist_ok=True)
    torch.save(content, folder / f"fold_{fold}" / name)


def write_scan(file: Path, seed: int = 0, **changes: Any) -> None:
    """An image of noise with a bright cube.

    ``shape``, ``spacing`` (x, y, z), and ``voxel``, the value of one voxel, may be changed.
    """
    import SimpleITK

    shape = changes.get("shape", SHAPE)
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    array[..., 4:10, 4:10] += 4
    if "voxel" in changes:
        array[3, 3, 3] = changes["voxel"]
    file.parent.mkdir(parents=True, exist_ok=True)
    # A leading axis of a 4D array is time; SimpleITK would take it for values of a voxel.
    image: Any = SimpleITK.GetImageFromArray(array, isVector=False)
    if "spacing" in changes:
        image.SetSpacing(changes["spacing"])
    SimpleITK.WriteImage(image, str(file))
