"""Corruption of the network's input by another gamma, another contrast, and noise.

The target of the prediction stays clean. Every statistic that a corruption needs is computed from
known voxels only, so that the corrupted input contains nothing about unknown ones.

Shape suffixes: B samples, M members, C channels; Z, Y, X voxels.

Source: the ranges are those of nnU-Net's gamma, contrast and noise augmentation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

GAMMA, CONTRAST, MAX_NOISE = (0.7, 1.5), (0.75, 1.25), 0.3
LEAST_DEVIATION = 1e-3
"""Known voxels that vary less than this, in normalised intensities, have no contrast to change."""
REDUCED = (-3, -2, -1)
"""The axes Z, Y, X: every channel of every member is measured by itself."""


@dataclass(frozen=True)
class Corruption:
    """The corruption of one sample.

    Attributes:
        gamma: exponent of intensities that are scaled to 0..1.
        contrast: factor on the distance from the mean.
        noise: standard deviation of what is added, in standard deviations of the known voxels.
        seed: random seed of the noise.
    """

    gamma: float = 1.0
    contrast: float = 1.0
    noise: float = 0.0
    seed: int = 0


CLEAN = Corruption()
"""Changes no bit of a sample."""


def draw_corruption(share: float, generator: np.random.Generator) -> Corruption:
    """Draw a corruption for a ``share`` of the samples, ``CLEAN`` for the others."""
    log_smallest, log_largest = (math.log(gamma) for gamma in GAMMA)

    # All numbers are drawn in every case, so that later draws do not depend on the first.
    is_clean = generator.random() >= share
    log_gamma = generator.uniform(log_smallest, log_largest)
    contrast = float(generator.uniform(*CONTRAST))
    noise = float(generator.uniform(0, MAX_NOISE))
    seed = int(generator.integers(2**63 - 1))

    if is_clean:
        return CLEAN
    return Corruption(math.exp(log_gamma), contrast, noise, seed)


@dataclass(frozen=True)
class Corruptions:
    """The corruptions of a batch.

    They are tensors, so that a compiled loss need not be compiled again for each value.

    Attributes:
        strength: (B, 3) float32, columns gamma, contrast and noise.
        seeds: seeds of the noise, known to the host; () once the noise is drawn.
        noise: (B, M, C, Z, Y, X), of mean 0 and deviation 1; None until ``with_noise`` draws it.
    """

    strength: Tensor
    seeds: tuple[int, ...] = ()
    noise: Tensor | None = None

    def __getitem__(self, part: slice) -> "Corruptions":
        """Return the corruptions of a part of the batch."""
        noise = None if self.noise is None else self.noise[part]
        return Corruptions(self.strength[part], self.seeds[part], noise)

    def pin_memory(self) -> "Corruptions":
        """Return the same in page-locked memory."""
        return replace(self, strength=self.strength.pin_memory())

    def with_noise(self, like_BMCZYX: Tensor) -> "Corruptions":
        """Return the same on the device of ``like_BMCZYX``, with every sample's noise drawn."""
        device = like_BMCZYX.device
        strength = self.strength.to(device, non_blocking=True)
        if not self.seeds:
            return replace(self, strength=strength)

        # Every sample has its own seed: its noise does not depend on the others of the batch.
        noise = torch.zeros_like(like_BMCZYX)
        for sample_MCZYX, seed in zip(noise, self.seeds, strict=True):
            generator = torch.Generator(device).manual_seed(seed)
            sample_MCZYX.normal_(generator=generator)
        return Corruptions(strength, (), noise)


def stacked(drawn: Sequence[Corruption]) -> Corruptions:
    """Return the corruptions of a batch."""
    strengths = [(one.gamma, one.contrast, one.noise) for one in drawn]
    strength = torch.tensor(strengths, dtype=torch.float32)  # (B, 3)
    seeds = tuple(one.seed for one in drawn)
    return Corruptions(strength, seeds)


def corrupted(
    voxels_BMCZYX: Tensor,
    known_BMZYX: Tensor,
    corruptions: Corruptions | None,
) -> Tensor:
    """Return the voxels with the known ones corrupted.

    Unknown voxels, and samples that stay clean, keep every bit. Gamma acts between the smallest and
    the largest known intensity and keeps mean and deviation. Contrast stays within that range, as
    nnU-Net's does. A member without known voxels, or with flat ones, keeps its intensities.

    Args:
        known_BMZYX: bool, what the network is shown and what is real.
        corruptions: corruptions of the batch, with their noise; None changes nothing.
    """
    if corruptions is None:
        return voxels_BMCZYX
    assert corruptions.noise is not None, "Batch.to draws the noise"

    known_BMCZYX = known_BMZYX[:, :, None].expand_as(voxels_BMCZYX)
    strength = corruptions.strength[:, :, None, None, None, None, None]  # (B, 3, 1, 1, 1, 1, 1)
    gamma, contrast, noise = strength.unbind(dim=1)  # (B, 1, 1, 1, 1, 1) each

    # Bounds of the known voxels. If there are none, the deviation is 0 and nothing is changed.
    # All statistics are (B, M, C, 1, 1, 1).
    mean, deviation = _statistics(voxels_BMCZYX, known_BMCZYX)
    lowest = torch.where(known_BMCZYX, voxels_BMCZYX, math.inf).amin(REDUCED, keepdim=True)
    highest = torch.where(known_BMCZYX, voxels_BMCZYX, -math.inf).amax(REDUCED, keepdim=True)
    can_change = deviation > LEAST_DEVIATION
    lowest = torch.where(can_change, lowest, 0.0)
    highest = torch.where(can_change, highest, 1.0)

    # Gamma. Unknown voxels may lie outside the bounds. They are not used, but a power of a negative
    # number is not a number.
    scaled_BMCZYX = ((voxels_BMCZYX - lowest) / (highest - lowest)).clamp(0, 1)
    bent_BMCZYX = scaled_BMCZYX**gamma
    bent_mean, bent_deviation = _statistics(bent_BMCZYX, known_BMCZYX)
    standardised_BMCZYX = (bent_BMCZYX - bent_mean) / bent_deviation.clamp(min=1e-6)
    restored_BMCZYX = standardised_BMCZYX * deviation + mean

    # Contrast and noise.
    stretched_BMCZYX = (restored_BMCZYX - mean) * contrast + mean
    within_bounds_BMCZYX = stretched_BMCZYX.clamp(lowest, highest)
    noisy_BMCZYX = within_bounds_BMCZYX + noise * deviation * corruptions.noise

    is_clean = (gamma == 1) & (contrast == 1) & (noise == 0)
    is_changed_BMCZYX = known_BMCZYX & can_change & ~is_clean
    return torch.where(is_changed_BMCZYX, noisy_BMCZYX, voxels_BMCZYX)


def _statistics(values_BMCZYX: Tensor, known_BMCZYX: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the known voxels, each (B, M, C, 1, 1, 1).

    Both are 0 if there are no known voxels.
    """
    count = known_BMCZYX.sum(REDUCED, keepdim=True).clamp(min=1)
    known_values = torch.where(known_BMCZYX, values_BMCZYX, 0.0)
    mean = known_values.sum(REDUCED, keepdim=True) / count

    distances = torch.where(known_BMCZYX, values_BMCZYX - mean, 0.0)
    variance = distances.square().sum(REDUCED, keepdim=True) / count
    return mean, variance.sqrt()
