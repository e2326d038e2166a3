"""Generate CT-like scans with a few organs for ``autoreg_demo``.

No patient data and no download is needed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg import rng
from nnunet_autoreg.geometry import Size, Spacing

LABELS = {"background": 0, "liver": 1, "kidneys": 2, "spine": 3}
SHAPE_VOX: Size = (32, 48, 56)
SPACING_MM: Spacing = (5.0, 5.0, 5.0)
AIR_HU, FAT_HU, TISSUE_HU, NOISE_HU = -1000.0, -100.0, 40.0, 60.0
WARP_VOX, WARP_SMOOTHNESS_VOX = 1.2, 6.0


@dataclass(frozen=True)
class Organ:
    """Hold an ellipsoid.

    Attributes:
        centre, radius: (z, y, x), in units of the half axes of the body.
        intensity_hu: mean intensity.
        label: 0 for an organ without a label.
    """

    centre: tuple[float, float, float]
    radius: tuple[float, float, float]
    intensity_hu: float
    label: int


ORGANS = (
    Organ((0.0, 0.1, 0.0), (9.0, 0.8, 0.85), TISSUE_HU, 0),
    Organ((-0.2, -0.1, -0.4), (0.6, 0.45, 0.38), 110.0, 1),
    Organ((-0.1, 0.0, 0.55), (0.4, 0.28, 0.2), 90.0, 0),
    Organ((0.2, 0.4, -0.42), (0.4, 0.2, 0.15), 190.0, 2),
    Organ((0.15, 0.4, 0.42), (0.4, 0.2, 0.15), 190.0, 2),
    Organ((0.3, -0.35, 0.2), (0.35, 0.2, 0.3), -20.0, 0),
    Organ((0.0, 0.6, 0.0), (9.0, 0.17, 0.14), 300.0, 3),
)


def draw_phantom(seed: int, number: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Return the intensities in HU and the label map of scan ``number``, both (Z, Y, X).

    The size of the body, and the position, size and intensity of every organ vary. Borders are
    deformed by a smooth random field. Noise is added and slightly smoothed, as in a real scanner.
    There is so much of it that a single voxel does not show to which organ it belongs.
    """
    from scipy.ndimage import gaussian_filter

    # Every scan has its own generator, so that each can be drawn without the others.
    g = rng.generator(seed, "phantom", number)
    scale_y, scale_x = g.uniform(0.75, 0.9), g.uniform(0.8, 0.95)
    scale = np.array([1.0, scale_y, scale_x])
    half_vox = np.array(SHAPE_VOX) / 2 * scale

    # Coordinates of every voxel in units of the body's half axes, deformed; each (Z, Y, X).
    from_middle = [np.arange(n) - (n - 1) / 2 for n in SHAPE_VOX]
    axes = np.meshgrid(*from_middle, indexing="ij")
    fields = [gaussian_filter(g.standard_normal(SHAPE_VOX), WARP_SMOOTHNESS_VOX) for _ in axes]
    coordinates = []
    for axis, field, half in zip(axes, fields, half_vox, strict=True):
        warp = WARP_VOX * field / field.std()
        coordinates.append((axis + warp) / half)
    _, y, x = coordinates

    scan = np.where(y**2 + x**2 < 1, FAT_HU, AIR_HU)
    truth = np.zeros(SHAPE_VOX, np.uint8)
    # Later organs cover earlier ones.
    for organ in ORGANS:
        centres = np.array(organ.centre) + g.normal(0, 0.05, 3)
        radii = np.array(organ.radius) * g.uniform(0.8, 1.2, 3)
        parts = zip(coordinates, centres, radii, strict=True)
        distances = [((position - centre) / radius) ** 2 for position, centre, radius in parts]
        inside = sum(distances) < 1
        scan[inside] = organ.intensity_hu + g.normal(0, 8)
        truth[inside] = organ.label

    # Smoothing lowers the spread, so that it is set afterwards.
    noise = gaussian_filter(g.standard_normal(SHAPE_VOX), 0.6)
    scan = np.clip(scan + NOISE_HU * noise / noise.std(), -1024, 3000)
    return scan.astype(np.int16), truth


def write_image(path: Path, array_ZYX: NDArray[np.int16] | NDArray[np.uint8]) -> None:
    """Write (Z, Y, X) voxels as NIfTI with the spacing of the phantom."""
    import SimpleITK

    image: Any = SimpleITK.GetImageFromArray(array_ZYX)
    # SimpleITK counts axes as (x, y, z).
    image.SetSpacing(SPACING_MM[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))
