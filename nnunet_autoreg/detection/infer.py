"""Boxes of a whole scan: tiles, mirrorings and models give candidates, which are thinned and merged
as in nnDetection v0.1.

Every pair of a model and a mirroring is a voter. Within a tile candidates overlapping by 0.6 are
thinned; those of one voter by 0.1, boxes near a tile's border, which may be cut, counting less;
what several voters found is merged by weighted box clustering.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, combinations
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
from nnunet_autoreg.geometry import Size, as_size

MOST_PER_TILE, MOST_CANDIDATES = 1000, 1000
BORDER_WEIGHT = 0.5
REACHED_VOX = 0.5
LOWEST_SCORE = 1e-3
"""Below it nothing is a candidate; heads start at 0.01 for every anchor."""


@dataclass(frozen=True)
class Thinning:
    """Overlaps (IoU) and numbers at every stage.

    Attributes:
        tile_iou, voter_iou: above it the lower score goes.
        merge_iou: above it boxes of different voters are one.
        cut_factor: what the score of a box is multiplied with that ends at a border between tiles:
            the object may go on beyond it, and another tile shows it whole, unless it is larger
            than half a tile.
        most_per_tile, most_boxes: kept in a tile, and in the end.
    """

    tile_iou: float = 0.6
    voter_iou: float = 0.1
    merge_iou: float = 0.5
    cut_factor: float = 0.5
    most_per_tile: int = 100
    most_boxes: int = 100


USUAL = Thinning()


@dataclass(frozen=True)
class Candidates:
    """Boxes before merging, in voxel edges of the preprocessed image.

    Attributes:
        labels_N: place of the class.
        weights_N: 1 for a box in the middle of its tile, down to 0.5 at its border.
        voters_N: which model and mirroring it comes from, from 0.
    """

    boxes_N6: Tensor  # noqa: N815
    scores_N: Tensor  # noqa: N815
    labels_N: Tensor  # noqa: N815
    weights_N: Tensor  # noqa: N815
    voters_N: Tensor  # noqa: N815


@dataclass(frozen=True)
class Found:
    """What is left, highest score first; ``votes_N`` says how many candidates were merged into
    each.
    """

    boxes_N6: Tensor  # noqa: N815
    scores_N: Tensor  # noqa: N815
    labels_N: Tensor  # noqa: N815
    votes_N: Tensor  # noqa: N815


def joined(parts: Sequence[Candidates]) -> Candidates:
    """All candidates of several parts; at least one is needed."""
    names = ("boxes_N6", "scores_N", "labels_N", "weights_N", "voters_N")
    return Candidates(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def merge(candidates: Candidates, num_voters: int, thinning: Thinning = USUAL) -> Found:
    """Thin the candidates of every voter and merge those of all."""
    kept = []
    for voter in range(num_voters):
        own = torch.nonzero(candidates.voters_N == voter)[:, 0]
        rank = candidates.scores_N[own] * candidates.weights_N[own]
        kept.append(
            own[
                bx.nms(
                    candidates.boxes_N6[own],
                    rank,
                    thinning.voter_iou,
                    candidates.labels_N[own],
                    thinning.most_boxes,
                )
            ]
        )
    chosen = torch.cat(kept)
    boxes, scores, labels = (
        candidates.boxes_N6[chosen],
        candidates.scores_N[chosen],
        candidates.labels_N[chosen],
    )
    if num_voters == 1:
        order = torch.sort(scores, descending=True, stable=True).indices
        return Found(boxes[order], scores[order], labels[order], torch.ones_like(labels))
    expected = torch.full_like(scores, float(num_voters))
    merged = bx.cluster(
        boxes,
        scores,
        labels,
        thinning.merge_iou,
        weights_N=candidates.weights_N[chosen],
        expected_N=expected,
    )
    return Found(*(values[: thinning.most_boxes] for values in merged))


def boxes_of_output(
    output: Output, grid: AnchorGrid, thinning: Thinning = USUAL
) -> list[Candidates]:
    """The candidates of each patch of a batch, thinned, clipped to the patch; of voter 0 and
    weighted by their place in it.
    """
    shape = as_size(output.logits_BCZYX.shape[2:])
    found = []
    for scores_AK, codes_A6 in zip(
        output.scores_BAK.float().sigmoid(), output.codes_BA6.float(), strict=True
    ):
        best = scores_AK.flatten().topk(min(MOST_PER_TILE, scores_AK.numel()))
        enough = best.values >= LOWEST_SCORE
        scores, index = best.values[enough], best.indices[enough]
        anchors, labels = index // scores_AK.shape[1], index % scores_AK.shape[1]
        boxes = bx.clip(bx.decode(codes_A6[anchors], grid.boxes_A6[anchors]), shape)
        whole = torch.nonzero((bx.sizes(boxes) > 0).all(1))[:, 0]
        kept = whole[
            bx.nms(
                boxes[whole],
                scores[whole],
                thinning.tile_iou,
                labels[whole],
                thinning.most_per_tile,
            )
        ]
        boxes = boxes[kept]
        found.append(
            Candidates(
                boxes,
                scores[kept],
                labels[kept],
                place_weights(boxes, shape),
                torch.zeros_like(labels[kept]),
            )
        )
    return found


def place_weights(boxes_N6: Tensor, shape_vox: Size) -> Tensor:
    """(N,) weight of a box by where its centre lies in a tile:

    1 in the middle, 0.5 at the nearest border.
    """
    half = torch.tensor(shape_vox, dtype=boxes_N6.dtype, device=boxes_N6.device) / 2
    away = ((bx.centres(boxes_N6) - half).abs() / half).clamp(max=1)
    return 1 - (1 - BORDER_WEIGHT) * away.amax(1) if len(boxes_N6) else boxes_N6.new_zeros(0)


class ScanDetector:
    """Runs detectors over whole preprocessed scans.

    Args:
        network: in evaluation mode with ``detect`` set; unwrapped.
        anchors: the plan's.
        patch_size: of a tile.
        mirror_axes: (0: z, 1: y, 2: x) along which to mirror too; every combination of them is a
            voter.
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
        thinning: Thinning = USUAL,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.network, self.anchors, self.patch_size, self.device = (
            network,
            anchors,
            patch_size,
            device,
        )
        self.thinning, self.autocast = thinning, autocast
        self.mirrorings = list(
            chain.from_iterable(combinations(mirror_axes, n) for n in range(len(mirror_axes) + 1))
        )
        self.grids: dict[tuple[Size, ...], AnchorGrid] = {}

    @property
    def num_voters(self) -> int:
        """Of one model."""
        return len(self.mirrorings)

    @torch.inference_mode()
    def candidates(
        self, image_CZYX: Tensor, with_logits: bool = False
    ) -> tuple[Candidates, Tensor | None]:
        """The candidates of a preprocessed scan (at most 1000 a voter), and its segmentation logits
        (C, Z, Y, X) if asked for.

        Raises:
            WeightsError: the network answers with numbers that are none.
        """
        padded, inner = pad_nd_image(
            image_CZYX, self.patch_size, "constant", {"value": 0}, True, None
        )
        origin = torch.tensor([s.start or 0 for s in inner[1:]], dtype=torch.float32)
        logits = _Sum(self.patch_size) if with_logits else None
        parts = [
            part
            for start in self._tiles(as_size(padded.shape[1:]))
            for part in self._tile(padded, start, logits)
        ]
        found = joined(parts)
        shift = torch.cat([origin, origin])
        shape = as_size(image_CZYX.shape[1:])
        moved = Candidates(
            bx.clip(found.boxes_N6 - shift, shape),
            found.scores_N,
            found.labels_N,
            found.weights_N,
            found.voters_N,
        )
        best = _best(moved, self.num_voters)
        inside = (slice(None), *inner[1:])
        return best, None if logits is None else logits.mean()[inside]

    def _tiles(self, shape: Size) -> Iterator[Size]:
        steps = compute_steps_for_sliding_window(shape, self.patch_size, 0.5)
        for z in steps[0]:
            for y in steps[1]:
                for x in steps[2]:
                    yield as_size((z, y, x))

    def _tile(self, padded: Tensor, start: Size, logits: "_Sum | None") -> Iterator[Candidates]:
        place = tuple(slice(s, s + p) for s, p in zip(start, self.patch_size, strict=True))
        voxels = (slice(None), *place)
        tile = padded[voxels][None].to(self.device)
        shift = torch.tensor([*start, *start], dtype=torch.float32)
        for voter, axes in enumerate(self.mirrorings):
            dims = [a + 2 for a in axes]
            with self.autocast():
                output: Output = self.network(tile.flip(dims) if dims else tile)
            _check_finite(output)
            (found,) = boxes_of_output(output, self._grid(output.cells), self.thinning)
            boxes = mirrored(found.boxes_N6, axes, self.patch_size).cpu()
            is_cut = ends_between_tiles(boxes, start, self.patch_size, as_size(padded.shape[1:]))
            scores = torch.where(
                is_cut, found.scores_N.cpu() * self.thinning.cut_factor, found.scores_N.cpu()
            )
            yield Candidates(
                boxes + shift,
                scores,
                found.labels_N.cpu(),
                found.weights_N.cpu(),
                found.voters_N.cpu() + voter,
            )
            if logits is not None:
                logits.add(
                    output.logits_BCZYX[0].flip([a + 1 for a in axes])
                    if dims
                    else output.logits_BCZYX[0],
                    place,
                    padded.shape[1:],
                )

    def _grid(self, cells: tuple[Size, ...]) -> AnchorGrid:
        if cells not in self.grids:
            self.grids[cells] = lay_out(self.anchors, cells, self.device)
        return self.grids[cells]


def _check_finite(output: Output) -> None:
    """NaN would come first in the ranking of scores, and hide every box."""
    if not (torch.isfinite(output.scores_BAK).all() and torch.isfinite(output.codes_BA6).all()):
        raise WeightsError(
            "the network answers with scores or boxes that are not finite (NaN or infinite): its "
            "training diverged, or half "
            "precision is too narrow for it; look at training_log_*.txt, or detect with "
            "checkpoint_best.pth, or on a CPU"
        )


def ends_between_tiles(boxes_N6: Tensor, start: Size, patch_size: Size, shape_vox: Size) -> Tensor:
    """(N,) whether a box of the tile at ``start`` reaches a border of it, to half a voxel, beyond
    which the image goes on.
    """
    found = torch.zeros(len(boxes_N6), dtype=torch.bool)
    for axis in range(3):
        if start[axis] > 0:
            found |= boxes_N6[:, axis] <= REACHED_VOX
        if start[axis] + patch_size[axis] < shape_vox[axis]:
            found |= boxes_N6[:, axis + 3] >= patch_size[axis] - REACHED_VOX
    return found


def mirrored(boxes_N6: Tensor, axes: Sequence[int], shape_vox: Size) -> Tensor:
    """Boxes of an image mirrored along ``axes``, in the image itself."""
    ends = boxes_N6.clone()
    for axis in axes:
        ends[:, axis] = shape_vox[axis] - boxes_N6[:, axis + 3]
        ends[:, axis + 3] = shape_vox[axis] - boxes_N6[:, axis]
    return ends


def _best(candidates: Candidates, num_voters: int) -> Candidates:
    """Boxes with an extent, and of every voter the 1000 of highest score."""
    chosen = []
    has_extent = (bx.sizes(candidates.boxes_N6) > 0).all(1)
    for voter in range(num_voters):
        own = torch.nonzero((candidates.voters_N == voter) & has_extent)[:, 0]
        chosen.append(own[candidates.scores_N[own].topk(min(MOST_CANDIDATES, len(own))).indices])
    index = torch.cat(chosen)
    return Candidates(
        *(
            getattr(candidates, n)[index]
            for n in ("boxes_N6", "scores_N", "labels_N", "weights_N", "voters_N")
        )
    )


class _Sum:
    """Logits of overlapping tiles, averaged with nnU-Net's Gaussian weights."""

    def __init__(self, patch_size: Size):
        cpu = torch.device("cpu")
        self.gaussian: Tensor = compute_gaussian(
            tuple(patch_size), sigma_scale=1.0 / 8, value_scaling_factor=10, device=cpu
        ).float()
        self.total: Tensor | None = None
        self.weight: Tensor | None = None

    def add(self, logits_CZYX: Tensor, place: tuple[slice, ...], shape: Sequence[int]) -> None:
        """Add a tile's."""
        if self.total is None or self.weight is None:
            self.total, self.weight = (
                torch.zeros((logits_CZYX.shape[0], *shape)),
                torch.zeros(tuple(shape)),
            )
        voxels = (slice(None), *place)
        self.total[voxels] += logits_CZYX.float().cpu() * self.gaussian
        self.weight[place] += self.gaussian

    def mean(self) -> Tensor:
        """The average; every voxel lies in some tile."""
        assert self.total is not None and self.weight is not None
        return self.total / self.weight
