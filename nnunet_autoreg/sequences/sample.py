"""A sequence as arrays, and a batch of them as tensors: what every objective reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One sequence. M members share a grid; tokens run member by member in raster order.

    Attributes:
        voxels: (M, C, Z, Y, X) float32, 0 where there is padding.
        real: (M, Z, Y, X) bool, False where there is padding.
        ranks: (T,) int64, block rank of every token.
        prefix: number of given blocks.
    """

    voxels: NDArray[np.float32]
    real: NDArray[np.bool_]
    ranks: NDArray[np.int64]
    prefix: int


@dataclass(frozen=True)
class Batch:
    """Samples stacked: voxels (B, M, C, Z, Y, X), real (B, M, Z, Y, X), ranks (B, T), prefix (B,)."""

    voxels: Tensor
    real: Tensor
    ranks: Tensor
    prefix: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``, copied without waiting where memory is pinned."""
        moved = (t.to(device, non_blocking=True) for t in (self.voxels, self.real, self.ranks, self.prefix))
        return Batch(*moved)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return Batch(*(t.pin_memory() for t in (self.voxels, self.real, self.ranks, self.prefix)))


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one plan."""
    return Batch(
        torch.from_numpy(np.stack([s.voxels for s in samples])),
        torch.from_numpy(np.stack([s.real for s in samples])),
        torch.from_numpy(np.stack([s.ranks for s in samples])),
        torch.tensor([s.prefix for s in samples], dtype=torch.int64),
    )
