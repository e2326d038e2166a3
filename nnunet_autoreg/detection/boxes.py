"""Compute with boxes as tensors: overlap, suppression, clustering, and the deltas of a network.

A box is (z0, y0, x0, z1, y1, x1) in voxel edges, half open: voxel i covers [i, i + 1). So the
voxels 3 to 5 have the edges 3 and 6, and the volume of a box is its number of voxels. Overlaps and
deltas are computed in float32 or float64, regardless of the input type.
"""

import math

import numpy as np
import torch
from torch import Tensor

CHUNK = 64
"""Number of boxes that ``nms`` decides at a time. With 64, 5000 boxes take 0.15 s on one core. With
256, whose pairs do not fit into the cache, they take 0.28 s.
"""

LARGEST_LOG_FACTOR = math.log(16.0)
"""A predicted box is at most 16 times its anchor on each axis, so that an untrained network cannot
overflow.
"""


def sizes(boxes_N6: Tensor) -> Tensor:
    """Return the sides of boxes in voxels, (N, 3)."""
    return boxes_N6[..., 3:] - boxes_N6[..., :3]


def centres(boxes_N6: Tensor) -> Tensor:
    """Return the centres of boxes in voxel edges, (N, 3)."""
    return (boxes_N6[..., 3:] + boxes_N6[..., :3]) / 2


def volumes(boxes_N6: Tensor) -> Tensor:
    """Return the volumes of boxes in voxels, (N,).

    A box that ends before it starts has the volume 0.
    """
    return sizes(_at_least_float32(boxes_N6)).clamp(min=0).prod(-1)


def iou(a_N6: Tensor, b_M6: Tensor) -> Tensor:
    """Return the intersection over union of every pair, (N, M); 0 if both are empty."""
    a = _at_least_float32(a_N6)
    b = _at_least_float32(b_M6)

    common = _intersection(a[:, None], b[None])  # (N, M)
    union = volumes(a)[:, None] + volumes(b)[None] - common
    return common / union.clamp(min=torch.finfo(union.dtype).tiny)


def pair_iou(a_N6: Tensor, b_N6: Tensor) -> Tensor:
    """Return the intersection over union of box i of ``a_N6`` with box i of ``b_N6``, (N,)."""
    a = _at_least_float32(a_N6)
    b = _at_least_float32(b_N6)

    common = _intersection(a, b)  # (N,)
    union = volumes(a) + volumes(b) - common
    return common / union.clamp(min=torch.finfo(union.dtype).tiny)


def pair_giou(a_N6: Tensor, b_N6: Tensor) -> Tensor:
    """Return the generalised IoU of box i of ``a_N6`` with box i of ``b_N6``, (N,) in (-1, 1].

    Source: Rezatofighi et al. 2019, "Generalized intersection over union" (arXiv 1902.09630).
    """
    a = _at_least_float32(a_N6)
    b = _at_least_float32(b_N6)
    common = _intersection(a, b)  # (N,)
    union = volumes(a) + volumes(b) - common

    # The hull is the smallest box around both.
    upper = torch.maximum(a[..., 3:], b[..., 3:])  # (N, 3)
    lower = torch.minimum(a[..., :3], b[..., :3])  # (N, 3)
    hull = (upper - lower).clamp(min=0).prod(-1)  # (N,)

    tiny = torch.finfo(union.dtype).tiny
    overlap = common / union.clamp(min=tiny)
    empty_share = (hull - union) / hull.clamp(min=tiny)
    return overlap - empty_share


def clip(boxes_N6: Tensor, shape_vox: tuple[int, int, int]) -> Tensor:
    """Return the boxes cut to an image of ``shape_vox`` (z, y, x)."""
    limit = torch.tensor([*shape_vox, *shape_vox], dtype=boxes_N6.dtype, device=boxes_N6.device)
    return torch.minimum(boxes_N6.clamp(min=0), limit)


def nms(
    boxes_N6: Tensor,
    scores_N: Tensor,
    iou_threshold: float,
    labels_N: Tensor | None = None,
    max_kept: int | None = None,
) -> Tensor:
    """Return the boxes that greedy non-maximum suppression keeps.

    From the highest score down, a box is kept unless one kept before overlaps it by more than the
    threshold.

    Args:
        iou_threshold: in [0, 1].
        labels_N: boxes of different labels do not suppress each other. If it is None, all boxes
            have one label.
        max_kept: largest number of boxes to keep; None for no limit.

    Returns:
        Indices of the boxes kept, highest score first. Boxes of equal scores keep their order.
    """
    boxes = _at_least_float32(boxes_N6)
    if labels_N is not None and len(boxes):
        # Boxes of different labels are moved so far apart that they cannot touch. This needs
        # float64, because float32 would round small boxes far from the origin.
        boxes = boxes.double()
        distance = boxes.max() - boxes.min() + 1
        boxes = boxes + labels_N.to(boxes)[:, None] * distance

    order = torch.sort(scores_N, descending=True, stable=True).indices  # (N,)
    ordered = boxes[order]

    kept = ordered.new_zeros((0, 6))  # (kept, 6)
    kept_indices: list[Tensor] = []
    count = 0
    limit = len(ordered) if max_kept is None else max_kept
    for start in range(0, len(ordered), CHUNK):
        if count >= limit:
            break

        # First against the boxes of earlier chunks.
        chunk = ordered[start : start + CHUNK]
        is_free = ~(iou(chunk, kept) > iou_threshold).any(1)

        # Then among each other. In NumPy: a loop over elements of a tensor is many times slower.
        overlapping = (iou(chunk, chunk) > iou_threshold).cpu().numpy()
        alive = is_free.cpu().numpy().copy()
        for i in range(len(alive)):
            if alive[i]:
                alive[i + 1 :] &= ~overlapping[i, i + 1 :]
        chosen = torch.from_numpy(np.flatnonzero(alive)[: limit - count]).to(chunk.device)
        kept = torch.cat([kept, chunk[chosen]])
        kept_indices.append(chosen + start)
        count += len(chosen)
    if not kept_indices:
        return order[:0]
    return order[torch.cat(kept_indices)]


def cluster(
    boxes_N6: Tensor,
    scores_N: Tensor,
    labels_N: Tensor,
    iou_threshold: float,
    *,
    weights_N: Tensor | None = None,
    expected_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge the boxes that several models or mirrorings found into one box per object.

    This is weighted box clustering. The remaining box with the highest score s begins a cluster. It
    takes in all remaining boxes of the same label that overlap it by more than the threshold. With
    w = weight x IoU with the first box, the score of the cluster is sum(w s) / (sum(w) + missing *
    mean(w)), and its box is the mean weighted by w s. So missing votes count as scores of 0.

    Args:
        weights_N: for example 1 in the middle of a tile and less towards its border; 1 if None.
        expected_N: number of votes that an object there could get; 1 if None. "Missing" is its mean
            in the cluster minus the number of votes found, but at least 0.

    Returns:
        Boxes (M, 6), scores (M,), labels (M,), and number of merged votes (M,), highest score
        first.

    Source: Jaeger et al. 2018, "Retina U-Net" (arXiv 1811.08661), without its weight by area, which
        nnDetection leaves out too.
    """
    boxes = _at_least_float32(boxes_N6)
    scores = _at_least_float32(scores_N)
    weights = torch.ones_like(scores) if weights_N is None else weights_N.to(scores)
    expected = torch.ones_like(scores) if expected_N is None else expected_N.to(scores)

    remaining = torch.sort(scores, descending=True, stable=True).indices
    merged_boxes = []
    merged_scores = []
    merged_labels = []
    num_votes: list[int] = []
    while len(remaining):
        first = remaining[0]
        overlap = iou(boxes[first][None], boxes[remaining])[0]
        is_member = (overlap > iou_threshold) & (labels_N[remaining] == labels_N[first])
        is_member[0] = True
        members = remaining[is_member]

        # The first box counts fully. If it is empty, its IoU with itself is 0.
        overlap = overlap[is_member]
        overlap = torch.where(members == first, torch.ones_like(overlap), overlap)
        weight = weights[members] * overlap
        missing = (expected[members].mean() - len(members)).clamp(min=0)
        box, score = _weighted_mean(boxes[members], scores[members], weight, missing)

        merged_boxes.append(box)
        merged_scores.append(score)
        merged_labels.append(labels_N[first])
        num_votes.append(len(members))
        # Every box belongs to only one cluster.
        remaining = remaining[~is_member]

    if not num_votes:
        return boxes, scores, labels_N, labels_N.new_zeros(0, dtype=torch.long)
    scores_M = torch.stack(merged_scores)
    order = torch.sort(scores_M, descending=True, stable=True).indices
    votes_M = torch.tensor(num_votes, device=boxes.device)
    return (
        torch.stack(merged_boxes)[order],
        scores_M[order],
        torch.stack(merged_labels)[order],
        votes_M[order],
    )


def _weighted_mean(
    boxes_N6: Tensor,
    scores_N: Tensor,
    weights_N: Tensor,
    missing: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the box (6,) and the score of a cluster; missing votes count as 0."""
    votes_N = weights_N * scores_N
    # Boxes with a score of 0 have no votes, and still need a mean.
    share_N = votes_N if votes_N.sum() > 0 else weights_N
    box_6 = (boxes_N6 * share_N[:, None]).sum(0) / share_N.sum()
    score = votes_N.sum() / (weights_N.sum() + missing * weights_N.mean())
    return box_6, score


def encode(boxes_N6: Tensor, anchors_N6: Tensor) -> Tensor:
    """Return the deltas (N, 6) that a network has to predict for box i from anchor i.

    The first three are the shift of the centre in anchor sides, the others the logarithms of the
    ratios of sides.
    """
    boxes = _at_least_float32(boxes_N6)
    anchors = _at_least_float32(anchors_N6)
    shift = (centres(boxes) - centres(anchors)) / sizes(anchors)  # (N, 3)
    log_factor = torch.log(sizes(boxes) / sizes(anchors))  # (N, 3)
    return torch.cat([shift, log_factor], -1)


def decode(deltas_N6: Tensor, anchors_N6: Tensor) -> Tensor:
    """Return the box (N, 6) that delta i makes of anchor i.

    This is the inverse of ``encode`` up to a factor of 16 per side.
    """
    deltas = _at_least_float32(deltas_N6)
    anchors = _at_least_float32(anchors_N6)
    middle = centres(anchors) + deltas[..., :3] * sizes(anchors)  # (N, 3)
    factor = deltas[..., 3:].clamp(max=LARGEST_LOG_FACTOR).exp()
    half = sizes(anchors) * factor / 2  # (N, 3)
    return torch.cat([middle - half, middle + half], -1)


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    """Return the volumes (...) that boxes (..., 6) have in common, in voxels."""
    # Axis by axis, because a product over a last axis of three is several times slower.
    sides = []
    for axis in range(3):
        upper = torch.minimum(a[..., axis + 3], b[..., axis + 3])
        lower = torch.maximum(a[..., axis], b[..., axis])
        sides.append((upper - lower).clamp(min=0))
    return sides[0] * sides[1] * sides[2]


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
