"""Pseudo-segments: a class for every voxel, which a network can learn to predict without labels.

Local features of the clean crop are computed for every voxel and compared with K centres; the
nearest centre is the voxel's class. The centres are found once, by k-means over voxels of the pool.
The features are smooth over a few voxels, so that the classes form regions and not noise.

Source: the idea of pretraining with segments that need no labels is that of MASS (arXiv
2603.13660), which takes supervoxels. Clusters of local features are used here, because they mean
the same in all scans. K-means++: Arthur and Vassilvitskii, 2007.

Shape suffixes: B samples, M members, N = B * M crops, C channels, Z Y X voxels, F features, K
segments, P points.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.geometry import Spacing
from nnunet_autoreg.objectives.targets import full_precision

SCALES = (1.0, 2.0, 4.0)
"""Standard deviations of the Gaussians, in voxels of the finest axis."""
NUM_FEATURES = 5
KERNEL_RADIUS = 3.0
"""Where a Gaussian is cut off, in standard deviations."""
MOST_ITERATIONS = 50
"""Of k-means. It has settled long before on some ten thousand points."""


class SegmentMap(nn.Module):
    """Gives every voxel the class of the nearest centre in the space of standardised features.

    Centres and standardisation are buffers: checkpoints hold them, and all processes share them.
    Until ``measured`` values are loaded, every voxel has class 0.

    Args:
        num_segments: K.
        spacing_mm: (z, y, x). Gaussians are equally wide in millimetres along all axes.
    """

    centres: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, num_segments: int, spacing_mm: Spacing):
        super().__init__()
        finest = min(spacing_mm)
        self.steps = tuple(spacing / finest for spacing in spacing_mm)
        self.register_buffer("centres", torch.zeros(num_segments, NUM_FEATURES))
        self.register_buffer("mean", torch.zeros(NUM_FEATURES))
        self.register_buffer("deviation", torch.ones(NUM_FEATURES))

    @torch.no_grad()
    def forward(self, voxels_BMCZYX: Tensor, valid_mask_BMZYX: Tensor) -> Tensor:
        """Return every voxel's class, (B, M, Z, Y, X) int64; padding has an arbitrary one."""
        B, M, _, Z, Y, X = voxels_BMCZYX.shape
        features_NFZYX = self.features(voxels_BMCZYX, valid_mask_BMZYX)

        with full_precision(voxels_BMCZYX.device):
            shift = self.mean[:, None, None, None]
            scale = self.deviation[:, None, None, None]
            standard_NFZYX = (features_NFZYX - shift) / scale
            # |f - c|^2 is least where f . c - |c|^2 / 2 is greatest.
            closeness_NKZYX = torch.einsum("nfzyx,kf->nkzyx", standard_NFZYX, self.centres)
            half_norm_K = self.centres.square().sum(dim=1) / 2
            closeness_NKZYX = closeness_NKZYX - half_norm_K[:, None, None, None]
            classes_NZYX = closeness_NKZYX.argmax(dim=1)
        return classes_NZYX.reshape(B, M, Z, Y, X)

    @torch.no_grad()
    def features(self, voxels_BMCZYX: Tensor, valid_mask_BMZYX: Tensor) -> Tensor:
        """Return the local features of every voxel, (N, F, Z, Y, X), float32.

        They are the smoothed intensity, its differences from wider surroundings at two scales, the
        local deviation, and the gradient's magnitude. Padding counts for nothing.
        """
        voxels_N1ZYX = voxels_BMCZYX[:, :, :1].flatten(0, 1).float()
        real_N1ZYX = valid_mask_BMZYX.flatten(0, 1)[:, None].float()

        with full_precision(voxels_N1ZYX.device):
            fine, middle, coarse = (
                self._smoothed(voxels_N1ZYX, real_N1ZYX, scale) for scale in SCALES
            )
            mean_square = self._smoothed(voxels_N1ZYX.square(), real_N1ZYX, SCALES[1])
            deviation = (mean_square - middle.square()).clamp(min=0).sqrt()

            slopes = torch.gradient(fine, dim=(2, 3, 4))
            squares = [
                (slope / step).square() for slope, step in zip(slopes, self.steps, strict=True)
            ]
            gradient = (squares[0] + squares[1] + squares[2]).sqrt()
            return torch.cat([fine, fine - middle, middle - coarse, deviation, gradient], dim=1)

    def _smoothed(self, values_N1ZYX: Tensor, real_N1ZYX: Tensor, scale: float) -> Tensor:
        """Return Gaussian means over real voxels."""
        sums = self._blurred(values_N1ZYX * real_N1ZYX, scale)
        weights = self._blurred(real_N1ZYX, scale)
        # Far from every real voxel both are 0.
        return sums / weights.clamp(min=1e-6)

    def _blurred(self, values_N1ZYX: Tensor, scale: float) -> Tensor:
        """Return sums under a Gaussian, axis by axis, with zeros around the crop."""
        for axis, step in enumerate(self.steps):
            sigma = scale / step
            radius = max(1, round(KERNEL_RADIUS * sigma))
            offsets = torch.arange(-radius, radius + 1.0, device=values_N1ZYX.device)
            kernel = torch.exp(-offsets.square() / (2 * sigma**2))
            kernel = kernel / kernel.sum()

            shape, padding = [1, 1, 1, 1, 1], [0, 0, 0]
            shape[2 + axis], padding[axis] = len(kernel), radius
            values_N1ZYX = functional.conv3d(values_N1ZYX, kernel.view(shape), padding=padding)
        return values_N1ZYX


def measured(
    features_PF: NDArray[np.float64],
    num_segments: int,
    generator: np.random.Generator,
) -> dict[str, Tensor]:
    """Return the buffers of a ``SegmentMap`` by name, from the features of some voxels.

    Raises:
        AutoregError: fewer different points than segments.
    """
    # Loading SciPy's clusters takes long, and most runs have no segments.
    from scipy.cluster.vq import kmeans2

    too_few = (
        f"objective.num_segments={num_segments}: the {len(features_PF)} voxels that were drawn "
        "from the scans are not different enough for so many clusters; set fewer, or 0 for none"
    )
    if len(features_PF) < num_segments:
        raise AutoregError(too_few, code="segments-too-few-voxels")

    mean_F = features_PF.mean(axis=0)
    deviation_F = features_PF.std(axis=0)
    # A feature that is the same everywhere, such as the gradient of flat images, stays 0.
    deviation_F[deviation_F == 0] = 1.0
    standard_PF = (features_PF - mean_F) / deviation_F

    # K-means++: each further start is drawn with a probability that grows with its squared
    # distance from the starts before.
    starts = [standard_PF[generator.integers(len(standard_PF))]]
    distance_P = np.full(len(standard_PF), np.inf)
    while len(starts) < num_segments:
        to_last_P = np.square(standard_PF - starts[-1]).sum(axis=1)
        distance_P = np.minimum(distance_P, to_last_P)
        if not distance_P.max() > 0:
            raise AutoregError(too_few, code="segments-too-few-voxels")
        chosen = generator.choice(len(standard_PF), p=distance_P / distance_P.sum())
        starts.append(standard_PF[chosen])

    centres_KF, _ = kmeans2(standard_PF, np.stack(starts), iter=MOST_ITERATIONS, minit="matrix")
    values = {"centres": centres_KF, "mean": mean_F, "deviation": deviation_F}
    return {name: torch.from_numpy(value).float() for name, value in values.items()}
