"""nnssl's checkpoints, synthesised from the format's own key lists with tiny networks, and our
export of them.
"""

import errno
import json
import resource
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from torch import Tensor, nn

from nnunet_autoreg.convert.choices import HUGGINGFACE_FORM, NNSSL_FORM, NNSSL_ORDER
from nnunet_autoreg.convert.exporting import adaptation_plan, export_weights
from nnunet_autoreg.convert.imported import ImportOptions, names_of
from nnunet_autoreg.convert.importing import import_weights
from nnunet_autoreg.convert.source import CHECKPOINT_NAME, OWN_KEY
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.families import CLASS_PATHS, token_size_of
from nnunet_autoreg.finetune.load import Target, load_encoder, write_tensors
from nnunet_autoreg.model.card import Adaptation, EncoderCard, read_card
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.records import sha256_of
from nnunet_autoreg.safe_load import load_plain

PRIMUS = {
    "embed_dim": 48,
    "patch_embed_size": [8, 8, 8],
    "eva_depth": 2,
    "eva_numheads": 4,
    "init_values": 0.1,
    "scale_attn_inner": True,
}
CROP = (16, 16, 24)
RESENC: dict[str, Any] = {
    **ENCODERS["resenc_tiny"].arguments,
    "n_stages": 2,
    "features_per_stage": [4, 6],
    "kernel_sizes": [[3, 3, 3]] * 2,
    "strides": [[1, 1, 1], [2, 2, 2]],
    "n_blocks_per_stage": [1, 1],
    "n_conv_per_stage_decoder": [1],
}
RESENC_KEYS = {
    "key_to_encoder": "encoder.stages",
    "key_to_stem": "encoder.stem",
    "key_to_lpe": None,
    "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
}
PRIMUS_KEYS = {
    "key_to_encoder": "eva",
    "key_to_stem": "down_projection",
    "key_to_lpe": "eva.pos_embed",
    "keys_to_in_proj": ["down_projection.proj"],
}


def random_network(
    family: str,
    arguments: dict[str, Any],
    crop: tuple[int, int, int] = CROP,
    channels: int = 1,
) -> Any:
    """A network of random weights, norms and scales included, so that nothing is equal by
    accident.
    """
    torch.manual_seed(0)
    network = build_network(CLASS_PATHS[family], arguments, crop, channels, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return network.eval()


def write_encoder(
    results: Path,
    network: Any,
    family: str,
    arguments: dict[str, Any],
    crop: tuple[int, int, int],
    **changes: Any,
) -> Path:
    """A finished pretraining run 'made' with a network's encoder, each tensor once."""
    folder = results / "autoreg_pretraining" / "made"
    tensors = {names[0]: network.state_dict()[names[0]] for names in names_of(network).values()}
    write_tensors(folder / "encoder.safetensors", tensors)
    lpe = network.key_to_lpe
    values: dict[str, Any] = {
        "name": "made",
        "encoder": family,
        "class_path": CLASS_PATHS[family],
        "arguments": arguments,
        "token_size_vox": token_size_of(CLASS_PATHS[family], arguments),
        "crop_size_vox": crop,
        "spacing_mm": (1.5, 1.0, 1.0),
        "modalities": ("MR",),
        "channel_names": ("T1",),
        "ct_window": None,
        "num_input_channels": 1,
        "adaptation": Adaptation(
            network.key_to_encoder,
            network.key_to_stem,
            tuple(network.keys_to_in_proj),
            lpe,
        ),
        "objective": "autoregressive",
        "licences": {"Some scans": "CC0"},
        "num_scans": 10,
        "num_steps": 100,
        "finished_at": "2026-01-01T00:00:00+00:00",
        "sha256": sha256_of(folder / "encoder.safetensors"),
        **changes,
    }
    EncoderCard(**values).save(folder)
    return folder


def plan_of(
    name: str,
    kwargs: dict[str, Any] | None,
    keys: dict[str, Any],
    patch: tuple[int, ...] = CROP,
) -> dict[str, Any]:
    """An adaptation plan as nnssl serialises it."""
    # Arguments that are given as names of classes.
    imported = None
    if name == "ResidualEncoderUNet":
        imported = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    configuration = {
        "spacing": [1, 1, 1],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "patch_size": list(patch),
    }
    return {
        "architecture_plans": {
            "arch_class_name": name,
            "arch_kwargs": kwargs,
            "arch_kwargs_requiring_import": imported,
        },
        "pretrain_plan": {
            "dataset_name": "Dataset745_OpenMind",
            "plans_name": "nnsslPlans",
            "configurations": {"onemmiso": configuration},
            "original_median_spacing_after_transp": [1, 1, 1],
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": list(patch),
        **keys,
    }


def save(
    folder: Path,
    tensors: dict[str, Tensor],
    plan: dict[str, Any] | None,
    **rest: Any,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "checkpoint_final.pth"
    content = {"network_weights": tensors, **rest}
    if plan is not None:
        content["nnssl_adaptation_plan"] = plan
    torch.save(content, file)
    return file


def primus_x(**changes: Any) -> dict[str, Any]:
    """arch_kwargs as nnssl writes them for a PrimusX."""
    names = {"eva_depth": "encoder_eva_depth", "eva_numheads": "encoder_eva_numheads"}
    renamed = {names.get(key, key): value for key, value in PRIMUS.items()}
    return {"input_channels": 1, "output_channels": 1, **renamed, **changes}


def eva_mae_features(network: Any, volume: Tensor) -> Tensor:
    """Features (B, V, w, h, d) of the network as nnssl's EvaMAE runs it: tokens flattened as (h w
    d).
    """
    grid = network.down_projection(volume)
    B, V, w, h, d = grid.shape
    tokens, _ = network.eva(grid.permute(0, 3, 2, 4, 1).reshape(B, h * w * d, V))
    return tokens.reshape(B, h, w, d, V).permute(0, 4, 2, 1, 3)


def nnunet_features(network: Any, volume: Tensor) -> Tensor:
    """The same as dynamic_network_architectures' Primus runs it: tokens flattened as (w h d)."""
    grid = network.down_projection(volume)
    tokens, _ = network.eva(grid.flatten(2).transpose(1, 2))
    return tokens.transpose(1, 2).reshape(grid.shape)


def load(
    results: Path,
    name: str,
    family: str,
    arguments: dict[str, Any],
    crop: tuple[int, int, int] = CROP,
) -> Any:
    """A network with an imported run's encoder, by the loader that fine-tuning uses."""
    folder = results / "autoreg_pretraining" / name
    network = build_network(CLASS_PATHS[family], arguments, crop, 1, 2)
    table = load_encoder(
        network,
        folder / "encoder.safetensors",
        read_card(folder),
        Target(1, crop),
        1.0,
    )
    assert table.encoder_share == 1.0
    return network.eval()


def test_a_transformer_computes_in_nnunet_what_it_computed_in_nnssl(
    tmp_path: Path,
) -> None:
    original = random_network("primus", PRIMUS)
    file = save(tmp_path / "in", original.state_dict(), plan_of("PrimusX", primus_x(), PRIMUS_KEYS))
    volume = torch.randn(2, 1, *CROP, generator=torch.Generator().manual_seed(1))
    results = tmp_path / "res"
    import_weights(file, "corrected", results, ImportOptions())
    import_weights(file, "kept", results, ImportOptions(token_order="keep"))
    corrected = load(results, "corrected", "primus", PRIMUS)
    kept = load(results, "kept", "primus", PRIMUS)
    # Positions are not enough: kernels are turned as well.
    positions_only = load(results, "kept", "primus", PRIMUS)

    with torch.no_grad():
        positions_only.eva.pos_embed.copy_(corrected.eva.pos_embed)
        in_nnssl = eva_mae_features(original, volume)
        in_nnunet = nnunet_features(original, volume)
        found = nnunet_features(corrected, volume)
        found_kept = nnunet_features(kept, volume)
        found_wrong = nnunet_features(positions_only, volume)

    torch.testing.assert_close(found, in_nnssl, atol=1e-5, rtol=1e-5)
    assert (found_kept - in_nnssl).abs().max() > 1e-3
    assert (found_wrong - in_nnssl).abs().max() > 1e-3
    # Kept as it is, the network computes what the same weights compute in nnU-Net.
    torch.testing.assert_close(found_kept, in_nnunet, atol=1e-6, rtol=0)


def test_an_order_that_cannot_be_corrected_is_refused_but_can_be_kept(tmp_path: Path) -> None:
    # 2 x 3 x 2 tokens: exchanging two axes of unequal length is not a permutation of positions.
    crop = (16, 24, 16)
    tensors = random_network("primus", PRIMUS, crop).state_dict()
    file = save(tmp_path, tensors, plan_of("PrimusX", primus_x(), PRIMUS_KEYS, crop))

    with refused(WeightsError, "weights-token-order", "(2, 3, 2)", "--token-order keep"):
        import_weights(file, "a", tmp_path / "res", ImportOptions())

    _, imported = import_weights(file, "a", tmp_path / "res", ImportOptions(token_order="keep"))

    assert any(note.startswith("token order kept") for note in imported.notes)


def test_a_cnn_is_imported_without_its_decoder_and_doubled_names(tmp_path: Path) -> None:
    original = random_network("resenc", RESENC)
    state = original.state_dict()
    assert "encoder.stem.convs.0.conv.weight" in state
    assert "encoder.stem.convs.0.all_modules.0.weight" in state

    # Names as a compiled network in DistributedDataParallel has them.
    wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()}
    assert "decoder.encoder.stem.convs.0.conv.weight" in state

    file = save(
        tmp_path / "in",
        wrapped,
        plan_of("ResidualEncoderUNet", RESENC, RESENC_KEYS),
        trainer_name="BaseMAETrainer",
    )
    card, imported = import_weights(file, "cnn", tmp_path / "res", ImportOptions())
    stored = load_file(tmp_path / "res" / "autoreg_pretraining" / "cnn" / "encoder.safetensors")

    for key in stored:
        assert key.startswith(("encoder.stem.", "encoder.stages."))
        assert "all_modules" not in key
    # Each tensor once, however many names it has.
    tensors = {value.data_ptr() for key, value in state.items() if key.startswith("encoder.")}
    assert len(stored) == len(tensors)
    num_decoder = sum(key.startswith("decoder.") for key in state)
    assert imported.notes == (f"left out: decoder ({num_decoder} tensors)",)
    assert card.licences == {"OpenMind": "CC-BY-4.0"}
    assert card.modalities == ("MR",)
    assert card.normalization == "ZScoreNormalization"
    assert card.objective == "imported from nnssl (BaseMAETrainer)"

    volume = torch.randn(1, 1, *CROP, generator=torch.Generator().manual_seed(1))
    loaded = load(tmp_path / "res", "cnn", "resenc", RESENC)
    with torch.no_grad():
        for ours, theirs in zip(loaded.encoder(volume), original.encoder(volume), strict=True):
            assert torch.equal(ours, theirs)


def test_two_names_of_one_tensor_that_differ_are_an_error(tmp_path: Path) -> None:
    state = dict(random_network("resenc", RESENC).state_dict())
    names = ("encoder.stem.convs.0.conv.weight", "encoder.stem.convs.0.all_modules.0.weight")
    state[names[0]] = state[names[0]] + 1
    file = save(tmp_path, state, plan_of("ResidualEncoderUNet", RESENC, RESENC_KEYS))

    with refused(WeightsError, "weights-mismatch", *names):
        import_weights(file, "a", tmp_path / "res", ImportOptions())


@pytest.mark.parametrize(
    ("trained", "stated", "code", "values"),
    [
        ({}, {"init_values": None}, "weights-mismatch", ("eva.blocks.0.gamma_1",)),
        ({}, {"scale_attn_inner": False}, "weights-mismatch", ("eva.blocks.0.attn.norm.bias",)),
        ({"init_values": None}, {}, "weights-mismatch", ("eva.blocks.0.gamma_1",)),
        ({}, {"encoder_eva_depth": 3}, "weights-mismatch", ("PrimusX", "depth 3", "depth 2")),
        ({}, {"embed_dim": 96}, "weights-mismatch", ("width 96", "width 48")),
        ({}, {"num_register_tokens": 4}, "weights-unknown-network", ("4",)),
    ],
)
def test_a_plan_that_contradicts_the_weights_is_an_error(
    tmp_path: Path,
    trained: dict[str, Any],
    stated: dict[str, Any],
    code: str,
    values: tuple[str, ...],
) -> None:
    tensors = random_network("primus", {**PRIMUS, **trained}).state_dict()
    file = save(tmp_path, tensors, plan_of("PrimusX", primus_x(**stated), PRIMUS_KEYS))

    with refused(WeightsError, code, *values):
        import_weights(file, "a", tmp_path / "res", ImportOptions())


@pytest.mark.parametrize("with_scale", [True, False])
def test_layer_scale_and_inner_norm_can_be_read_from_the_weights(
    tmp_path: Path,
    with_scale: bool,
) -> None:
    arguments = {
        **PRIMUS,
        "init_values": 0.1 if with_scale else None,
        "scale_attn_inner": with_scale,
    }
    kwargs = {k: v for k, v in primus_x().items() if k not in ("init_values", "scale_attn_inner")}
    network = random_network("primus", arguments)
    state = {f"encoder.{key}": value for key, value in network.state_dict().items()}
    file = save(tmp_path, state, plan_of("PrimusX", kwargs, PRIMUS_KEYS))

    card, _ = import_weights(file, "a", tmp_path / "res", ImportOptions())

    assert card.arguments == arguments


def test_layer_scale_written_as_a_list_is_its_first_value(tmp_path: Path) -> None:
    plan = plan_of("PrimusX", primus_x(init_values=[0.1]), PRIMUS_KEYS)
    file = save(tmp_path, random_network("primus", PRIMUS).state_dict(), plan)

    card, _ = import_weights(file, "a", tmp_path / "res", ImportOptions())

    assert card.arguments["init_values"] == 0.1


def test_the_plan_beside_the_file_is_used_if_the_file_has_none(tmp_path: Path) -> None:
    file = save(tmp_path, random_network("primus", PRIMUS).state_dict(), None)

    with refused(WeightsError, "weights-not-importable", file, "--adaptation-plan"):
        import_weights(file, "a", tmp_path / "res", ImportOptions())

    plan = plan_of("PrimusX", primus_x(), PRIMUS_KEYS)
    (tmp_path / "elsewhere.json").write_text(json.dumps(plan))
    import_weights(file, "by_flag", tmp_path / "res", ImportOptions(), tmp_path / "elsewhere.json")
    (tmp_path / "adaptation_plan.json").write_text(json.dumps(plan))
    import_weights(tmp_path, "beside", tmp_path / "res", ImportOptions())
    folder = tmp_path / "res" / "autoreg_pretraining"

    beside = (folder / "beside" / "encoder.safetensors").read_bytes()
    assert beside == (folder / "by_flag" / "encoder.safetensors").read_bytes()


def test_of_two_patch_sizes_the_one_that_fits_the_positions_is_used(tmp_path: Path) -> None:
    # 12 positions are 2 x 2 x 3 tokens of 8 voxels, and not 4 x 4 x 4.
    state = random_network("primus", PRIMUS).state_dict()
    file = save(tmp_path, state, plan_of("PrimusX", primus_x(), PRIMUS_KEYS, (32, 32, 32)))
    with refused(WeightsError, "weights-patch-size", "12", "(32, 32, 32)", "--patch-size"):
        import_weights(file, "a", tmp_path / "res", ImportOptions())

    right_plan = plan_of("PrimusX", primus_x(), PRIMUS_KEYS)
    (tmp_path / "adaptation_plan.json").write_text(json.dumps(right_plan))
    card, imported = import_weights(file, "a", tmp_path / "res", ImportOptions())

    assert card.crop_size_vox == CROP
    (note,) = [note for note in imported.notes if note.startswith("patch size (16, 16, 24)")]
    assert "(32, 32, 32)" in note


def test_a_preset_without_arguments_is_the_published_network(tmp_path: Path) -> None:
    plan = plan_of("ResEncL", None, RESENC_KEYS, (64, 64, 64))
    del plan["pretrain_plan"]["configurations"]["onemmiso"]["spacing"]
    arguments = ENCODERS["resenc_l"].arguments
    with torch.device("meta"):
        network = build_network(CLASS_PATHS["resenc"], arguments, (64, 64, 64), 1, 2)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    state = {key: torch.zeros(shape) for key, shape in shapes.items() if key.startswith("encoder.")}

    card, _ = import_weights(save(tmp_path, state, plan), "a", tmp_path / "res", ImportOptions())

    # The name of the configuration, onemmiso, is all that says 1 mm.
    assert card.encoder == "resenc_l"
    assert card.token_size_vox == (32, 32, 32)
    assert card.spacing_mm == (1.0, 1.0, 1.0)

    primus = plan_of("PrimusM", None, PRIMUS_KEYS)
    file = save(tmp_path / "m", random_network("primus", PRIMUS).state_dict(), primus)

    with refused(WeightsError, "weights-mismatch", "PrimusM", "width 864", "width 48"):
        import_weights(file, "m", tmp_path / "res", ImportOptions())


@pytest.mark.parametrize(
    ("family", "change", "code", "value"),
    [
        ("primus", {"arch_kwargs": [1, 2]}, "weights-bad-adaptation-plan", "arch_kwargs"),
        (
            "primus",
            {"arch_kwargs": primus_x(init_values="much")},
            "weights-bad-adaptation-plan",
            "init_values 'much'",
        ),
        ("primus", {"arch_kwargs": primus_x(encoder_eva_numheads=5)}, "weights-heads", "48"),
        (
            "primus",
            {"arch_kwargs": primus_x(encoder_eva_numheads="four")},
            "weights-heads",
            "--heads N",
        ),
        (
            "primus",
            {"arch_class_name": None},
            "weights-bad-adaptation-plan",
            "architecture_plans.arch_class_name",
        ),
        (
            "resenc",
            {"arch_kwargs": {**RESENC, "norm_op": "os.system"}},
            "weights-network",
            "norm_op='os.system'",
        ),
        (
            "resenc",
            {"arch_kwargs": {**RESENC, "n_stages": "two"}},
            "weights-network",
            "cannot be built",
        ),
        (
            "resenc",
            {"arch_kwargs": {**RESENC, "norm_op": None}},
            "weights-network",
            "AttributeError",
        ),
        (
            "resenc",
            {"arch_kwargs": {"n_stages": 2}},
            "weights-bad-adaptation-plan",
            "features_per_stage, conv_op",
        ),
    ],
)
def test_a_malformed_plan_ends_in_one_line(
    tmp_path: Path,
    family: str,
    change: dict[str, Any],
    code: str,
    value: str,
) -> None:
    if family == "primus":
        arguments = PRIMUS
        plan = plan_of("PrimusX", primus_x(), PRIMUS_KEYS)
    else:
        arguments = RESENC
        plan = plan_of("ResidualEncoderUNet", RESENC, RESENC_KEYS)
    plan["architecture_plans"].update(change)
    file = save(tmp_path, random_network(family, arguments).state_dict(), plan)

    with refused(WeightsError, code, value):
        import_weights(file, "a", tmp_path / "res", ImportOptions())
    assert not (tmp_path / "res").exists()


@pytest.mark.parametrize("stated", ["x", [1], -1])
def test_an_impossible_number_of_channels_ends_in_one_line(tmp_path: Path, stated: Any) -> None:
    plan = {**plan_of("PrimusX", primus_x(), PRIMUS_KEYS), "pretrain_num_input_channels": stated}
    file = save(tmp_path, random_network("primus", PRIMUS).state_dict(), plan)
    with refused(WeightsError, "weights-bad-adaptation-plan", file, repr(stated)):
        import_weights(file, "a", tmp_path / "res", ImportOptions())


def test_another_network_of_nnssl_is_named(tmp_path: Path) -> None:
    state = random_network("resenc", RESENC).state_dict()
    file = save(tmp_path, state, plan_of("PlainConvUNet", {"n_stages": 2}, RESENC_KEYS))

    with refused(WeightsError, "weights-unknown-network", file, "PlainConvUNet", "ResEncL"):
        import_weights(file, "a", tmp_path / "res", ImportOptions())


def minimal_reader(folder: Path, class_count: int = 3) -> nn.Module:
    """Return a network as the format's own readers make it, from nothing but the file.

    Encoder and stem are loaded strictly by prefix.
    """
    content = torch.load(folder / "checkpoint_final.pth", map_location="cpu", weights_only=True)
    plan = content["nnssl_adaptation_plan"]
    network_weights = content["network_weights"]
    for key in (
        "architecture_plans",
        "pretrain_plan",
        "pretrain_num_input_channels",
        "recommended_downstream_patchsize",
        "key_to_encoder",
        "key_to_stem",
        "keys_to_in_proj",
        "key_to_lpe",
    ):
        assert key in plan
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    name = plan["architecture_plans"]["arch_class_name"]
    kwargs = plan["architecture_plans"]["arch_kwargs"]
    network = read_network(name, kwargs, plan, configuration["patch_size"], class_count)

    parts = (plan["key_to_encoder"], plan["key_to_stem"])
    for part in parts:
        weights = {}
        for key, value in network_weights.items():
            if key.startswith(f"{part}."):
                weights[key.removeprefix(f"{part}.")] = value
        network.get_submodule(part).load_state_dict(weights, strict=True)

    # Several names of the layer that reads the image hold the same values.
    values = [network_weights[f"{key}.weight"] for key in plan["keys_to_in_proj"]]
    for value in values:
        assert torch.equal(value, values[0])
        assert value.dtype == torch.float32
    assert all(key.startswith(parts) for key in network_weights)
    return network.eval()


def read_network(
    name: str,
    kwargs: dict[str, Any],
    plan: dict[str, Any],
    patch: list[int],
    class_count: int,
) -> nn.Module:
    from dynamic_network_architectures.architectures.primus import Primus, PrimusS, PrimusV2
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    channels = plan["pretrain_num_input_channels"]
    if kwargs is None:
        # As nnU-Net's master branch builds its presets.
        return PrimusS(channels, class_count, (8, 8, 8), tuple(patch))
    if name == "ResidualEncoderUNet":
        classes: dict[str, Any] = {"conv_op": nn.modules.conv.Conv3d, "norm_op": nn.InstanceNorm3d}
        imported = {}
        for key in plan["architecture_plans"]["arch_kwargs_requiring_import"]:
            if kwargs[key] is not None:
                imported[key] = classes.get(key, nn.LeakyReLU)
        return ResidualEncoderUNet(
            input_channels=channels,
            num_classes=class_count,
            **{**kwargs, **imported},
        )
    primus = {"PrimusX": Primus, "PrimusV2": PrimusV2}[name]
    return primus(
        channels,
        kwargs["embed_dim"],
        kwargs["patch_embed_size"],
        class_count,
        kwargs["encoder_eva_depth"],
        kwargs["encoder_eva_numheads"],
        tuple(patch),
        scale_attn_inner=kwargs["scale_attn_inner"],
        init_values=kwargs["init_values"],
    )


@pytest.mark.parametrize(
    ("family", "arguments"),
    [("primus", PRIMUS), ("primus_v2", PRIMUS), ("resenc", RESENC)],
)
def test_an_export_follows_the_format_and_is_imported_bit_by_bit(
    tmp_path: Path,
    family: str,
    arguments: dict[str, Any],
) -> None:
    network = random_network(family, arguments)
    folder = write_encoder(tmp_path, network, family, arguments, CROP)
    weights = folder / "encoder.safetensors"

    done = export_weights(weights, tmp_path / "out")

    names = [file.name for file in done.files]
    assert names == ["checkpoint_final.pth", "adaptation_plan.json", "config.json"]

    # No name of a temporary file, which has the name of this computer.
    with zipfile.ZipFile(tmp_path / "out" / "checkpoint_final.pth") as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {"archive"}

    read: Any = minimal_reader(tmp_path / "out")
    volume = torch.randn(1, 1, *CROP, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if family == "resenc":
            for ours, theirs in zip(network.encoder(volume), read.encoder(volume), strict=True):
                assert torch.equal(ours, theirs)
        else:
            assert torch.equal(nnunet_features(read, volume), nnunet_features(network, volume))

    card, imported = import_weights(tmp_path / "out", "back", tmp_path, ImportOptions())

    # A tensor of two names is counted once, as it is written.
    assert imported.tensors.keys() == load_file(weights).keys()
    back = tmp_path / "autoreg_pretraining" / "back" / "encoder.safetensors"
    assert back.read_bytes() == weights.read_bytes()

    first = read_card(folder)
    changed = {f for f in first.__dataclass_fields__ if getattr(first, f) != getattr(card, f)}
    assert changed == {"name", "extra"}
    assert imported.licences == {"Some scans": "CC0"}
    assert not [note for note in imported.notes if "assumed" in note]

    # Tokens have an order, which our export states; stages of a CNN do not.
    kept = [note for note in imported.notes if note.startswith("token order kept")]
    assert len(kept) == (0 if family == "resenc" else 1)


@pytest.mark.parametrize(
    ("encoder", "objective", "expected"),
    [
        ("primus_tiny", "autoregressive (query, raster)", True),
        ("primus_tiny", "masked (75 %)", False),
        ("resenc_tiny", "autoregressive (network, random)", False),
    ],
)
def test_an_export_is_causal_if_the_network_saw_only_earlier_blocks(
    write_run: Callable[..., Path],
    tmp_path: Path,
    encoder: str,
    objective: str,
    expected: bool,
) -> None:
    """A CNN that predicts blocks looks in all directions."""
    folder = write_run(tmp_path, "run", encoder=encoder, objective=objective)

    export_weights(folder / "encoder.safetensors", tmp_path / "out", NNSSL_FORM)

    exported = load_plain(tmp_path / "out" / CHECKPOINT_NAME)
    assert exported[OWN_KEY]["causal"] is expected


def test_an_export_for_readers_of_the_other_token_order_computes_the_same(tmp_path: Path) -> None:
    network = random_network("primus", PRIMUS)
    folder = write_encoder(tmp_path, network, "primus", PRIMUS, CROP)

    export_weights(folder / "encoder.safetensors", tmp_path / "out", NNSSL_FORM, NNSSL_ORDER)

    read = minimal_reader(tmp_path / "out")
    volume = torch.randn(1, 1, *CROP, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = nnunet_features(network, volume)
        torch.testing.assert_close(eva_mae_features(read, volume), wanted, atol=1e-5, rtol=1e-5)
        assert (nnunet_features(read, volume) - wanted).abs().max() > 1e-3

    # Our own import reads the order from the file.
    import_weights(tmp_path / "out", "back", tmp_path, ImportOptions())
    back = tmp_path / "autoreg_pretraining" / "back" / "encoder.safetensors"
    assert back.read_bytes() == (folder / "encoder.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("family", "arguments", "crop", "form"),
    [
        # A CNN has no tokens, Hugging Face's form no field for their order, and a crop with two
        # unequal axes no exchange.
        ("resenc", RESENC, CROP, NNSSL_FORM),
        ("primus", PRIMUS, CROP, HUGGINGFACE_FORM),
        ("primus", PRIMUS, (16, 24, 16), NNSSL_FORM),
    ],
)
def test_tokens_that_cannot_be_reordered_are_refused_at_export(
    tmp_path: Path,
    family: str,
    arguments: dict[str, Any],
    crop: tuple[int, int, int],
    form: str,
) -> None:
    network = random_network(family, arguments, crop)
    folder = write_encoder(tmp_path, network, family, arguments, crop)

    with refused(WeightsError, "weights-token-order", "--token-order nnssl", "'made'"):
        export_weights(folder / "encoder.safetensors", tmp_path / "out", form, NNSSL_ORDER)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("encoder", "changes", "expected"),
    [
        ("primus_s", {}, "PrimusS"),
        ("primus_b", {}, "PrimusB"),
        ("primus_m", {}, "PrimusM"),
        ("primus_l", {}, "PrimusL"),
        ("primus_tiny", {}, "PrimusX"),
        ("primus_s", {"patch_embed_size": [4, 4, 4]}, "PrimusX"),
        ("primus_s", {"init_values": None}, "PrimusX"),
        ("primus_s", {"scale_attn_inner": False}, "PrimusX"),
        ("primus_s", {"mlp_ratio": 4.0}, "PrimusX"),
    ],
)
def test_an_encoder_has_the_name_of_a_preset_if_it_is_one(
    tmp_path: Path,
    write_run: Callable[..., Path],
    encoder: str,
    changes: Any,
    expected: str,
) -> None:
    size = ENCODERS[encoder]
    card = replace(
        read_card(write_run(tmp_path, "made", (16, 16, 16))),
        encoder=encoder,
        class_path=size.class_path,
        arguments={**size.arguments, **changes},
    )

    plan, warnings = adaptation_plan(card, {"down_projection.proj.weight": torch.zeros(1)})

    described = plan["architecture_plans"]
    assert described["arch_class_name"] == expected
    assert (described["arch_kwargs"] is None) == (expected != "PrimusX")
    assert len(warnings) == (1 if expected == "PrimusX" else 0)


def test_a_preset_is_read_by_its_name_and_windows_are_kept(tmp_path: Path) -> None:
    from nnunet_autoreg.plan import IntensityWindow

    window = IntensityWindow(50.0, 100.0, 40.0, -900.0, 900.0, -800.0, 800.0)
    arguments = ENCODERS["primus_s"].arguments
    network = random_network("primus", arguments)
    folder = write_encoder(tmp_path, network, "primus", arguments, CROP, ct_window=window)

    done = export_weights(folder / "encoder.safetensors", tmp_path / "out")

    read = minimal_reader(tmp_path / "out")
    volume = torch.randn(1, 1, *CROP, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(nnunet_features(read, volume), nnunet_features(network, volume))
    assert len(done.warnings) == 1
    assert "Hounsfield window of -800 to 800" in done.warnings[0]
    content = torch.load(done.files[0], weights_only=True)
    assert content["nnunet_autoreg"]["card"]["ct_window"]["mean"] == 50.0
    citation = content["citations"][0]["apa_citations"][0]
    assert "Licences of what it was made from: Some scans: CC0" in citation


def test_an_export_does_not_overwrite_other_files(tmp_path: Path) -> None:
    network = random_network("resenc", RESENC)
    folder = write_encoder(tmp_path, network, "resenc", RESENC, CROP)
    export_weights(folder / "encoder.safetensors", tmp_path / "out")
    plan = tmp_path / "out" / "adaptation_plan.json"
    plan.write_text(plan.read_text().replace("autoreg_pretrain", "somebody_else"))
    before = plan.read_bytes()

    with refused(WeightsError, "weights-export-exists", tmp_path / "out", "adaptation_plan.json"):
        export_weights(folder / "encoder.safetensors", tmp_path / "out")

    assert plan.read_bytes() == before


def test_an_export_of_other_weights_does_not_overwrite_the_checkpoint(tmp_path: Path) -> None:
    network = random_network("resenc", RESENC)
    folder = write_encoder(tmp_path, network, "resenc", RESENC, CROP)
    export_weights(folder / "encoder.safetensors", tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=True)
    # The smallest change that somebody else's training could have made.
    content["network_weights"]["encoder.stem.convs.0.conv.weight"][0, 0, 1, 1, 1] += 1e-6
    torch.save(content, checkpoint)
    before = checkpoint.read_bytes()

    with refused(WeightsError, "weights-export-exists", "checkpoint_final.pth"):
        export_weights(folder / "encoder.safetensors", tmp_path / "out")

    assert checkpoint.read_bytes() == before


def test_the_same_export_may_be_repeated_and_changes_nothing(tmp_path: Path) -> None:
    # An export that was killed is completed by typing the same line again.
    network = random_network("resenc", RESENC)
    folder = write_encoder(tmp_path, network, "resenc", RESENC, CROP)
    first = export_weights(folder / "encoder.safetensors", tmp_path / "out")
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in first.files]

    again = export_weights(folder / "encoder.safetensors", tmp_path / "out")

    assert again.files == first.files
    assert len(before) == 3
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in again.files] == before


def test_the_name_of_another_run_is_not_taken(tmp_path: Path) -> None:
    network = random_network("resenc", RESENC)
    folder = write_encoder(tmp_path, network, "resenc", RESENC, CROP)
    export_weights(folder / "encoder.safetensors", tmp_path / "out")

    with refused(WeightsError, "weights-name-taken", "--name made", folder):
        import_weights(tmp_path / "out", "made", tmp_path, ImportOptions())

    assert [path.name for path in folder.parent.iterdir()] == ["made"]


def test_the_same_import_may_be_repeated_and_changes_nothing(tmp_path: Path) -> None:
    network = random_network("resenc", RESENC)
    folder = write_encoder(tmp_path, network, "resenc", RESENC, CROP)
    export_weights(folder / "encoder.safetensors", tmp_path / "out")
    first, _ = import_weights(tmp_path / "out", "theirs", tmp_path, ImportOptions())
    card_file = folder.parent / "theirs" / "encoder.json"
    before = card_file.read_bytes()

    again, _ = import_weights(tmp_path / "out", "theirs", tmp_path, ImportOptions())

    assert again == first
    assert card_file.read_bytes() == before


@pytest.mark.parametrize("form", [NNSSL_FORM, HUGGINGFACE_FORM])
def test_a_full_disk_ends_an_export_with_the_errors_own_reason(
    write_run: Callable[..., Path],
    tmp_path: Path,
    form: str,
) -> None:
    folder = write_run(tmp_path, "run")

    with small_files(10_000), pytest.raises(OSError) as caught:
        export_weights(folder / "encoder.safetensors", tmp_path / "out", form)

    assert caught.value.errno == errno.EFBIG
    assert Path(caught.value.filename).parent == tmp_path / "out"
    assert not list((tmp_path / "out").glob(".*"))


def test_a_full_disk_ends_an_import_with_the_errors_own_reason(tmp_path: Path) -> None:
    # Once a traceback of safetensors.
    file = tmp_path / "encoder.safetensors"

    with small_files(1000), pytest.raises(OSError) as caught:
        write_tensors(file, {"a": torch.zeros(10_000)})

    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    assert not list(tmp_path.iterdir())


@contextmanager
def small_files(most_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as on a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
