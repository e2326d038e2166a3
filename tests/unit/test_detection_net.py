"""Detectors of every family: segmentation unchanged, levels of the stated strides, gradients
everywhere.
"""

from typing import Any

import pytest
import torch
from refusals import refused

from nnunet_autoreg.detection.net import Output, build_detector, stage_strides, token_doublings
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.model import encoders
from nnunet_autoreg.model.sizes import ENCODERS

PATCH = (32, 32, 32)
# Each network as narrow as its layers allow.
SMALL: dict[str, dict[str, Any]] = {
    "resenc_tiny": {"features_per_stage": [4, 6, 8, 8]},
    "primus_tiny": {"embed_dim": 48, "eva_depth": 1, "eva_numheads": 2},
    "primus_v2_tiny": {"embed_dim": 48, "eva_depth": 1, "eva_numheads": 2},
    "primus_v3_tiny": {
        "embed_dim": 48,
        "eva_depth": 1,
        "eva_numheads": 2,
        "ch_per_level": [4, 6, 8, 8],
    },
    "vit_b16": {"embed_dim": 48, "eva_depth": 4, "eva_numheads": 2},
}


class FixedAnswer(torch.nn.Module):
    """Answers with the corner of a fixed map, as large as the features."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        z, y, x = features.shape[2:]
        return self.answer[:, :, :z, :y, :x]


def made(name: str, num_shapes: int = 3, num_classes: int = 2) -> tuple[Any, Any, list[int]]:
    """A segmentation network, a detector with the same weights, and its stages: strides 4 and 8."""
    size = ENCODERS[name]
    arguments = {**size.arguments, **SMALL[name]}
    torch.manual_seed(0)
    network = encoders.build_network(size.class_path, arguments, PATCH, 1, 3)
    strides = stage_strides(size.class_path, arguments, PATCH)
    stages = [i for i, stride in enumerate(strides) if max(stride) in (4, 8)]
    heads = {"num_shapes": num_shapes, "num_classes": num_classes, "num_channels": 32}
    detector = build_detector(network, size.class_path, arguments, stages=stages, **heads)
    return network, detector, stages


@pytest.mark.parametrize("name", SMALL)
def test_in_evaluation_heads_change_neither_segmentation_nor_keys(
    name: str,
) -> None:
    network, detector, _ = made(name)
    image = torch.randn(1, 1, *PATCH, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        expected = network.eval()(image)
        found = detector.eval()(image)

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # nnU-Net's own commands load the checkpoint, so all keys of the segmentation are the same.
    assert set(network.state_dict()) <= set(detector.state_dict())
    new = set(detector.state_dict()) - set(network.state_dict())
    assert new
    assert all(key.startswith("detection.") for key in new)


@pytest.mark.parametrize("name", SMALL)
def test_heads_score_every_anchor_and_every_parameter_gets_a_gradient(
    name: str,
) -> None:
    _, detector, stages = made(name)

    assert len(stages) == 2

    output = detector.train()(torch.randn(2, 1, *PATCH))

    # Strides 4 and 8 in a patch of 32; three anchors in every cell.
    assert isinstance(output, Output)
    assert output.cells == ((8, 8, 8), (4, 4, 4))
    num_anchors = (8**3 + 4**3) * 3
    assert output.scores_BAK.shape == (2, num_anchors, 2)
    assert output.deltas_BA6.shape == (2, num_anchors, 6)

    # The last layer of the boxes starts at 0, where its inputs would have a gradient of 0.
    torch.nn.init.ones_(detector.detection["heads"].regressor[-1].weight)
    output = detector(torch.randn(2, 1, *PATCH))
    of_heads = output.scores_BAK.sum() + output.deltas_BA6.square().sum()
    (output.logits_BCZYX.sum() + of_heads).backward()
    parameters = [(key, p) for key, p in detector.named_parameters() if p.requires_grad]
    assert [key for key, p in parameters if p.grad is None] == []


def test_an_untrained_head_scores_every_anchor_with_about_one_percent() -> None:
    _, detector, _ = made("resenc_tiny")
    detector.eval().detect = True

    with torch.no_grad():
        output = detector(torch.zeros(1, 1, *PATCH))

    # Random weights of the layers before move the prior of 1 % a little.
    assert output.scores_BAK.sigmoid().mean().item() == pytest.approx(0.01, abs=3e-3)
    assert not output.deltas_BA6.any()


def test_anchors_come_level_by_level_then_cell_by_cell_then_shape_by_shape() -> None:
    _, detector, _ = made("resenc_tiny")
    heads = detector.detection["heads"]
    maps = [torch.zeros(1, 32, 2, 2, 2), torch.zeros(1, 32, 1, 1, 1)]
    # Channel c of cell n has the value c + 100 n.
    channels = torch.arange(6.0)[None, :, None, None, None]
    marked = channels + 100 * torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    heads.classifier = FixedAnswer(marked)
    heads.regressor = FixedAnswer(torch.zeros(1, 18, 2, 2, 2))

    scores, _ = heads(maps)

    # Six channels: three shapes of two classes; cell 3 of 8 is the fourth.
    # 8 cells and 1 cell with three shapes each. Anchor 3 x 3 + 1 is the second shape of cell 3, and
    # anchor 24 the first one of the second level.
    assert scores.shape == (1, 27, 2)
    assert scores[0, 3 * 3 + 1].tolist() == [302.0, 303.0]
    assert scores[0, 24].tolist() == [0.0, 1.0]


# Coarse slices: the first step halves only y and x.
def test_strides_of_stages_follow_the_network_and_no_cell_is_cut() -> None:
    resenc = ENCODERS["resenc_tiny"]
    primus = ENCODERS["primus_tiny"]
    flat = {**resenc.arguments, "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]}

    of_flat = stage_strides(resenc.class_path, flat, PATCH)
    assert of_flat == [(1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8)]
    of_primus = stage_strides(primus.class_path, primus.arguments, (48, 64, 64))
    assert of_primus == [(2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16)]
    # Tokens of 8 voxels are doubled in resolution twice (stride 2), once, not at all, and so on.
    assert token_doublings((8, 8, 8)) == [2, 1, 0, -1, -2]
    assert token_doublings((4, 8, 8)) == [2, 1, 0, -1, -2]


def test_tokens_that_cannot_be_halved_to_voxels_are_refused() -> None:
    with refused(PlanError, "detection-token-size", "(6, 6, 6)"):
        token_doublings((6, 6, 6))
