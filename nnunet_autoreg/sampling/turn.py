"""How a crop is mirrored and its axes are reordered: chosen where it is read, carried out where it
is used.
"""

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
class Turn:
    """Mirror, then reorder the last three axes (z, y, x); whatever axes come before them stay.

    Attributes:
        flips: whether each axis is mirrored.
        axes: the order in which the mirrored axes are taken.
    """

    flips: Flips = (False, False, False)
    axes: Size = (0, 1, 2)

    def array(self, whole: NDArray[Scalar]) -> NDArray[Scalar]:
        """The turned array (..., Z, Y, X), contiguous."""
        return np.ascontiguousarray(
            np.flip(whole, self._mirrored(whole)).transpose(self._order(whole))
        )

    def tensor(self, whole: Tensor) -> Tensor:
        """The same of a tensor, as a view where nothing is mirrored; on a device, queued there
        without waiting for it.
        """
        mirrored = self._mirrored(whole)
        return (whole.flip(mirrored) if mirrored else whole).permute(self._order(whole))

    def _mirrored(self, whole: "NDArray[Any] | Tensor") -> tuple[int, ...]:
        return tuple(whole.ndim - 3 + axis for axis, flip in enumerate(self.flips) if flip)

    def _order(self, whole: "NDArray[Any] | Tensor") -> tuple[int, ...]:
        before = whole.ndim - 3
        return (*range(before), *(before + axis for axis in self.axes))


AS_READ = Turn()


def draw_turn(
    plan: Plan, size_vox: Sequence[int], spacing_mm: Sequence[float], generator: np.random.Generator
) -> Turn:
    """Which axes to mirror, and their order, of crops of ``size_vox``."""
    flips = draw_flips(plan, generator)
    return Turn(flips, draw_axes(plan, size_vox, spacing_mm, generator))


def draw_flips(plan: Plan, generator: np.random.Generator) -> Flips:
    """Which axes to mirror."""
    if not plan.sequence.flip:
        return (False, False, False)
    z, y, x = (bool(f) for f in generator.integers(0, 2, size=3))
    return (z, y, x)


def draw_axes(
    plan: Plan, size_vox: Sequence[int], spacing_mm: Sequence[float], generator: np.random.Generator
) -> Size:
    """A random permutation of the axes that moves only axes of equal crop length and equal spacing
    (to 1 %).
    """
    if not plan.sequence.swap_axes:
        return (0, 1, 2)
    wish = generator.permutation(3)
    equal = all(
        size_vox[i] == size_vox[j] and abs(spacing_mm[i] / spacing_mm[j] - 1) < 0.01
        for i, j in enumerate(wish)
    )
    return as_size(wish.tolist()) if equal else as_size((0, 1, 2))
