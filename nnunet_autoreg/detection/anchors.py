"""Plan anchors for the sizes of objects, lay them over feature maps, and match them to objects.

Level 0 is the finest. Every level has the same K shapes, enlarged from level to level as the stride
grows, because all levels share one head. Sizes, strides and shapes are in voxels of the
preprocessed image, (z, y, x).

Shape suffixes: N objects of a training set, K shapes, G objects of a patch, A anchors.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_autoreg.detection import boxes as bx
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.geometry import Size, Spacing, as_size, as_spacing
from nnunet_autoreg.rng import generator

Floats = NDArray[np.float64]

MOST_SHAPES = 12
ENOUGH_IOU = 0.7
REACHABLE_IOU = 0.3
MOST_LEVELS = 4
USUAL_STRIDE, SMALL_STRIDE, SMALL_SIDE_VOX = 4, 2, 4.0
ANCHOR_SIDES = 4
"""A level is meant for objects whose side is this many strides. The ratio is nnDetection's: 16
voxels at stride 4.
"""
RESTARTS, ROUNDS = 4, 40
NUM_CANDIDATE_CELLS = 4
WINDOW = 4
"""Number of cells per axis, two on either side, among which the four nearest ones lie for any
strides.
"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnchorPlan:
    """Hold the levels and the anchor shapes of a detector.

    Attributes:
        stages: the encoder's stages that are levels, finest first.
        strides_vox: stride of each level.
        shapes_vox: the K shapes of level 0.
        mean_iou: mean over the objects of the IoU with the best shape of any level, if both have
            one centre.
        unreachable: class name -> share of its objects whose IoU with every anchor is below 0.3, at
            the mean distance from the nearest cell's centre.
    """

    stages: tuple[int, ...]
    strides_vox: tuple[Size, ...]
    shapes_vox: tuple[Spacing, ...]
    mean_iou: float
    unreachable: dict[str, float]

    @property
    def num_shapes(self) -> int:
        """Return the number of anchors per cell."""
        return len(self.shapes_vox)


def plan_anchors(
    sizes_vox: Mapping[str, Sequence[Sequence[float]]],
    stage_strides_vox: Sequence[Size],
    seed: int = 0,
) -> AnchorPlan:
    """Choose levels and shapes for the objects of a training set.

    A warning names every class with objects that are too small or too thin for all anchors.

    Args:
        sizes_vox: class name -> sides (z, y, x) of its objects, at the target spacing.
        stage_strides_vox: the stride of every stage that can carry a level, finest first.
        seed: random seed of the clustering.

    Raises:
        PlanError: there is no object, an object without extent, or no stage.
    """
    every_size = [side for of_class in sizes_vox.values() for side in of_class]
    sizes = np.array(every_size, dtype=np.float64).reshape(-1, 3)  # (N, 3)
    if not len(sizes):
        raise PlanError(
            "there is no object to plan anchors for; look at the labels, at min_voxels and at "
            "detect_labels",
            code="detection-no-objects",
        )
    if sizes.min() <= 0:
        smallest = sizes[sizes.min(1).argmin()]
        raise PlanError(
            f"an object has sides of {tuple(smallest.tolist())} voxels; every side must be greater "
            "than 0",
            code="detection-object-without-extent",
        )

    stages = choose_levels(sizes, stage_strides_vox)
    strides = [stage_strides_vox[stage] for stage in stages]
    shapes, mean_iou = choose_shapes(sizes, strides, seed)

    unreachable = {}
    for name, of_class in sizes_vox.items():
        if not len(of_class):
            continue
        # The nearest cell's centre is a quarter of a stride away on each axis, on average.
        own_sizes = np.array(of_class, dtype=np.float64).reshape(-1, 3)
        best_iou = _best_iou(own_sizes, shapes, strides, offset=0.25)
        unreachable[name] = round(float((best_iou < REACHABLE_IOU).mean()), 4)
    _warn_about_unreachable(unreachable, strides[0])

    # The plan is a file that people read.
    rounded = np.round(np.asarray(shapes, dtype=np.float64), 3).tolist()
    return AnchorPlan(
        stages=tuple(stages),
        strides_vox=tuple(as_size(stride) for stride in strides),
        shapes_vox=tuple(as_spacing(shape) for shape in rounded),
        mean_iou=round(mean_iou, 4),
        unreachable=unreachable,
    )


def choose_levels(sizes_N3: Floats, stage_strides_vox: Sequence[Size]) -> list[int]:
    """Return the encoder's stages that become levels, finest first.

    The finest level has stride 4, or stride 2 if a tenth of the objects have a mean side below 4
    voxels. The mean side is the geometric mean, and the stride of a stage is its largest one. The
    highest level is the one that the largest object belongs to. There are at least two levels, if
    there are two stages, and at most four.

    Raises:
        PlanError: there is no stage.
    """
    if not stage_strides_vox:
        raise PlanError(
            "the encoder has no stage that detection can use; a stage with a stride of at most 4 "
            "voxels is needed",
            code="detection-no-stage",
        )

    side = np.cbrt(sizes_N3.prod(1))  # (N,)
    wanted = SMALL_STRIDE if np.percentile(side, 10) < SMALL_SIDE_VOX else USUAL_STRIDE

    # Never finer than wanted unless the stages skip it: stride 2 costs eight times the anchors of
    # stride 4.
    fitting = [i for i, stride in enumerate(stage_strides_vox) if max(stride) <= wanted]
    first = fitting[-1] if fitting else 0
    available = list(range(first, min(first + MOST_LEVELS, len(stage_strides_vox))))

    # Levels above that of the largest object are meant for none of the objects.
    level_of_object = _levels_of(sizes_N3, [stage_strides_vox[i] for i in available])
    num_levels = int(level_of_object.max()) + 1
    return available[: max(num_levels, 2)]


def choose_shapes(
    sizes_N3: Floats,
    strides_vox: Sequence[Size],
    seed: int = 0,
) -> tuple[Floats, float]:
    """Return the fewest shapes, at most 12, with which the mean best IoU reaches 0.7.

    If 12 do not reach it, the best shapes found are returned. The sizes of all objects are first
    scaled to level 0. Then they are clustered by k-means, with 1 - IoU of boxes with one centre as
    the distance. The shapes are the geometric means of the clusters.

    Returns:
        (K, 3) shapes of level 0, smallest first, and their mean best IoU over all levels.

    Source: Redmon and Farhadi 2017, "YOLO9000" (arXiv 1612.08242), in 2D.
    """
    level_of_object = _levels_of(sizes_N3, strides_vox)
    scaled = sizes_N3 / _factors(strides_vox)[level_of_object]  # (N, 3)

    best = scaled[:1]
    best_iou = -1.0
    most = min(MOST_SHAPES, len(np.unique(scaled, axis=0)))
    for k in range(1, most + 1):
        # One cluster has one solution. The solution for several depends on their start.
        for restart in range(RESTARTS if k > 1 else 1):
            shapes = _k_means(scaled, k, generator(seed, "anchors", k, restart))
            mean = float(_best_iou(sizes_N3, shapes, strides_vox, offset=0.0).mean())
            if mean > best_iou:
                best = shapes
                best_iou = mean
        # Every further shape would add an anchor to every cell.
        if best_iou >= ENOUGH_IOU:
            break

    smallest_first = np.argsort(best.prod(1), kind="stable")
    return best[smallest_first], best_iou


def _levels_of(sizes_N3: Floats, strides_vox: Sequence[Size]) -> NDArray[np.intp]:
    """Return the level (N,) of each object: its mean side is nearest to four strides, by ratio."""
    mean_sides = np.cbrt(sizes_N3.prod(1))  # (N,)
    strides = np.array(strides_vox, dtype=np.float64)  # (L, 3)
    meant_for = ANCHOR_SIDES * np.cbrt(strides.prod(1))  # (L,)
    log_ratios = np.log2(mean_sides)[:, None] - np.log2(meant_for)[None]  # (N, L)
    return np.asarray(np.abs(log_ratios).argmin(1))


def _factors(strides_vox: Sequence[Size]) -> Floats:
    """Return the factors (L, 3) by which the shapes of each level are larger than those of level 0.

    They are the ratios of the strides.
    """
    strides = np.array(strides_vox, dtype=np.float64)
    return np.asarray(strides / strides[0])


def _k_means(sizes_N3: Floats, k: int, random: np.random.Generator) -> Floats:
    """Return the means (at most k, 3) of clusters of sizes."""
    centres = sizes_N3[[int(random.integers(len(sizes_N3)))]]
    while len(centres) < k:
        # Far objects are likelier to start a cluster. One that equals a centre never does.
        distance = 1 - _centred_iou(sizes_N3, centres).max(1)  # (N,)
        if distance.sum() <= 0:
            break
        chosen = int(random.choice(len(sizes_N3), p=distance / distance.sum()))
        centres = np.concatenate([centres, sizes_N3[[chosen]]])

    nearest = None
    for _ in range(ROUNDS):
        now = _centred_iou(sizes_N3, centres).argmax(1)  # (N,)
        if nearest is not None and (now == nearest).all():
            break
        nearest = now
        for i in np.unique(nearest):
            # A box twice as large is as far away as one half as large.
            centres[i] = np.exp(np.log(sizes_N3[nearest == i]).mean(0))
    return centres


def _centred_iou(sizes_N3: Floats, shapes_K3: Floats, offset: Floats | float = 0.0) -> Floats:
    """Return the IoU (N, K) of boxes whose centres lie ``offset`` voxels apart on each axis."""
    a = sizes_N3[:, None]
    b = shapes_K3[None]
    sides = np.minimum(np.minimum(a, b), (a + b) / 2 - offset)  # (N, K, 3)
    common = np.clip(sides, 0, None).prod(-1)
    return np.asarray(common / (a.prod(-1) + b.prod(-1) - common))


def _best_iou(
    sizes_N3: Floats,
    shapes_K3: Floats,
    strides_vox: Sequence[Size],
    offset: float,
) -> Floats:
    """Return the best IoU (N,) over shapes and levels.

    The centres lie ``offset`` strides apart on each axis.
    """
    strides = np.array(strides_vox, dtype=np.float64)
    per_level = []
    for factor, stride in zip(_factors(strides_vox), strides, strict=True):
        iou_NK = _centred_iou(sizes_N3, shapes_K3 * factor, offset * stride)
        per_level.append(iou_NK.max(1))
    return np.asarray(np.max(per_level, axis=0))


@dataclass(frozen=True)
class AnchorGrid:
    """Hold the anchors of one patch size, in the order of the head's output.

    The order is level, then cell (z, y, x), then shape.

    Attributes:
        boxes_A6: float32, in voxel edges of the patch.
        level_cells: number of cells (z, y, x) of each level.
        strides_vox: stride of each level.
        num_shapes: K.
    """

    boxes_A6: Tensor  # noqa: N815
    level_cells: tuple[Size, ...]
    strides_vox: tuple[Size, ...]
    num_shapes: int


def lay_out(
    plan: AnchorPlan,
    level_cells: Sequence[Size],
    device: torch.device | str = "cpu",
) -> AnchorGrid:
    """Return the anchors over feature maps of ``level_cells`` cells.

    All anchors of cell i have the centre of that cell, (i + 1/2) strides.

    Raises:
        PlanError: the number of feature maps differs from the number of levels.
    """
    if len(level_cells) != len(plan.strides_vox):
        raise PlanError(
            f"the network gives {len(level_cells)} feature maps for the {len(plan.strides_vox)} "
            "levels of the detection plan; plan again",
            code="detection-levels",
        )

    shapes = torch.tensor(plan.shapes_vox, dtype=torch.float32)  # (K, 3)
    factors = torch.tensor(_factors(plan.strides_vox), dtype=torch.float32)  # (L, 3)
    levels = []
    for cells, stride, factor in zip(level_cells, plan.strides_vox, factors, strict=True):
        axes = []
        for num_cells, step in zip(cells, stride, strict=True):
            axes.append((torch.arange(num_cells, dtype=torch.float32) + 0.5) * step)
        grid = torch.meshgrid(*axes, indexing="ij")
        middle = torch.stack(grid, -1).reshape(-1, 1, 3)  # (cells, 1, 3)

        half = (shapes * factor / 2)[None]  # (1, K, 3)
        boxes = torch.cat([middle - half, middle + half], -1)  # (cells, K, 6)
        levels.append(boxes.reshape(-1, 6))

    return AnchorGrid(
        boxes_A6=torch.cat(levels).to(device),
        level_cells=tuple(as_size(cells) for cells in level_cells),
        strides_vox=plan.strides_vox,
        num_shapes=plan.num_shapes,
    )


def _warn_about_unreachable(shares: Mapping[str, float], finest_stride: Size) -> None:
    """Warn about every class with objects that no anchor fits."""
    for name, share in shares.items():
        if share > 0:
            log.warning(
                "%.1f %% of the objects of class '%s' are too small or too thin for every anchor "
                "(IoU below %g, finest stride %s) and can hardly be learned; use a finer spacing",
                100 * share,
                name,
                REACHABLE_IOU,
                "x".join(map(str, finest_stride)),
            )


def match(objects_G6: Tensor, grid: AnchorGrid, *, centre_inside: bool = False) -> Tensor:
    """Return the object that each anchor has to find, by adaptive training sample selection.

    The candidates of an object are all anchors of the four nearest cells of every level. A
    candidate is positive if its IoU is at least the mean plus the standard deviation of the
    candidates' IoUs. An anchor that is positive for several objects goes to the one it overlaps
    most. Unlike in the paper, an anchor that does not touch the object is never positive, and an
    object without any positive takes its best free candidate: by IoU, then by distance, then by
    similarity of volume.

    Args:
        centre_inside: the anchor's centre must also lie inside the object, which nnDetection does
            not require.

    Returns:
        (A,) index of the object of each anchor, or -1 for background.

    Source: Zhang et al. 2020, "Bridging the gap between anchor-based and anchor-free detection"
        (arXiv 1912.02424).
    """
    anchors = grid.boxes_A6
    objects = objects_G6.to(grid.boxes_A6)
    matched = torch.full((len(anchors),), -1, dtype=torch.long, device=anchors.device)
    if not len(objects):
        return matched

    # A candidate is positive from the mean plus the standard deviation of its object's IoUs.
    candidates = _candidates(bx.centres(objects), grid)  # (G, C)
    repeated = objects[:, None].expand(-1, candidates.shape[1], -1)  # (G, C, 6)
    overlap = bx.pair_iou(repeated, anchors[candidates])  # (G, C)
    spread = overlap.std(1) if overlap.shape[1] > 1 else 0.0
    enough = overlap.mean(1) + spread
    positive = (overlap >= enough[:, None]) & (overlap > 0)
    if centre_inside:
        middle = bx.centres(anchors[candidates])  # (G, C, 3)
        is_inside = (middle > objects[:, None, :3]) & (middle < objects[:, None, 3:])
        positive &= is_inside.all(-1)

    # An anchor that several objects want goes to the one it overlaps most.
    best = torch.zeros(len(anchors), device=anchors.device)
    for g in range(len(objects)):
        chosen = candidates[g][positive[g]]
        chosen_overlap = overlap[g][positive[g]]
        is_better = chosen_overlap > best[chosen]
        matched[chosen[is_better]] = g
        best[chosen[is_better]] = chosen_overlap[is_better]

    # An object without an anchor takes its best candidate that no other object has.
    has_anchor = torch.zeros(len(objects), dtype=torch.bool, device=matched.device)
    has_anchor[matched[matched >= 0]] = True
    for g in torch.nonzero(~has_anchor)[:, 0].tolist():
        own = candidates[g]  # (C,)
        is_free = matched[own] < 0
        if bool(is_free.any()):
            value = _fitness(anchors[own], objects[g], overlap[g])  # (C,)
            value = torch.where(is_free, value, torch.full_like(value, -torch.inf))
            matched[own[value.argmax()]] = g
    return matched


def _fitness(anchors_C6: Tensor, object_6: Tensor, overlap_C: Tensor) -> Tensor:
    """Return how well anchors fit an object, (C,): by overlap, distance, similarity of volume.

    The distance decides only between equal overlaps, and the volume only between equal distances.
    """
    distance_C = (bx.centres(anchors_C6) - bx.centres(object_6)).square().sum(-1)
    ratio_C = bx.volumes(anchors_C6) / bx.volumes(object_6).clamp(min=1e-6)
    # Twice the volume differs as much as half of it.
    difference_C = ratio_C.log().abs()
    return overlap_C.double() - 1e-6 * distance_C.double() - 1e-9 * difference_C.double()


def _candidates(centres_G3: Tensor, grid: AnchorGrid) -> Tensor:
    """Return the anchors (G, C) of the cells nearest to each centre, on every level.

    They are computed from the grid, without looking at all anchors.
    """
    found = []
    first_anchor = 0
    for cells, stride in zip(grid.level_cells, grid.strides_vox, strict=True):
        step = torch.tensor(stride, dtype=torch.float32, device=centres_G3.device)
        num_cells = torch.tensor(cells, device=centres_G3.device)

        # A window of 4 cells per axis around the centre, moved inwards at the border.
        location = centres_G3 / step - 0.5  # (G, 3), in cells
        before = location.floor().long() - 1
        start = torch.minimum(before, num_cells - WINDOW).clamp(min=0)
        axes = []
        away = []
        for i in range(3):
            offsets = torch.arange(min(WINDOW, cells[i]), device=start.device)
            axis = start[:, i, None] + offsets  # (G, up to 4)
            axes.append(axis)
            away.append(((axis - location[:, i, None]) * step[i]).square())
        z, y, x = axes
        away_zy = away[0][:, :, None, None] + away[1][:, None, :, None]
        distance = (away_zy + away[2][:, None, None, :]).flatten(1)  # (G, up to 64)

        rows = z[:, :, None, None] * cells[1] + y[:, None, :, None]
        index = (rows * cells[2] + x[:, None, None, :]).flatten(1)  # (G, up to 64)
        by_distance = torch.sort(distance, dim=1, stable=True).indices
        cell = index.gather(1, by_distance[:, :NUM_CANDIDATE_CELLS])  # (G, 4)

        shape = torch.arange(grid.num_shapes, device=cell.device)
        anchors = first_anchor + cell[:, :, None] * grid.num_shapes + shape  # (G, 4, K)
        found.append(anchors.flatten(1))
        first_anchor += cells[0] * cells[1] * cells[2] * grid.num_shapes
    return torch.cat(found, 1)
