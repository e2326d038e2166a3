"""Load pretrained encoders in Python programs: ``from nnunet_autoreg import load_encoder``."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nnunet_autoreg.corpus.fingerprint import transpose_axes
from nnunet_autoreg.corpus.intensity import looks_like_hounsfield
from nnunet_autoreg.corpus.read import cropped_shape
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.finetune import load
from nnunet_autoreg.finetune.block import check_arguments, check_class
from nnunet_autoreg.finetune.normalization import (
    PERCENTILE_SCHEME,
    AutoregPercentileNormalization,
)
from nnunet_autoreg.finetune.resolve import is_ct, locate
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing, spacing_ratio, volume
from nnunet_autoreg.model.card import CARD_NAME, EncoderCard, read_card, verify_weights
from nnunet_autoreg.model.encoders import build_network
from nnunet_autoreg.model.feature_maps import FeatureEncoder
from nnunet_autoreg.nnunet_api import CT_SCHEME, MR_SCHEME, crop_resample_normalise

EXPECTED_SHARE = 0.95
"""Share of the encoder's parameters that must come from the weights file."""
RESULTS_VARIABLE = "nnUNet_results"
MASK_BELOW = 0.75
"""As in nnU-Net, only non-zero voxels are normalised if the box around them is smaller than this
share of the image.
"""


class PretrainedEncoder(FeatureEncoder):
    """A pretrained encoder; calling it returns feature maps, the finest first.

    It is an ordinary ``torch.nn.Module`` in evaluation mode, without a decoder. Its parameters may
    be trained.

    Attributes:
        card: description of the encoder and its pretraining (``encoder.json``).
        num_channels: number of channels of the images.
    """

    def __init__(self, network: nn.Module, card: EncoderCard, input_shape: Size, num_channels: int):
        super().__init__(network, card.class_path, card.arguments, input_shape)
        self.card = card
        self.num_channels = num_channels

    def preprocess(self, image_CZYX: NDArray[np.floating], spacing_mm: Sequence[float]) -> Tensor:
        """Return a scan preprocessed as in pretraining, (C, Z, Y, X) in float32.

        It is cropped to its non-zero part, normalised, and resampled to the spacing of
        pretraining. The coarsest axis comes first if it is clearly coarser than the others.

        Args:
            image_CZYX: intensities as stored in the file; Hounsfield units for CT.
            spacing_mm: (z, y, x).

        Raises:
            PlanError: the scan vanishes at the spacing of pretraining.
        """
        axes = transpose_axes(spacing_mm)
        source_mm = as_spacing([spacing_mm[axis] for axis in axes])
        turned = np.asarray(image_CZYX, dtype=np.float32).transpose(0, *(a + 1 for a in axes))

        shows_ct = False
        if self.card.ct_window is not None:
            only_ct = all(is_ct(modality) for modality in self.card.modalities)
            shows_ct = only_ct or looks_like_hounsfield(turned[0])

        use_mask = False
        if not shows_ct:
            # Small enough for nnU-Net to use its mask of non-zero voxels.
            nonzero_vox = volume(cropped_shape(turned.any(axis=0)))
            use_mask = 0 < nonzero_vox < MASK_BELOW * volume(turned.shape[1:])

        normaliser = None
        if self.card.normalization == PERCENTILE_SCHEME:
            normaliser = AutoregPercentileNormalization(use_mask_for_norm=False)
        prepared = crop_resample_normalise(
            turned,
            source_mm,
            self.target_spacing_mm(source_mm, shows_ct),
            CT_SCHEME if shows_ct else MR_SCHEME,
            use_mask=use_mask,
            ct_window=self.card.ct_window if shows_ct else None,
            normaliser=normaliser,
        )
        return torch.from_numpy(prepared)

    def target_spacing_mm(self, source_mm: Sequence[float], shows_ct: bool) -> Spacing:
        """Return the spacing of pretraining that is nearest to that of a scan, (z, y, x).

        Args:
            source_mm: spacing (z, y, x) of the scan.
            shows_ct: whether it is a CT scan; only spacings of such scans are compared.
        """
        candidates = []
        for group in self.card.spacing_groups:
            if is_ct(group.modality) == shows_ct:
                candidates.append(group.spacing_mm)

        def distance(spacing: Spacing) -> float:
            return spacing_ratio(spacing, source_mm)

        return min(candidates or [self.card.spacing_mm], key=distance)


def load_encoder(
    weights: str | Path,
    input_shape: Sequence[int] | None = None,
    channel_names: Sequence[str] | None = None,
) -> PretrainedEncoder:
    """Return a pretrained encoder as a ``torch.nn.Module`` in evaluation mode, on the CPU.

    Args:
        weights: the name of a finished run in ``$nnUNet_results``, the folder of a run, or a
            ``.safetensors`` file with its ``encoder.json`` beside it.
        input_shape: (z, y, x) voxels of the images, which a transformer has to know. It must be a
            multiple of the token size. The default is the crop size of pretraining. A CNN reads
            images of any size.
        channel_names: channel names of the images, if they differ from those of pretraining.

    Raises:
        WeightsError: there is no such run or file, or it is damaged.
        UsageError: the shape is not a multiple of the token size.
    """
    # Without the variable, only folders and files can be given.
    results = Path(os.environ.get(RESULTS_VARIABLE, ""))
    file = locate(results, str(weights), given_as="weights ")
    card = read_card(file.parent)
    verify_weights(file, card.sha256)
    # A card may come from anyone, so only known classes and layers are imported.
    check_class(card.class_path, CARD_NAME)
    check_arguments(card.arguments, CARD_NAME)

    token = card.token_size_vox
    wanted = tuple(card.crop_size_vox if input_shape is None else input_shape)
    fits = [n > 0 and n % step == 0 for n, step in zip(wanted, token, strict=False)]
    if len(wanted) != len(token) or not all(fits):
        raise UsageError(
            f"input_shape={wanted} is not a multiple of the token size {token} of '{card.name}'; "
            "give three positive numbers of voxels (z, y, x)",
            code="encoder-input-shape",
        )
    shape = as_size(wanted)
    names = tuple(channel_names or ())
    num_channels = len(names) or card.num_input_channels

    # The network begins with random weights, which must not advance the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        network = build_network(card.class_path, card.arguments, shape, num_channels, num_classes=1)
    target = load.Target(num_channels, shape, names)
    load.load_encoder(network, file, card, target, EXPECTED_SHARE, with_decoder=False)
    return PretrainedEncoder(network, card, shape, num_channels).eval()
