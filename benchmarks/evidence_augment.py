"""Patches for fine-tuning, cut and augmented on the device in the way of nnU-Net.

Everything random is drawn first and applied afterwards.

Source: ranges and probabilities of nnU-Net's ``nnUNetTrainer.get_training_transforms``, without
blur and simulated low resolution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from evidence_data import DeviceScan
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from nnunet_autoreg import rng
from nnunet_autoreg.geometry import Size, Spacing

ANISOTROPIC = 3.0
"""If one spacing is over this many times another, rotation and zoom are done in the plane only."""
FOREGROUND_SHARE = 0.33
"""Share of the patches of a batch that must hold foreground."""
MOST_LOCATIONS = 10_000
SMALLEST_RANGE = 1e-5


@dataclass(frozen=True)
class Intensity:
    """Changes of the intensities of a patch; None is left out.

    Attributes:
        noise: standard deviation of Gaussian noise and the seed of its generator.
        gain: factor of the intensities.
        contrast: factor of the deviations from the mean; the range of values stays.
        inverted_gamma, gamma: exponents over the range of values; mean and deviation stay.
    """

    noise: tuple[float, int] | None
    gain: float | None
    contrast: float | None
    inverted_gamma: float | None
    gamma: float | None


@dataclass(frozen=True)
class PatchDraw:
    """The random choices of one patch.

    Attributes:
        scan: its number in the list of labelled scans.
        centre_vox: (z, y, x) of the patch's middle in the scan.
        matrix: (3, 3), from an offset in the patch to an offset in the scan, both in voxels.
    """

    scan: int
    centre_vox: tuple[float, float, float]
    matrix: NDArray[np.float64]
    intensity: Intensity


class LabelledScans:
    """The labelled scans of a fine-tuning on the device, and the locations of their structures."""

    def __init__(self, scans: Sequence[DeviceScan], spacing_mm: Spacing):
        self.scans = list(scans)
        self.spacing_mm = spacing_mm

    @cached_property
    def locations(self) -> list[dict[int, NDArray[np.int64]]]:
        """Per scan and class up to 10,000 of its voxels (z, y, x), evenly spaced."""
        found = []
        for scan in self.scans:
            labels_ZYX = scan.labels[0, 0].cpu().numpy()
            of_class = {}
            for value in np.unique(labels_ZYX).tolist():
                if value > 0:
                    of_class[value] = _evenly(np.argwhere(labels_ZYX == value))
            found.append(of_class)
        return found

    @property
    def is_flat(self) -> bool:
        """Whether slices are so thick that patches are rotated in the plane only."""
        return max(self.spacing_mm) / min(self.spacing_mm) > ANISOTROPIC

    def draw(self, seed: int, step: int, number: int, batch: int, crop_vox: Size) -> PatchDraw:
        """Draw patch ``number`` of a step's batch; it depends only on (seed, step, number)."""
        generator = rng.generator(seed, "evidence: patch", step, number)
        scan = int(generator.integers(len(self.scans)))
        # As nnU-Net: the last third of the batch.
        wants_foreground = number >= round(batch * (1 - FOREGROUND_SHARE))
        centre = self._centre(generator, scan, crop_vox, wants_foreground)
        matrix = draw_matrix(generator, self.is_flat)
        return PatchDraw(scan, centre, matrix, draw_intensity(generator))

    def _centre(
        self,
        generator: np.random.Generator,
        scan: int,
        crop_vox: Size,
        wants_foreground: bool,
    ) -> tuple[float, float, float]:
        """Draw the middle of a patch: anywhere, or around a voxel of a structure."""
        shape = self.scans[scan].image.shape[2:]
        low = [min(0, (n - c) // 2) for n, c in zip(shape, crop_vox, strict=True)]
        high = [max(n - c, (n - c) // 2) for n, c in zip(shape, crop_vox, strict=True)]
        anywhere = [int(generator.integers(a, b + 1)) for a, b in zip(low, high, strict=True)]

        classes = self.locations[scan]
        start = anywhere
        if wants_foreground and classes:
            of_class = classes[int(generator.choice(sorted(classes)))]
            voxel = of_class[int(generator.integers(len(of_class)))]
            around = [int(v) - c // 2 for v, c in zip(voxel, crop_vox, strict=True)]
            start = [min(max(s, a), b) for s, a, b in zip(around, low, high, strict=True)]
        z, y, x = (s + (c - 1) / 2 for s, c in zip(start, crop_vox, strict=True))
        return (z, y, x)

    def batch(self, seed: int, step: int, batch: int, crop_vox: Size) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a step, both (B, 1, Z, Y, X) float32."""
        images, labels = [], []
        for number in range(batch):
            drawn = self.draw(seed, step, number, batch, crop_vox)
            image, label = cut(self.scans[drawn.scan], drawn, crop_vox)
            images.append(change(image, drawn.intensity))
            labels.append(label)
        return torch.cat(images), torch.cat(labels)


def _evenly(voxels: NDArray[np.int64]) -> NDArray[np.int64]:
    count = min(len(voxels), MOST_LOCATIONS)
    chosen = np.linspace(0, len(voxels) - 1, count).astype(np.int64)
    return np.asarray(voxels[chosen])


def draw_matrix(generator: np.random.Generator, is_flat: bool) -> NDArray[np.float64]:
    """Draw a rotation, a zoom and mirrored axes as one matrix over (z, y, x)."""
    limit = math.pi if is_flat else math.pi / 6
    turns, angles = generator.random() < 0.2, generator.uniform(-limit, limit, size=3)
    zooms, zoom = generator.random() < 0.2, generator.uniform(0.7, 1.4)
    mirrored = generator.random(3) < 0.5

    matrix = np.eye(3)
    if turns:
        for axis, angle in enumerate(angles[:1] if is_flat else angles):
            matrix = matrix @ _rotation(axis, float(angle))
    size = np.full(3, zoom if zooms else 1.0)
    if is_flat:
        size[0] = 1.0
    return np.asarray(matrix * size * np.where(mirrored, -1.0, 1.0))


def _rotation(axis: int, angle: float) -> NDArray[np.float64]:
    """Return the rotation about an axis of (z, y, x)."""
    first, second = (other for other in range(3) if other != axis)
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = math.cos(angle)
    matrix[first, second], matrix[second, first] = -math.sin(angle), math.sin(angle)
    return matrix


def draw_intensity(generator: np.random.Generator) -> Intensity:
    """Draw the changes of the intensities of a patch."""
    # Every number is drawn every time, so that one choice does not change the others.
    happens = generator.random(5)
    deviation = math.sqrt(generator.uniform(0, 0.1))
    noise_seed = int(generator.integers(2**31))
    gain, contrast = generator.uniform(0.75, 1.25, size=2)
    exponents = generator.uniform(0.7, 1.5, size=2)
    return Intensity(
        noise=(deviation, noise_seed) if happens[0] < 0.1 else None,
        gain=float(gain) if happens[1] < 0.15 else None,
        contrast=float(contrast) if happens[2] < 0.15 else None,
        inverted_gamma=float(exponents[0]) if happens[3] < 0.1 else None,
        gamma=float(exponents[1]) if happens[4] < 0.3 else None,
    )


def cut(scan: DeviceScan, drawn: PatchDraw, crop_vox: Size) -> tuple[Tensor, Tensor]:
    """Return a patch and its labels, both (1, 1, Z, Y, X) float32; 0 outside the scan."""
    shape = np.array(scan.image.shape[2:], dtype=np.float64)
    # From torch's coordinates of the patch, -1 to 1 over its extent, to those of the scan.
    theta = np.empty((3, 4))
    theta[:, :3] = drawn.matrix * np.array(crop_vox)[None, :] / shape[:, None]
    theta[:, 3] = (2 * np.array(drawn.centre_vox) + 1) / shape - 1
    # Torch has the axes as (x, y, z).
    theta[:, :3] = theta[::-1, 2::-1].copy()
    theta[:, 3] = theta[::-1, 3].copy()

    device = scan.image.device
    matrix = torch.from_numpy(theta).float()[None].to(device)
    grid = functional.affine_grid(matrix, [1, 1, *crop_vox], align_corners=False)
    image = functional.grid_sample(scan.image, grid, mode="bilinear", align_corners=False)
    labels = functional.grid_sample(scan.labels.float(), grid, mode="nearest", align_corners=False)
    return image, labels


def change(image: Tensor, drawn: Intensity) -> Tensor:
    """Return the image (1, 1, Z, Y, X) with the drawn changes of its intensities."""
    if drawn.noise is not None:
        deviation, seed = drawn.noise
        generator = torch.Generator(image.device).manual_seed(seed)
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        image = image + deviation * noise
    if drawn.gain is not None:
        image = image * drawn.gain
    if drawn.contrast is not None:
        mean, low, high = image.mean(), image.amin(), image.amax()
        image = ((image - mean) * drawn.contrast + mean).clamp(low, high)
    if drawn.inverted_gamma is not None:
        image = -_gamma(-image, drawn.inverted_gamma)
    if drawn.gamma is not None:
        image = _gamma(image, drawn.gamma)
    return image


def _gamma(image: Tensor, exponent: float) -> Tensor:
    """Return the image after a power of its values; mean and standard deviation stay."""
    mean, deviation = image.mean(), image.std()
    low = image.amin()
    extent = (image.amax() - low).clamp(min=SMALLEST_RANGE)
    power = ((image - low) / extent).clamp(min=0) ** exponent
    standardised = (power - power.mean()) / power.std().clamp(min=SMALLEST_RANGE)
    return standardised * deviation + mean
