"""A sequence as arrays, and a batch of them as tensors: what every objective reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_autoreg.geometry import Size
from nnunet_autoreg.sampling.affine import Source, resampled
from nnunet_autoreg.sampling.corruption import Corruption, Corruptions, stacked
from nnunet_autoreg.sampling.turn import AS_READ, Turn


@dataclass(frozen=True)
class Sample:
    """One sequence. M members share a grid; tokens run member by member in raster order.

    Attributes:
        voxels: (M, C, Z, Y, X) float32, 0 where there is padding.
        real: (M, Z, Y, X) bool, False where there is padding.
        ranks: (T,) int64, block rank of every token.
        prefix: number of given blocks.
        positions: (T,) int64, raster index of every token in the plan's grid; None where one member
            fills it in order.
        members: (T,) int64, the member code of every token (``kinds.member_codes``); None where all
            are 0.
        scored: (M, Z, Y, X) bool, False where a voxel carries no loss although it is real; None
            where all do.
        turn: what is still to be done to ``voxels`` and ``real``. All else speaks of them as they
            are afterwards.
        sources: per member, what its crop is still to be resampled from, before it is turned; until
            then ``voxels`` and ``real`` are all zeros. () where crops are neither rotated nor
            zoomed.
        corruption: how what the network is shown is corrupted, drawn here and carried out by the
            objective; None where the plan corrupts nothing.
    """

    voxels: NDArray[np.float32]
    real: NDArray[np.bool_]
    ranks: NDArray[np.int64]
    prefix: int
    positions: NDArray[np.int64] | None = None
    members: NDArray[np.int64] | None = None
    scored: NDArray[np.bool_] | None = None
    turn: Turn = AS_READ
    sources: tuple[Source, ...] = ()
    corruption: Corruption | None = None

    def turned(self) -> "Sample":
        """Return the sample with everything carried out that is still to be done to its voxels."""
        voxels, real = self.voxels, self.real
        if self.sources:
            size = self.voxels.shape[2:]
            crops = [resampled(source, size) for source in self.sources]
            voxels = np.stack([crop.numpy() for crop, _ in crops])
            real = np.stack([mask.numpy() for _, mask in crops])
        return replace(
            self,
            voxels=self.turn.array(voxels),
            real=self.turn.array(real),
            turn=AS_READ,
            sources=(),
        )


def unread(num_members: int, size: Size) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the zeros, (M, 1, Z, Y, X) and (M, Z, Y, X), that stand for crops until they are
    resampled. They take no memory.
    """
    return np.broadcast_to(np.float32(0), (num_members, 1, *size)), np.broadcast_to(
        np.bool_(False), (num_members, *size)
    )


@dataclass(frozen=True)
class Batch:
    """Samples of one kind stacked: every array of ``Sample`` with an axis B in front, prefix (B,).

    Attributes:
        turns: what ``to`` still has to do, sample by sample; () where nothing is. Known to the
            host, so that no device is waited for.
        sources: per sample, what ``to`` still has to resample its crops from; () for a sample, or
            for all of them, without.
        corruption: of what the network is shown, for ``corruption.corrupted``; ``to`` draws its
            noise. None without.
    """

    voxels: Tensor
    real: Tensor
    ranks: Tensor
    prefix: Tensor
    positions: Tensor | None = None
    members: Tensor | None = None
    scored: Tensor | None = None
    turns: tuple[Turn, ...] = ()
    sources: tuple[tuple[Source, ...], ...] = ()
    corruption: Corruptions | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``, copied without waiting where memory is pinned, and rotated,
        zoomed and turned there. What is not
        turned and already there is shared, what is turned is new: this batch stays as it is.
        """
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        if self.corruption is not None:
            moved = replace(moved, corruption=self.corruption.with_noise(moved.voxels))
        if not self.turns and not self.sources:
            return moved

        voxels, real = torch.empty_like(moved.voxels), torch.empty_like(moved.real)
        for number in range(len(voxels)):
            crops, masks = moved.voxels[number], moved.real[number]
            if self.sources and self.sources[number]:
                size = crops.shape[2:]
                members = [resampled(source.to(device), size) for source in self.sources[number]]
                crops = torch.stack([crop for crop, _ in members])
                masks = torch.stack([mask for _, mask in members])
            # A turn changes no shape, as only axes of equal length change places.
            turn = self.turns[number] if self.turns else AS_READ
            voxels[number].copy_(turn.tensor(crops))
            real[number].copy_(turn.tensor(masks))
        return replace(moved, voxels=voxels, real=real, turns=(), sources=())

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        sources = tuple(
            tuple(source.pin_memory() for source in members) for members in self.sources
        )
        corruption = None if self.corruption is None else self.corruption.pin_memory()
        return replace(self._each(Tensor.pin_memory), sources=sources, corruption=corruption)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {
            name: change(value) for name, value in given.items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one plan and one kind."""
    corruptions = [s.corruption for s in samples if s.corruption is not None]
    assert len(corruptions) in (0, len(samples)), "a batch holds samples of one plan and purpose"
    return Batch(
        torch.from_numpy(np.stack([s.voxels for s in samples])),
        torch.from_numpy(np.stack([s.real for s in samples])),
        torch.from_numpy(np.stack([s.ranks for s in samples])),
        torch.tensor([s.prefix for s in samples], dtype=torch.int64),
        _stacked([s.positions for s in samples]),
        _stacked([s.members for s in samples]),
        _stacked([s.scored for s in samples]),
        tuple(s.turn for s in samples) if any(s.turn != AS_READ for s in samples) else (),
        tuple(s.sources for s in samples) if any(s.sources for s in samples) else (),
        stacked(corruptions) if corruptions else None,
    )


def _stacked(arrays: "Sequence[NDArray[np.int64] | NDArray[np.bool_] | None]") -> Tensor | None:
    given = [a for a in arrays if a is not None]
    assert len(given) in (0, len(arrays)), "a batch holds sequences of one kind"
    return torch.from_numpy(np.stack(given)) if given else None
