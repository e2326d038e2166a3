"""Signals that ask a run to stop: noted while training, so that its state is saved first; one line everywhere else."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nnunet_autoreg.errors import AutoregError


class InterruptedRunError(AutoregError):
    """The user or the cluster asked the run to stop; what was done is kept."""

    exit_code = 130


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that is empty until SIGINT or SIGTERM comes; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end what is inside as an interruption does, with everything tidied up; outside the main thread nothing changes.

    Raises:
        InterruptedRunError: it came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise InterruptedRunError("stopped by SIGTERM; what was done is kept: type the same line again to go on")

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
