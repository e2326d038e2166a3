"""Convert AR-SSL4M's prediction head, for tests that compare whole forward passes with theirs."""

import math
from collections.abc import Mapping

from torch import Tensor

from nnunet_autoreg.geometry import Size


def head_to_ours(tensors: Mapping[str, Tensor], token: Size) -> tuple[Tensor, Tensor]:
    """Return weight (P, V) and bias (P) of the head, with a token's voxels in order (z, y, x).

    AR-SSL4M lists the voxels of a token in the order (x, y, z), with z running fastest.

    Args:
        token: (z, y, x) voxels of a token.
    """
    z, y, x = token
    weight_XYZV = tensors["decoder_pred.weight"].reshape(x, y, z, -1)
    bias_XYZ = tensors["decoder_pred.bias"].reshape(x, y, z)

    weight_PV = weight_XYZV.permute(2, 1, 0, 3).reshape(math.prod(token), -1)
    bias_P = bias_XYZ.permute(2, 1, 0).reshape(-1)
    return weight_PV.contiguous(), bias_P.contiguous()
