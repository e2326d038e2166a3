"""Cut a scan of any size into tiles of one size, and compute the features of an encoder for it.

Shape suffixes: C channels, Z Y X voxels, V features, z y x positions of a feature map.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_autoreg.geometry import Size, as_size, box_at, round_up


def is_smaller(shape_vox: Sequence[int], tile_size: Sequence[int]) -> bool:
    """Return whether a scan is smaller than a tile along some axis, so that zeros are added."""
    return any(size < tile for size, tile in zip(shape_vox, tile_size, strict=True))


@dataclass(frozen=True)
class ScanTile:
    """Hold one tile of a scan.

    Attributes:
        start: first voxel of the tile in the padded scan, a multiple of the token size.
        image_1CZYX: voxels of the tile.
        inside_11ZYX: 1 for voxels that count, 0 for others and for padding.
    """

    start: Size
    image_1CZYX: Tensor  # noqa: N815
    inside_11ZYX: Tensor  # noqa: N815


class TiledScan:
    """A scan that is padded with zeros on both sides, and cut into as few tiles as cover it.

    Args:
        image_CZYX: preprocessed.
        tile_size: (z, y, x) voxels, a multiple of the token size.
        token_size: tiles start at multiples of it, so that feature maps of tiles fit together.
        counted_ZYX: 1 for voxels that count, 0 for others; all voxels count if it is None.
    """

    def __init__(
        self,
        image_CZYX: Tensor,
        tile_size: Size,
        token_size: Size,
        counted_ZYX: Tensor | None = None,
    ):
        self.tile_size = tile_size
        self.token_size = token_size
        shape = as_size(image_CZYX.shape[1:])
        rounded = round_up(shape, token_size)
        padded = []
        offset = []
        padding: list[int] = []
        for axis in range(3):
            size = max(rounded[axis], tile_size[axis])
            low = (size - shape[axis]) // 2
            padded.append(size)
            offset.append(low)
            # torch wants the last axis first.
            padding = [low, size - shape[axis] - low, *padding]
        self.shape = as_size(padded)
        # First voxel of the scan in the padded scan.
        self.offset = as_size(offset)
        self.image_CZYX = functional.pad(image_CZYX, padding)
        counted = torch.ones(shape) if counted_ZYX is None else counted_ZYX
        self.inside_ZYX = functional.pad(counted, padding)

    def starts(self) -> list[Size]:
        """Return the first voxels of the tiles, evenly spread along each axis."""
        per_axis = []
        for size, tile, token in zip(self.shape, self.tile_size, self.token_size, strict=True):
            num_tiles = math.ceil(size / tile)
            # In tokens. A single tile starts at 0.
            last = (size - tile) // token
            steps = [round(last * n / max(1, num_tiles - 1)) for n in range(num_tiles)]
            per_axis.append([step * token for step in steps])
        return [as_size(start) for start in product(*per_axis)]

    def __iter__(self) -> Iterator[ScanTile]:
        """Yield every tile with a voxel that counts."""
        for start in self.starts():
            z, y, x = box_at(start, self.tile_size)
            image = self.image_CZYX[None, :, z, y, x]
            inside = self.inside_ZYX[None, None, z, y, x]
            if bool(inside.any()):
                yield ScanTile(start, image, inside)


@dataclass(frozen=True)
class ScanFeatures:
    """Hold the features of a scan.

    Attributes:
        mean_V: mean over all positions, weighted by the share of their voxels that count.
        map_Vzyx: the features of every position of the padded scan; None if not wanted.
    """

    mean_V: Tensor  # noqa: N815
    map_Vzyx: Tensor | None  # noqa: N815


@torch.no_grad()
def features_of_scan(
    feature_map: Callable[[Tensor], Tensor],
    scan: TiledScan,
    with_map: bool = False,
) -> ScanFeatures:
    """Return the features of all tiles together; tiles that overlap are averaged.

    Args:
        feature_map: computes the feature map (1, V, z, y, x) of a tile (1, C, Z, Y, X).
        with_map: also return the features of every position.
    """
    total_V: Tensor | None = None
    weight = 0.0
    sums: Tensor | None = None
    counts: Tensor | None = None
    for tile in scan:
        features = feature_map(tile.image_1CZYX).float().cpu()[0]  # (V, z, y, x)
        grid = as_size(features.shape[1:])
        share_zyx = functional.adaptive_avg_pool3d(tile.inside_11ZYX, grid)[0, 0]
        added_V = (features * share_zyx).sum((1, 2, 3))
        total_V = added_V if total_V is None else total_V + added_V
        weight += float(share_zyx.sum())

        if with_map:
            strides = [size // cells for size, cells in zip(scan.tile_size, grid, strict=True)]
            if sums is None or counts is None:
                whole = [size // stride for size, stride in zip(scan.shape, strides, strict=True)]
                sums = torch.zeros(len(features), *whole)
                counts = torch.zeros(*whole)

            # Where the tile's feature map lies in that of the padded scan.
            first = [low // stride for low, stride in zip(tile.start, strides, strict=True)]
            z, y, x = box_at(first, grid)
            sums[:, z, y, x] += features
            counts[z, y, x] += 1

    assert total_V is not None, "a scan has at least one voxel"
    map_Vzyx = None
    if sums is not None and counts is not None:
        # Tiles without a voxel that counts are skipped, and their positions stay 0.
        map_Vzyx = sums / counts.clamp(min=1)
    return ScanFeatures(total_V / weight, map_Vzyx)
