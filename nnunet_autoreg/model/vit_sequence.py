"""AR-SSL4M's ViT over a sequence of blocks: the START token goes in front, as one more block that
is always given.
"""

from typing import Any

from torch import Tensor, nn

from nnunet_autoreg.geometry import Size
from nnunet_autoreg.model.attention import Rule
from nnunet_autoreg.model.sequence import SequenceEncoder
from nnunet_autoreg.model.trunk import run_blocks


class ViTEncoder(SequenceEncoder):
    """Everything below ``model`` of a ``ViT``; its UNETR decoder is dropped."""

    transfers = ("model.",)
    num_starts = 1

    def __init__(
        self, network: nn.Module, token_size: Size, block_size: Size, recompute: bool = False
    ):
        super().__init__(network, token_size, block_size, recompute)
        self.network.decoder = nn.Identity()

    @property
    def trunk(self) -> Any:
        """The network's own transformer, ``model.vit.Trunk``."""
        return self.network.model

    @property
    def width(self) -> int:
        """Length of a token's feature vector."""
        return int(self.network.embed_dim)

    @property
    def num_heads(self) -> int:
        """Attention heads of the transformer."""
        return int(self.trunk.layers[0].self_attn.num_heads)

    @property
    def linear_projection(self) -> nn.Conv3d:
        """The patch embedding."""
        projection: nn.Conv3d = self.trunk.patchifier.proj
        return projection

    def rope(self, positions_BT: Tensor | None = None) -> None:
        """There is no rotary table."""

    def contextual(
        self,
        x_BTV: Tensor,
        rule: Rule | None,
        positions_BT: Tensor | None = None,
        member_BTV: Tensor | None = None,
    ) -> Tensor:
        """Features (B, 1 + T, V) of START and the tokens; see ``forward``."""
        fixed = self.network.positions
        x_BTV = x_BTV + (fixed if positions_BT is None else fixed[0][positions_BT])
        if member_BTV is not None:
            x_BTV = x_BTV + member_BTV
        out: Tensor = self.trunk.norm(
            run_blocks(self.trunk.layers, self.trunk.with_start(x_BTV), None, rule, self.recompute)
        )
        return out
