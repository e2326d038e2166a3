"""Weights of every family of encoders into networks of other grids, channels, kernels and
depths.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from nnunet_autoreg.errors import PlanError, WeightsError
from nnunet_autoreg.finetune.adapt import fit_kernel
from nnunet_autoreg.finetune.block import AutoregBlock, Recipe, check_block
from nnunet_autoreg.finetune.channels import map_channels
from nnunet_autoreg.finetune.families import decoder_first, rate_reason, recipe_values
from nnunet_autoreg.finetune.load import Target, WeightTable, load_encoder
from nnunet_autoreg.finetune.network import GUARD_CLASS, architecture_entry
from nnunet_autoreg.finetune.network import build_network as network_of_plan
from nnunet_autoreg.finetune.resenc import reconciled
from nnunet_autoreg.finetune.stock import predict_line, runs_on_stock, stock_plans
from nnunet_autoreg.model.card import read_card
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan

Write = Callable[..., Path]
CROP = (16, 24, 16)
RESENC = ENCODERS["resenc_tiny"]
SMALL_VIT = {
    "embed_dim": 48,
    "patch_embed_size": [8, 8, 8],
    "eva_depth": 3,
    "eva_numheads": 4,
    "mlp_ratio": 4.0,
    "decoder_features": 4,
}
# What nnU-Net's planner asks for at 3.27 x 0.98 x 0.98 mm, by its rule: an axis more than twice as
# coarse is neither pooled nor convolved.
ANISOTROPIC: dict[str, Any] = {
    "n_stages": 5,
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)),
    "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
}


def planned(name: str) -> EncoderPlan:
    size = ENCODERS[name]
    return EncoderPlan(size.name, size.class_path, size.arguments, size.token_size)


def network_of(
    name: str,
    patch: tuple[int, int, int] = CROP,
    channels: int = 1,
    arguments: dict[str, Any] | None = None,
) -> nn.Module:
    torch.manual_seed(99)
    return build_network(
        ENCODERS[name].class_path,
        arguments or ENCODERS[name].arguments,
        patch,
        channels,
        3,
    )


def loaded(network: nn.Module, folder: Path, target: Target, share: float = 0.95) -> WeightTable:
    return load_encoder(network, folder / "encoder.safetensors", read_card(folder), target, share)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resenc_tiny", None),
        ("primus_v2_tiny", None),
        ("primus_v3_tiny", None),
        ("vit_b16", SMALL_VIT),
    ],
    ids=["resenc", "primus_v2", "primus_v3", "vit"],
)
def test_an_encoder_of_any_family_is_loaded_under_all_its_names(
    tmp_path: Path,
    write_run: Write,
    name: str,
    arguments: dict[str, Any] | None,
) -> None:
    changes = {} if arguments is None else {"arguments": arguments, "token_size_vox": (8, 8, 8)}
    folder = write_run(tmp_path, "brain", crop=CROP, encoder=name, **changes)
    network = network_of(name, arguments=arguments)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    table = loaded(network, folder, Target(1, CROP))
    after = network.state_dict()

    given = load_file(folder / "encoder.safetensors")

    assert all(torch.equal(after[key], value) for key, value in given.items())
    assert table.encoder_share == 1.0
    assert {e.status for e in table.entries} == {"loaded"}

    changed = {key for key in after if not torch.equal(after[key], before[key])}
    prefixes = (f"{network.key_to_encoder}.", f"{network.key_to_stem}.")

    assert changed
    # A U-Net's decoder holds its encoder, so every tensor of the encoder has a name below
    # "decoder." too.
    assert all(key.removeprefix("decoder.").startswith(prefixes) for key in changed)
    # Two names of one layer that reads the image, for families that have them.
    assert all(
        torch.equal(after[f"{k}.weight"], after[f"{network.keys_to_in_proj[0]}.weight"])
        for k in network.keys_to_in_proj[:2]
    )


def test_a_file_may_use_the_other_name_of_a_tensor(tmp_path: Path, write_run: Write) -> None:
    folder = write_run(tmp_path, "brain", crop=CROP, encoder="resenc_tiny")
    given = load_file(folder / "encoder.safetensors")
    renamed = {
        key.replace(".conv.weight", ".all_modules.0.weight"): value for key, value in given.items()
    }

    assert set(renamed) != set(given)

    save_file(renamed, folder / "encoder.safetensors")
    network = network_of("resenc_tiny")

    assert loaded(network, folder, Target(1, CROP)).encoder_share == 1.0
    assert torch.equal(
        network.state_dict()["encoder.stem.convs.0.conv.weight"],
        given["encoder.stem.convs.0.conv.weight"],
    )


@pytest.mark.parametrize("name", ["resenc_tiny", "primus_v2_tiny", "primus_v3_tiny"])
def test_every_convolution_that_reads_the_image_gets_its_channels(
    tmp_path: Path,
    write_run: Write,
    name: str,
) -> None:
    """On an image repeated over the channels the adapted network gives what the one-channel network
    gives.
    """
    folder = write_run(tmp_path, "brain", crop=CROP, encoder=name)
    one = network_of(name).eval()
    three = network_of(name, channels=4).eval()
    loaded(one, folder, Target(1, CROP))
    loaded(three, folder, Target(3, CROP))
    # Three copies of one channel must add up to what one channel gave; a cascade's channel starts
    # at 0.
    image = torch.randn(1, 1, *CROP)
    cascade = torch.randn(1, 1, *CROP)
    stem = "encoder.stem" if name == "resenc_tiny" else "down_projection"
    with torch.no_grad():
        expected = one.get_submodule(stem)(image)
        found = three.get_submodule(stem)(torch.cat([image, image, image, cascade], dim=1))

    # Three thirds are added in another order than one whole.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["primus_v2_tiny", "primus_v3_tiny"])
def test_positions_of_a_convolutional_tokenizer_are_interpolated(
    tmp_path: Path,
    write_run: Write,
    name: str,
) -> None:
    folder = write_run(tmp_path, "brain", crop=CROP, encoder=name)
    table = loaded(network_of(name, (24, 24, 32)), folder, Target(1, (24, 24, 32)))

    # Tokens of 8 voxels: 16 x 24 x 16 are 2 x 3 x 2 of them, and 24 x 24 x 32 are 3 x 3 x 4.
    assert [e.note for e in table.entries if e.status == "adapted"] == [
        "positions 2x3x2 -> 3x3x4, trilinear",
    ]


def test_a_summed_kernel_is_exact_on_images_constant_along_the_axis() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(4, 2, 3, 3, 3)
    slice_ = torch.randn(1, 2, 1, 9, 9)
    flat, note = fit_kernel(kernel, (1, 3, 3))

    expected = functional.conv3d(slice_.expand(-1, -1, 3, -1, -1), kernel, padding=(0, 1, 1))

    found = functional.conv3d(slice_, flat, padding=(0, 1, 1))

    # Sums of 2 x 3 x 3 x 3 products in float32, in another order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert note == "kernel 3x3x3 -> 1x3x3, summed"


def test_a_padded_kernel_gives_exactly_the_same_result() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(4, 2, 3, 1, 3)
    image = torch.randn(1, 2, 5, 6, 7)
    deep, note = fit_kernel(kernel, (3, 3, 3))

    expected = functional.conv3d(image, kernel, padding=(1, 0, 1))

    found = functional.conv3d(image, deep, padding=1)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert note == "kernel 3x1x3 -> 3x3x3, padded with zeros"
    # Cutting a kernel would lose weights, so a larger one does not fit.
    assert fit_kernel(torch.zeros(4, 2, 5, 5, 5), (3, 3, 3))[1] == ""


def test_anisotropic_data_get_their_own_strides_and_all_weights(
    tmp_path: Path,
    write_run: Write,
) -> None:
    arguments, note = reconciled(ANISOTROPIC, planned("resenc_tiny"))

    # Five stages are asked for, but the encoder has weights for four.
    assert arguments["strides"] == [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert arguments["features_per_stage"] == [16, 32, 64, 128]
    assert "4 stages" in note
    assert "stages 0: 3x3x3 -> 1x3x3" in note

    folder = write_run(tmp_path, "brain", crop=CROP, encoder="resenc_tiny")
    patch = (8, 24, 16)
    network = network_of("resenc_tiny", patch, arguments=arguments)
    table = loaded(network, folder, Target(1, patch))
    given = load_file(folder / "encoder.safetensors")
    state = network.state_dict()

    for key in ("encoder.stem.convs.0.conv.weight", "encoder.stages.0.blocks.0.conv1.conv.weight"):
        torch.testing.assert_close(state[key], given[key].sum(2, keepdim=True))
    unchanged = "encoder.stages.1.blocks.0.conv1.conv.weight"
    assert torch.equal(state[unchanged], given[unchanged])
    assert table.encoder_share == 1.0
    # The stem and the two convolutions of the one block of stage 0, in one group of the table.
    line = table.lines()[2]
    assert "adapted     3 tensors" in line
    assert line.endswith("(kernel 3x3x3 -> 1x3x3, summed)")
    assert network(torch.zeros(1, 1, *patch)).shape == (1, 3, *patch)


def test_a_patch_with_fewer_stages_uses_the_first_ones(tmp_path: Path, write_run: Write) -> None:
    wanted = {
        "n_stages": 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "kernel_sizes": [[3, 3, 3]] * 3,
    }
    arguments, note = reconciled(wanted, planned("resenc_tiny"))

    assert "3 stages" in note
    assert "4" in note

    folder = write_run(tmp_path, "brain", crop=CROP, encoder="resenc_tiny")
    table = loaded(network_of("resenc_tiny", arguments=arguments), folder, Target(1, CROP))
    given = load_file(folder / "encoder.safetensors")
    deepest = sum(
        value.numel() for key, value in given.items() if key.startswith("encoder.stages.3.")
    )

    # The share is of what the network has; the deepest stage of the file has no place in it.
    assert table.encoder_share == 1.0
    assert sum(e.num_parameters for e in table.unused) == deepest > 0
    lines = [line.strip() for line in table.lines()]
    unused = [line for line in lines if line.startswith("unused")]
    assert any("stages that this network does not have" in line for line in unused)


def test_the_last_stage_of_a_deeper_network_may_start_at_random(
    tmp_path: Path,
    write_run: Write,
) -> None:
    folder = write_run(tmp_path, "brain", crop=CROP, encoder="resenc_tiny")
    given = load_file(folder / "encoder.safetensors")
    save_file(
        {k: v for k, v in given.items() if not k.startswith("encoder.stages.3.")},
        folder / "encoder.safetensors",
    )

    with refused(WeightsError, "weights-share", folder, "encoder.stages.3.blocks.0"):
        loaded(network_of("resenc_tiny"), folder, Target(1, CROP))

    # The deepest stage holds most of the parameters, so the allowed share must be far lower.
    table = loaded(network_of("resenc_tiny"), folder, Target(1, CROP), share=0.1)

    assert {e.key.split(".")[2] for e in table.entries if e.status == "random"} == {"3"}


def test_other_widths_or_blocks_are_another_encoder(tmp_path: Path, write_run: Write) -> None:
    folder = write_run(tmp_path, "brain", crop=CROP, encoder="resenc_tiny")
    half_width = {**RESENC.arguments, "features_per_stage": [8, 16, 32, 64]}
    # The run has two blocks in each of its last three stages.
    fewer_blocks = {**RESENC.arguments, "n_blocks_per_stage": [1, 1, 2, 2]}

    with refused(WeightsError, "weights-other-encoder", "brain"):
        loaded(network_of("resenc_tiny", arguments=half_width), folder, Target(1, CROP))
    with refused(WeightsError, "weights-other-encoder", folder, "encoder.stages.1.blocks.1."):
        loaded(network_of("resenc_tiny", arguments=fewer_blocks), folder, Target(1, CROP))


def test_channels_are_matched_by_name_or_start_from_the_mean(
    tmp_path: Path,
    write_run: Write,
) -> None:
    names = ("T1", "T2", "FLAIR")
    folder = write_run(
        tmp_path,
        "brain",
        crop=CROP,
        channels=3,
        encoder="resenc_tiny",
        num_input_channels=3,
        channel_names=names,
    )
    old = load_file(folder / "encoder.safetensors")["encoder.stem.convs.0.conv.weight"]
    network = network_of("resenc_tiny", channels=2)
    table = loaded(network, folder, Target(2, CROP, ("flair", "PET")))

    new = network.state_dict()["encoder.stem.convs.0.conv.weight"]

    torch.testing.assert_close(new[:, 0], old[:, 2])
    torch.testing.assert_close(new[:, 1], old.mean(1))

    note = next(e.note for e in table.entries if e.status == "adapted")

    assert note == "3 -> 2 channels by name: flair <- FLAIR, PET <- mean of all 3"
    # None of the names is known, and two channels cannot be made of three without one.
    with refused(WeightsError, "weights-channels", "3 input channels", "2"):
        loaded(network_of("resenc_tiny", channels=2), folder, Target(2, CROP, ("DWI", "PET")))


@pytest.mark.parametrize(
    ("given", "given_names", "needed_names", "sources", "factors"),
    [
        # One channel feeds two, each with half its weights, so that sums stay as they were.
        (1, ("MRI",), ("CT", "MRI"), ((0,), (0,)), (0.5, 0.5)),
        # By name in another order, and by position if no name is known.
        (2, ("T1", "T2"), ("T2", "T1"), ((1,), (0,)), (1.0, 1.0)),
        (2, ("T1", "T2"), ("A", "B"), ((0,), (1,)), (1.0, 1.0)),
        # Into one channel: the one of its name, or the sum of both.
        (2, ("T1", "T2"), ("T2",), ((1,),), (1.0,)),
        (2, ("T1", "T2"), ("MRI",), ((0, 1),), (1.0,)),
        # One name for two channels says nothing about either.
        (2, ("T1",), ("T1",), ((0, 1),), (1.0,)),
    ],
)
def test_each_image_channel_starts_from_its_match_or_a_mean(
    given: int,
    given_names: tuple[str, ...],
    needed_names: tuple[str, ...],
    sources: Any,
    factors: Any,
) -> None:
    found = map_channels(given, given_names, len(needed_names), needed_names)
    assert found is not None
    assert (found.sources, found.factors) == (sources, factors)


def test_the_recipe_of_a_cnn_is_nnunets_with_a_tenth_of_its_rate() -> None:
    values = recipe_values(planned("resenc_l"))

    assert (values["optimizer"], values["weight_decay"], values["clip_norm"]) == ("sgd", 3e-5, 12.0)
    assert (values["pretrained_rate"], values["scratch_rate"]) == (1e-3, 1e-2)
    assert values["deep_supervision"]

    recipe = Recipe(150, **recipe_values(planned("primus_v2_m")))

    assert recipe.optimizer == "adamw"
    assert (recipe.pretrained_rate, recipe.scratch_rate) == (1e-4, 3e-4)
    assert not recipe.deep_supervision


def test_a_pretrained_cnn_has_the_rate_of_random_weights_if_measured() -> None:
    tiny = planned("resenc_tiny")
    large = planned("resenc_l")

    values = recipe_values(tiny)

    # Measured for the tiny CNN; the large one and transformers have other reasons for their rates.
    assert values["pretrained_rate"] == values["scratch_rate"] == 1e-2
    assert len({rate_reason(tiny), rate_reason(large), rate_reason(planned("primus_m"))}) == 3


def test_the_decoder_is_trained_first_for_adapted_stems_or_few_labels() -> None:
    cnn = planned("resenc_tiny")

    # An adapted stem; the limit of ten cases; no pretrained weights; a transformer.
    assert decoder_first(cnn, 50, True, "kernel [3, 3, 3] -> [1, 3, 3]")[0] == 0.1
    assert decoder_first(cnn, 10, True, "")[0] == 0.1
    assert decoder_first(cnn, 11, True, "")[0] == 0.0
    assert decoder_first(cnn, 5, False, "")[0] == 0.0
    assert decoder_first(planned("primus_v2_tiny"), 5, True, "1 -> 2 channels")[0] == 0.0


def test_what_a_family_cannot_do_is_refused_by_name() -> None:
    cnn = Recipe(1, **recipe_values(planned("resenc_tiny")))

    with_drop_path = AutoregBlock(planned("resenc_tiny"), None, Recipe(1, 1e-3, 1e-2))
    with refused(PlanError, "plan-family", "recipe.drop_path_rate=0.2", "resenc_tiny"):
        check_block(with_drop_path, "AutoregPlans.json")

    deep = Recipe(1, 1e-3, 1e-3, deep_supervision=True)
    with refused(PlanError, "plan-family", "recipe.deep_supervision=true", "primus_tiny"):
        check_block(AutoregBlock(planned("primus_tiny"), None, deep), "AutoregPlans.json")

    # Plans can come from strangers: a name in them must not import anything.

    evil = EncoderPlan(
        "evil",
        RESENC.class_path,
        {**RESENC.arguments, "norm_op": "subprocess.Popen"},
        (8, 8, 8),
    )

    with refused(PlanError, "plan-network-argument", "norm_op='subprocess.Popen'", "torch.nn"):
        check_block(AutoregBlock(evil, None, cnn), "AutoregPlans.json")


def test_stock_plans_build_the_same_cnn_by_nnunets_own_function() -> None:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    arguments, _ = reconciled(ANISOTROPIC, planned("resenc_tiny"))
    # As plans come from JSON, in which nnU-Net leaves this entry out.
    arguments = {key: value for key, value in arguments.items() if key != "dropout_op"}
    block = AutoregBlock(
        planned("resenc_tiny"),
        None,
        Recipe(1, **recipe_values(planned("resenc_tiny"))),
    )
    full = {
        "normalization_schemes": ["ZScoreNormalization"],
        "architecture": architecture_entry(block, (8, 24, 16), arguments),
    }
    plans = {"autoreg": {}, "configurations": {"3d_fullres": full, "mine": {"batch_size": 4}}}

    stock = stock_plans(plans)

    entry = stock["configurations"]["3d_fullres"]["architecture"]
    assert entry["network_class_name"] == RESENC.class_path
    built = get_network_from_plans(
        entry["network_class_name"],
        entry["arch_kwargs"],
        entry["_kw_requires_import"],
        1,
        3,
        deep_supervision=False,
    )
    ours = network_of_plan(block, (8, 24, 16), 1, 3, arguments)
    # The same names and shapes: what one writes the other loads.
    shapes = {key: tuple(value.shape) for key, value in built.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    assert stock_plans(stock) == stock
    assert stock["configurations"]["mine"] == {"batch_size": 4}
    # The plans that it was made from are as before.
    assert full["architecture"]["network_class_name"] == GUARD_CLASS


@pytest.mark.parametrize(
    ("encoder", "scheme", "expected"),
    [
        ("resenc_tiny", "ZScoreNormalization", True),
        ("resenc_tiny", "AutoregPercentileNormalization", False),
        ("primus_tiny", "ZScoreNormalization", False),
    ],
)
def test_only_a_cnn_with_nnunets_normalisation_runs_on_stock_nnunet(
    encoder: str,
    scheme: str,
    expected: bool,
) -> None:
    # A configuration that inherits does not state a normalisation.
    plans = {"configurations": {"3d_fullres": {"normalization_schemes": [scheme]}, "mine": {}}}

    assert runs_on_stock(planned(encoder).class_path, plans) == expected


def test_a_plans_architecture_rebuilds_a_cnn_and_stops_stock_trainers() -> None:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    arguments, _ = reconciled(ANISOTROPIC, planned("resenc_tiny"))
    block = AutoregBlock(
        planned("resenc_tiny"),
        None,
        Recipe(1, **recipe_values(planned("resenc_tiny"))),
    )
    entry = architecture_entry(block, (8, 24, 16), arguments)
    # The guard is what the plans name, so that a stock trainer cannot build a network without the
    # weights by mistake. Prediction, without deep supervision, is allowed.
    assert entry["arch_kwargs"]["strides"][1] == [1, 2, 2]
    stock = (entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"], 1, 3)
    with pytest.raises(SystemExit) as stopped:
        get_network_from_plans(*stock, deep_supervision=True)
    assert "-tr AutoregPretrainedTrainer" in str(stopped.value)
    assert get_network_from_plans(*stock)(torch.zeros(1, 1, 8, 24, 16)).shape == (1, 3, 8, 24, 16)
    deep = network_of_plan(block, (8, 24, 16), 1, 3, arguments, deep_supervision=True)
    shapes = [tuple(output.shape[2:]) for output in deep(torch.zeros(1, 1, 8, 24, 16))]
    assert shapes == [(8, 24, 16), (8, 12, 8), (4, 6, 4)]


@pytest.mark.parametrize(
    ("folds", "words"),
    [
        (("0",), "-f 0 -device cpu"),
        (("0", "2"), "-f 0 2 -device cpu"),
        (("all",), "-f all -device cpu"),
        # "all" is another training: folds are predicted together, "all" by itself.
        (("0", "all"), "-f 0 -device cpu"),
        # All five folds are nnU-Net's default, so the line needs no -f.
        (("0", "1", "2", "3", "4"), "-p AutoregPlans -device cpu"),
    ],
)
def test_the_line_after_training_predicts_with_the_folds_that_exist(
    tmp_path: Path,
    folds: tuple[str, ...],
    words: str,
) -> None:
    model = tmp_path / "AutoregPretrainedTrainer_5epochs__AutoregPlans__3d_fullres"
    for fold in folds:
        (model / f"fold_{fold}").mkdir(parents=True)
        (model / f"fold_{fold}" / "checkpoint_final.pth").touch()
    # A fold that is still trained cannot predict.
    (model / "fold_9").mkdir()

    line = predict_line(model, "Dataset004_Hippocampus", "cpu")

    assert line.endswith(words)
    assert "-d 4 " in line
    assert "-c 3d_fullres" in line
    assert "-tr AutoregPretrainedTrainer_5epochs" in line
    assert "-device" not in predict_line(model, "Dataset004_Hippocampus", "cuda")
