"""The inputs of planning: the scans in numbers, the hardware, and the user's values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_autoreg.corpus.fingerprint import Fingerprint, GroupPrint
from nnunet_autoreg.geometry import Size, Spacing, size_text, smaller_of, volume
from nnunet_autoreg.machine import GIB, memory_bytes
from nnunet_autoreg.model.sizes import EncoderSize
from nnunet_autoreg.plan import IntensityWindow

BY_USER = "set by the user"
MOSTLY_PADDING = 0.25
USABLE_GPU, USABLE_ELSEWHERE = 0.8, 0.5
MemoryOf = Callable[[EncoderSize, Size, bool], tuple[float, float]]
"""(encoder, crop, activations checkpointed) -> fixed bytes and bytes per crop of a training step.
"""


@dataclass(frozen=True)
class Hardware:
    """The device of a run and its memory.

    Attributes:
        device: "cpu", "cuda" or "mps".
        memory_gib: memory of the GPU, or of the machine without one.
    """

    device: str
    memory_gib: float

    @property
    def usable_bytes(self) -> float:
        """Memory that a training step may take.

        It is 80 % of a GPU's, or half of a machine's, which other programs use too.
        """
        return self.usable_share * self.memory_gib * GIB

    @property
    def usable_share(self) -> float:
        """The same as a share of ``memory_gib``."""
        return USABLE_GPU if self.device == "cuda" else USABLE_ELSEWHERE


def hardware_of(device: str, memory_gib: float | None = None) -> Hardware:
    """Return the device and the memory to plan for: ``memory_gib``, or by default all there is."""
    if memory_gib is not None:
        return Hardware(device, memory_gib)

    if device == "cuda":
        import torch

        return Hardware(device, torch.cuda.get_device_properties(0).total_memory / GIB)
    return Hardware(device, memory_bytes() / GIB)


@dataclass(frozen=True)
class Pool:
    """Facts about the scans from which a run is planned.

    Attributes:
        spacing_mm: target spacing; of several, that of the largest group.
        median_shape_vox, total_vox: after resampling.
        ct_window: None if there is no CT among the scans.
        groups: scans by target spacing.
    """

    num_scans: int
    spacing_mm: Spacing
    median_shape_vox: Size
    total_vox: int
    ct_window: IntensityWindow | None
    groups: tuple[GroupPrint, ...] = ()


@dataclass(frozen=True)
class Overrides:
    """The values that the user set; None is planned.

    At most one of ``num_steps``, ``num_epochs`` and ``num_hours`` is set.

    Attributes:
        token_size_vox: token size of the weights that training starts from, or of arguments that
            the user set; None is planned.
        arguments: arguments of the network of the CNN that training starts from; None is planned.
        single_tokens: the planned encoder has to go token by token, which a CNN cannot (``--preset
            faithful``).
    """

    encoder: str = "auto"
    batch_size: int | None = None
    num_steps: int | None = None
    num_epochs: float | None = None
    num_hours: float | None = None
    single_tokens: bool = False
    token_size_vox: Size | None = None
    arguments: dict[str, Any] | None = None


def pool_of(fingerprint: Fingerprint) -> Pool:
    """Return the part of a fingerprint that decides the plan."""
    f = fingerprint
    return Pool(f.num_scans, f.spacing_mm, f.median_shape_vox, f.total_vox, f.ct_window, f.groups)


def unpadded_voxels(crop: Sequence[int], shape_vox: Sequence[int]) -> int:
    """Return how many voxels of a crop a scan of ``shape_vox`` fills; the rest is padding."""
    return volume(smaller_of(crop, shape_vox))


def unpadded_share(crop: Sequence[int], shape_vox: Sequence[int]) -> float:
    """Return the same as a share of the crop."""
    return unpadded_voxels(crop, shape_vox) / volume(crop)


def dimensions(values: Sequence[float]) -> str:
    """Return sizes or spacings as text with four digits: "32 x 48 x 32"."""
    return size_text(values, ".4g")


def count_of(number: float) -> str:
    """Return a large number as text: 37.2 thousand."""
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"
