"""A pretrained U-Net's decoder in networks of other depths, strides, kernels and channels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nnunet_autoreg.convert.exporting import export_weights
from nnunet_autoreg.convert.imported import ImportOptions
from nnunet_autoreg.convert.importing import import_weights
from nnunet_autoreg.errors import PlanError, WeightsError
from nnunet_autoreg.finetune.block import (
    AutoregBlock,
    PlannedWeights,
    Recipe,
    check_recipe,
    read_block,
)
from nnunet_autoreg.finetune.decoder import transferred_keys
from nnunet_autoreg.finetune.families import decoder_first, recipe_values
from nnunet_autoreg.finetune.load import Target, load_encoder, load_planned_encoder
from nnunet_autoreg.finetune.recipe import make_optimizer, make_schedule, parameter_groups
from nnunet_autoreg.finetune.table import WeightTable
from nnunet_autoreg.model.card import DECODER_PREFIXES, Adaptation, read_card
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.model.unet import PretrainingUNet
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.pretrain.checkpointing import check_exported_keys
from nnunet_autoreg.records import read_json, write_json

Write = Callable[..., Path]
CROP = (16, 16, 16)
SIZE = ENCODERS["resenc_tiny"]
ENCODER = EncoderPlan(SIZE.name, SIZE.class_path, SIZE.arguments, SIZE.token_size)
FEWER_STAGES: dict[str, Any] = {
    **SIZE.arguments,
    "n_stages": 3,
    "features_per_stage": [16, 32, 64],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "n_blocks_per_stage": [1, 2, 2],
    "n_conv_per_stage_decoder": [1, 1],
}
# As nnU-Net plans for thick slices: the finest stage is neither pooled nor convolved along z.
ANISOTROPIC: dict[str, Any] = {
    **SIZE.arguments,
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
}


@pytest.fixture
def run(tmp_path: Path, write_run: Write) -> Path:
    """A finished run of the whole network, encoder and decoder, with known values in the
    decoder.
    """
    folder = write_run(tmp_path, "whole", crop=CROP, encoder="resenc_tiny", decoder=True)
    tensors = load_file(folder / "encoder.safetensors")
    for number, key in enumerate(sorted(tensors)):
        if key.startswith(DECODER_PREFIXES):
            tensors[key] = torch.full_like(tensors[key], 1.0 + number)
    rewrite(folder, tensors)
    return folder


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Replace the run's weights, hash included."""
    from nnunet_autoreg.records import sha256_of

    save_file(tensors, folder / "encoder.safetensors")
    replace(read_card(folder), sha256=sha256_of(folder / "encoder.safetensors")).save(folder)


def copy_of_state(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def decoder_is(network: nn.Module, before: dict[str, Tensor]) -> bool:
    """Return whether the network's decoder has exactly these weights."""
    state = network.state_dict()
    keys = [key for key in state if key.startswith(DECODER_PREFIXES)]
    assert keys
    return all(torch.equal(state[key], before[key]) for key in keys)


def unet(
    arguments: dict[str, Any] = SIZE.arguments,
    channels: int = 1,
    deep_supervision: bool = False,
) -> nn.Module:
    torch.manual_seed(99)
    return build_network(
        SIZE.class_path,
        arguments,
        CROP,
        channels,
        3,
        deep_supervision=deep_supervision,
    )


def loaded(
    network: nn.Module,
    folder: Path,
    channels: int = 1,
    with_decoder: bool = True,
) -> WeightTable:
    file = folder / "encoder.safetensors"
    return load_encoder(
        network,
        file,
        read_card(folder),
        Target(channels, CROP),
        0.95,
        with_decoder,
    )


def statuses(table: WeightTable) -> dict[str, str]:
    return {entry.key: entry.status for entry in table.decoder}


def block_of(folder: Path, **recipe: Any) -> AutoregBlock:
    card = read_card(folder)
    weights = PlannedWeights(
        card.name,
        f"autoreg_pretraining/{card.name}/encoder.safetensors",
        card.sha256,
        card.has_decoder,
    )
    return AutoregBlock(ENCODER, weights, Recipe(150, **{**recipe_values(ENCODER), **recipe}))


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_a_decoder_of_equal_topology_is_loaded_whole(run: Path, deep_supervision: bool) -> None:
    network = unet(deep_supervision=deep_supervision)
    heads = {k: v.clone() for k, v in network.state_dict().items() if "seg_layers" in k}

    table = loaded(network, run)

    state = network.state_dict()
    given = load_file(run / "encoder.safetensors")
    assert all(torch.equal(state[key], value) for key, value in given.items())
    assert all(torch.equal(state[key], value) for key, value in heads.items())
    assert set(statuses(table).values()) == {"loaded"}
    assert (table.encoder_share, table.decoder_share) == (1.0, 1.0)
    assert table.rest.key == "decoder.seg_layers"
    # Both names of a convolution hold the new value.
    names = [f"decoder.stages.0.convs.0.{alias}.weight" for alias in ("conv", "all_modules.0")]
    assert torch.equal(state[names[0]], state[names[1]])


def test_the_table_shows_the_decoder_apart_from_the_encoder(run: Path) -> None:
    lines = loaded(unet(), run).lines()

    # Three stages of a convolution and a norm, each with weight and bias, are 12 tensors; three
    # transposed convolutions are 6 more.
    place = lines.index("decoder weights from the same file")
    assert lines[place + 1].split()[:3] == ["loaded", "18", "tensors"]
    assert lines[place + 4].split()[0] == "new"
    assert "decoder.seg_layers" in lines[place + 4]
    assert lines[-1].count("100.0 %") == 2


def test_stages_are_matched_from_the_finest_if_there_are_fewer(run: Path) -> None:
    network = unet(FEWER_STAGES)

    table = loaded(network, run)

    # Stages of a decoder are counted from the deepest: stages 0 and 1 here are 1 and 2 in the file.
    state = network.state_dict()
    given = load_file(run / "encoder.safetensors")
    for mine, theirs in ((0, 1), (1, 2)):
        for name in (
            "stages.{}.convs.0.conv.weight",
            "stages.{}.convs.0.norm.bias",
            "transpconvs.{}.weight",
        ):
            assert torch.equal(
                state[f"decoder.{name.format(mine)}"],
                given[f"decoder.{name.format(theirs)}"],
            )
    assert set(statuses(table).values()) == {"loaded"}
    deepest = ("encoder.stages.3.", "decoder.stages.0.", "decoder.transpconvs.0.")
    assert {entry.key for entry in table.unused} == {
        key for key in given if key.startswith(deepest)
    }


def test_a_decoder_with_fewer_stages_fills_the_finest_ones(
    tmp_path: Path,
    write_run: Write,
    run: Path,
) -> None:
    small = write_run(
        tmp_path,
        "small",
        crop=CROP,
        encoder="resenc_tiny",
        decoder=True,
        arguments=FEWER_STAGES,
    )
    network = unet()
    before = copy_of_state(network)

    table = load_encoder(
        network,
        small / "encoder.safetensors",
        read_card(small),
        Target(1, CROP),
        0.1,
    )

    state = network.state_dict()
    given = load_file(small / "encoder.safetensors")
    finest = state["decoder.transpconvs.2.weight"]
    assert torch.equal(finest, given["decoder.transpconvs.1.weight"])
    deepest = "decoder.transpconvs.0.weight"
    assert torch.equal(state[deepest], before[deepest])
    random = {key.split(".")[2] for key, status in statuses(table).items() if status == "random"}
    assert random == {"0"}


def test_a_transposed_convolution_of_another_stride_stays_random(run: Path) -> None:
    network = unet(ANISOTROPIC)
    before = copy_of_state(network)

    table = loaded(network, run)

    state = network.state_dict()
    found = statuses(table)
    # Weight and bias: a convolution is taken whole or not at all.
    assert {key for key, status in found.items() if status == "random"} == {
        "decoder.transpconvs.2.weight",
        "decoder.transpconvs.2.bias",
    }
    assert all(torch.equal(state[key], before[key]) for key in found if found[key] == "random")
    assert any("stride 2x2x2 in the weights, 1x2x2 here" in line for line in table.lines())
    # The finest stage's kernels are summed over z, as those of the encoder.
    given = load_file(run / "encoder.safetensors")
    key = "decoder.stages.2.convs.0.conv.weight"
    torch.testing.assert_close(state[key], given[key].sum(2, keepdim=True))
    assert found[key] == "adapted"
    # A share of parameters: one transposed convolution of the finest, smallest stage is missing.
    assert 0.9 < table.decoder_share < 1.0
    assert table.encoder_share == 1.0


def test_convolutions_of_other_channels_stay_random_whole(run: Path) -> None:
    # As if the run's stage had 48 features where the network has 32.
    tensors = load_file(run / "encoder.safetensors")
    tensors["decoder.stages.1.convs.0.conv.weight"] = torch.ones(48, 64, 3, 3, 3)
    rewrite(run, tensors)
    network = unet()
    before = copy_of_state(network)

    table = loaded(network, run)

    found = statuses(table)
    random = {key for key, status in found.items() if status == "random"}
    part = "decoder.stages.1.convs.0."
    whole = ("conv.weight", "conv.bias", "norm.weight", "norm.bias")
    assert random == {f"{part}{name}" for name in whole}
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in random)
    note = "shape 48x64x3x3x3 in the weights, 32x64x3x3x3 here"
    assert any(note in line for line in table.lines())


def test_other_channels_and_a_cascade_leave_the_decoder_whole(run: Path) -> None:
    # Two channels of the image and two one-hot channels of a cascade's earlier stage.
    network = unet(channels=4)

    table = loaded(network, run, channels=2)

    assert set(statuses(table).values()) == {"loaded"}
    stem = network.state_dict()["encoder.stem.convs.0.conv.weight"]
    assert torch.count_nonzero(stem[:, 2:]) == 0


def test_a_file_without_a_decoder_loads_as_before(tmp_path: Path, write_run: Write) -> None:
    folder = write_run(tmp_path, "old", crop=CROP, encoder="resenc_tiny")
    card = read_json(folder / "encoder.json")
    # Cards of finished runs do not have the field.
    del card["adaptation"]["keys_to_decoder"]
    write_json(folder / "encoder.json", card)
    network = unet()
    before = copy_of_state(network)

    table = loaded(network, folder)

    assert not read_card(folder).has_decoder
    assert table.encoder_share == 1.0
    assert (table.decoder, table.rest.key) == ((), "decoder")
    assert decoder_is(network, before)


def test_heads_and_second_names_in_a_file_are_ignored_and_listed(run: Path) -> None:
    tensors = load_file(run / "encoder.safetensors")
    # nnU-Net's decoder holds the encoder under a second name, and its heads are made for the labels
    # of another task.
    stray = {
        "decoder.encoder.stem.convs.0.conv.weight": torch.full((16, 1, 3, 3, 3), 7.0),
        "decoder.seg_layers.2.weight": torch.full((3, 16, 1, 1, 1), 7.0),
    }
    rewrite(run, {**tensors, **stray})
    network = unet()

    table = loaded(network, run)

    assert {entry.key for entry in table.unused} == set(stray)
    state = network.state_dict()
    stem = "encoder.stem.convs.0.conv.weight"
    assert torch.equal(state[stem], tensors[stem])
    assert not torch.any(state["decoder.seg_layers.2.weight"] == 7.0)


def test_a_decoder_that_the_card_does_not_list_is_not_loaded(run: Path) -> None:
    card = read_card(run)
    replace(card, adaptation=replace(card.adaptation, keys_to_decoder=())).save(run)
    network = unet()
    before = copy_of_state(network)

    table = loaded(network, run)

    assert decoder_is(network, before)
    assert {entry.key for entry in table.unused} == {
        key for key in load_file(run / "encoder.safetensors") if key.startswith("decoder.")
    }


@pytest.mark.parametrize(
    "keys",
    [["encoder."], ["decoder."], ["decoder.stages."], ["decoder.seg_layers."]],
)
def test_a_card_that_lists_another_decoder_is_refused(run: Path, keys: list[str]) -> None:
    card = read_json(run / "encoder.json")
    card["adaptation"]["keys_to_decoder"] = keys
    write_json(run / "encoder.json", card)

    with pytest.raises(WeightsError) as caught:
        read_card(run)

    assert "keys_to_decoder" in str(caught.value)


def test_if_only_the_encoder_is_wanted_the_decoder_stays_random(run: Path, tmp_path: Path) -> None:
    network = unet()
    before = copy_of_state(network)

    # As for features, which have no decoder.
    table = load_planned_encoder(
        network,
        block_of(run),
        tmp_path,
        Target(1, CROP),
        with_decoder=False,
    )

    assert decoder_is(network, before)
    assert (table.decoder, table.encoder_share) == ((), 1.0)


def test_a_recipe_can_leave_the_decoder_at_random(run: Path, tmp_path: Path) -> None:
    with_decoder = load_planned_encoder(unet(), block_of(run), tmp_path, Target(1, CROP))
    block = block_of(run, transfer_decoder=False)
    without = load_planned_encoder(unet(), block, tmp_path, Target(1, CROP))

    assert (with_decoder.decoder_share, without.decoder) == (1.0, ())
    assert transferred_keys(unet(), block) == frozenset()


def test_a_plan_that_expects_a_decoder_refuses_weights_without(
    tmp_path: Path,
    write_run: Write,
) -> None:
    folder = write_run(tmp_path, "old", crop=CROP, encoder="resenc_tiny")
    block = block_of(folder)
    assert block.weights is not None
    expecting = replace(block, weights=replace(block.weights, has_decoder=True))

    with refused(WeightsError, "weights-no-decoder", folder):
        load_planned_encoder(unet(), expecting, tmp_path, Target(1, CROP))


@pytest.mark.parametrize(
    "arguments",
    [SIZE.arguments, FEWER_STAGES, ANISOTROPIC],
    ids=["equal", "fewer", "anisotropic"],
)
def test_rates_know_the_loaded_decoder_without_the_file(
    run: Path,
    arguments: dict[str, Any],
) -> None:
    network = unet(arguments)
    table = loaded(network, run)
    block = block_of(run)
    # A training that is continued elsewhere may not have the file. The groups of the optimiser must
    # be the same nevertheless, or its state could not be loaded.
    (run / "encoder.safetensors").unlink()

    found = transferred_keys(unet(arguments), block)

    assert found == {key for key, status in statuses(table).items() if status != "random"}


def test_heads_and_random_parts_keep_the_full_rate(run: Path) -> None:
    network = unet(ANISOTROPIC)
    block = block_of(run, decoder_rate_factor=4.0, layer_decay=0.5)

    groups = parameter_groups(network, block.recipe, transferred_keys(network, block))

    factor = {id(p): group["rate_factor"] for group in groups for p in group["params"]}
    by_name = {name: factor[id(p)] for name, p in network.named_parameters()}
    assert groups[0]["rate_factor"] == 1.0
    # Loaded: the factor of the decoder. New: heads, and the transposed convolution of another
    # stride.
    assert by_name["decoder.stages.1.convs.0.conv.weight"] == 4.0
    assert by_name["decoder.seg_layers.2.weight"] == 1.0
    assert by_name["decoder.transpconvs.2.weight"] == 1.0
    assert by_name["encoder.stem.convs.0.conv.weight"] < 1.0
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_a_pretrained_decoder_needs_no_decoder_first_stage() -> None:
    # Five labelled cases and an adapted stem are both reasons for the stage, unless a decoder is
    # loaded.
    assert decoder_first(ENCODER, 5, True, "1 -> 2 channels", has_decoder=True)[0] == 0.0
    assert decoder_first(ENCODER, 5, True, "1 -> 2 channels", has_decoder=False)[0] == 0.1


def test_the_scratch_twin_has_the_length_of_the_pretrained_run(run: Path) -> None:
    recipe = block_of(run).recipe

    pretrained = make_schedule(recipe, recipe.pretrained_rate, 10, 25, 2)
    scratch = make_schedule(recipe, recipe.scratch_rate, 10, 25, 2, uses_weights=False)

    assert pretrained.num_iterations == scratch.num_iterations
    assert pretrained.warmup_iterations == scratch.warmup_iterations
    assert pretrained.decoder_first_iterations == scratch.decoder_first_iterations == 0
    # 10 epochs of 25 iterations; relative to their peaks both schedules are one curve.
    for i in range(250):
        relative_rate = pretrained.rate(i) / recipe.pretrained_rate
        assert relative_rate == pytest.approx(scratch.rate(i) / recipe.scratch_rate)


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)],
)
def test_a_cnn_is_trained_by_the_optimiser_of_its_recipe(
    run: Path,
    optimizer: str,
    kind: type,
) -> None:
    network = unet()
    block = block_of(run, optimizer=optimizer, weight_decay=0.01)
    groups = parameter_groups(network, block.recipe, transferred_keys(network, block))
    found = make_optimizer(groups, block.recipe, 1e-3)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}

    network(torch.randn(1, 1, *CROP)).square().mean().backward()
    found.step()

    assert type(found) is kind
    # Without deep supervision the heads of coarser stages get no gradient and do not move.
    used = []
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            used.append(name)
            assert not torch.equal(parameter, before[name])
    assert used
    # SGD decays everything, as nnU-Net's own; AdamW neither norms nor biases.
    decays = {group["weight_decay"] for group in found.param_groups}
    assert decays == ({0.01} if optimizer == "sgd" else {0.01, 0.0})


def test_tiny_transformers_are_planned_without_drop_path() -> None:
    rates = {}
    for name in ("primus_tiny", "primus_v2_tiny", "primus_s"):
        size = ENCODERS[name]
        values = recipe_values(EncoderPlan(name, size.class_path, size.arguments, size.token_size))
        rates[name] = Recipe(150, **values).drop_path_rate

    assert rates == {"primus_tiny": 0.0, "primus_v2_tiny": 0.0, "primus_s": 0.2}


def test_an_impossible_decoder_rate_is_refused_by_name(run: Path) -> None:
    with refused(PlanError, "plan-range", "AutoregPlans.json", "decoder_rate_factor=0.0"):
        check_recipe(replace(block_of(run).recipe, decoder_rate_factor=0.0), "AutoregPlans.json")


def test_plans_of_earlier_trainings_are_read_without_a_decoder() -> None:
    # As planned before decoders were transferred: the block says nothing about one.
    encoder = {
        "name": SIZE.name,
        "class_path": SIZE.class_path,
        "arguments": SIZE.arguments,
        "token_size_vox": [8, 8, 8],
    }
    recipe = {"num_epochs": 1, **recipe_values(ENCODER)}
    weights = {"name": "old", "file": "old/encoder.safetensors", "sha256": "00"}

    block = read_block(
        {
            "plans_name": "AutoregPlans",
            "autoreg": {"encoder": encoder, "weights": weights, "recipe": recipe},
        },
    )

    assert not block.transfers_decoder
    assert transferred_keys(unet(), block) == frozenset()


def test_foreign_exports_hold_only_the_encoder(run: Path, tmp_path: Path) -> None:
    done = export_weights(run / "encoder.safetensors", tmp_path / "out")

    content = torch.load(tmp_path / "out" / "checkpoint_final.pth", weights_only=True)
    keys = set(content["network_weights"])
    assert keys
    assert all(key.startswith("encoder.") for key in keys)
    assert any("decoder" in warning for warning in done.warnings)
    back, _ = import_weights(tmp_path / "out", "back", tmp_path, ImportOptions())
    assert not back.has_decoder
    imported = load_file(tmp_path / "autoreg_pretraining" / "back" / "encoder.safetensors")
    assert not any(key.startswith("decoder.") for key in imported)


@pytest.mark.parametrize(
    "stray",
    ["decoder.seg_layers.0.weight", "decoder.encoder.stem.convs.0.conv.weight", "mark"],
)
def test_a_pretraining_writes_only_what_its_card_lists(stray: str) -> None:
    adaptation = Adaptation("encoder.stages", "encoder.stem", (), None, DECODER_PREFIXES)
    whole = [
        "encoder.stages.0.x",
        "encoder.stem.x",
        "decoder.stages.0.x",
        "decoder.transpconvs.0.weight",
    ]
    check_exported_keys(whole, adaptation)

    with pytest.raises(AssertionError):
        check_exported_keys([*whole, stray], adaptation)
    with pytest.raises(AssertionError):
        check_exported_keys(whole, replace(adaptation, keys_to_decoder=()))


def test_whole_network_pretraining_leaves_what_fine_tuning_loads(run: Path) -> None:
    # One output channel: pretraining predicts intensities, fine-tuning three classes.
    pretraining = PretrainingUNet(
        build_network(SIZE.class_path, SIZE.arguments, CROP, 1, 1),
        learned_mark=True,
    )
    state = pretraining.transferable_state()
    adaptation = pretraining.adaptation()
    check_exported_keys(state, adaptation)
    rewrite(run, state)
    replace(read_card(run), adaptation=adaptation).save(run)
    network = unet()

    table = loaded(network, run)

    assert (table.encoder_share, table.decoder_share, table.unused) == (1.0, 1.0, ())
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())


def test_a_pretraining_can_start_from_a_whole_network(run: Path) -> None:
    pretraining = PretrainingUNet(
        build_network(SIZE.class_path, SIZE.arguments, CROP, 1, 1),
        learned_mark=False,
    )

    table = loaded(pretraining.network, run)

    given = load_file(run / "encoder.safetensors")
    assert (table.encoder_share, table.decoder_share) == (1.0, 1.0)
    state = pretraining.transferable_state()
    assert all(torch.equal(state[key], value) for key, value in given.items())
