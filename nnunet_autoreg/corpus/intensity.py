"""Intensities: recognise Hounsfield units, find the body, and compute the window of the pool."""

import numpy as np
import numpy.typing as npt

from nnunet_autoreg.nnunet_api import Array
from nnunet_autoreg.plan import IntensityWindow
from nnunet_autoreg.rng import generator

BODY_HU = -300.0
MAX_MASK_SIDE = 256
PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)
AIR_SHARE = 0.1
MAX_VALUES = 100_000
NOT_MR = ("PET", "PT", "SPECT", "NM", "US", "XA", "CBCT", "DX", "CR", "OCT")


def modality_of(channel: str, array_ZYX: Array) -> tuple[str, str]:
    """Return (modality, rule used) of a scan.

    It comes from its dataset's channel name or, if there is none, from its values.
    """
    name = channel.strip().upper()
    if not name:
        if looks_like_hounsfield(array_ZYX):
            return "CT", "values look like Hounsfield units"
        return "MR", "values do not look like Hounsfield units"
    if name == "CT" and float(array_ZYX.min()) >= 0:
        return name, "dataset.json, though no value is negative: are these Hounsfield units?"
    if name == "CT" or name in NOT_MR:
        return name, "dataset.json"
    return "MR", f"dataset.json: channel '{channel}' is not CT"


def looks_like_hounsfield(array_ZYX: Array) -> bool:
    """Return whether values look like Hounsfield units.

    Air is well below -500, soft tissue around 0. Almost no voxel is below air, unlike in signed
    phase images; a constant padding value is allowed.
    """
    # At most about 64 slices, and a quarter of their voxels: shares need no more.
    step = max(1, array_ZYX.shape[0] // 64)
    values = array_ZYX[::step, ::2, ::2]
    low = float(values.min())
    if low > -500 or float(values.max()) > 40000:
        return False

    air = (values <= -500).mean()
    soft = ((values >= -200) & (values <= 300)).mean()
    below_air = ((values < -1100) & (values != low)).mean()
    return bool(air >= 0.001 and soft >= 0.05 and below_air <= 0.02)


def body_mask(array_ZYX: Array) -> npt.NDArray[np.bool_]:
    """Return a mask of the body in a CT scan.

    It is the largest connected part above -300 HU, filled within each axial slice.

    Filling brings lungs and bowel gas back in, which lie below -300 HU but inside the body.
    """
    from scipy import ndimage

    parts, count = ndimage.label(array_ZYX > BODY_HU)
    if count == 0:
        return np.zeros(array_ZYX.shape, dtype=bool)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0  # the background is not part
    body = parts == sizes.argmax()

    # In 3D a lung would stay open through the trachea.
    for z in range(body.shape[0]):
        body[z] = ndimage.binary_fill_holes(body[z])
    return np.asarray(body, dtype=bool)


def tissue_mask(array_ZYX: Array) -> npt.NDArray[np.bool_]:
    """Return a mask of the body in a scan without Hounsfield units.

    It contains voxels above 10 % of the range from the 2nd to the 98th percentile.

    The most frequent lowest value (skull-stripping, padding) counts as air before the percentiles
    are taken. A crop without air loses its darkest voxels only.

    Source: the threshold with which BET starts (Smith 2002, Human Brain Mapping 17:143).
    """
    inside = np.asarray(array_ZYX != array_ZYX.min(), dtype=bool)
    if not inside.any():
        return inside
    low, high = np.percentile(array_ZYX[inside], (2.0, 98.0))
    threshold = low + AIR_SHARE * (high - low)
    return np.asarray(inside & (array_ZYX > threshold), dtype=bool)


def body_percentiles(array_ZYX: Array, modality: str) -> tuple[float, ...]:
    """Return the ``PERCENTILES`` of a scan's intensities inside the body, not in air.

    They are empty if no body is found.

    Volumes wider than 256 voxels are thinned first.
    """
    thinned = _thinned(array_ZYX)
    mask = body_mask(thinned) if modality == "CT" else tissue_mask(thinned)
    inside = thinned[mask]
    if not inside.size:
        return ()
    # Every n-th value, where n is rounded up.
    step = -(-inside.size // MAX_VALUES)
    inside = inside[::step]
    return tuple(float(v) for v in np.percentile(inside, PERCENTILES))


def _thinned(array_ZYX: Array) -> Array:
    """Return every n-th voxel along axes that are longer than ``MAX_MASK_SIDE``."""
    z, y, x = (-(-side // MAX_MASK_SIDE) for side in array_ZYX.shape)
    return array_ZYX[::z, ::y, ::x]


def sample_body(array_ZYX: Array, num: int, content_hash: str) -> Array:
    """Draw ``num`` Hounsfield values inside the body.

    They are drawn with replacement, so that every scan has the same weight.

    Volumes wider than 256 voxels are thinned first; the draw depends only on the content. Empty
    without a body.
    """
    thinned = _thinned(array_ZYX)
    inside = thinned[body_mask(thinned)]
    if not inside.size:
        return np.zeros(0, dtype=np.float32)
    # Seeded by the content: neither the name nor the order of the scans changes the draw.
    rng = generator(0, "ct_window", int(content_hash[:16], 16))
    return rng.choice(inside, num, replace=True).astype(np.float32)


def window_of(samples_hu: Array) -> IntensityWindow | None:
    """Return nnU-Net's foreground statistics of pooled samples; None without samples."""
    if not samples_hu.size:
        return None
    values = samples_hu.astype(np.float64)
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    return IntensityWindow(
        mean=float(values.mean()),
        std=float(values.std()),
        median=float(median),
        min=float(values.min()),
        max=float(values.max()),
        percentile_00_5=float(low),
        percentile_99_5=float(high),
    )
