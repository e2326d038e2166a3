"""What a step really takes: its peak of memory, on a GPU by the allocator's own count, on a CPU by following every tensor."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Line = dict[str, object]


@dataclass(frozen=True)
class Setting:
    """Where ``gpu.py`` runs.

    Attributes:
        is_small: the miniature for a CPU.
        minutes: of the pretraining by command.
    """

    device: torch.device
    is_small: bool
    minutes: float


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are alive on the CPU, and the most there were; what an operation needs inside itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known[storage._cdata] = storage
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


def peak_bytes(run: Callable[[], object], held: list[torch.Tensor], device: torch.device) -> int:
    """The most bytes in use while ``run`` runs.

    Args:
        held: tensors that are there before and count: parameters, moments, inputs. On a GPU all that is there counts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    counted = LiveBytes()
    for tensor in held:
        counted.add(tensor)
    with counted:
        run()
    return counted.peak


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-12))
