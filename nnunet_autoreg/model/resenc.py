"""nnU-Net's residual encoder U-Net, pretrained by blocks: the CNN on every block, a transformer over their deepest features.

The transformer exists in pretraining only; what transfers is ``encoder.*``.
"""

from typing import Any

from dynamic_network_architectures.building_blocks.eva import Eva
from torch import Tensor, nn

from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.model.attention import AttentionRule
from nnunet_autoreg.model.sequence import SequenceEncoder
from nnunet_autoreg.plan import TrunkPlan


class ResEncEncoder(SequenceEncoder):
    """The encoder of a ``ResidualEncoderUNet`` over a sequence of blocks.

    A token is the cube of voxels that one position of the deepest features stands for. Skips are trained through the deeper stages
    alone. Convolutions pad with zeros at a block's border, where fine-tuning sees what lies beyond: the deeper a stage, the more of
    its positions are near a border.

    Args:
        network: a ``ResidualEncoderUNet``; its decoder is dropped.
        grid: tokens per axis of the crop.
        trunk: the transformer to make.
        token_size, block_size, recompute: as of ``SequenceEncoder``.
    """

    transfers = ("encoder.",)

    def __init__(
        self, network: nn.Module, token_size: Size, block_size: Size, grid: Size, trunk: TrunkPlan, recompute: bool = False
    ):
        super().__init__(network, token_size, block_size, recompute)
        self.network.decoder = nn.Identity()
        self.project = nn.Conv3d(int(self.network.encoder.output_channels[-1]), trunk.width, kernel_size=1)
        self.transformer = Eva(
            trunk.width, trunk.depth, trunk.num_heads, ref_feat_shape=grid, init_values=0.1, scale_attn_inner=True
        )

    @property
    def trunk(self) -> Any:
        """The transformer over the CNN's features."""
        return self.transformer

    def local(self, volumes_BCZYX: Tensor) -> Tensor:
        """The CNN's deepest features, brought to the transformer's width."""
        out: Tensor = self.project(self.network.encoder(volumes_BCZYX)[-1])
        return out

    def describe(self, voxels_BMCZYX: Tensor, rule: AttentionRule | None, positions_BT: Tensor | None = None) -> Tensor:
        """The CNN's deepest features (B, T, channels) of each whole crop: fine-tuning has no transformer."""
        whole_BMCZYX = voxels_BMCZYX.flatten(0, 1)
        deepest: Tensor = self.network.encoder(whole_BMCZYX)[-1]
        assert as_size(deepest.shape[2:]) == as_size([s // t for s, t in zip(whole_BMCZYX.shape[2:], self.token_size, strict=True)])
        return deepest.flatten(2).transpose(1, 2).reshape(voxels_BMCZYX.shape[0], -1, deepest.shape[1])
