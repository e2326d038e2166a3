"""A sequence as arrays, and a batch of them as tensors: what every objective reads."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

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
        positions: (T,) int64, raster index of every token in the plan's grid; None where one member fills it in order.
        members: (T,) int64, the member code of every token (``kinds.member_codes``); None where all are 0.
        scored: (M, Z, Y, X) bool, False where a voxel carries no loss although it is real; None where all do.
    """

    voxels: NDArray[np.float32]
    real: NDArray[np.bool_]
    ranks: NDArray[np.int64]
    prefix: int
    positions: NDArray[np.int64] | None = None
    members: NDArray[np.int64] | None = None
    scored: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Batch:
    """Samples of one kind stacked: every array of ``Sample`` with an axis B in front, prefix (B,)."""

    voxels: Tensor
    real: Tensor
    ranks: Tensor
    prefix: Tensor
    positions: Tensor | None = None
    members: Tensor | None = None
    scored: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``, copied without waiting where memory is pinned."""
        return Batch(*(None if t is None else t.to(device, non_blocking=True) for t in self._tensors()))  # type: ignore[arg-type]

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return Batch(*(None if t is None else t.pin_memory() for t in self._tensors()))  # type: ignore[arg-type]

    def _tensors(self) -> list[Tensor | None]:
        return [getattr(self, f.name) for f in fields(self)]


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one plan and one kind."""
    return Batch(
        torch.from_numpy(np.stack([s.voxels for s in samples])),
        torch.from_numpy(np.stack([s.real for s in samples])),
        torch.from_numpy(np.stack([s.ranks for s in samples])),
        torch.tensor([s.prefix for s in samples], dtype=torch.int64),
        _stacked([s.positions for s in samples]),
        _stacked([s.members for s in samples]),
        _stacked([s.scored for s in samples]),
    )


def _stacked(arrays: "Sequence[NDArray[np.int64] | NDArray[np.bool_] | None]") -> Tensor | None:
    given = [a for a in arrays if a is not None]
    assert len(given) in (0, len(arrays)), "a batch holds sequences of one kind"
    return torch.from_numpy(np.stack(given)) if given else None
