"""The ViT against AR-SSL4M: numbers of the original model, and a second model written in (x, y, z)
here.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from ar_ssl4m_head import head_to_ours
from refusals import refused
from torch import Tensor
from torch.nn import functional

from nnunet_autoreg.convert.ar_ssl4m import expected_keys, to_ours, to_theirs
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.model.attention import block_causal
from nnunet_autoreg.model.vit import ViT, sincos_positions

TOKEN = (16, 16, 16)


def golden(shared_data: Path) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Weights under the original keys, input (B, Z, Y, X), and the original model's numbers."""
    with np.load(shared_data / "golden" / "ar_ssl4m_small.npz") as file:
        numbers = {key: torch.from_numpy(file[key]) for key in file.files}
    weights = {}
    for key, value in numbers.items():
        if key.startswith("weights/"):
            weights[key.removeprefix("weights/")] = value
    return weights, numbers["input_xyz"].permute(0, 3, 2, 1).contiguous(), numbers


def model_of(weights: Mapping[str, Tensor], shape: tuple[int, int, int], heads: int) -> ViT:
    depth = len({key.split(".")[2] for key in weights if key.startswith("model.layers.")})
    model = ViT(1, int(weights["model.norm.weight"].shape[0]), TOKEN, 2, depth, heads, shape)
    model.eval()
    # The decoder of the ViT is ours, so its weights are not in the file.
    state = {key: value for key, value in model.state_dict().items() if key.startswith("decoder.")}
    model.load_state_dict({**to_ours(weights), **state}, strict=True)
    return model


@pytest.mark.parametrize("prefix", [0, 1, 5, 23])
def test_predictions_and_loss_are_those_of_the_original_model(
    shared_data: Path,
    prefix: int,
) -> None:
    weights, volume_BZYX, numbers = golden(shared_data)
    B, Z, Y, X = volume_BZYX.shape
    grid = (Z // 16, Y // 16, X // 16)
    model = model_of(weights, (Z, Y, X), heads=12)
    head, bias = head_to_ours(weights, TOKEN)
    # The original's sequence runs along z fastest and x slowest; START comes before all.
    order = torch.arange(24).reshape(grid).permute(2, 1, 0).flatten()
    rank_T = torch.empty(25, dtype=torch.long)
    rank_T[0] = -1
    rank_T[1 + order] = torch.arange(24)
    valid_BT = torch.ones(B, 25, dtype=torch.bool)
    mask = block_causal(rank_T.expand(B, -1), torch.full((B,), prefix), valid_BT).dense()
    with torch.no_grad():
        tokens_BTV = model.model.with_start(model.tokens(volume_BZYX[:, None]))
        features_BTV = model.model.hidden(tokens_BTV, mask)[-1]
        by_rank = torch.cat([features_BTV[:, :1], features_BTV[:, 1 + order]], dim=1)
        # Each position predicts the token that comes next.
        predicted_BNP = functional.linear(by_rank[:, :24], head, bias)

    # (B, z, 16, y, 16, x, 16) -> (B, z, y, x, 16, 16, 16)
    split = volume_BZYX.reshape(B, grid[0], 16, grid[1], 16, grid[2], 16)
    patches_BNP = split.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, 24, -1)[:, order]
    mean = patches_BNP.mean(-1, keepdim=True)
    deviation = (patches_BNP.var(-1, keepdim=True) + 1e-6).sqrt()
    target_BNP = (patches_BNP - mean) / deviation
    loss = functional.mse_loss(predicted_BNP[:, prefix:], target_BNP[:, prefix:])

    # The original's voxels within a token run along z fastest; the file has every 64th of them.
    cubes = predicted_BNP.reshape(B, 24, 16, 16, 16)
    in_their_order = cubes.permute(0, 1, 4, 3, 2).reshape(B, 24, -1)[..., ::64]
    predictions = numbers[f"prefix{prefix}/predictions"]
    torch.testing.assert_close(in_their_order, predictions, atol=1e-4, rtol=0)
    assert float(loss) == pytest.approx(float(numbers[f"prefix{prefix}/loss"]), abs=1e-4)


def synthetic(depth: int, width: int) -> dict[str, Tensor]:
    """A checkpoint of the original's key names and shapes with random values."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (4, width),
        "patchifier.proj.weight": (width, 1, *TOKEN),
        "decoder_pred.weight": (4096, width),
        "decoder_pred.bias": (4096,),
        "linear1.weight": (4 * width, width),
        "linear1.bias": (4 * width,),
        "linear2.weight": (width, 4 * width),
    }
    tensors = {}
    for key in sorted(expected_keys(depth)):
        default = (width, width) if key.endswith("_proj.weight") else (width,)
        shape = next((shape for ending, shape in shapes.items() if key.endswith(ending)), default)
        # Norms begin at 1.
        offset = 1.0 if "norm.weight" in key else 0.0
        tensors[key] = torch.randn(shape, generator=generator) * 0.1 + offset
    return tensors


def their_norm(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    weight = weights[f"{name}.weight"]
    return functional.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], 1e-5)


def their_positions(grid: list[int], width: int) -> Tensor:
    """Sines and cosines of x, y and z, a third of the width each, (x, y, z, V)."""
    table = np.zeros((*grid, width))
    for place in np.ndindex(*grid):
        for axis in range(3):
            for k in range(width // 6):
                angle = place[axis] / 10000 ** (k / (width // 6))
                table[(*place, axis * width // 3 + k)] = math.sin(angle)
                table[(*place, axis * width // 3 + width // 6 + k)] = math.cos(angle)
    return torch.from_numpy(table).float()


def their_layer(x: Tensor, w: Mapping[str, Tensor], heads: int) -> Tensor:
    """One block of the transformer: attention and a perceptron, each after a norm."""
    B, _, width = x.shape
    y = their_norm(x, w, "input_layernorm")
    q, k, v = (
        (y @ w[f"self_attn.{n}_proj.weight"].T)
        .reshape(B, -1, heads, width // heads)
        .transpose(1, 2)
        for n in "qkv"
    )  # (B, heads, T, width / heads)
    attention = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(-1)
    seen = (attention @ v).transpose(1, 2).reshape(B, -1, width)
    x = x + seen @ w["self_attn.o_proj.weight"].T + w["self_attn.o_proj.bias"]

    y = their_norm(x, w, "post_attention_layernorm")
    y = y @ w["mlp.linear1.weight"].T + w["mlp.linear1.bias"]
    # GELU
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    return x + y @ w["mlp.linear2.weight"].T + w["mlp.linear2.bias"]


def their_encoder(weights: Mapping[str, Tensor], volume_BXYZ: Tensor, heads: int) -> Tensor:
    """Features (B, x, y, z, V) of the encoder as fine-tuning uses it, computed in (x, y, z) from
    nothing but the description.
    """
    width = weights["model.norm.weight"].shape[0]
    x = functional.conv3d(
        volume_BXYZ[:, None],
        weights["model.patchifier.proj.weight"],
        weights["model.patchifier.proj.bias"],
        stride=16,
    )
    B, _, *grid = x.shape
    x = x.flatten(2).transpose(1, 2) + their_positions(grid, width).reshape(1, -1, width)
    # Special token 1 is START.
    x = torch.cat([weights["model.embed_tokens.weight"][1].expand(B, 1, -1), x], dim=1)
    depth = len({key.split(".")[2] for key in weights if key.startswith("model.layers.")})
    for i in range(depth):
        w = {key.removeprefix(f"model.layers.{i}."): value for key, value in weights.items()}
        x = their_layer(x, w, heads)
    x = their_norm(x, weights, "model.norm")
    return x[:, 1:].reshape(B, *grid, width)


def test_our_model_in_zyx_gives_what_theirs_gives_in_xyz() -> None:
    weights = synthetic(depth=2, width=24)
    # Three different sides, so that swapped axes cannot agree by accident.
    volume_BXYZ = torch.randn(2, 48, 32, 16, generator=torch.Generator().manual_seed(1))
    volume_BCZYX = volume_BXYZ.permute(0, 3, 2, 1)[:, None]
    theirs = their_encoder(weights, volume_BXYZ, heads=4)
    model = model_of(weights, (16, 32, 48), heads=4)

    def ours() -> Tensor:
        with torch.no_grad():
            features_BTV = model.encode(volume_BCZYX)[-1]
        return features_BTV.reshape(2, 1, 2, 3, 24).permute(0, 3, 2, 1, 4)

    torch.testing.assert_close(ours(), theirs, atol=1e-5, rtol=1e-5)

    # Loaded without turning the kernel the same comparison fails, so it separates the axes.
    with torch.no_grad():
        model.model.patchifier.proj.weight.copy_(weights["model.patchifier.proj.weight"])

    assert (ours() - theirs).abs().max() > 0.1


def test_ours_has_the_161_encoder_tensors_of_the_original_163() -> None:
    with torch.device("meta"):
        model = ViT(1, 768, TOKEN, 3)
    state = {key: value for key, value in model.state_dict().items() if key.startswith("model.")}

    assert len(expected_keys(12)) == 163
    # Without the weight and the bias of the head of pretraining, decoder_pred.
    assert set(state) == {key for key in expected_keys(12) if not key.startswith("decoder_pred.")}
    assert sum(value.numel() for value in state.values()) == 88_177_920
    assert model.tap_indices == [3, 6, 9]


def test_export_is_the_inverse_of_import_bit_by_bit() -> None:
    weights = synthetic(depth=1, width=12)
    back = to_theirs(to_ours(weights))

    kernel = "model.patchifier.proj.weight"
    assert set(back) == {key for key in weights if key.startswith("model.")}
    assert all(torch.equal(back[key], weights[key]) for key in back)
    # The way there does change something.
    assert not torch.equal(to_ours(weights)[kernel], weights[kernel])


def test_positions_of_width_six_are_sines_and_cosines_of_x_y_z() -> None:
    positions = sincos_positions((2, 1, 3), 6).reshape(2, 1, 3, 6)

    # x = 2, y = 0 and z = 1, each with one frequency.
    expected = [math.sin(2), math.cos(2), 0.0, 1.0, math.sin(1), math.cos(1)]
    torch.testing.assert_close(positions[1, 0, 2], torch.tensor(expected))


def test_logits_have_the_shape_of_the_volume_for_tokens_of_16_and_of_8() -> None:
    for token, depth, taps in ((16, 3, [0, 1, 2]), (8, 6, [2, 4])):
        model = ViT(2, 24, (token,) * 3, 3, depth, 2, (16, 32, 16), decoder_features=4)
        assert model(torch.zeros(1, 2, 16, 32, 16)).shape == (1, 3, 16, 32, 16)
        assert model.tap_indices == taps


def test_every_parameter_but_the_unread_special_tokens_learns() -> None:
    model = ViT(1, 24, TOKEN, 2, 4, 2, (32, 32, 16), decoder_features=4)
    volume = torch.randn(1, 1, 32, 32, 16, generator=torch.Generator().manual_seed(2))

    model(volume).square().sum().backward()

    still = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.abs().sum() > 0:
            still.append(name)
    assert still == []

    # Of the four special tokens only START, number 1, is read.
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert gradient[[0, 2, 3]].abs().sum() == 0


def test_the_keys_that_nnunets_loaders_ask_for_exist() -> None:
    from dynamic_network_architectures.architectures.abstract_arch import (
        test_submodules_loadable as check,
    )

    model = ViT(1, 24, TOKEN, 2, 2, 2, (16, 16, 16), decoder_features=4)

    check(model)
    assert model.key_to_lpe is None


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"patch_embed_size": (12, 12, 12)}, "plan-token-size", "[12, 12, 12]"),
        ({"patch_embed_size": (16, 16, 8)}, "plan-token-size", "[16, 16, 8]"),
        ({"input_shape": (16, 24, 16)}, "plan-input-shape", "size 24 on axis y"),
        ({"embed_dim": 20}, "plan-width", "width 20"),
        ({"eva_numheads": 5}, "plan-width", "5 heads"),
    ],
)
def test_impossible_values_are_named(changes: dict[str, object], code: str, named: str) -> None:
    values = {
        "embed_dim": 24,
        "patch_embed_size": TOKEN,
        "eva_depth": 1,
        "eva_numheads": 2,
        "input_shape": (16, 16, 16),
        **changes,
    }

    with refused(PlanError, code, named):
        ViT(input_channels=1, num_classes=2, **values)


def test_a_checkpoint_of_163_tensors_loads_strictly_into_twelve_blocks() -> None:
    weights = synthetic(depth=12, width=12)

    assert len(weights) == 163

    model = model_of(weights, (16, 16, 16), heads=2)

    assert len([key for key in model.state_dict() if key.startswith("model.")]) == 161
    missing = "model.layers.11.mlp.linear2.bias"
    incomplete = {key: value for key, value in weights.items() if key != missing}
    with pytest.raises(RuntimeError) as caught:
        model_of(incomplete, (16, 16, 16), heads=2)
    assert missing in str(caught.value)
