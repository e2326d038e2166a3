"""Start nnU-Net's loading processes for our own loaders."""

from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA


def started(training_loader: Any, validation_loader: Any, is_cuda: bool) -> tuple[Any, Any]:
    """Return both loaders in as many processes as nnU-Net would start, or in this one.

    Args:
        is_cuda: whether batches are copied to a GPU.
    """
    num_processes = get_allowed_n_proc_DA()
    if num_processes == 0:
        made = (
            SingleThreadedAugmenter(training_loader, None),
            SingleThreadedAugmenter(validation_loader, None),
        )
    else:
        made = (
            _processes(training_loader, num_processes, is_cuda),
            _processes(validation_loader, max(1, num_processes // 2), is_cuda),
        )
    # As nnU-Net does, draw one batch, so that the processes start.
    for augmenter in made:
        next(augmenter)
    return made


def _processes(loader: Any, num_processes: int, is_cuda: bool) -> Any:
    """Return a loader that works in processes; the other values are nnU-Net's."""
    return NonDetMultiThreadedAugmenter(
        loader,
        None,
        num_processes,
        num_cached=max(6, num_processes // 2),
        seeds=None,
        pin_memory=is_cuda,
        wait_time=0.002,
    )
