from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import nn

from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.finetune.adapt import interpolate_positions
from nnunet_autoreg.finetune.block import AutoregBlock, PlannedWeights, Recipe
from nnunet_autoreg.finetune.load import (
    Target,
    check_same_encoder,
    load_encoder,
    load_planned_encoder,
)
from nnunet_autoreg.finetune.network import architecture_entry
from nnunet_autoreg.model.card import read_card
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.sizes import ENCODERS
from nnunet_autoreg.plan import EncoderPlan

Write = Callable[..., Path]
CROP = (16, 24, 16)
SIZE = ENCODERS["primus_tiny"]


def network(patch: tuple[int, int, int] = CROP, channels: int = 1) -> nn.Module:
    return build_network(SIZE.class_path, SIZE.arguments, patch, channels, 3)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    file = folder / "encoder.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


def test_the_same_encoder_is_loaded_as_it_is_without_a_decoder(
    tmp_path: Path,
    write_run: Write,
) -> None:
    folder = write_run(tmp_path, "brain", crop=CROP)
    net = network()
    decoder = {k: v.clone() for k, v in net.state_dict().items() if k.startswith("up_projection")}
    table = load_encoder(
        net,
        folder / "encoder.safetensors",
        read_card(folder),
        Target(1, CROP),
        0.95,
    )

    state = net.state_dict()

    assert all(
        torch.equal(state[k], v) for k, v in load_file(folder / "encoder.safetensors").items()
    )
    assert all(torch.equal(state[k], v) for k, v in decoder.items())
    assert table.encoder_share == 1.0
    assert {e.status for e in table.entries} == {"loaded"}
    assert table.rest.key == "up_projection"
    assert table.decoder == ()
    assert "100.0 %" in table.lines()[-1]


def test_one_channel_is_repeated_over_four_and_a_cascade_starts_at_zero(
    tmp_path: Path,
    write_run: Write,
) -> None:
    folder = write_run(tmp_path, "brain", crop=CROP)
    old = load_file(folder / "encoder.safetensors")["down_projection.proj.weight"]
    net = network(channels=6)
    table = load_encoder(
        net,
        folder / "encoder.safetensors",
        read_card(folder),
        Target(4, CROP),
        0.95,
    )

    new = net.state_dict()["down_projection.proj.weight"]

    # Each of four copies has a quarter of the weights; the last two channels are the cascade's.
    assert all(torch.equal(new[:, c], old[:, 0] / 4) for c in range(4))
    assert torch.count_nonzero(new[:, 4:]) == 0

    note = next(e.note for e in table.entries if e.status == "adapted")

    assert note == "1 -> 4 channels, repeated / 4, 2 one-hot channels of the cascade start at 0"


def test_several_channels_are_summed_into_one(tmp_path: Path, write_run: Write) -> None:
    folder = write_run(tmp_path, "multi", crop=CROP, channels=3, num_input_channels=3)
    old = load_file(folder / "encoder.safetensors")["down_projection.proj.weight"]
    net = network()

    load_encoder(net, folder / "encoder.safetensors", read_card(folder), Target(1, CROP), 0.95)

    torch.testing.assert_close(
        net.state_dict()["down_projection.proj.weight"],
        old.sum(1, keepdim=True),
    )
    # Two channels without names: which of the three belongs to which is unknown.
    with refused(WeightsError, "weights-channels", "3 input channels", "2"):
        load_encoder(
            network(channels=2),
            folder / "encoder.safetensors",
            read_card(folder),
            Target(2, CROP),
            0.95,
        )


def test_positions_on_the_same_grid_stay_and_on_a_finer_one_lie_between() -> None:
    positions = torch.tensor([0.0, 4.0]).reshape(1, 2, 1)

    same = interpolate_positions(positions, (2, 1, 1), (2, 1, 1))
    doubled = interpolate_positions(positions, (2, 1, 1), (4, 1, 1))

    torch.testing.assert_close(same, positions)
    # The four new middles lie a quarter of a token beside the old ones: 1 and 3 in between, and the
    # outer two are held at the ends.
    torch.testing.assert_close(doubled.flatten(), torch.tensor([0.0, 1.0, 3.0, 4.0]))


def test_positions_keep_the_order_z_y_x_of_the_tokens() -> None:
    # A value that depends on z only must do so after y and x are stretched.
    z = torch.arange(2.0).reshape(2, 1, 1)
    positions = z.expand(2, 3, 4).reshape(1, 24, 1)

    stretched = interpolate_positions(positions, (2, 3, 4), (2, 6, 8)).reshape(2, 6, 8)

    torch.testing.assert_close(stretched, z.expand(2, 6, 8))


def test_another_patch_size_interpolates_the_positions_and_says_so(
    tmp_path: Path,
    write_run: Write,
) -> None:
    folder = write_run(tmp_path, "brain", crop=CROP)
    patch = (24, 24, 32)
    net = network(patch)
    table = load_encoder(
        net,
        folder / "encoder.safetensors",
        read_card(folder),
        Target(1, patch),
        0.95,
    )

    old = load_file(folder / "encoder.safetensors")["eva.pos_embed"]

    torch.testing.assert_close(
        net.state_dict()["eva.pos_embed"],
        interpolate_positions(old, (2, 3, 2), (3, 3, 4)),
    )
    assert any(
        "eva.pos_embed (positions 2x3x2 -> 3x3x4, trilinear)" in line for line in table.lines()
    )


def test_too_small_a_share_is_an_error_without_any_change(tmp_path: Path, write_run: Write) -> None:
    folder = write_run(tmp_path, "brain", crop=CROP)
    # Two of the six transformer blocks are missing.
    file = rewrite(
        folder,
        lambda t: [t.pop(k) for k in list(t) if k.startswith(("eva.blocks.4", "eva.blocks.5"))],
    )
    net = network()

    before = net.state_dict()["eva.pos_embed"].clone()

    with refused(WeightsError, "weights-share", file, "95 %", "plan again"):
        load_encoder(net, file, read_card(folder), Target(1, CROP), 0.95)
    assert torch.equal(net.state_dict()["eva.pos_embed"], before)

    table = load_encoder(net, file, read_card(folder), Target(1, CROP), 0.5)

    assert sum(e.status == "random" for e in table.entries) > 0


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        # Another width, a block more, a value that is not a number, and another grid: a crop of 16
        # x 24 x 16 has 2 x 3 x 2 = 12 tokens.
        (
            lambda t: t.update({"eva.norm.weight": torch.ones(7)}),
            "weights-other-encoder",
            ("'eva.norm.weight'", "(7,)", "'brain'", "(264,)"),
        ),
        (
            lambda t: t.update({"eva.blocks.9.gamma_1": torch.ones(264)}),
            "weights-other-encoder",
            ("eva.blocks.9.gamma_1",),
        ),
        (
            lambda t: t.update({"eva.norm.bias": torch.full((264,), float("nan"))}),
            "weights-not-finite",
            ("'eva.norm.bias'", "encoder.safetensors"),
        ),
        (
            lambda t: t.update({"eva.pos_embed": torch.ones(1, 5, 264)}),
            "weights-card-mismatch",
            ("'eva.pos_embed'", "12 positions"),
        ),
    ],
)
def test_wrong_contents_are_named(
    tmp_path: Path,
    write_run: Write,
    change: Callable[[dict[str, torch.Tensor]], object],
    code: str,
    values: tuple[str, ...],
) -> None:
    folder = write_run(tmp_path, "brain", crop=CROP)
    file = rewrite(folder, change)

    with refused(WeightsError, code, *values):
        load_encoder(network(), file, read_card(folder), Target(1, CROP), 0.95)


@pytest.mark.parametrize("keep", [0, 7, 1000])
def test_a_truncated_file_is_an_error(tmp_path: Path, write_run: Write, keep: int) -> None:
    folder = write_run(tmp_path, "brain", crop=CROP)
    file = folder / "encoder.safetensors"
    file.write_bytes(file.read_bytes()[:keep])

    with refused(WeightsError, "weights-unreadable", file):
        load_encoder(network(), file, read_card(folder), Target(1, CROP), 0.95)


def test_rotary_tables_in_a_file_are_not_loaded(tmp_path: Path, write_run: Write) -> None:
    folder = write_run(tmp_path, "brain", crop=CROP)
    # A rotary table holds sines and cosines, which are at most 1.
    file = rewrite(folder, lambda t: t.update({"eva.rope.pos_embed": torch.full((12, 88), 9.0)}))
    net = network()

    table = load_encoder(net, file, read_card(folder), Target(1, CROP), 0.95)

    assert not any("rope" in e.key for e in table.entries)
    assert dict(net.named_buffers())["eva.rope.pos_embed"].max() <= 1


def test_weights_of_another_encoder_than_the_plans_are_refused(
    tmp_path: Path,
    write_run: Write,
) -> None:
    card = read_card(write_run(tmp_path, "brain", crop=CROP))
    planned = EncoderPlan(
        "primus_tiny",
        SIZE.class_path,
        {**SIZE.arguments, "eva_depth": 12},
        (8, 8, 8),
    )

    with refused(WeightsError, "weights-other-encoder", "'brain'", "arguments.eva_depth: 12 -> 6"):
        check_same_encoder(card, planned)


def test_a_plan_notices_that_its_weights_file_was_replaced(
    tmp_path: Path,
    write_run: Write,
) -> None:
    folder = write_run(tmp_path, "brain", crop=CROP)
    encoder = EncoderPlan("primus_tiny", SIZE.class_path, SIZE.arguments, (8, 8, 8))
    weights = PlannedWeights(
        "brain",
        "autoreg_pretraining/brain/encoder.safetensors",
        read_card(folder).sha256,
    )
    block = AutoregBlock(encoder, weights, Recipe(1, 1e-4, 1e-4))
    assert load_planned_encoder(network(), block, tmp_path, Target(1, CROP)).encoder_share == 1.0

    rewrite(folder, lambda t: t.update({"eva.norm.bias": torch.ones(264)}))
    with pytest.raises(WeightsError) as replaced:
        load_planned_encoder(network(), block, tmp_path, Target(1, CROP))

    (folder / "encoder.safetensors").unlink()
    with pytest.raises(WeightsError) as missing:
        load_planned_encoder(network(), block, tmp_path, Target(1, CROP))

    for caught in (replaced, missing):
        assert str(folder / "encoder.safetensors") in str(caught.value)

    with refused(WeightsError, "weights-none-planned", "AutoregScratchTrainer"):
        load_planned_encoder(
            network(),
            AutoregBlock(encoder, None, Recipe(1, 1e-4, 1e-4)),
            tmp_path,
            Target(1, CROP),
        )


def test_the_architecture_of_a_plan_stops_stock_trainers_only() -> None:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    block = AutoregBlock(
        EncoderPlan("primus_tiny", SIZE.class_path, SIZE.arguments, (8, 8, 8)),
        None,
        Recipe(1, 1e-4, 1e-4),
    )
    entry = architecture_entry(block, CROP)
    stock = (entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"], 1, 3)

    with pytest.raises(SystemExit) as stopped:
        get_network_from_plans(*stock, deep_supervision=True)

    assert "-tr AutoregPretrainedTrainer" in str(stopped.value)
    # nnU-Net's prediction builds the network without deep supervision, and may.
    assert get_network_from_plans(*stock)(torch.zeros(1, 1, *CROP)).shape == (1, 3, *CROP)
