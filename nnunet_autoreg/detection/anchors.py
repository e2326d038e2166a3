"""Anchors: their shapes and levels are planned from the objects' sizes, laid over the feature
grids, and matched to objects.

Level 0 is the finest. Every level has the same K shapes, doubled from level to level as the stride
doubles, because the levels share one head. Sizes, strides and shapes are in voxels of the
preprocessed image, (z, y, x).
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
"""Strides to a side of the object for which a level is meant: nnDetection's ratio, 16 voxels at
stride 4.
"""
RESTARTS, ROUNDS = 4, 40
NUM_CANDIDATE_CELLS = 4
WINDOW = 4
"""Cells per axis among which the four nearest ones lie, whatever the strides: two on either side.
"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnchorPlan:
    """Levels and shapes.

    Attributes:
        stages: which of the encoder's stages the levels are, finest first.
        strides_vox: stride of each level.
        shapes_vox: the K shapes of level 0.
        mean_iou: mean over the objects of the IoU with the best shape of any level, centres put
            together.
        unreachable: class name -> share of its objects that no anchor reaches with IoU 0.3 where
            the grid happens to fall.
    """

    stages: tuple[int, ...]
    strides_vox: tuple[Size, ...]
    shapes_vox: tuple[Spacing, ...]
    mean_iou: float
    unreachable: dict[str, float]

    @property
    def num_shapes(self) -> int:
        """Anchors per cell."""
        return len(self.shapes_vox)


def plan_anchors(
    sizes_vox: Mapping[str, Sequence[Sequence[float]]],
    stage_strides_vox: Sequence[Size],
    seed: int = 0,
) -> AnchorPlan:
    """Choose levels and shapes for the objects of a training set; classes with objects that are out
    of reach are warned about.

    Args:
        sizes_vox: class name -> sides of its objects, at the target spacing.
        stage_strides_vox: the stride of every stage that can carry a level, finest first.

    Raises:
        PlanError: no object, an object without extent, or no stage.
    """
    sizes = np.array(
        [side for of_class in sizes_vox.values() for side in of_class], dtype=np.float64
    ).reshape(-1, 3)
    if not len(sizes):
        raise PlanError(
            "there is no object to plan anchors for; look at the labels, at min_voxels and at "
            "detect_labels"
        )
    if sizes.min() <= 0:
        raise PlanError(
            f"an object has sides of {tuple(sizes[sizes.min(1).argmin()].tolist())} voxels; every "
            "side must be greater than 0"
        )
    stages = choose_levels(sizes, stage_strides_vox)
    strides = [stage_strides_vox[s] for s in stages]
    shapes, mean_iou = choose_shapes(sizes, strides, seed)
    unreachable = {
        name: _share_out_of_reach(
            np.array(of_class, dtype=np.float64).reshape(-1, 3), shapes, strides
        )
        for name, of_class in sizes_vox.items()
        if len(of_class)
    }
    for name, share in unreachable.items():
        if share > 0:
            log.warning(
                "%.1f %% of the objects of class '%s' are too small or too thin for every anchor "
                "(IoU below %g, finest stride %s): "
                "they can hardly be learned; use a finer spacing",
                100 * share,
                name,
                REACHABLE_IOU,
                "x".join(map(str, strides[0])),
            )
    plain = tuple(as_spacing([round(float(v), 3) for v in shape]) for shape in shapes)
    return AnchorPlan(
        tuple(stages), tuple(as_size(s) for s in strides), plain, round(mean_iou, 4), unreachable
    )


def choose_levels(sizes_N3: Floats, stage_strides_vox: Sequence[Size]) -> list[int]:
    """Stages for the levels: the finest has stride 4, or 2 where a tenth of the objects have a mean
    side below 4 voxels.

    The mean side is geometric, and a stage has stride 4 if that is its largest. Levels go up to the
    one that the largest object belongs to, but there are two where there are two stages, and at
    most four.

    Raises:
        PlanError: no stage.
    """
    if not stage_strides_vox:
        raise PlanError(
            "the encoder offers no stage for detection; a stage with a stride of at most 4 voxels "
            "is needed"
        )
    side = np.cbrt(sizes_N3.prod(1))
    wanted = SMALL_STRIDE if np.percentile(side, 10) < SMALL_SIDE_VOX else USUAL_STRIDE
    # Never finer than wanted unless the stages skip it: stride 2 costs eight times the anchors of
    # stride 4.
    fitting = [i for i, stride in enumerate(stage_strides_vox) if max(stride) <= wanted]
    first = fitting[-1] if fitting else 0
    available = list(range(first, min(first + MOST_LEVELS, len(stage_strides_vox))))
    highest = int(_levels_of(sizes_N3, [stage_strides_vox[i] for i in available]).max())
    return available[: max(highest + 1, 2)]


def choose_shapes(
    sizes_N3: Floats, strides_vox: Sequence[Size], seed: int = 0
) -> tuple[Floats, float]:
    """The fewest shapes, at most 12, with which the mean best IoU reaches 0.7; else the best found.

    Every object is first halved once per level below its own. The shapes are then the means of
    clusters, in logarithms, by k-means whose distance is 1 - IoU of boxes with one centre (Redmon &
    Farhadi 2017, arXiv 1612.08242, in 2D).

    Returns:
        (K, 3) shapes of level 0, smallest first, and their mean best IoU over all levels.
    """
    halved = sizes_N3 / _factors(strides_vox)[_levels_of(sizes_N3, strides_vox)]
    best, best_iou = halved[:1], -1.0
    most = min(MOST_SHAPES, len(np.unique(halved, axis=0)))
    for k in range(1, most + 1):
        for restart in range(RESTARTS if k > 1 else 1):
            shapes = _k_means(halved, k, generator(seed, "anchors", k, restart))
            mean = float(_best_iou(sizes_N3, shapes, strides_vox, offset=0.0).mean())
            if mean > best_iou:
                best, best_iou = shapes, mean
        if best_iou >= ENOUGH_IOU:
            break
    return best[np.argsort(best.prod(1), kind="stable")], best_iou


def _levels_of(sizes_N3: Floats, strides_vox: Sequence[Size]) -> NDArray[np.intp]:
    """The level each object belongs to: where its mean side is nearest to four mean strides, by
    ratio.
    """
    sides = np.log2(np.cbrt(sizes_N3.prod(1)))
    strides = np.log2(ANCHOR_SIDES * np.cbrt(np.array(strides_vox, dtype=np.float64).prod(1)))
    return np.asarray(np.abs(sides[:, None] - strides[None]).argmin(1))


def _factors(strides_vox: Sequence[Size]) -> Floats:
    """(L, 3) how much larger the shapes of each level are than those of level 0."""
    strides = np.array(strides_vox, dtype=np.float64)
    return np.asarray(strides / strides[0])


def _k_means(sizes: Floats, k: int, random: np.random.Generator) -> Floats:
    centres = sizes[[int(random.integers(len(sizes)))]]
    while len(centres) < k:
        # Far objects are likelier to start a cluster; one that is met exactly never does.
        distance = 1 - _centred_iou(sizes, centres).max(1)
        if distance.sum() <= 0:
            break
        centres = np.concatenate(
            [centres, sizes[[int(random.choice(len(sizes), p=distance / distance.sum()))]]]
        )
    nearest = None
    for _ in range(ROUNDS):
        now = _centred_iou(sizes, centres).argmax(1)
        if nearest is not None and (now == nearest).all():
            break
        nearest = now
        for i in np.unique(nearest):
            centres[i] = np.exp(np.log(sizes[nearest == i]).mean(0))
    return centres


def _centred_iou(sizes_N3: Floats, shapes_K3: Floats, offset: Floats | float = 0.0) -> Floats:
    """(N, K) IoU of boxes whose centres lie ``offset`` voxels apart on each axis."""
    a, b = sizes_N3[:, None], shapes_K3[None]
    common = np.clip(np.minimum(np.minimum(a, b), (a + b) / 2 - offset), 0, None).prod(-1)
    return np.asarray(common / (a.prod(-1) + b.prod(-1) - common))


def _best_iou(
    sizes_N3: Floats, shapes_K3: Floats, strides_vox: Sequence[Size], offset: float
) -> Floats:
    """(N,) best IoU over shapes and levels, with centres ``offset`` strides apart on each axis."""
    strides = np.array(strides_vox, dtype=np.float64)
    per_level = [
        _centred_iou(sizes_N3, shapes_K3 * f, offset * s).max(1)
        for f, s in zip(_factors(strides_vox), strides, strict=True)
    ]
    return np.asarray(np.max(per_level, axis=0))


def _share_out_of_reach(sizes_N3: Floats, shapes_K3: Floats, strides_vox: Sequence[Size]) -> float:
    # The nearest cell's centre is a quarter of a stride away on each axis, in the mean over all
    # places of an object.
    return round(
        float((_best_iou(sizes_N3, shapes_K3, strides_vox, offset=0.25) < REACHABLE_IOU).mean()), 4
    )


@dataclass(frozen=True)
class AnchorGrid:
    """The anchors of one patch size, as they are laid out in the head's output: level, then cell
    (z, y, x), then shape.

    Attributes:
        boxes_A6: float32.
        level_cells: number of cells (z, y, x) of each level.
        strides_vox: stride of each level.
        num_shapes: K.
    """

    boxes_A6: Tensor  # noqa: N815
    level_cells: tuple[Size, ...]
    strides_vox: tuple[Size, ...]
    num_shapes: int


def lay_out(
    plan: AnchorPlan, level_cells: Sequence[Size], device: torch.device | str = "cpu"
) -> AnchorGrid:
    """Anchors over feature maps of ``level_cells`` cells; the anchors of a cell have its centre, (i
    + 1/2) strides.

    Raises:
        PlanError: another number of feature maps than levels.
    """
    if len(level_cells) != len(plan.strides_vox):
        raise PlanError(
            f"{len(level_cells)} feature maps for the {len(plan.strides_vox)} levels of the "
            "detection plan; plan anew"
        )
    shapes = torch.tensor(plan.shapes_vox, dtype=torch.float32)
    levels = []
    for cells, stride, factor in zip(
        level_cells, plan.strides_vox, _factors(plan.strides_vox), strict=True
    ):
        axes = [
            (torch.arange(n, dtype=torch.float32) + 0.5) * s
            for n, s in zip(cells, stride, strict=True)
        ]
        middle = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 1, 3)
        half = (shapes * torch.tensor(factor, dtype=torch.float32) / 2)[None]
        levels.append(torch.cat([middle - half, middle + half], -1).reshape(-1, 6))
    return AnchorGrid(
        torch.cat(levels).to(device),
        tuple(as_size(c) for c in level_cells),
        plan.strides_vox,
        plan.num_shapes,
    )


def match(objects_G6: Tensor, grid: AnchorGrid, *, centre_inside: bool = False) -> Tensor:
    """Adaptive training sample selection: which object each anchor is to find.

    The candidates of an object are all anchors of the four nearest cells of every level. Those are
    positive whose IoU reaches the mean plus the standard deviation of the candidates' IoUs; an
    anchor wanted by several objects goes to the one it overlaps most. Unlike in the paper an anchor
    that does not touch the object is never positive, and an object left without any takes its best
    free candidate: by IoU, else the nearest cell's shape of the most similar volume.

    Args:
        centre_inside: the anchor's centre must also lie inside the object. nnDetection does
            without.

    Returns:
        (A,) index of the object, or -1 for background.

    Source: Zhang et al. 2020, "Bridging the gap between anchor-based and anchor-free detection"
        (arXiv 1912.02424).
    """
    anchors, objects = grid.boxes_A6, objects_G6.to(grid.boxes_A6)
    matched = torch.full((len(anchors),), -1, dtype=torch.long, device=anchors.device)
    if not len(objects):
        return matched
    candidates = _candidates(bx.centres(objects), grid)
    overlap = bx.pair_iou(objects[:, None].expand(-1, candidates.shape[1], -1), anchors[candidates])
    enough = overlap.mean(1) + (overlap.std(1) if overlap.shape[1] > 1 else 0.0)
    positive = (overlap >= enough[:, None]) & (overlap > 0)
    if centre_inside:
        middle = bx.centres(anchors[candidates])
        positive &= ((middle > objects[:, None, :3]) & (middle < objects[:, None, 3:])).all(-1)
    best = torch.zeros(len(anchors), device=anchors.device)
    for g in range(len(objects)):
        mine, how_well = candidates[g][positive[g]], overlap[g][positive[g]]
        better = how_well > best[mine]
        matched[mine[better]] = g
        best[mine[better]] = how_well[better]
    _serve_the_unmatched(matched, objects, anchors, candidates, overlap)
    return matched


def _serve_the_unmatched(
    matched: Tensor, objects: Tensor, anchors: Tensor, candidates: Tensor, overlap: Tensor
) -> None:
    """Give every object without an anchor its best candidate that nobody has."""
    served = torch.zeros(len(objects), dtype=torch.bool, device=matched.device)
    served[matched[matched >= 0]] = True
    for g in torch.nonzero(~served)[:, 0].tolist():
        free = matched[candidates[g]] < 0
        if not bool(free.any()):
            continue
        own = candidates[g]
        ratio = (bx.volumes(anchors[own]) / bx.volumes(objects[g]).clamp(min=1e-6)).log().abs()
        distance = (bx.centres(anchors[own]) - bx.centres(objects[g])).square().sum(-1)
        # Order of importance: overlap, then distance, then likeness of volume.
        value = overlap[g].double() - 1e-6 * distance.double() - 1e-9 * ratio.double()
        matched[own[torch.where(free, value, torch.full_like(value, -torch.inf)).argmax()]] = g


def _candidates(centres_G3: Tensor, grid: AnchorGrid) -> Tensor:
    """(G, C) indices of the anchors of the nearest cells of every level; computed from the grid,
    never over all anchors.
    """
    found, first = [], 0
    for cells, stride in zip(grid.level_cells, grid.strides_vox, strict=True):
        step = torch.tensor(stride, dtype=torch.float32, device=centres_G3.device)
        number = torch.tensor(cells, device=centres_G3.device)
        place = centres_G3 / step - 0.5
        start = torch.minimum(place.floor().long() - 1, number - WINDOW).clamp(min=0)
        axes = [
            start[:, i, None] + torch.arange(min(WINDOW, cells[i]), device=start.device)
            for i in range(3)
        ]
        away = [((axis - place[:, i, None]) * step[i]).square() for i, axis in enumerate(axes)]
        distance = (
            away[0][:, :, None, None] + away[1][:, None, :, None] + away[2][:, None, None, :]
        ).flatten(1)
        index = (
            (axes[0][:, :, None, None] * cells[1] + axes[1][:, None, :, None]) * cells[2]
            + axes[2][:, None, None, :]
        ).flatten(1)
        nearest = torch.sort(distance, dim=1, stable=True).indices[:, :NUM_CANDIDATE_CELLS]
        cell = index.gather(1, nearest)
        shape = torch.arange(grid.num_shapes, device=cell.device)
        found.append((first + cell[:, :, None] * grid.num_shapes + shape).flatten(1))
        first += cells[0] * cells[1] * cells[2] * grid.num_shapes
    return torch.cat(found, 1)
