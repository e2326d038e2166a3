"""Every signature of nnU-Net and its networks that we call or override: when one of these changes,
look at our use of it.
"""

import ast
import importlib
import inspect
from typing import Any

import pytest

from nnunet_autoreg.families import CLASS_PATHS
from nnunet_autoreg.finetune.network import GUARD_CLASS

pytestmark = pytest.mark.contract

TRAINER = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer:nnUNetTrainer"
PLANNER = (
    "nnunetv2.experiment_planning.experiment_planners.default_experiment_planner:ExperimentPlanner"
)
NORMALIZATION = "nnunetv2.preprocessing.normalization.default_normalization_schemes"
RESAMPLING = "nnunetv2.preprocessing.resampling.default_resampling"

# "name" has no default, "name=..." has one. Values of defaults that we rely on are checked below.
SIGNATURES = {
    f"{TRAINER}.__init__": "self plans configuration fold dataset_json device=",
    f"{TRAINER}.build_network_architecture": (
        "plans_manager configuration_manager num_input_channels num_output_channels "
        "enable_deep_supervision="
    ),
    f"{TRAINER}.initialize": "self",
    f"{TRAINER}.on_train_start": "self",
    f"{TRAINER}.train_step": "self batch",
    f"{TRAINER}.configure_optimizers": "self",
    f"{TRAINER}.set_deep_supervision_enabled": "self enabled",
    f"{TRAINER}._get_deep_supervision_scales": "self",
    f"{TRAINER}.do_split": "self",
    f"{PLANNER}.__init__": (
        "self dataset_name_or_id gpu_memory_target_in_gb= preprocessor_name= plans_name= "
        "overwrite_target_spacing= suppress_transpose="
    ),
    f"{PLANNER}.get_plans_for_configuration": "self spacing median_shape data_identifier "
    "approximate_n_voxels_dataset _cache",
    f"{PLANNER}.plan_experiment": "self",
    f"{PLANNER}.save_plans": "self plans",
    f"{PLANNER}.generate_data_identifier": "self configuration_name",
    f"{PLANNER}.determine_transpose": "self",
    f"{PLANNER}.determine_fullres_target_spacing": "self",
    "nnunetv2.utilities.find_class_by_name:recursive_find_python_class": (
        "folder class_name current_module base_folder= verbose= cleanup_imports_from_base_folder="
    ),
    "nnunetv2.utilities.find_objects:recursive_find_trainer_class_by_name": "trainer_name",
    "nnunetv2.preprocessing.cropping.cropping:crop_to_nonzero": "data seg= nonzero_label=",
    f"{RESAMPLING}:compute_new_shape": "old_shape old_spacing new_spacing",
    f"{RESAMPLING}:resample_data_or_seg_to_shape": (
        "data new_shape current_spacing new_spacing is_seg= order= order_z= force_separate_z= "
        "separate_z_anisotropy_threshold="
    ),
    f"{NORMALIZATION}:ImageNormalization.__init__": "self use_mask_for_norm= intensityproperties= "
    "target_dtype=",
    f"{NORMALIZATION}:ZScoreNormalization.run": "self image seg=",
    f"{NORMALIZATION}:CTNormalization.run": "self image seg=",
    "nnunetv2.imageio.simpleitk_reader_writer:SimpleITKIO.read_images": "self image_fnames",
    "dynamic_network_architectures.architectures.primus:Primus.__init__": (
        "self input_channels embed_dim patch_embed_size num_classes eva_depth= eva_numheads= "
        "input_shape= decoder_norm= decoder_act= "
        "num_register_tokens= use_rot_pos_emb= use_abs_pos_embed= mlp_ratio= drop_path_rate= "
        "patch_drop_rate= proj_drop_rate= "
        "attn_drop_rate= rope_impl= rope_kwargs= init_values= scale_attn_inner="
    ),
    "timm.models.eva:EvaBlock.forward": "self x rope= attn_mask=",
}

# A change of one of these would change what we compute, without an error.
DEFAULTS = {
    (f"{PLANNER}.__init__", "gpu_memory_target_in_gb"): 8,
    (f"{PLANNER}.__init__", "plans_name"): "nnUNetPlans",
    (f"{PLANNER}.__init__", "preprocessor_name"): "DefaultPreprocessor",
    ("nnunetv2.preprocessing.cropping.cropping:crop_to_nonzero", "nonzero_label"): -1,
    (f"{RESAMPLING}:resample_data_or_seg_to_shape", "separate_z_anisotropy_threshold"): 3,
}


def resolve(where: str) -> Any:
    """Return what ``module:path.to.object`` names."""
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("where", SIGNATURES, ids=lambda where: where.partition(":")[2])
def test_a_borrowed_signature_is_as_we_know_it(where: str) -> None:
    parameters = inspect.signature(resolve(where)).parameters.values()
    found = " ".join(
        p.name + ("" if p.default is inspect.Parameter.empty else "=") for p in parameters
    )

    assert found == SIGNATURES[where]
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.parametrize(
    ("where", "name"),
    DEFAULTS,
    ids=lambda text: text.partition(":")[2] or text,
)
def test_a_default_that_we_rely_on_is_as_we_know_it(where: str, name: str) -> None:
    parameters = inspect.signature(resolve(where)).parameters

    assert parameters[name].default == DEFAULTS[where, name]


def test_checkpoints_are_loaded_by_position() -> None:
    # nnU-Net's master branch has renamed the argument, so nobody may rely on its name.
    theirs = list(inspect.signature(resolve(f"{TRAINER}.load_checkpoint")).parameters)
    source = inspect.getsource(importlib.import_module("nnunetv2.run.run_training"))
    calls = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".load_checkpoint"):
            calls.append(node)

    assert theirs in (["self", "filename_or_checkpoint"], ["self", "checkpoint"])
    assert calls
    assert all(len(call.args) == 1 and not call.keywords for call in calls)

    for module, name in (
        ("autoreg_trainers", "AutoregPretrainedTrainer"),
        ("autoreg_detection_trainers", "AutoregDetectionTrainer"),
    ):
        ours = resolve(f"nnunet_autoreg.trainers.{module}:{name}.load_checkpoint")
        _, argument = inspect.signature(ours).parameters.values()
        assert argument.kind is inspect.Parameter.POSITIONAL_ONLY


def test_the_class_paths_that_plans_hold_never_change() -> None:
    # Plans outlive the code that has written them. Add a path, but never change one.
    frozen = {
        "primus": "dynamic_network_architectures.architectures.primus.Primus",
        "primus_v2": "dynamic_network_architectures.architectures.primus.PrimusV2",
        "primus_v3": "dynamic_network_architectures.architectures.primus.PrimusV3",
        "resenc": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "vit": "nnunet_autoreg.model.vit.ViT",
    }
    guard = "nnunet_autoreg.finetune.network.PlannedForAutoregTrainers"

    assert frozen.items() <= CLASS_PATHS.items()
    assert guard == GUARD_CLASS
    for path in (*frozen.values(), guard):
        module, _, name = path.rpartition(".")
        assert isinstance(resolve(f"{module}:{name}"), type)


def test_prediction_builds_the_network_without_a_trainer() -> None:
    trainer = resolve(TRAINER)
    # nnU-Net's predictor has the class of the trainer, and no instance of it.
    assert isinstance(inspect.getattr_static(trainer, "build_network_architecture"), staticmethod)


def test_primus_names_the_parts_that_a_weight_contract_needs() -> None:
    network = resolve("dynamic_network_architectures.architectures.primus:Primus")(
        input_channels=1,
        embed_dim=264,
        patch_embed_size=(8, 8, 8),
        num_classes=2,
        eva_depth=1,
        eva_numheads=4,
        input_shape=(16, 16, 16),
    )

    assert (network.key_to_encoder, network.key_to_stem) == ("eva", "down_projection")
    assert (network.keys_to_in_proj, network.key_to_lpe) == (
        ("down_projection.proj",),
        "eva.pos_embed",
    )
    # 16 / 8 = 2 tokens along every axis.
    assert tuple(network.eva.pos_embed.shape) == (1, 2 * 2 * 2, 264)
    assert isinstance(network.eva.blocks[0], resolve("timm.models.eva:EvaBlock"))
