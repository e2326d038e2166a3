"""The rules: numbers about the data and the hardware in, plan values with their reasons out. Pure, and torch-free."""

from collections.abc import Sequence

from nnunet_autoreg.geometry import Size, as_size, round_up, volume

START_VOX = 256**3


def plan_crop(median_shape_vox: Sequence[float], spacing_mm: Sequence[float], token_vox: Sequence[int], max_vox: int) -> Size:
    """The crop (pretraining) or patch (fine-tuning) that suits images of a median shape.

    As nnU-Net plans patches: start from a box that is isotropic in mm and larger than needed, clip it to the median shape,
    round up to whole tokens, then shrink the axis that is largest relative to the median shape until it fits.

    Args:
        median_shape_vox: median image size after resampling, (z, y, x).
        spacing_mm: target spacing, (z, y, x).
        token_vox: token size; every axis of the result is a multiple of it.
        max_vox: largest number of voxels allowed.
    """
    resolution = [1 / s for s in spacing_mm]
    scale = (START_VOX / (resolution[0] * resolution[1] * resolution[2])) ** (1 / 3)
    start = [max(1, min(round(r * scale), round(m))) for r, m in zip(resolution, median_shape_vox, strict=True)]
    crop = list(round_up(start, token_vox))
    while volume(crop) > max_vox:
        shrinkable = [i for i in range(3) if crop[i] > token_vox[i]]
        if not shrinkable:
            break
        largest = max(shrinkable, key=lambda i: crop[i] / median_shape_vox[i])
        crop[largest] -= token_vox[largest]
    return as_size(crop)
