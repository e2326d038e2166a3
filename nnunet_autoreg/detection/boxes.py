"""Boxes as tensors: overlap, suppression, clustering, and the code that a network predicts.

A box is (z0, y0, x0, z1, y1, x1) in voxel edges, half open: voxel i covers [i, i + 1), so a box of
    voxels 3 to 5 reads 3, 6 and its
volume is its number of voxels. Whatever is passed in, arithmetic is in float32 or better.
"""

import math

import torch
from torch import Tensor

BLOCK = 64
"""Boxes decided at a time by ``nms``:

5000 of them take 0.15 s on one core; with 256, whose pairs leave the cache, 0.28 s.
"""

LARGEST_LOG_FACTOR = math.log(16.0)
"""A predicted box is at most 16 times its anchor on each axis, so that an untrained network cannot
overflow.
"""


def sizes(boxes_N6: Tensor) -> Tensor:
    """(N, 3) sides in voxels."""
    return boxes_N6[..., 3:] - boxes_N6[..., :3]


def centres(boxes_N6: Tensor) -> Tensor:
    """(N, 3) centres in voxel edges."""
    return (boxes_N6[..., 3:] + boxes_N6[..., :3]) / 2


def volumes(boxes_N6: Tensor) -> Tensor:
    """(N,) volumes in voxels; 0 for a box whose ends are the wrong way round."""
    return sizes(_at_least_float32(boxes_N6)).clamp(min=0).prod(-1)


def iou(a_N6: Tensor, b_M6: Tensor) -> Tensor:
    """(N, M) intersection over union of every pair; 0 where both boxes are empty."""
    a, b = _at_least_float32(a_N6), _at_least_float32(b_M6)
    common = _intersection(a[:, None], b[None])
    union = volumes(a)[:, None] + volumes(b)[None] - common
    return common / union.clamp(min=torch.finfo(union.dtype).tiny)


def pair_iou(a_N6: Tensor, b_N6: Tensor) -> Tensor:
    """(N,) intersection over union of box i of the one with box i of the other."""
    a, b = _at_least_float32(a_N6), _at_least_float32(b_N6)
    common = _intersection(a, b)
    union = volumes(a) + volumes(b) - common
    return common / union.clamp(min=torch.finfo(union.dtype).tiny)


def pair_giou(a_N6: Tensor, b_N6: Tensor) -> Tensor:
    """(N,) generalised IoU of box i of the one with box i of the other, in (-1, 1].

    Source: Rezatofighi et al. 2019, "Generalized intersection over union" (arXiv 1902.09630).
    """
    a, b = _at_least_float32(a_N6), _at_least_float32(b_N6)
    common = _intersection(a, b)
    union = volumes(a) + volumes(b) - common
    hull = (
        (torch.maximum(a[..., 3:], b[..., 3:]) - torch.minimum(a[..., :3], b[..., :3]))
        .clamp(min=0)
        .prod(-1)
    )
    tiny = torch.finfo(union.dtype).tiny
    return common / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def clip(boxes_N6: Tensor, shape_vox: tuple[int, int, int]) -> Tensor:
    """Boxes cut to an image of ``shape_vox`` (z, y, x)."""
    limit = torch.tensor([*shape_vox, *shape_vox], dtype=boxes_N6.dtype, device=boxes_N6.device)
    return torch.minimum(boxes_N6.clamp(min=0), limit)


def nms(
    boxes_N6: Tensor,
    scores_N: Tensor,
    iou_threshold: float,
    labels_N: Tensor | None = None,
    max_kept: int | None = None,
) -> Tensor:
    """Greedy suppression: from the highest score down, a box is kept unless one kept before
    overlaps it by more than the threshold.

    Args:
        iou_threshold: in [0, 1].
        labels_N: boxes of different labels do not suppress each other; all are of one kind if None.
        max_kept: stop after so many.

    Returns:
        Indices of the boxes kept, highest score first; of equal scores the one that comes first.
    """
    order = torch.sort(scores_N, descending=True, stable=True).indices
    ordered = _apart(_at_least_float32(boxes_N6), labels_N)[order]
    kept = ordered.new_zeros((0, 6))
    kept_places: list[Tensor] = []
    count, limit = 0, len(ordered) if max_kept is None else max_kept
    for start in range(0, len(ordered), BLOCK):
        if count >= limit:
            break
        block = ordered[start : start + BLOCK]
        free = ~(iou(block, kept) > iou_threshold).any(1)
        places = _greedy(block, free, iou_threshold)[: limit - count]
        kept = torch.cat([kept, block[places]])
        kept_places.append(places + start)
        count += len(places)
    return order[torch.cat(kept_places)] if kept_places else order


def _greedy(block: Tensor, free: Tensor, iou_threshold: float) -> Tensor:
    """Places in ``block``, in order, of the free boxes that no earlier one of them suppresses."""
    overlapping = (iou(block, block) > iou_threshold).cpu().numpy()
    alive = free.cpu().numpy().copy()
    for i in range(len(alive)):
        if alive[i]:
            alive[i + 1 :] &= ~overlapping[i, i + 1 :]
    return torch.from_numpy(alive.nonzero()[0]).to(block.device)


def _apart(boxes: Tensor, labels: Tensor | None) -> Tensor:
    """Boxes moved so that those of different labels cannot touch."""
    if labels is None or len(boxes) == 0:
        return boxes
    # In float64: far from the origin float32 would round small boxes.
    boxes = boxes.double()
    return boxes + labels.to(boxes)[:, None] * (boxes.max() - boxes.min() + 1)


def cluster(
    boxes_N6: Tensor,
    scores_N: Tensor,
    labels_N: Tensor,
    iou_threshold: float,
    *,
    weights_N: Tensor | None = None,
    expected_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted box clustering: what several models or mirrorings found becomes one box per object,
    votes that lack count as 0.

    From the highest score down, a cluster is every box left of that label which overlaps by more
    than the threshold. With
    w = weight x IoU with the highest: its score is sum(w s) / (sum(w) + missing mean(w)), its box
        the mean weighted by w s.

    Args:
        weights_N: e.g. 1 in the middle of a tile and less towards its border; 1 if None.
        expected_N: how many votes an object at this place could get; "missing" is their mean in the
            cluster less the votes found, never below 0. 1 if None.

    Returns:
        Boxes (M, 6), scores (M,), labels (M,), and number of merged votes (M,), highest score
        first.

    Source: Jaeger et al. 2018, "Retina U-Net" (arXiv 1811.08661), without its weight by area, which
        nnDetection leaves out too.
    """
    boxes, scores = _at_least_float32(boxes_N6), _at_least_float32(scores_N)
    weights = torch.ones_like(scores) if weights_N is None else weights_N.to(scores)
    expected = torch.ones_like(scores) if expected_N is None else expected_N.to(scores)
    pool = torch.sort(scores, descending=True, stable=True).indices
    merged: list[tuple[Tensor, Tensor, Tensor, int]] = []
    while len(pool):
        first = pool[0]
        overlap = iou(boxes[first][None], boxes[pool])[0]
        mine = (overlap > iou_threshold) & (labels_N[pool] == labels_N[first])
        mine[0] = True
        members = pool[mine]
        # The overlap of an empty box with itself is 0, and it would weigh nothing in its own
        # cluster.
        weight = weights[members] * torch.where(
            members == first, torch.ones_like(overlap[mine]), overlap[mine]
        )
        votes = weight * scores[members]
        missing = (expected[members].mean() - len(members)).clamp(min=0)
        score = votes.sum() / (weight.sum() + missing * weight.mean())
        share = votes if votes.sum() > 0 else weight
        merged.append(
            (
                (boxes[members] * share[:, None]).sum(0) / share.sum(),
                score,
                labels_N[first],
                len(members),
            )
        )
        pool = pool[~mine]
    if not merged:
        return boxes, scores, labels_N, labels_N.new_zeros(0, dtype=torch.long)
    order = torch.sort(torch.stack([m[1] for m in merged]), descending=True, stable=True).indices
    votes_M = torch.tensor([m[3] for m in merged], device=boxes.device)
    return (
        torch.stack([m[0] for m in merged])[order],
        torch.stack([m[1] for m in merged])[order],
        torch.stack([m[2] for m in merged])[order],
        votes_M[order],
    )


def encode(boxes_N6: Tensor, anchors_N6: Tensor) -> Tensor:
    """(N, 6) what a network has to predict for box i from anchor i: shift in anchor sides, then log
    of the ratio of sides.
    """
    boxes, anchors = _at_least_float32(boxes_N6), _at_least_float32(anchors_N6)
    shift = (centres(boxes) - centres(anchors)) / sizes(anchors)
    return torch.cat([shift, torch.log(sizes(boxes) / sizes(anchors))], -1)


def decode(codes_N6: Tensor, anchors_N6: Tensor) -> Tensor:
    """The boxes that ``codes_N6`` mean at ``anchors_N6``; inverse of ``encode`` up to a factor of
    16 per side.
    """
    codes, anchors = _at_least_float32(codes_N6), _at_least_float32(anchors_N6)
    middle = centres(anchors) + codes[..., :3] * sizes(anchors)
    half = sizes(anchors) * codes[..., 3:].clamp(max=LARGEST_LOG_FACTOR).exp() / 2
    return torch.cat([middle - half, middle + half], -1)


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    # Axis by axis: a product over a last axis of three is several times slower.
    sides = [
        (torch.minimum(a[..., i + 3], b[..., i + 3]) - torch.maximum(a[..., i], b[..., i])).clamp(
            min=0
        )
        for i in range(3)
    ]
    return sides[0] * sides[1] * sides[2]


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
