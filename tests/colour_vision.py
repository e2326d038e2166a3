"""What people without green-sensitive cones (deuteranopia) see.

    python tests/colour_vision.py PICTURE.png SIMULATED.png

The matrix is that of Machado, Oliveira and Fernandes (IEEE TVCG 2009) for a complete deuteranopia.
It holds for linear red, green and blue.
"""

import sys

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DEUTERANOPIA = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
)
# IEC 61966-2-1 (sRGB), for the white of daylight (D65).
XYZ_OF_LINEAR = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ],
)
WHITE_D65 = np.array([0.95047, 1.0, 1.08883])


def rgb_of(colour: str) -> Floats:
    """Return red, green and blue from 0 to 1 of a colour such as "#0072b2"."""
    return np.array(list(bytes.fromhex(colour.removeprefix("#")))) / 255


def to_linear(srgb: Floats) -> Floats:
    """Return linear values of sRGB ones (..., 3)."""
    # The two pieces of the transfer function of sRGB.
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: Floats) -> Floats:
    """Return sRGB values of linear ones (..., 3)."""
    clipped = np.clip(linear, 0, 1)
    return np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)


def simulated(srgb: Floats) -> Floats:
    """Return sRGB values (..., 3) as people with deuteranopia see them."""
    return to_srgb(to_linear(srgb) @ DEUTERANOPIA.T)


def lab(srgb: Floats) -> Floats:
    """Return CIE L*, a*, b* of one colour."""
    ratios = XYZ_OF_LINEAR @ to_linear(srgb) / WHITE_D65
    # The two pieces of the function of CIE L*a*b* (1976).
    x, y, z = np.where(ratios > 0.008856, np.cbrt(ratios), 7.787 * ratios + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(first: str, second: str) -> float:
    """Return the CIE 1976 distance of two colours under deuteranopia; about 2 is just visible."""
    labs = [lab(simulated(rgb_of(colour))) for colour in (first, second)]
    return float(np.linalg.norm(labs[0] - labs[1]))


def main(source: str, target: str) -> None:
    """Write the simulated picture."""
    from matplotlib.image import imread, imsave

    imsave(target, simulated(imread(source)[..., :3].astype(np.float64)))


if __name__ == "__main__":
    main(*sys.argv[1:])
