"""Find the boxes of a whole scan, from tiles, mirrorings and models.

Every pair of a model and a mirroring is a member of the ensemble. The steps are those of
nnDetection v0.1. First, boxes of one tile that overlap by more than 0.6 are suppressed. Then boxes
of one member that overlap by more than 0.1 are suppressed; boxes near a tile's border count less,
because they may be cut. At last, the boxes of several members are merged by weighted box
clustering.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import (
    compute_gaussian,
    compute_steps_for_sliding_window,
)
from torch import Tensor

from nnunet_autoreg.detection import boxes as bx
from nnunet_autoreg.detection.anchors import AnchorGrid, AnchorPlan, lay_out
from nnunet_autoreg.detection.net import Detector, Output
from nnunet_autoreg.errors import WeightsError
from nnunet_autoreg.geometry import Size, as_size, box_at

MOST_PER_TILE, MOST_CANDIDATES = 1000, 1000
BORDER_WEIGHT = 0.5
BORDER_VOX = 0.5
LOWEST_SCORE = 1e-3
"""Boxes with a lower score are not candidates; untrained heads give every anchor 0.01."""


@dataclass(frozen=True)
class NmsSettings:
    """Hold overlaps (IoU) and numbers for every stage of suppression and merging.

    Attributes:
        tile_iou, member_iou: if two boxes of a tile, or of a member, overlap more, the one with the
            lower score is removed.
        merge_iou: boxes of different members that overlap more become one.
        cut_factor: the score of a box that ends at a border between tiles is multiplied by it. The
            object may continue beyond the border, and another tile shows it whole, unless it is
            larger than half a tile.
        most_per_tile, most_boxes: largest number of boxes that are kept in a tile, and in the end.
    """

    tile_iou: float = 0.6
    member_iou: float = 0.1
    merge_iou: float = 0.5
    cut_factor: float = 0.5
    most_per_tile: int = 100
    most_boxes: int = 100

    def for_file(self) -> dict[str, Any]:
        """Return the settings under the keys that files of detections have."""
        return {
            "tile_iou": self.tile_iou,
            "voter_iou": self.member_iou,
            "merge_iou": self.merge_iou,
            "cut_factor": self.cut_factor,
            "most_per_tile": self.most_per_tile,
            "most_boxes": self.most_boxes,
        }


DEFAULT_NMS = NmsSettings()


@dataclass(frozen=True)
class Candidates:
    """Hold boxes before merging, in voxel edges of the preprocessed image.

    Attributes:
        scores_N: in [0, 1].
        labels_N: index of the class.
        weights_N: 1 for a box in the middle of its tile, down to 0.5 at its border.
        members_N: index of the ensemble member, a model and a mirroring, that found the box.
    """

    boxes_N6: Tensor  # noqa: N815
    scores_N: Tensor  # noqa: N815
    labels_N: Tensor  # noqa: N815
    weights_N: Tensor  # noqa: N815
    members_N: Tensor  # noqa: N815

    def at(self, index: Tensor) -> "Candidates":
        """Return the candidates with these indices."""
        return Candidates(
            self.boxes_N6[index],
            self.scores_N[index],
            self.labels_N[index],
            self.weights_N[index],
            self.members_N[index],
        )


@dataclass(frozen=True)
class MergedBoxes:
    """Hold the boxes after merging, highest score first.

    Attributes:
        labels_N: index of the class.
        votes_N: number of candidates that were merged into each box.
    """

    boxes_N6: Tensor  # noqa: N815
    scores_N: Tensor  # noqa: N815
    labels_N: Tensor  # noqa: N815
    votes_N: Tensor  # noqa: N815


def concatenate(parts: Sequence[Candidates]) -> Candidates:
    """Return all candidates of several parts; at least one part is needed."""
    return Candidates(
        torch.cat([part.boxes_N6 for part in parts]),
        torch.cat([part.scores_N for part in parts]),
        torch.cat([part.labels_N for part in parts]),
        torch.cat([part.weights_N for part in parts]),
        torch.cat([part.members_N for part in parts]),
    )


def merge(candidates: Candidates, num_members: int, nms: NmsSettings = DEFAULT_NMS) -> MergedBoxes:
    """Suppress overlapping candidates of every member, and merge those of all members.

    Args:
        num_members: number of members of the ensemble, also of those without any candidate.
    """
    kept = []
    for member in range(num_members):
        index = torch.nonzero(candidates.members_N == member)[:, 0]
        own = candidates.at(index)
        # The location in the tile decides only which box is kept. Its score does not change.
        ranking = own.scores_N * own.weights_N
        chosen = bx.nms(own.boxes_N6, ranking, nms.member_iou, own.labels_N, nms.most_boxes)
        kept.append(index[chosen])

    left = candidates.at(torch.cat(kept))

    if num_members == 1:
        order = torch.sort(left.scores_N, descending=True, stable=True).indices
        left = left.at(order)
        votes = torch.ones_like(left.labels_N)
        return MergedBoxes(left.boxes_N6, left.scores_N, left.labels_N, votes)

    merged = bx.cluster(
        left.boxes_N6,
        left.scores_N,
        left.labels_N,
        nms.merge_iou,
        weights_N=left.weights_N,
        # Every member could have found every object.
        expected_N=torch.full_like(left.scores_N, float(num_members)),
    )
    return MergedBoxes(*(values[: nms.most_boxes] for values in merged))


def boxes_of_output(
    output: Output,
    grid: AnchorGrid,
    nms: NmsSettings = DEFAULT_NMS,
) -> list[Candidates]:
    """Return the candidates of each patch of a batch, after suppression, clipped to the patch.

    Their member is 0, and their weights are those of their locations in the patch.
    """
    shape = as_size(output.logits_BCZYX.shape[2:])
    all_scores = output.scores_BAK.float().sigmoid()
    all_deltas = output.deltas_BA6.float()
    num_classes = all_scores.shape[2]
    found = []
    for scores_AK, deltas_A6 in zip(all_scores, all_deltas, strict=True):
        # The best scores, regardless of the anchor and the class.
        best = scores_AK.flatten().topk(min(MOST_PER_TILE, scores_AK.numel()))
        is_enough = best.values >= LOWEST_SCORE
        scores = best.values[is_enough]
        index = best.indices[is_enough]
        anchors = index // num_classes
        labels = index % num_classes

        decoded = bx.decode(deltas_A6[anchors], grid.boxes_A6[anchors])
        boxes = bx.clip(decoded, shape)
        # A box outside the patch has no extent after clipping.
        inside = torch.nonzero((bx.sizes(boxes) > 0).all(1))[:, 0]
        chosen = bx.nms(
            boxes[inside],
            scores[inside],
            nms.tile_iou,
            labels[inside],
            nms.most_per_tile,
        )
        kept = inside[chosen]
        found.append(
            Candidates(
                boxes_N6=boxes[kept],
                scores_N=scores[kept],
                labels_N=labels[kept],
                weights_N=tile_weights(boxes[kept], shape),
                members_N=torch.zeros_like(labels[kept]),
            ),
        )
    return found


def tile_weights(boxes_N6: Tensor, shape_vox: Size) -> Tensor:
    """Return the weight (N,) of boxes by the location of their centres in a tile.

    It is 1 in the middle, and falls to 0.5 at the nearest border.
    """
    if not len(boxes_N6):
        return boxes_N6.new_zeros(0)
    half = torch.tensor(shape_vox, dtype=boxes_N6.dtype, device=boxes_N6.device) / 2
    away = ((bx.centres(boxes_N6) - half).abs() / half).clamp(max=1)  # (N, 3)
    return 1 - (1 - BORDER_WEIGHT) * away.amax(1)


class ScanDetector:
    """Run a detector over whole preprocessed scans.

    Args:
        network: detector in evaluation mode with ``detect`` set, without DDP or torch.compile.
        anchors: anchors of the detection plan.
        patch_size: size of a tile, (z, y, x).
        mirror_axes: axes (0: z, 1: y, 2: x) along which scans are mirrored. Every combination of
            them, also none, is a member of the ensemble.
        autocast: makes the context of a forward pass.
    """

    def __init__(
        self,
        network: Detector,
        anchors: AnchorPlan,
        patch_size: Size,
        device: torch.device,
        *,
        mirror_axes: Sequence[int] = (),
        nms: NmsSettings = DEFAULT_NMS,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.network = network
        self.anchors = anchors
        self.patch_size = patch_size
        self.device = device
        self.nms = nms
        self.autocast = autocast
        # The scan as it is comes first.
        self.mirrorings: list[tuple[int, ...]] = []
        for num_axes in range(len(mirror_axes) + 1):
            self.mirrorings += combinations(mirror_axes, num_axes)
        self.grids: dict[tuple[Size, ...], AnchorGrid] = {}

    @property
    def num_members(self) -> int:
        """Return the number of ensemble members of one model."""
        return len(self.mirrorings)

    @torch.inference_mode()
    def candidates(
        self,
        image_CZYX: Tensor,
        with_logits: bool = False,
    ) -> tuple[Candidates, Tensor | None]:
        """Return the candidates of a preprocessed scan, and its segmentation logits (C, Z, Y, X).

        There are at most 1000 candidates per member. The logits are None without ``with_logits``.

        Raises:
            WeightsError: the network gives numbers that are not finite.
        """
        padded, inner = pad_nd_image(
            image_CZYX,
            self.patch_size,
            "constant",
            {"value": 0},
            True,
            None,
        )
        padded_shape = as_size(padded.shape[1:])
        logits = _LogitsMean(self.patch_size) if with_logits else None
        parts: list[Candidates] = []
        steps = compute_steps_for_sliding_window(padded_shape, self.patch_size, 0.5)
        for start in product(*steps):
            parts.extend(self._tile(padded, as_size(start), logits))

        found = concatenate(parts)

        # From the padded image back to the image itself.
        origin = [s.start or 0 for s in inner[1:]]
        shift = torch.tensor([*origin, *origin], dtype=torch.float32)
        boxes = bx.clip(found.boxes_N6 - shift, as_size(image_CZYX.shape[1:]))
        found = replace(found, boxes_N6=boxes)

        # The best boxes of every member, without those that lie in the padding.
        chosen = []
        has_extent = (bx.sizes(boxes) > 0).all(1)
        for member in range(self.num_members):
            index = torch.nonzero((found.members_N == member) & has_extent)[:, 0]
            best = found.scores_N[index].topk(min(MOST_CANDIDATES, len(index))).indices
            chosen.append(index[best])

        candidates = found.at(torch.cat(chosen))

        if logits is None:
            return candidates, None
        inside = (slice(None), *inner[1:])
        return candidates, logits.mean()[inside]

    def _tile(
        self,
        padded: Tensor,
        start: Size,
        logits: "_LogitsMean | None",
    ) -> Iterator[Candidates]:
        """Yield the candidates of a tile in every mirroring, and add its logits to the mean."""
        region = box_at(start, self.patch_size)
        every_channel = (slice(None), *region)
        tile = padded[every_channel][None].to(self.device)  # (1, C, z, y, x)
        shift = torch.tensor([*start, *start], dtype=torch.float32)
        padded_shape = as_size(padded.shape[1:])

        for member, axes in enumerate(self.mirrorings):
            batch_dims = [axis + 2 for axis in axes]
            with self.autocast():
                output: Output = self.network(tile.flip(batch_dims) if batch_dims else tile)
            _check_finite(output)
            # All tiles have one size, so that this is done once.
            if output.cells not in self.grids:
                self.grids[output.cells] = lay_out(self.anchors, output.cells, self.device)
            (found,) = boxes_of_output(output, self.grids[output.cells], self.nms)

            # Merging needs the boxes of all tiles at once. They are kept on the CPU, because the
            # network needs the GPU's memory.
            boxes = mirrored(found.boxes_N6, axes, self.patch_size).cpu()
            is_cut = ends_between_tiles(boxes, start, self.patch_size, padded_shape)
            scores = found.scores_N.cpu()
            yield Candidates(
                boxes_N6=boxes + shift,
                scores_N=torch.where(is_cut, scores * self.nms.cut_factor, scores),
                labels_N=found.labels_N.cpu(),
                weights_N=found.weights_N.cpu(),
                members_N=found.members_N.cpu() + member,
            )
            if logits is not None:
                logits_CZYX = output.logits_BCZYX[0]
                dims = [axis + 1 for axis in axes]
                logits.add(logits_CZYX.flip(dims) if dims else logits_CZYX, region, padded_shape)


def _check_finite(output: Output) -> None:
    """Refuse outputs with NaN, which would be ranked as the highest scores and hide every box."""
    has_scores = bool(torch.isfinite(output.scores_BAK).all())
    has_deltas = bool(torch.isfinite(output.deltas_BA6).all())
    if not (has_scores and has_deltas):
        raise WeightsError(
            "the network's scores or boxes are NaN or infinite: its training diverged, or half "
            "precision is not enough; look at training_log_*.txt, or detect with "
            "checkpoint_best.pth, or on a CPU",
            code="detection-not-finite",
        )


def ends_between_tiles(boxes_N6: Tensor, start: Size, patch_size: Size, shape_vox: Size) -> Tensor:
    """Return whether each box (N,) of the tile at ``start`` ends at a border between tiles.

    A box ends at a border if it comes within half a voxel of it. No box is cut at the borders of
    the image itself.

    Args:
        boxes_N6: in voxel edges of the tile.
        start: first voxel of the tile in the image.
        shape_vox: shape of the image, (z, y, x).
    """
    found = torch.zeros(len(boxes_N6), dtype=torch.bool)
    for axis in range(3):
        if start[axis] > 0:
            found |= boxes_N6[:, axis] <= BORDER_VOX
        if start[axis] + patch_size[axis] < shape_vox[axis]:
            found |= boxes_N6[:, axis + 3] >= patch_size[axis] - BORDER_VOX
    return found


def mirrored(boxes_N6: Tensor, axes: Sequence[int], shape_vox: Size) -> Tensor:
    """Return the boxes of an image that was mirrored along ``axes`` in the image itself."""
    ends = boxes_N6.clone()
    for axis in axes:
        ends[:, axis] = shape_vox[axis] - boxes_N6[:, axis + 3]
        ends[:, axis + 3] = shape_vox[axis] - boxes_N6[:, axis]
    return ends


class _LogitsMean:
    """Average the logits of overlapping tiles with nnU-Net's Gaussian weights."""

    def __init__(self, patch_size: Size):
        gaussian: Tensor = compute_gaussian(
            tuple(patch_size),
            sigma_scale=1.0 / 8,
            value_scaling_factor=10,
            device=torch.device("cpu"),
        )
        self.gaussian = gaussian.float()
        self.total: Tensor | None = None
        self.weight: Tensor | None = None

    def add(self, logits_CZYX: Tensor, region: tuple[slice, ...], shape: Sequence[int]) -> None:
        """Add the logits of the tile in ``region`` of an image of ``shape``."""
        if self.total is None or self.weight is None:
            self.total = torch.zeros((logits_CZYX.shape[0], *shape))
            self.weight = torch.zeros(tuple(shape))
        every_channel = (slice(None), *region)
        self.total[every_channel] += logits_CZYX.float().cpu() * self.gaussian
        # Voxels in the middle of a tile are predicted best.
        self.weight[region] += self.gaussian

    def mean(self) -> Tensor:
        """Return the average (C, Z, Y, X); every voxel lies in some tile."""
        assert self.total is not None and self.weight is not None
        return self.total / self.weight
