"""Slices of validation scans as small pictures: the truth, trivial and actual prediction, error."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.geometry import Spacing, as_spacing
from nnunet_autoreg.report import palette

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nnunet_autoreg.objectives.base import Objective
    from nnunet_autoreg.sampling.flip_transpose import FlipTranspose
    from nnunet_autoreg.sampling.sample import Batch

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Bytes = NDArray[np.uint8]

NUM_SAMPLES = 4
BAR_MM = 10
PLANES = (("axial", "APRL"), ("coronal", "SIRL"), ("sagittal", "SIAP"))
"""Names of the planes across the axes z, y, x, and the directions at top, bottom, left and right.

Stored arrays run towards superior, anterior and right. They are shown as radiologists view scans,
from the opposite ends.
"""

NAMES_OF_AXES = "zyx"
LARGEST_ERROR = 0.5
"""Errors of this share of the truth's grey range, and larger ones, have the brightest colour."""

GIVEN_COLOUR = palette.bytes_of(palette.BLUE)
BORDER_COLOUR = palette.bytes_of(palette.GIVEN.colour)
BORDER_WIDTH = 2
PICTURE_WIDTH = 240
"""Pixels. Borders are drawn at the size of the page, where thick slices are many pixels high."""
TINT = 0.28
"""Share of the tint in the colour of the given part."""


@dataclass(frozen=True)
class Plane:
    """One plane of one sample. Every array is (H, W).

    Attributes:
        edges: letters of the directions at top, bottom, left and right; "" if unknown.
        aspect: height of a pixel divided by its width.
        width_mm: width of the picture.
        grey: the intensities that are drawn black and white.
    """

    name: str
    edges: str
    aspect: float
    width_mm: float
    truth: Floats
    trivial: Floats
    predicted: Floats
    given: Bools
    loss_mask: Bools
    valid_mask: Bools
    grey: tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """One validation sample.

    Attributes:
        num_given, num_blocks: number of given blocks, and of all blocks.
        planes: planes of the image of which most was predicted.
        images: three planes through the middle of each image, if the sequence has several.
    """

    num_given: int
    num_blocks: int
    planes: tuple[Plane, ...]
    images: tuple[tuple[Plane, ...], ...] = ()


@contextmanager
def evaluating(module: "nn.Module") -> Iterator[None]:
    """Put a module into evaluation mode without gradients; restore its mode afterwards."""
    import torch

    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def validation_pictures(
    objective: "Objective",
    batches: Sequence["Batch"],
    device: "torch.device",
    spacing_mm: Spacing,
    scan_axes: Sequence[int] | None = None,
) -> list[Picture]:
    """Return pictures of the first few validation samples under the objective's present weights.

    Each batch that is needed costs one forward pass.

    Args:
        scan_axes: for each axis of the stored arrays, the axis of the scan: 0 towards superior, 1
            anterior, 2 right. None if scans differ in it, so that planes have no names.
    """
    own_mm = as_spacing([spacing_mm[axis] for axis in _axes_of_view(scan_axes)])
    is_oriented = scan_axes is not None
    names = ("truth", "trivial", "predicted", "given", "loss_mask", "valid_mask")

    pictures: list[Picture] = []
    with evaluating(objective.module):
        for batch in batches:
            if len(pictures) >= NUM_SAMPLES:
                break

            made = objective.reconstruct(batch.to(device))
            # An objective that does not predict voxels has nothing to show.
            if made is None:
                return []

            # Each part: (B, M, Z, Y, X)
            parts = {name: getattr(made, name).float().cpu().numpy() for name in names}
            num_blocks = (batch.order_index.amax(dim=1) + 1).tolist()

            for index, num_given in enumerate(batch.prefix.tolist()):
                augmentation = batch.flip_transposes[index] if batch.flip_transposes else None
                sample = {}
                for name, part in parts.items():
                    sample[name] = upright(part[index], augmentation, scan_axes)
                planes = _planes(sample, own_mm, is_oriented)
                images = _middle_planes(sample, own_mm, is_oriented)
                pictures.append(Picture(num_given, num_blocks[index], planes, images))

    return pictures[:NUM_SAMPLES]


def _axes_of_view(scan_axes: Sequence[int] | None) -> list[int]:
    """Return which stored axes run towards superior, anterior and right."""
    if scan_axes is None:
        return [0, 1, 2]
    axes: list[int] = np.argsort(scan_axes).tolist()
    return axes


def upright(
    part: Floats,
    augmentation: "FlipTranspose | None",
    scan_axes: Sequence[int] | None,
) -> Floats:
    """Return volumes (M, Z, Y, X) in radiological orientation.

    Their axes point to inferior, posterior and left. Flips and transpositions of training are
    undone.

    Args:
        augmentation: how the volumes were flipped and transposed; None if they were not.
        scan_axes: see ``validation_pictures``.
    """
    if augmentation is not None:
        inverse = np.argsort(augmentation.axes)
        part = part.transpose(0, *(1 + axis for axis in inverse))
        flipped = tuple(1 + axis for axis in range(3) if augmentation.flips[axis])
        part = np.flip(part, flipped)

    part = part.transpose(0, *(1 + axis for axis in _axes_of_view(scan_axes)))
    return np.flip(part, (1, 2, 3))


def _planes(
    sample: Mapping[str, Floats],
    spacing_mm: Spacing,
    is_oriented: bool,
) -> tuple[Plane, ...]:
    """Return three planes through the member of a sample in which most voxels were predicted."""
    # Another member may be given as a whole, with nothing to compare.
    member = int(sample["loss_mask"].sum(axis=(1, 2, 3)).argmax())
    volumes, grey = _volumes_of(sample, member)

    # There is most to see where the truth differs most from the trivial prediction.
    structure = volumes["loss_mask"] * np.abs(volumes["truth"] - volumes["trivial"])
    planes = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        position = int(structure.sum(axis=others).argmax())
        planes.append(_plane(volumes, axis, position, spacing_mm, grey, is_oriented))
    return tuple(planes)


def _middle_planes(
    sample: Mapping[str, Floats],
    spacing_mm: Spacing,
    is_oriented: bool,
) -> tuple[tuple[Plane, ...], ...]:
    """Return three planes through the middle of every image of a sample; () of a single image.

    The images of a sequence are crops around the same structure, or of the same place, so that
    their middles show whether they match.
    """
    num_members = len(sample["truth"])
    if num_members == 1:
        return ()

    images = []
    for member in range(num_members):
        volumes, grey = _volumes_of(sample, member)
        planes = []
        for axis, side in enumerate(volumes["truth"].shape):
            planes.append(_plane(volumes, axis, side // 2, spacing_mm, grey, is_oriented))
        images.append(tuple(planes))
    return tuple(images)


def _volumes_of(
    sample: Mapping[str, Floats],
    member: int,
) -> tuple[dict[str, Floats], tuple[float, float]]:
    """Return the volumes of one image, each (Z, Y, X), and its grey range."""
    volumes = {name: part[member] for name, part in sample.items()}
    voxels = volumes["truth"][volumes["valid_mask"] > 0]
    return volumes, grey_range(voxels, 99)


def grey_range(voxels: Floats, highest_percentile: float) -> tuple[float, float]:
    """Return the intensities that are drawn black and white.

    A few bright voxels, such as metal, must not darken all others.
    """
    if not voxels.size:
        return 0.0, 1.0
    low, high = np.percentile(voxels, (1, highest_percentile))
    return float(low), float(max(high, low + 1e-3))


def _plane(
    volumes: Mapping[str, Floats],
    axis: int,
    position: int,
    spacing_mm: Spacing,
    grey: tuple[float, float],
    is_oriented: bool,
) -> Plane:
    """Return the plane across ``axis`` at a position along it."""
    down, across = (other for other in range(3) if other != axis)
    height_mm, width_mm = spacing_mm[down], spacing_mm[across]
    name, edges = PLANES[axis]
    if not is_oriented:
        name, edges = f"{NAMES_OF_AXES[down]}-{NAMES_OF_AXES[across]} plane", ""

    # Each: (H, W)
    cut = {key: np.take(volume, position, axis=axis) for key, volume in volumes.items()}
    return Plane(
        name=name,
        edges=edges,
        aspect=height_mm / width_mm,
        width_mm=cut["truth"].shape[1] * width_mm,
        truth=cut["truth"],
        trivial=cut["trivial"],
        predicted=cut["predicted"],
        given=cut["given"] > 0,
        loss_mask=cut["loss_mask"] > 0,
        valid_mask=cut["valid_mask"] > 0,
        grey=grey,
    )


def panels(plane: Plane) -> list[tuple[str, str]]:
    """Return (title, HTML image) of the truth, the trivial prediction, the prediction, its error.

    The given part is tinted. Voxels without a prediction are transparent.
    """
    from matplotlib import colormaps

    shown = plane.given | plane.loss_mask
    # All images show the given part as it is, so that they can be compared.
    trivial = np.where(plane.given, plane.truth, plane.trivial)
    predicted = np.where(plane.given, plane.truth, plane.predicted)

    low, high = plane.grey
    error = np.abs(plane.predicted - plane.truth) / ((high - low) * LARGEST_ERROR)
    error_image = np.asarray(colormaps["inferno"](error, bytes=True))

    # Each image: (H, W, 4)
    images = [
        ("true", _grey(plane.truth, plane), plane.valid_mask),
        ("nothing predicted", _grey(trivial, plane), shown),
        ("predicted", _grey(predicted, plane), shown),
        ("error", error_image, plane.loss_mask),
    ]

    percent = 100 * plane.given.mean()
    given = _enlarged(plane.given, plane)
    found = []
    for title, image, visible in images:
        alt = f"{title}, {plane.name}: {percent:.0f} % of the picture was given"
        pixels = tinted(_enlarged(image, plane), _enlarged(visible, plane), given)
        found.append((title, _view(pixels, plane, alt)))
    return found


def plain_panel(plane: Plane) -> str:
    """Return only the image as an HTML image, transparent in padding."""
    pixels = _grey(plane.truth, plane)
    pixels[..., 3] = np.where(plane.valid_mask, 255, 0)
    return _view(_enlarged(pixels, plane), plane, f"image, {plane.name}")


def _grey(values: Floats, plane: Plane) -> Bytes:
    """Return intensities (H, W) as grey pixels (H, W, 4)."""
    from matplotlib import colormaps

    low, high = plane.grey
    return np.asarray(colormaps["gray"]((values - low) / (high - low), bytes=True))


def _view(pixels: Bytes, plane: Plane, alt: str) -> str:
    """Return an enlarged image with letters at its edges, and a bar of 10 mm if it is that wide."""
    down, across = _repeats(plane)
    element = image_element(pixels, plane.aspect * across / down, alt)

    letters = []
    for side, letter in zip(("top", "bottom", "left", "right"), plane.edges, strict=False):
        letters.append(f'<i class="{side}">{letter}</i>')
    share = 100 * BAR_MM / plane.width_mm
    bar = f'<i class="mm" style="width:{share:.2f}%">{BAR_MM} mm</i>' if share <= 100 else ""
    marks = f'<span aria-hidden="true">{"".join(letters)}{bar}</span>'
    return f'<div class="view">{element}{marks}</div>'


def _repeats(plane: Plane) -> tuple[int, int]:
    """Return the pixels of the page per voxel, down and across."""
    across = max(1, round(PICTURE_WIDTH / plane.truth.shape[1]))
    down = max(1, round(across * plane.aspect))
    return down, across


def _enlarged(image: NDArray[Any], plane: Plane) -> NDArray[Any]:
    """Return an image (H, W, ...) of a plane in which every pixel is repeated down and across."""
    down, across = _repeats(plane)
    return image.repeat(down, axis=0).repeat(across, axis=1)


def tinted(image: Bytes, visible: Bools, given: Bools) -> Bytes:
    """Return the image with the given part tinted and bordered, transparent where not visible.

    Args:
        image: (H, W, 4), red, green, blue and opacity.
        visible: (H, W).
        given: (H, W).
    """
    made: Bytes = image.copy()
    made[..., 3] = np.where(visible, 255, 0)

    colours = image[given, :3]  # (pixels, 3)
    mixed = (1 - TINT) * colours + TINT * np.asarray(GIVEN_COLOUR)
    made[given, :3] = mixed.astype(np.uint8)
    # If nothing else is visible there, only the tint is.
    made[given & ~visible] = (*GIVEN_COLOUR, round(255 * TINT))

    # The border consists of given pixels with a neighbour that is not given, in several layers.
    inside = given
    for _ in range(BORDER_WIDTH):
        padded = np.pad(inside, 1, mode="edge")
        above, below = padded[:-2, 1:-1], padded[2:, 1:-1]
        left, right = padded[1:-1, :-2], padded[1:-1, 2:]
        inside = inside & above & below & left & right
    made[given & ~inside] = (*BORDER_COLOUR, 255)
    return made


def image_element(pixels: NDArray[Any], aspect: float, alt: str, **options: Any) -> str:
    """Return an image as an HTML element that holds its own data.

    Args:
        pixels: (H, W, 4), red, green, blue and opacity; or (H, W) with ``options`` of ``imsave``.
        aspect: height of a pixel divided by its width.
        alt: description for people who cannot see it.
    """
    from matplotlib.image import imsave

    png = io.BytesIO()
    # None leaves the name of the software out.
    metadata: Any = {"Software": None}
    imsave(png, pixels, format="png", metadata=metadata, **options)
    data = base64.b64encode(png.getvalue()).decode()

    height, width = pixels.shape[:2]
    ratio = width / (height * aspect)
    return (
        f'<img class="slice" alt="{escape(alt)}" style="aspect-ratio:{ratio:.4f}" '
        f'src="data:image/png;base64,{data}">'
    )
