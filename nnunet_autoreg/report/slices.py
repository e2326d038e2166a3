"""Slices of validation scans as small pictures: the truth, trivial and actual prediction, error."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
        num_given, num_blocks: how many of its blocks were given, and how many there are.
        planes: planes of the image of which most was predicted.
        images: where a sequence has several images, three planes through the middle of each.
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
        scan_axes: the axis of the scan (0 towards superior, 1 anterior, 2 right) that each axis of
            the stored arrays is; None if scans differ in it, so that planes have no names.
    """
    pictures: list[Picture] = []
    with evaluating(objective.module):
        for batch in batches:
            if len(pictures) >= NUM_SAMPLES:
                break

            made = objective.reconstruct(batch.to(device))
            # An objective that predicts no voxels has nothing to show.
            if made is None:
                return []

            # Each part: (B, M, Z, Y, X)
            parts = {
                name: getattr(made, name).float().cpu().numpy()
                for name in ("truth", "trivial", "predicted", "given", "loss_mask", "valid_mask")
            }
            num_blocks = (batch.order_index.amax(dim=1) + 1).tolist()

            for index, num_given in enumerate(batch.prefix.tolist()):
                augmentation = batch.flip_transposes[index] if batch.flip_transposes else None
                sample = {
                    name: upright(part[index], augmentation, scan_axes)
                    for name, part in parts.items()
                }
                own_mm = tuple(spacing_mm[axis] for axis in _axes_of_view(scan_axes))
                view = (as_spacing(own_mm), scan_axes is not None)
                planes, images = _planes(sample, *view), _middle_planes(sample, *view)
                pictures.append(Picture(num_given, num_blocks[index], planes, images))

    return pictures[:NUM_SAMPLES]


def _axes_of_view(scan_axes: Sequence[int] | None) -> list[int]:
    """Return which stored axes run towards superior, anterior and right."""
    return [0, 1, 2] if scan_axes is None else np.argsort(scan_axes).tolist()


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

    # Where the truth differs most from the trivial prediction, there is most to see.
    structure = volumes["loss_mask"] * np.abs(volumes["truth"] - volumes["trivial"])
    positions = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        positions.append(int(structure.sum(axis=others).argmax()))
    return tuple(
        _plane(volumes, axis, position, spacing_mm, grey, is_oriented)
        for axis, position in enumerate(positions)
    )


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
    # A few bright voxels, such as metal, must not darken all others.
    voxels = volumes["truth"][volumes["valid_mask"] > 0]
    low, high = np.percentile(voxels, [1, 99]) if voxels.size else (0.0, 1.0)
    return volumes, (float(low), float(max(high, low + 1e-3)))


def _plane(
    volumes: Mapping[str, Floats],
    axis: int,
    position: int,
    spacing_mm: Spacing,
    grey: tuple[float, float],
    is_oriented: bool,
) -> Plane:
    """Return the plane across ``axis`` at a position along it."""
    others = tuple(a for a in range(3) if a != axis)
    cut = {key: np.take(volume, position, axis=axis) for key, volume in volumes.items()}
    height_mm, width_mm = (spacing_mm[a] for a in others)
    name, edges = PLANES[axis]
    if not is_oriented:
        first, second = (NAMES_OF_AXES[a] for a in others)
        name, edges = f"{first}-{second} plane", ""
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

    low, high = plane.grey
    shown = plane.given | plane.loss_mask
    # All images show the given part as it is, so that they can be compared.
    trivial = np.where(plane.given, plane.truth, plane.trivial)
    predicted = np.where(plane.given, plane.truth, plane.predicted)
    error = np.abs(plane.predicted - plane.truth) / ((high - low) * LARGEST_ERROR)

    def grey(values: Floats) -> Bytes:
        return np.asarray(colormaps["gray"]((values - low) / (high - low), bytes=True))

    # Each image: (H, W, 4)
    images = [
        ("true", grey(plane.truth), plane.valid_mask),
        ("nothing predicted", grey(trivial), shown),
        ("predicted", grey(predicted), shown),
        ("error", np.asarray(colormaps["inferno"](error, bytes=True)), plane.loss_mask),
    ]

    percent = 100 * plane.given.mean()
    repeats = _repeats(plane)
    given = _enlarged(plane.given, repeats)
    found = []
    for title, image, visible in images:
        alt = f"{title}, {plane.name}: {percent:.0f} % of the picture was given"
        pixels = tinted(_enlarged(image, repeats), _enlarged(visible, repeats), given)
        element = _image(pixels, plane.aspect * repeats[1] / repeats[0], alt)
        found.append((title, _with_marks(element, plane)))
    return found


def plain_panel(plane: Plane) -> str:
    """Return only the image as an HTML image, transparent in padding."""
    from matplotlib import colormaps

    low, high = plane.grey
    grey = np.asarray(colormaps["gray"]((plane.truth - low) / (high - low), bytes=True))
    grey[..., 3] = np.where(plane.valid_mask, 255, 0)
    repeats = _repeats(plane)
    aspect = plane.aspect * repeats[1] / repeats[0]
    element = _image(_enlarged(grey, repeats), aspect, f"image, {plane.name}")
    return _with_marks(element, plane)


def _with_marks(element: str, plane: Plane) -> str:
    """Return the image with letters at its edges, and a bar of 10 mm where it is that wide."""
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
    return max(1, round(across * plane.aspect)), across


def _enlarged(image: NDArray[Any], repeats: tuple[int, int]) -> NDArray[Any]:
    """Return an image (H, W, ...) in which every pixel is repeated down and across."""
    return image.repeat(repeats[0], axis=0).repeat(repeats[1], axis=1)


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
    # Where nothing else is visible, the tint alone is.
    made[given & ~visible] = (*GIVEN_COLOUR, round(255 * TINT))

    # The border are those given pixels of which a neighbour is not given, in several layers.
    inside = given
    for _ in range(BORDER_WIDTH):
        padded = np.pad(inside, 1, mode="edge")
        above, below = padded[:-2, 1:-1], padded[2:, 1:-1]
        left, right = padded[1:-1, :-2], padded[1:-1, 2:]
        inside = inside & above & below & left & right
    made[given & ~inside] = (*BORDER_COLOUR, 255)
    return made


def _image(rgba: Bytes, aspect: float, alt: str) -> str:
    """Return the pixels as an HTML image that holds its own data."""
    from matplotlib.image import imsave

    png = io.BytesIO()
    # None leaves the name of the software out.
    metadata: Any = {"Software": None}
    imsave(png, rgba, format="png", metadata=metadata)
    data = base64.b64encode(png.getvalue()).decode()

    height, width = rgba.shape[:2]
    return (
        f'<img class="slice" alt="{alt}" style="aspect-ratio:{width / (height * aspect):.4f}" '
        f'src="data:image/png;base64,{data}">'
    )
