"""Encoders of every family: built for fine-tuning and for pretraining from the same numbers, and
what passes between the two.
"""

from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.families import (
    CLASS_PATHS,
    family_of,
    has_deep_supervision,
    missing_arguments,
    smallest_block,
    token_size_of,
)
from nnunet_autoreg.geometry import as_size
from nnunet_autoreg.model.encoders import build_network, build_sequence_encoder
from nnunet_autoreg.model.sequence import SequenceEncoder, to_blocks
from nnunet_autoreg.model.sizes import ENCODERS, encoder_size
from nnunet_autoreg.plan import EncoderPlan

# The families, but narrow and shallow, so that each of them runs on a CPU in a moment.
NARROW = {"embed_dim": 48, "eva_depth": 2, "eva_numheads": 2}
STAGES = {"features_per_stage": [8, 12, 16, 24], "n_blocks_per_stage": [1, 1, 1, 1]}
SMALL: dict[str, dict[str, Any]] = {
    "primus_tiny": NARROW,
    "primus_v2_tiny": NARROW,
    "primus_v3_tiny": {**NARROW, "ch_per_level": [8, 12, 16, 24]},
    "resenc_tiny": STAGES,
    "vit_b16": {**NARROW, "patch_embed_size": [8, 8, 8], "decoder_features": 4},
}
TRANSFORMERS = tuple(name for name in SMALL if name != "resenc_tiny")
CONVOLVED = ("primus_v2_tiny", "primus_v3_tiny")
CROP = (16, 16, 32)
# Per family: the encoder, its stem, the first layer that reads the image, and the position
# embedding. The ViT computes its positions, so there is none to resize.
ADAPTED = {
    "primus_tiny": ("eva", "down_projection", "down_projection.proj", "eva.pos_embed"),
    "primus_v2_tiny": (
        "eva",
        "down_projection",
        "down_projection.stem.blocks.0.conv1.conv",
        "eva.pos_embed",
    ),
    "primus_v3_tiny": (
        "eva",
        "down_projection",
        "down_projection.stem.blocks.0.conv1.conv",
        "eva.pos_embed",
    ),
    "vit_b16": ("model", "model.patchifier", "model.patchifier.proj", None),
}


def small_plan(name: str) -> EncoderPlan:
    size = encoder_size(name)
    arguments = {**size.arguments, **SMALL[name]}
    return EncoderPlan(name, size.class_path, arguments, token_size_of(size.class_path, arguments))


def small_encoder(name: str, channels: int = 1) -> SequenceEncoder:
    torch.manual_seed(0)
    plan = small_plan(name)
    block = smallest_block(family_of(plan.class_path), plan.token_size_vox)
    return build_sequence_encoder(plan, CROP, block, channels).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_named_encoder_can_be_built_and_states_its_tokens_and_family(name: str) -> None:
    size = encoder_size(name)
    arguments = dict(size.arguments)
    if "eva_depth" in arguments:
        arguments["eva_depth"] = 2
    crop = [4 * side for side in size.token_size]
    # The meta device computes shapes only; the largest encoders would need gigabytes.
    with torch.device("meta"):
        network: Any = build_network(size.class_path, arguments, crop, 1, 3)
        output = network(torch.empty(1, 1, *crop))

    assert output.shape == (1, 3, *crop)
    assert family_of(size.class_path) == size.family
    assert name.startswith(size.family)
    assert token_size_of(size.class_path, size.arguments) == size.token_size
    smallest = smallest_block(size.family, size.token_size)
    for tokens, least in zip(size.block_tokens, smallest, strict=True):
        assert tokens >= least
    assert not missing_arguments(size.class_path, size.arguments)


def test_the_presets_have_the_sizes_of_their_papers() -> None:
    """nnU-Net's ResEnc encoder:

    6 stages, stride 32; Primus M: width 864, 16 blocks; ViT-B/16: 12 blocks of 768.
    """
    resenc = encoder_size("resenc_l")

    assert resenc.token_size == (32, 32, 32)
    assert resenc.arguments["n_blocks_per_stage"] == [1, 3, 4, 6, 6, 6]
    # nnU-Net's M, L and XL are one network, planned for different amounts of GPU memory.
    for name, patch_gib in (("resenc_m", 8), ("resenc_l", 24), ("resenc_xl", 40)):
        assert encoder_size(name).arguments == resenc.arguments
        assert encoder_size(name).patch_gib == patch_gib
    assert encoder_size("primus_v2_m").arguments["embed_dim"] == 864
    assert encoder_size("vit_b16").token_size == (16, 16, 16)
    # The total stride per axis: 1 * 1 * 2 = 2 along z, and 1 * 2 * 2 = 4 along y and x.
    assert token_size_of(CLASS_PATHS["resenc"], {"strides": [1, [1, 2, 2], 2]}) == (2, 4, 4)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transferred_weights_fill_exactly_the_downstream_encoder(
    name: str,
    tmp_path: Any,
) -> None:
    encoder = small_encoder(name)
    plan = small_plan(name)
    state = encoder.transferable_state()
    save_file(state, tmp_path / "encoder.safetensors")
    torch.manual_seed(1)
    downstream: Any = build_network(plan.class_path, plan.arguments, CROP, 1, 3).eval()
    live = downstream.state_dict(keep_vars=True)
    prefixes = (f"{downstream.key_to_encoder}.", f"{downstream.key_to_stem}.")
    # By identity, because several names can share one tensor. Rotary tables are computed from the
    # crop and do not transfer.
    parts = {id(t) for key, t in live.items() if key.startswith(prefixes) and ".rope." not in key}
    assert {id(live[key]) for key in state} == parts
    assert len(state) == len(parts)

    downstream.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=False)
    assert all(torch.equal(live[key], value) for key, value in state.items())

    volume = noise(1, 1, *CROP)
    # Equal weights are not enough: the downstream network must also compute the same features.
    with torch.no_grad():
        expected = encoder.describe(volume[:, None], None)
        assert torch.allclose(fine_tuned_features(name, downstream, volume), expected, atol=1e-5)


def fine_tuned_features(name: str, network: Any, volume: Tensor) -> Tensor:
    """Features as the downstream network computes them itself, (B, T, *)."""
    if name == "vit_b16":
        last: Tensor = network.encode(volume)[-1]
        return last
    features, _ = network.eva(network.down_projection(volume).flatten(2).transpose(1, 2))
    out: Tensor = features
    return out


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_card_names_the_parts_that_fine_tuning_adapts(name: str) -> None:
    encoder = small_encoder(name, channels=2)
    adaptation = encoder.adaptation()
    key_to_encoder, key_to_stem, in_proj, positions = ADAPTED[name]

    assert (adaptation.key_to_encoder, adaptation.key_to_stem, adaptation.key_to_lpe) == (
        key_to_encoder,
        key_to_stem,
        positions,
    )
    assert adaptation.keys_to_in_proj[0] == in_proj

    # Every tensor whose shape depends on the number of channels is named, under some name.
    other = small_encoder(name, channels=3).network.state_dict()
    state = encoder.network.state_dict(keep_vars=True)
    depends = {id(t) for key, t in state.items() if t.shape != other[key].shape}

    assert depends == {id(state[f"{key}.weight"]) for key in adaptation.keys_to_in_proj}


@pytest.mark.parametrize("name", CONVOLVED)
def test_the_local_part_sees_one_block_at_a_time(name: str) -> None:
    encoder = small_encoder(name)
    volume = noise(1, 1, 1, *CROP)
    blocks = to_blocks(volume[:, 0], encoder.block_size)
    with torch.no_grad():
        tokens = encoder.tokens(volume)
        alone = [
            encoder.local(blocks[:, k]).flatten(2).transpose(1, 2)[0]
            for k in range(blocks.shape[1])
        ]

    # Two blocks of 16^3 beside each other along x, each of 2 x 2 x 2 tokens.
    index = torch.arange(16).reshape(2, 2, 4)

    assert blocks.shape[1] == 2
    # Convolutions of one and of two blocks may add up in another order.
    assert torch.allclose(tokens[0, index[:, :, :2].flatten()], alone[0], atol=1e-5)
    assert torch.allclose(tokens[0, index[:, :, 2:].flatten()], alone[1], atol=1e-5)


@pytest.mark.parametrize("name", CONVOLVED)
def test_run_over_a_whole_crop_the_local_part_would_leak(name: str) -> None:
    """What the tests of leakage would see if blocks were not taken one by one."""
    encoder = small_encoder(name)
    volume = noise(1, 1, 1, *CROP)
    other = noise(1, 1, 1, *CROP, seed=1)
    # The two crops agree in the first block (x < 16) and differ in the second.
    other[..., :16] = volume[..., :16]
    # Tokens of the first block in a grid of 2 x 2 x 4.
    first = torch.arange(16).reshape(2, 2, 4)[:, :, :2].flatten()
    with torch.no_grad():
        assert torch.equal(encoder.tokens(volume)[0, first], encoder.tokens(other)[0, first])
        whole = as_size(CROP)
        assert not torch.equal(
            encoder.tokens(volume, whole)[0, first],
            encoder.tokens(other, whole)[0, first],
        )


@pytest.mark.parametrize("name", CONVOLVED)
def test_computing_the_local_part_twice_changes_no_number(name: str) -> None:
    once = small_encoder(name)
    twice = small_encoder(name)
    twice.recompute = True
    volume = noise(1, 1, 1, *CROP)
    gradients = []
    for encoder in (once, twice):
        # One row of weights for each of 16 tokens with 48 features.
        (encoder(volume, None) * noise(1, 16, 48, seed=2)).sum().backward()
        # All gradients in one: those of biases before a norm are nothing but rounding.
        found = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    one, two = gradients

    # Recomputation repeats the same operations, so only rounding may differ.
    assert (one - two).norm() < 1e-4 * one.norm()


def test_a_cnn_hands_its_image_and_deep_supervision_arguments_on() -> None:
    plan = small_plan("resenc_tiny")
    network: Any = build_network(plan.class_path, plan.arguments, CROP, 1, 3, deep_supervision=True)
    outputs = network(noise(1, 1, *CROP))

    # Strides 1, 2, 2, 2: a decoder predicts at all resolutions except the deepest, one eighth.
    assert [tuple(o.shape[2:]) for o in outputs] == [(16, 16, 32), (8, 8, 16), (4, 4, 8)]
    assert has_deep_supervision("resenc")
    assert not has_deep_supervision("primus")


def test_what_a_family_cannot_do_is_refused() -> None:
    cnn = small_plan("resenc_tiny")
    primus = small_plan("primus_tiny")
    no_strides = {key: value for key, value in cnn.arguments.items() if key != "strides"}

    with refused(PlanError, "plan-stochastic-depth", "0.2"):
        build_network(cnn.class_path, cnn.arguments, CROP, 1, 2, drop_path_rate=0.2)
    with refused(PlanError, "plan-deep-supervision", primus.class_path):
        build_network(primus.class_path, primus.arguments, CROP, 1, 2, deep_supervision=True)
    # 20 voxels lie between two multiples of the total stride 8: 16 and 24.
    with refused(PlanError, "plan-input-shape", "size 20", "axis z", "16 or 24"):
        build_network(cnn.class_path, cnn.arguments, (20, 16, 16), 1, 2)
    with refused(PlanError, "plan-missing-argument", "strides"):
        build_network(cnn.class_path, no_strides, CROP, 1, 2)
    with refused(PlanError, "plan-cnn-has-no-tokens", "sequence.predictor=network"):
        build_sequence_encoder(cnn, CROP, (2, 2, 2))


def test_a_strangers_arguments_name_no_class_from_elsewhere() -> None:
    plan = small_plan("resenc_tiny")
    # The second is the same class, by way of a module of torch that has imported it.
    for name in (
        "subprocess.Popen",
        "torch.nn.modules.module.torch.utils.cpp_extension.subprocess.Popen",
        "torch.nn.Parameter",
        3,
    ):
        evil = {**plan.arguments, "nonlin": name, "nonlin_kwargs": {}}
        with refused(PlanError, "plan-not-a-layer", "nonlin", name):
            build_network(plan.class_path, evil, CROP, 1, 2)

    with refused(PlanError, "plan-unknown-network", "os.system"):
        build_network("os.system", plan.arguments, CROP, 1, 2)


def test_start_is_one_more_block_in_front_that_is_always_given() -> None:
    encoder = small_encoder("vit_b16")
    features = encoder(noise(2, 1, 1, *CROP), None)
    without_start = small_encoder("primus_tiny")(noise(2, 1, 1, *CROP), None)

    # The crop holds 2 x 2 x 4 tokens of 8 x 8 x 8 voxels.
    assert encoder.num_starts == 1
    assert features.shape == (2, 1 + 16, 48)
    assert without_start.shape == (2, 16, 48)
