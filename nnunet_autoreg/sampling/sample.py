"""A sequence as arrays, and a batch of sequences as tensors. Every objective reads batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_autoreg.geometry import Size
from nnunet_autoreg.sampling.affine import CropSource, resampled
from nnunet_autoreg.sampling.corruption import Corruption, Corruptions, stacked
from nnunet_autoreg.sampling.flip_transpose import UNCHANGED, FlipTranspose


@dataclass(frozen=True)
class Sample:
    """One sequence of M members, which share a grid; tokens go member by member in raster order.

    Attributes:
        voxels: (M, C, Z, Y, X) float32, 0 in padding.
        valid_mask: (M, Z, Y, X) bool, False in padding.
        order_index: (T,) int64, position in the order of every token's block, 0..K-1.
        prefix: number of given blocks.
        positions: (T,) int64, raster index of every token in the plan's grid; None if one member
            fills it in order.
        members: (T,) int64, the member code of every token (``kinds.member_codes``); None if all
            are 0.
        loss_mask: (M, Z, Y, X) bool, False where a voxel carries no loss although it is not
            padding; None if all voxels carry loss.
        flip_transpose: mirroring and transposing that ``voxels`` and ``valid_mask`` still need. All
            other fields describe the sample afterwards.
        sources: per member, what its crop still has to be resampled from, before it is mirrored;
            until then ``voxels`` and ``valid_mask`` are all zeros. () if crops are neither rotated
            nor zoomed.
        corruption: how the objective has to corrupt the network's input; None without corruption.
        case_id: number of the case in its pool, volumes before images; None if no objective asks.
        number: index of the sample within its step's batch; None if no objective asks.
    """

    voxels: NDArray[np.float32]
    valid_mask: NDArray[np.bool_]
    order_index: NDArray[np.int64]
    prefix: int
    positions: NDArray[np.int64] | None = None
    members: NDArray[np.int64] | None = None
    loss_mask: NDArray[np.bool_] | None = None
    flip_transpose: FlipTranspose = UNCHANGED
    sources: tuple[CropSource, ...] = ()
    corruption: Corruption | None = None
    case_id: int | None = None
    number: int | None = None

    def augmented(self) -> "Sample":
        """Return the sample after resampling, mirroring and transposing."""
        voxels, valid_mask = self.voxels, self.valid_mask

        if self.sources:
            size = self.voxels.shape[2:]
            crops = [resampled(source, size) for source in self.sources]
            voxels = np.stack([crop.numpy() for crop, _ in crops])  # (M, C, Z, Y, X)
            valid_mask = np.stack([mask.numpy() for _, mask in crops])  # (M, Z, Y, X)

        return replace(
            self,
            voxels=self.flip_transpose.array(voxels),
            valid_mask=self.flip_transpose.array(valid_mask),
            flip_transpose=UNCHANGED,
            sources=(),
        )


def empty_crops(num_members: int, size: Size) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return placeholders for crops that are resampled later: zeros that take no memory."""
    zero, padding = np.float32(0), np.bool_(False)
    voxels = np.broadcast_to(zero, (num_members, 1, *size))  # (M, 1, Z, Y, X)
    valid_mask = np.broadcast_to(padding, (num_members, *size))  # (M, Z, Y, X)
    return voxels, valid_mask


@dataclass(frozen=True)
class Batch:
    """Samples of one kind: every array of ``Sample`` with an axis B in front; ``prefix`` is (B,).

    Attributes:
        flip_transposes: per sample, the mirroring and transposing that ``to`` still has to do; ()
            if there is none. They stay on the host, which need not wait for the device then.
        sources: per sample, the parts of scans from which ``to`` still has to resample its crops;
            () if no sample has any.
        corruption: corruption of the network's input, for ``corruption.corrupted``; ``to`` draws
            its noise. None without corruption.
        case_ids, numbers: (B,) int64, ``case_id`` and ``number`` of every sample; None without.
    """

    voxels: Tensor
    valid_mask: Tensor
    order_index: Tensor
    prefix: Tensor
    positions: Tensor | None = None
    members: Tensor | None = None
    loss_mask: Tensor | None = None
    flip_transposes: tuple[FlipTranspose, ...] = ()
    sources: tuple[tuple[CropSource, ...], ...] = ()
    corruption: Corruptions | None = None
    case_ids: Tensor | None = None
    numbers: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``, where crops are rotated, zoomed, mirrored and transposed.

        The copy does not block if memory is pinned. This batch does not change, but tensors that
        are on the device already may be shared.
        """
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        if self.corruption is not None:
            moved = replace(moved, corruption=self.corruption.with_noise(moved.voxels))
        if not self.flip_transposes and not self.sources:
            return moved

        voxels = torch.empty_like(moved.voxels)  # (B, M, C, Z, Y, X)
        valid_mask = torch.empty_like(moved.valid_mask)  # (B, M, Z, Y, X)
        for number in range(len(voxels)):
            crops = moved.voxels[number]  # (M, C, Z, Y, X)
            masks = moved.valid_mask[number]  # (M, Z, Y, X)

            sources = self.sources[number] if self.sources else ()
            if sources:
                size = crops.shape[2:]
                members = [resampled(source.to(device), size) for source in sources]
                crops = torch.stack([crop for crop, _ in members])
                masks = torch.stack([mask for _, mask in members])

            # The shape stays the same, because only axes of equal length change places.
            flip_transpose = self.flip_transposes[number] if self.flip_transposes else UNCHANGED
            voxels[number].copy_(flip_transpose.tensor(crops))
            valid_mask[number].copy_(flip_transpose.tensor(masks))

        return replace(moved, voxels=voxels, valid_mask=valid_mask, flip_transposes=(), sources=())

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory. torch's DataLoader calls this."""
        sources = []
        for of_sample in self.sources:
            sources.append(tuple(source.pin_memory() for source in of_sample))

        corruption = None if self.corruption is None else self.corruption.pin_memory()
        pinned = self._each(Tensor.pin_memory)
        return replace(pinned, sources=tuple(sources), corruption=corruption)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with ``change`` applied to every tensor."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
        return replace(self, **changed)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one plan and one kind."""
    corruptions = [s.corruption for s in samples if s.corruption is not None]
    assert len(corruptions) in (0, len(samples)), "a batch holds samples of one plan and purpose"

    # Empty if nothing is left to do, so that ``Batch.to`` copies nothing.
    flip_transposes = tuple(s.flip_transpose for s in samples)
    if all(flip_transpose == UNCHANGED for flip_transpose in flip_transposes):
        flip_transposes = ()
    sources = tuple(s.sources for s in samples)
    if not any(sources):
        sources = ()

    voxels = np.stack([s.voxels for s in samples])  # (B, M, C, Z, Y, X)
    valid_mask = np.stack([s.valid_mask for s in samples])  # (B, M, Z, Y, X)
    order_index = np.stack([s.order_index for s in samples])  # (B, T)
    prefix = [s.prefix for s in samples]  # (B,)

    return Batch(
        voxels=torch.from_numpy(voxels),
        valid_mask=torch.from_numpy(valid_mask),
        order_index=torch.from_numpy(order_index),
        prefix=torch.tensor(prefix, dtype=torch.int64),
        positions=_stacked([s.positions for s in samples]),  # (B, T)
        members=_stacked([s.members for s in samples]),  # (B, T)
        loss_mask=_stacked([s.loss_mask for s in samples]),  # (B, M, Z, Y, X)
        flip_transposes=flip_transposes,
        sources=sources,
        corruption=stacked(corruptions) if corruptions else None,
        case_ids=_numbers([s.case_id for s in samples]),
        numbers=_numbers([s.number for s in samples]),
    )


def _numbers(values: Sequence[int | None]) -> Tensor | None:
    """Return the numbers as a tensor (B,); None if there are none."""
    given = [value for value in values if value is not None]
    if not given:
        return None
    return torch.tensor(given, dtype=torch.int64)


def _stacked(arrays: "Sequence[NDArray[np.int64] | NDArray[np.bool_] | None]") -> Tensor | None:
    """Return the arrays as one tensor with an axis in front; None if there are none."""
    given = [array for array in arrays if array is not None]
    assert len(given) in (0, len(arrays)), "a batch holds sequences of one kind"
    if not given:
        return None
    return torch.from_numpy(np.stack(given))
