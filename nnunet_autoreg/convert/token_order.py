"""Convert transformers between the token orders of nnssl and of nnU-Net.

nnssl flattens the tokens of a grid (w, h, d) as (h, w, d); dynamic_network_architectures from 0.4.3
on flattens them as (w, h, d). If the weights of one are loaded into the other as they are, tokens
meet the learned positions and rotary angles of other tokens.

Both are corrected only in the weights. The position table is reordered. Where the first two axes
have the same length, exchanging their rotary angles is the same as exchanging the channels of
queries and keys that these angles turn. So a network of any grid can build its rotary table as
usual.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.geometry import Size

POSITIONS = "eva.pos_embed"
_TURNED = (".attn.q_proj.weight", ".attn.q_proj.bias", ".attn.k_proj.weight", ".attn.k_proj.bias")


def swap_plane_axes(tensors: Mapping[str, Tensor], grid: Size, num_heads: int) -> dict[str, Tensor]:
    """Return an encoder for tokens in the order (w, h, d) from one for (h, w, d), or vice versa.

    Args:
        grid: tokens per axis of pretraining (w, h, d), which is array order.

    Raises:
        WeightsError: the first two axes differ in length, so the order cannot be corrected (code
            "weights-token-order").
    """
    w, h, d = grid
    if w != h:
        raise WeightsError(
            f"the grid of tokens is {grid}: its first two axes differ, so nnssl's rotary angles "
            "cannot be corrected; --token-order keep loads the weights as they are",
            code="weights-token-order",
        )

    swapped = dict(tensors)
    if POSITIONS in swapped:
        table_1NV = swapped[POSITIONS]
        table_1HWDV = table_1NV.reshape(1, h, w, d, -1)
        table_1WHDV = table_1HWDV.permute(0, 2, 1, 3, 4)
        swapped[POSITIONS] = table_1WHDV.reshape(table_1NV.shape).contiguous()

    # Rotary embedding gives each axis a third of the channels of a head.
    other_way_round = torch.tensor([1, 0, 2])
    for key, rows in tensors.items():
        if key.endswith(_TURNED):
            by_head = rows.reshape(num_heads, 3, -1, *rows.shape[1:])  # (heads, axes, channels, ..)
            swapped[key] = by_head[:, other_way_round].reshape(rows.shape).contiguous()
    return swapped
