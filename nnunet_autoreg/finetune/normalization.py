"""Normalise images as in the pretraining of imported encoders, through nnU-Net's plans."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization

from nnunet_autoreg.model.card import EncoderCard

PERCENTILE_SCHEME = "AutoregPercentileNormalization"


class AutoregPercentileNormalization(ImageNormalization):  # type: ignore[misc]
    """Scale an image from its 1st and 99.9th percentile to 0 and 1, and clip it to [0, 1].

    nnU-Net finds the class by name through the start-up bridge.

    Source: AR-SSL4M's pretraining, which uses the percentiles of every crop of 128^3 voxels after
    resizing. Here they are those of the whole scan before resampling, because nnU-Net normalises
    before it cuts patches.
    """

    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true = False
    low, high = 1.0, 99.9

    def run(self, image: npt.NDArray[Any], seg: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Return the normalised image; a constant one becomes 0. ``seg`` is not used."""
        image = image.astype(self.target_dtype, copy=False)
        low, high = np.percentile(image, (self.low, self.high)).tolist()
        image -= low
        image /= max(high - low, 1e-8)  # a constant image has no range
        return np.clip(image, 0.0, 1.0, out=image)


def as_pretrained(
    schemes: Sequence[str],
    use_mask: Sequence[bool],
    card: EncoderCard | None,
) -> tuple[list[str], list[bool]]:
    """Return nnU-Net's normalisation per channel, or that of the weights if they name one.

    nnU-Net's mask is only used with its z-score: percentiles are those of the whole scan.
    """
    if card is None or card.normalization is None:
        return list(schemes), list(use_mask)
    can_mask = card.normalization == "ZScoreNormalization"
    masked = [bool(is_masked) and can_mask for is_masked in use_mask]
    return [card.normalization] * len(schemes), masked
