"""Strides and kernels of a CNN for scans of unlike spacing along their axes. Torch-free."""

from collections.abc import Sequence
from dataclasses import replace

from nnunet_autoreg.families import RESENC, token_size_of
from nnunet_autoreg.geometry import Spacing
from nnunet_autoreg.model.sizes import EncoderSize

LIKE = 2.0
"""An axis whose voxels are less than this many times as long as the shortest ones is pooled and
convolved with them.
"""


def suited_to(encoder: EncoderSize, spacing_mm: Spacing) -> EncoderSize:
    """``encoder`` with strides and kernels for voxels of this size; stages, widths and depths stay,
    and so do transformers.

    An axis of thick slices is not halved, and not convolved along, until the others have become as
    coarse.

    Source: the rule by spacing of nnU-Net's ``get_pool_and_conv_props``, for a fixed number of
        stages.
    """
    if encoder.family != RESENC:
        return encoder
    current = list(spacing_mm)
    strides, kernels, kernel = [[1, 1, 1]], [], [1, 1, 1]
    for stage in range(int(encoder.arguments["n_stages"])):
        kernel = [
            3 if size == 3 or like else 1
            for size, like in zip(kernel, _are_like(current), strict=True)
        ]
        kernels.append(kernel)
        if stage + 1 < int(encoder.arguments["n_stages"]):
            strides.append([2 if like else 1 for like in _are_like(current)])
            current = [size * stride for size, stride in zip(current, strides[-1], strict=True)]
    arguments = {**encoder.arguments, "strides": strides, "kernel_sizes": kernels}
    return replace(
        encoder, arguments=arguments, token_size=token_size_of(encoder.class_path, arguments)
    )


def _are_like(spacing_mm: Sequence[float]) -> list[bool]:
    return [size / min(spacing_mm) < LIKE for size in spacing_mm]
