"""The normalisation that imported encoders saw, as nnU-Net's plans express it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization

from nnunet_autoreg.model.card import EncoderCard

PERCENTILE_SCHEME = "AutoregPercentileNormalization"


class AutoregPercentileNormalization(ImageNormalization):  # type: ignore[misc]
    """An image's 1st percentile to 0, its 99.9th to 1, clipped to [0, 1]. nnU-Net finds it by name
    through the start-up bridge.

    Source: AR-SSL4M's pretraining, which takes the percentiles of every crop of 128^3 voxels after
        resizing; here they are those
    of the whole scan before resampling, because nnU-Net normalises before it cuts patches.
    """

    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true = False
    low, high = 1.0, 99.9

    def run(self, image: npt.NDArray[Any], seg: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The normalised image; a constant one becomes 0. ``seg`` is not looked at."""
        image = image.astype(self.target_dtype, copy=False)
        low, high = (float(v) for v in np.percentile(image, (self.low, self.high)))
        image -= low
        image /= max(high - low, 1e-8)
        return np.clip(image, 0.0, 1.0, out=image)


def as_pretrained(
    schemes: Sequence[str], use_mask: Sequence[bool], card: EncoderCard | None
) -> tuple[list[str], list[bool]]:
    """nnU-Net's choice of normalisation per channel, or for every channel that of the weights,
    where they name one.

    nnU-Net's mask follows its z-score only: percentiles are those of the whole scan.
    """
    if card is None or card.normalization is None:
        return list(schemes), list(use_mask)
    masked = [bool(m) and card.normalization == "ZScoreNormalization" for m in use_mask]
    return [card.normalization] * len(schemes), masked
