import pytest
import torch
from refusals import refused
from torch import nn

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.finetune.block import AutoregBlock, Recipe, check_block, read_block
from nnunet_autoreg.finetune.recipe import (
    IterationRates,
    Schedule,
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan

RECIPE = Recipe(num_epochs=150, pretrained_rate=1e-4, scratch_rate=3e-4)
BLOCK = {
    "encoder": {
        "name": "primus_tiny",
        "class_path": ENCODERS["primus_tiny"].class_path,
        "arguments": ENCODERS["primus_tiny"].arguments,
        "token_size_vox": [8, 8, 8],
    },
    "weights": {
        "name": "brain",
        "file": "autoreg_pretraining/brain/encoder.safetensors",
        "sha256": "00",
    },
    "recipe": {"num_epochs": 150, "pretrained_rate": 1e-4, "scratch_rate": 3e-4},
}


def tiny() -> nn.Module:
    return build_network(
        ENCODERS["primus_tiny"].class_path,
        ENCODERS["primus_tiny"].arguments,
        (16, 16, 16),
        1,
        3,
    )


def test_the_rate_rises_linearly_and_then_follows_the_polynomial() -> None:
    # Warm-up: (i + 1) / 10. Then ((100 - i) / 90)^0.9, which is 0.5^0.9 halfway at 55.
    schedule = Schedule(peak_rate=1.0, num_iterations=100, warmup_iterations=10, poly_exponent=0.9)

    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(4) == pytest.approx(0.5)
    assert schedule.rate(9) == 1.0
    assert schedule.rate(10) == 1.0
    assert schedule.rate(55) == pytest.approx(0.5**0.9)
    assert schedule.rate(99) == pytest.approx((1 / 90) ** 0.9)
    assert schedule.rate(100) == 0.0


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "batch", "warmup"),
    [
        (150, 250, 2, 3750),  # 37500 iterations: max(1875, 6250) is above 10 % of the run
        (150, 250, 8, 1875),  # 5 % of the run is more than 12500 / 8 samples
        (300, 250, 2, 6250),  # 12500 samples of batch 2
        (2000, 250, 2, 12500),  # 5 % would be 25000: 50 epochs cap it
        (1, 2, 2, 0),  # a run too short to warm up
    ],
)
def test_the_length_of_the_warm_up_follows_the_rule(
    epochs: int,
    per_epoch: int,
    batch: int,
    warmup: int,
) -> None:
    assert make_schedule(RECIPE, 1e-4, epochs, per_epoch, batch).warmup_iterations == warmup


def test_the_rate_depends_only_on_epoch_and_iteration() -> None:
    schedule = Schedule(1.0, 100, 10, 0.9)
    parameter = nn.Parameter(torch.zeros(2))
    groups = [{"params": [parameter], "rate_factor": 0.5, "weight_decay": 0.0}]
    rates = IterationRates(make_optimizer(groups, RECIPE, 1.0), schedule, iterations_per_epoch=10)

    rates.step(5, 5)

    # Epoch 5 of 10 iterations and iteration 5 are iteration 55; the group has half the rate.
    assert rates.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.5**0.9)


def test_norms_biases_positions_and_layer_scale_are_not_decayed() -> None:
    network = tiny()
    groups = parameter_groups(network, RECIPE)

    assert [(g["rate_factor"], g["weight_decay"]) for g in groups] == [(1.0, 0.05), (1.0, 0.0)]

    names = {id(p): name for name, p in network.named_parameters()}
    decayed, undecayed = ({names[id(p)] for p in g["params"]} for g in groups)

    # Matrices are decayed; vectors and positions are not.
    assert {
        "down_projection.proj.weight",
        "eva.blocks.0.attn.q_proj.weight",
        "up_projection.decode.2.weight",
    } <= decayed
    assert {
        "eva.pos_embed",
        "eva.blocks.0.gamma_1",
        "eva.norm.weight",
        "down_projection.proj.bias",
    } <= undecayed
    assert len(decayed) + len(undecayed) == len(names)


def test_layer_decay_slows_the_layers_near_the_input() -> None:
    network = tiny()
    groups = parameter_groups(network, Recipe(150, 1e-4, 3e-4, layer_decay=0.5))
    factor = {id(p): g["rate_factor"] for g in groups for p in g["params"]}

    by_name = {name: factor[id(p)] for name, p in network.named_parameters()}

    # Six blocks: the last has one factor, the first six, and the input seven.
    assert groups[0]["rate_factor"] == 1.0
    assert by_name["up_projection.decode.2.weight"] == by_name["eva.norm.weight"] == 1.0
    assert by_name["eva.blocks.5.attn.q_proj.weight"] == 0.5
    assert by_name["eva.blocks.0.attn.q_proj.weight"] == 0.5**6
    assert by_name["eva.pos_embed"] == by_name["down_projection.proj.weight"] == 0.5**7


def test_a_block_is_read_with_its_defaults() -> None:
    block = read_block({"plans_name": "AutoregPlans", "autoreg": BLOCK})

    assert isinstance(block, AutoregBlock)
    assert block.recipe.betas == (0.9, 0.98)
    assert block.recipe.num_iterations_per_epoch == 250
    assert block.encoder.token_size_vox == (8, 8, 8)


def test_an_unknown_recipe_key_is_refused_with_a_close_match() -> None:
    plans = {
        "plans_name": "AutoregPlans",
        "autoreg": {**BLOCK, "recipe": {**BLOCK["recipe"], "clip_nrom": 2.0}},
    }
    with pytest.raises(PlanError) as caught:
        read_block(plans)

    for value in ("AutoregPlans.json", "clip_nrom", "clip_norm"):
        assert value in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_epochs", 0),
        ("clip_norm", 0.0),
        ("drop_path_rate", 1.0),
        ("expected_encoder_share", 1.5),
        ("weight_decay", -0.1),
    ],
)
def test_impossible_recipe_values_are_refused_by_name(key: str, value: float) -> None:
    plans = {
        "plans_name": "AutoregPlans",
        "autoreg": {**BLOCK, "recipe": {**BLOCK["recipe"], key: value}},
    }
    with refused(PlanError, "plan-range", "AutoregPlans.json", f"autoreg.recipe.{key}={value}"):
        read_block(plans)


def test_plans_without_a_block_or_of_a_newer_format_are_refused() -> None:
    with refused(PlanError, "plan-no-block", "nnUNetPlans.json", "-p AutoregPlans"):
        read_block({"plans_name": "nnUNetPlans"})
    with pytest.raises(PlanError) as newer:
        read_block({"plans_name": "AutoregPlans", "autoreg": {**BLOCK, "version": 99}})
    assert "99" in str(newer.value)


def test_network_classes_of_foreign_packages_are_refused() -> None:
    # Plans can come from strangers, and only networks of this package may be imported.
    encoder = EncoderPlan("evil", "os.system", {}, (8, 8, 8))
    with refused(PlanError, "plan-network-class", "'os.system'", "dynamic_network_architectures"):
        check_block(AutoregBlock(encoder, None, RECIPE), "AutoregPlans.json")
