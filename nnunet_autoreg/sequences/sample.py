"""A sequence as arrays, and a batch of them as tensors: what every objective reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_autoreg.sequences.turn import AS_READ, Turn


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
        turn: what is still to be done to ``voxels`` and ``real``. All else speaks of them as they are afterwards.
    """

    voxels: NDArray[np.float32]
    real: NDArray[np.bool_]
    ranks: NDArray[np.int64]
    prefix: int
    positions: NDArray[np.int64] | None = None
    members: NDArray[np.int64] | None = None
    scored: NDArray[np.bool_] | None = None
    turn: Turn = AS_READ

    def turned(self) -> "Sample":
        """The sample with its turn carried out."""
        return replace(self, voxels=self.turn.array(self.voxels), real=self.turn.array(self.real), turn=AS_READ)


@dataclass(frozen=True)
class Batch:
    """Samples of one kind stacked: every array of ``Sample`` with an axis B in front, prefix (B,).

    Attributes:
        turns: what ``to`` still has to do, sample by sample; () where nothing is. Known to the host, so that no device is waited for.
    """

    voxels: Tensor
    real: Tensor
    ranks: Tensor
    prefix: Tensor
    positions: Tensor | None = None
    members: Tensor | None = None
    scored: Tensor | None = None
    turns: tuple[Turn, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``, copied without waiting where memory is pinned, and turned there. What is not turned and already
        there is shared, what is turned is new: this batch stays as it is."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        if not self.turns:
            return moved
        return replace(moved, voxels=_turned(moved.voxels, self.turns), real=_turned(moved.real, self.turns), turns=())

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in given.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


def _turned(whole: Tensor, turns: Sequence[Turn]) -> Tensor:
    """(B, ..., Z, Y, X), each sample turned by its own; turns change no shape, as only axes of equal length change places."""
    out = torch.empty_like(whole)
    for target, source, turn in zip(out, whole, turns, strict=True):
        target.copy_(turn.tensor(source))
    return out


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
        tuple(s.turn for s in samples) if any(s.turn != AS_READ for s in samples) else (),
    )


def _stacked(arrays: "Sequence[NDArray[np.int64] | NDArray[np.bool_] | None]") -> Tensor | None:
    given = [a for a in arrays if a is not None]
    assert len(given) in (0, len(arrays)), "a batch holds sequences of one kind"
    return torch.from_numpy(np.stack(given)) if given else None
