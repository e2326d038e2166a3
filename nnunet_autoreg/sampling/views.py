"""Two views of one crop, cut into slabs along z, or of one 2D image.

Both views show the same slices of a scan. Each is rotated, zoomed, mirrored and shifted, and its
intensities are changed, independently of the other. All this happens in the plane of the slices, so
that slab k of both views shows the same slices. A 2D image is repeated to the depth of one slab.

All random choices are drawn first. They depend only on the seed, the step and the sample: a scan is
seen differently each time, in every process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_autoreg.geometry import Size, Spacing, as_size, grid_of
from nnunet_autoreg.plan import Plan, ViewPlan
from nnunet_autoreg.sampling.affine import Affine, read_source
from nnunet_autoreg.sampling.blocks import window_positions
from nnunet_autoreg.sampling.corruption import (
    CLEAN,
    LEAST_DEVIATION,
    Corruption,
    draw_corruption,
)
from nnunet_autoreg.sampling.flip_transpose import may_swap
from nnunet_autoreg.sampling.sample import Sample, empty_crops
from nnunet_autoreg.sampling.spatial import draw_start
from nnunet_autoreg.store.case import StoredCase

NUM_VIEWS = 2
SHIFT = 1 / 4
"""How far a view may lie from the place of the crop, along y and x, as a share of the crop."""


def views_of(plan: Plan) -> ViewPlan:
    """Return the plan's values of an objective that learns from views."""
    assert isinstance(plan.objective, ViewPlan), "only such objectives draw views"
    return plan.objective


def num_slabs(plan: Plan) -> int:
    """Return into how many slabs a crop is cut."""
    views = views_of(plan)
    room_vox = plan.sequence.crop_size_vox[0] - views.slab_vox
    return room_vox // views.slab_step_vox + 1


def slab_size(plan: Plan) -> Size:
    """Return the voxels of a slab, (z, y, x)."""
    _, y, x = plan.sequence.crop_size_vox
    return (views_of(plan).slab_vox, y, x)


@dataclass(frozen=True)
class View:
    """The random choices of one view.

    Attributes:
        start: first voxel of its crop, (z, y, x); negative on axes on which the crop begins in
            padding.
        affine: how it is rotated, zoomed, mirrored and transposed, within the plane of the slices;
            mirrored along z as well, in both views alike.
        intensities: how they are changed.
    """

    start: Size
    affine: Affine
    intensities: Corruption


@dataclass(frozen=True)
class ViewsDraw:
    """The random choices of one sample.

    Attributes:
        views: the two views.
        window: first layer of tokens, in the plan's grid, of the positions that slabs take. It is
            the same for all slabs of a sample, so that it does not show which slab one is.
        order: the slabs in random order, (n,); the first ones are hidden from the attention.
    """

    views: tuple[View, ...]
    window: int
    order: NDArray[np.int64]


def draw(
    plan: Plan,
    shape_vox: Size,
    spacing_mm: Spacing,
    generator: np.random.Generator,
    is_image: bool,
) -> ViewsDraw:
    """Draw two views of a crop from a case of ``shape_vox``.

    Args:
        is_image: the case is a 2D image.
    """
    size = slab_size(plan) if is_image else plan.sequence.crop_size_vox
    # An image has one slice, which every slice of the crop will show.
    cut = (1, *size[1:]) if is_image else size

    # The order of the draws is part of the result: another order gives other samples.
    start = draw_start(shape_vox, cut, generator)
    mirror_z = bool(generator.integers(2)) and plan.sequence.flip
    z_step = -1.0 if mirror_z else 1.0
    if is_image:
        z_step = 0.0

    views = []
    for _ in range(NUM_VIEWS):
        affine = _draw_affine(plan, size, spacing_mm, z_step, generator)

        # The view is shifted in the plane of the slices, as far as the scan reaches.
        view_start = [start[0]]
        for first, side, length in zip(start[1:], cut[1:], shape_vox[1:], strict=True):
            shift = round(float(generator.uniform(-SHIFT, SHIFT)) * side)
            last = length - side
            lowest, highest = min(0, last), max(0, last)
            view_start.append(min(max(first + shift, lowest), highest))

        intensities = draw_corruption(views_of(plan).intensity_share, generator)
        views.append(View(as_size(view_start), affine, intensities))

    token_depth = plan.encoder.token_size_vox[0]
    crop_layers = plan.sequence.crop_size_vox[0] // token_depth
    slab_layers = views_of(plan).slab_vox // token_depth
    window = int(generator.integers(crop_layers - slab_layers + 1))

    order = generator.permutation(1 if is_image else num_slabs(plan))
    return ViewsDraw(tuple(views), window, order.astype(np.int64))


def _draw_affine(
    plan: Plan,
    size: Size,
    spacing_mm: Spacing,
    z_step: float,
    generator: np.random.Generator,
) -> Affine:
    """Draw how a view is rotated, zoomed, mirrored and transposed.

    Every number is drawn in every case, so that later draws do not depend on these.
    """
    s = plan.sequence
    log_smallest, log_largest = (math.log(factor) for factor in s.zoom)

    is_rotated, is_zoomed = generator.random(2) < s.spatial_share
    angle_deg = float(generator.uniform(-s.max_rotation_deg, s.max_rotation_deg)) * is_rotated
    log_zoom = float(generator.uniform(log_smallest, log_largest)) * is_zoomed
    flips = [bool(flip) and s.flip for flip in generator.integers(2, size=2)]
    is_swapped = bool(generator.integers(2)) and s.swap_axes

    return in_plane(
        angle_deg,
        math.exp(log_zoom),
        flips,
        is_swapped and may_swap(1, 2, size, spacing_mm),
        z_step,
        spacing_mm,
    )


def in_plane(
    angle_deg: float,
    zoom: float,
    flips: Sequence[bool],
    is_swapped: bool,
    z_step: float,
    spacing_mm: Spacing,
) -> Affine:
    """Return the affine of one view.

    Args:
        flips: whether the crop is mirrored along y and x.
        is_swapped: whether y and x change places before.
        z_step: step along z of the scan for a step along z of the crop: 1, -1, or 0 for an image.

    Rotations happen in mm, so that pixels of unequal sides do not shear what they show.
    """
    angle = math.radians(angle_deg)
    sine, cosine = math.sin(angle), math.cos(angle)
    rotation = np.array([[cosine, -sine], [sine, cosine]])
    _, y_mm, x_mm = spacing_mm
    mm_of_pixel = np.diag([y_mm, x_mm])
    pixel_of_mm = np.diag([1 / y_mm, 1 / x_mm])

    mirrored = np.diag([-1.0 if flip else 1.0 for flip in flips])
    swapped = np.array([[0.0, 1.0], [1.0, 0.0]]) if is_swapped else np.eye(2)
    # Read from right to left: pixels of the crop, swapped and mirrored, to mm, zoomed and rotated.
    step = pixel_of_mm @ rotation @ mm_of_pixel @ mirrored @ swapped / zoom  # (2, 2)
    (yy, yx), (xy, xx) = step.tolist()
    matrix = (
        (z_step, 0.0, 0.0),
        (0.0, yy, yx),
        (0.0, xy, xx),
    )
    return Affine(angle_deg, zoom, matrix)


def apply(plan: Plan, case: StoredCase, drawn: ViewsDraw, case_id: int, is_image: bool) -> Sample:
    """Read the parts of the case that the views will be resampled from."""
    s, token = plan.sequence, plan.encoder.token_size_vox
    size = slab_size(plan) if is_image else s.crop_size_vox
    sources = []
    for view in drawn.views:
        source = read_source(case, view.start, size, view.affine, s.max_source)
        voxels_CZYX = changed(source.voxels, view.intensities)
        sources.append(replace(source, voxels=voxels_CZYX))

    grid = grid_of(s.crop_size_vox, token)
    slab_grid = grid_of(slab_size(plan), token)
    positions = window_positions(grid, slab_grid, (drawn.window, 0, 0))  # (tokens of a slab,)

    voxels, valid_mask = empty_crops(NUM_VIEWS, size)
    return Sample(
        voxels,
        valid_mask,
        drawn.order,
        prefix=1,
        positions=positions,
        sources=tuple(sources),
        case_id=case_id,
    )


def changed(voxels_CZYX: Tensor, change: Corruption) -> Tensor:
    """Return voxels with another gamma and contrast, and with noise.

    Gamma keeps mean and deviation, and acts between the smallest and the largest intensity.
    """
    deviation = float(voxels_CZYX.std()) if voxels_CZYX.numel() > 1 else 0.0
    if change == CLEAN or deviation <= LEAST_DEVIATION:
        return voxels_CZYX

    # Gamma, as in ``corruption.corrupted``.
    lowest, highest = voxels_CZYX.min(), voxels_CZYX.max()
    mean = voxels_CZYX.mean()
    scaled_CZYX = (voxels_CZYX - lowest) / (highest - lowest)
    bent_CZYX = scaled_CZYX**change.gamma
    bent_deviation = bent_CZYX.std().clamp(min=1e-6)
    restored_CZYX = (bent_CZYX - bent_CZYX.mean()) / bent_deviation * deviation + mean

    stretched_CZYX = (restored_CZYX - mean) * change.contrast + mean
    within_bounds_CZYX = stretched_CZYX.clamp(lowest, highest)

    generator = torch.Generator().manual_seed(change.seed)
    noise_CZYX = torch.randn(voxels_CZYX.shape, generator=generator)
    return within_bounds_CZYX + change.noise * deviation * noise_CZYX
