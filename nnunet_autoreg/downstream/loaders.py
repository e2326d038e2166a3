"""Start nnU-Net's loading processes for loaders of our own."""

from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA


def started(training_loader: Any, validation_loader: Any, is_cuda: bool) -> tuple[Any, Any]:
    """Return both loaders with as many processes as nnU-Net would give them; 0 is none."""
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
    # nnU-Net draws one batch here too, so that the processes start.
    for augmenter in made:
        next(augmenter)
    return made


def _processes(loader: Any, num_processes: int, is_cuda: bool) -> Any:
    return NonDetMultiThreadedAugmenter(
        loader,
        None,
        num_processes,
        num_cached=max(6, num_processes // 2),
        seeds=None,
        pin_memory=is_cuda,
        wait_time=0.002,
    )
