"""Primus, PrimusV2 and PrimusV3 over a sequence of blocks."""

from typing import Any

from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchEmbed
from torch import Tensor, nn

from nnunet_autoreg.geometry import Size
from nnunet_autoreg.model.sequence import SequenceEncoder


class PrimusEncoder(SequenceEncoder):
    """The tokenizer and the transformer of a Primus network; its decoder is dropped.

    The convolutional tokenizers of V2 and V3 look far beyond a token and normalise over all they
    see; fine-tuning lets them see a whole patch where pretraining shows them a block.
    """

    transfers = ("down_projection.", "eva.")

    def __init__(
        self, network: nn.Module, token_size: Size, block_size: Size, recompute: bool = False
    ):
        super().__init__(network, token_size, block_size, recompute)
        self.network.up_projection = nn.Identity()

    @property
    def trunk(self) -> Any:
        """The network's own transformer."""
        return self.network.eva

    @property
    def linear_projection(self) -> nn.Conv3d | None:
        """That of the first Primus; V2 and V3 have none."""
        tokenizer = self.network.down_projection
        projection = getattr(tokenizer, "proj", None)
        is_linear = (
            isinstance(tokenizer, PatchEmbed)
            and isinstance(projection, nn.Conv3d)
            and projection.kernel_size == self.token_size
        )
        return projection if is_linear else None

    def local(self, volumes_BCZYX: Tensor) -> Tensor:
        """What the tokenizer makes of volumes."""
        out: Tensor = self.network.down_projection(volumes_BCZYX)
        return out
