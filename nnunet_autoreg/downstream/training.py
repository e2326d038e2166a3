"""Help the trainers of detection and classification, independently of nnU-Net's trainer."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import distributed


def keep_thread_limit() -> None:
    """Limit torch to ``OMP_NUM_THREADS`` threads if that variable is set.

    On a CPU ``nnUNetv2_train`` uses every core. Threads that share cores with other programs wait
    for each other.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        torch.set_num_threads(int(wanted))


class ForwardedLog(logging.Handler):
    """Send the library's log lines to a function, such as that of nnU-Net's trainer."""

    def __init__(self, write: Callable[[str], None]):
        super().__init__(logging.INFO)
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line."""
        mark = "WARNING: " if record.levelno >= logging.WARNING else ""
        self.write(f"{mark}{record.getMessage()}")


@contextmanager
def forwarded_log(name: str, write: Callable[[str], None]) -> Iterator[None]:
    """Send the log of a part of the library to ``write`` for a while, from level INFO on.

    Args:
        name: name of the logger, such as ``nnunet_autoreg.detection``.
    """
    logger = logging.getLogger(name)
    handler = ForwardedLog(write)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def from_all_processes(outputs: list[dict[str, Any]], is_ddp: bool) -> list[dict[str, Any]]:
    """Return the outputs of all processes of a distributed training together.

    Args:
        is_ddp: whether there are several processes.
    """
    if not is_ddp:
        return outputs
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, outputs)
    return list(chain.from_iterable(gathered))
