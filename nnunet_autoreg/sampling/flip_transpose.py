"""Mirroring and transposing of crops: drawn when a crop is read, applied where it is used."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.plan import Plan

Flips = tuple[bool, bool, bool]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class FlipTranspose:
    """Mirror the last three axes (z, y, x), then reorder them. Axes before them stay.

    Attributes:
        flips: whether each axis is mirrored.
        axes: the order in which the mirrored axes are taken.
    """

    flips: Flips = (False, False, False)
    axes: Size = (0, 1, 2)

    def array(self, whole: NDArray[Scalar]) -> NDArray[Scalar]:
        """Return the changed array (..., Z, Y, X), contiguous."""
        mirrored = np.flip(whole, self._mirrored_axes(whole))
        reordered = mirrored.transpose(self._order(whole))
        return np.ascontiguousarray(reordered)

    def tensor(self, whole: Tensor) -> Tensor:
        """Return the changed tensor (..., Z, Y, X); a view if nothing is mirrored.

        On a device this is queued without waiting.
        """
        axes = self._mirrored_axes(whole)
        mirrored = whole.flip(axes) if axes else whole
        return mirrored.permute(self._order(whole))

    def _mirrored_axes(self, whole: "NDArray[Any] | Tensor") -> tuple[int, ...]:
        first = whole.ndim - 3
        return tuple(first + axis for axis in range(3) if self.flips[axis])

    def _order(self, whole: "NDArray[Any] | Tensor") -> tuple[int, ...]:
        first = whole.ndim - 3
        z, y, x = self.axes
        return (*range(first), first + z, first + y, first + x)


UNCHANGED = FlipTranspose()


def draw_flip_transpose(
    plan: Plan,
    size_vox: Sequence[int],
    spacing_mm: Sequence[float],
    generator: np.random.Generator,
) -> FlipTranspose:
    """Draw which axes of crops of ``size_vox`` are mirrored, and their order."""
    flips: Flips = (False, False, False)
    if plan.sequence.flip:
        z, y, x = (bool(flip) for flip in generator.integers(0, 2, size=3))
        flips = (z, y, x)

    axes: Size = (0, 1, 2)
    if plan.sequence.swap_axes:
        drawn_axes = as_size(generator.permutation(3).tolist())
        pairs = enumerate(drawn_axes)
        if all(may_swap(old, new, size_vox, spacing_mm) for old, new in pairs):
            axes = drawn_axes

    return FlipTranspose(flips, axes)


def may_swap(a: int, b: int, size_vox: Sequence[int], spacing_mm: Sequence[float]) -> bool:
    """Return whether two axes may change places: equal lengths, and spacings equal to 1 %."""
    ratio = spacing_mm[a] / spacing_mm[b]
    return size_vox[a] == size_vox[b] and abs(ratio - 1) < 0.01
