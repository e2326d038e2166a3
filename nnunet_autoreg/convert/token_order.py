"""nnssl flattens the tokens of a grid (w, h, d) as (h, w, d), dynamic_network_architectures from
0.4.3 on as (w, h, d).

Loaded as they are, weights of the one meet in the other the learnt positions and the rotary angles
of the wrong tokens. Both are mended
in the weights alone: the position table is reordered; and where the first two axes are of equal
    length, taking the rotary angles of
the two axes in exchange is the same as exchanging the channels of queries and keys that these
angles turn, so that a network of any grid may rebuild its rotary table as it always does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.geometry import Size

PERMUTE, KEEP = "permute", "keep"
TOKEN_ORDERS = (PERMUTE, KEEP)
OURS = "whd"
"""What our exports state."""
POSITIONS = "eva.pos_embed"
_TURNED = (".attn.q_proj.weight", ".attn.q_proj.bias", ".attn.k_proj.weight", ".attn.k_proj.bias")


def swap_plane_axes(tensors: Mapping[str, Tensor], grid: Size, num_heads: int) -> dict[str, Tensor]:
    """An encoder for tokens in the order (w, h, d) from one for (h, w, d), and the other way round.

    Args:
        grid: tokens per axis of pretraining (w, h, d), which is array order.

    Raises:
        WeightsError: the first two axes differ in length, so that the order cannot be mended.
    """
    w, h, d = grid
    if w != h:
        raise WeightsError(
            f"the grid of tokens is {grid}: where its first two axes differ, nnssl's rotary angles "
            "belong to no axis and cannot be "
            "mended; --token-order keep loads the weights as they are"
        )
    swapped = dict(tensors)
    if POSITIONS in swapped:
        table_1NV = swapped[POSITIONS]
        swapped[POSITIONS] = (
            table_1NV.reshape(1, h, w, d, -1)
            .permute(0, 2, 1, 3, 4)
            .reshape(table_1NV.shape)
            .contiguous()
        )
    for key, value in tensors.items():
        if key.endswith(_TURNED):
            swapped[key] = _exchanged(value, num_heads)
    return swapped


def _exchanged(rows: Tensor, num_heads: int) -> Tensor:
    """The output channels (heads x thirds) with the first and second third of every head
    exchanged.
    """
    by_head = rows.reshape(num_heads, 3, -1, *rows.shape[1:])
    return by_head[:, torch.tensor([1, 0, 2])].reshape(rows.shape).contiguous()
