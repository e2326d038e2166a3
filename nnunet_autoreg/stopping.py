"""SIGTERM and Ctrl-C end a command within ten seconds, with one line and exit code 130.

Python runs signal handlers between two instructions of the main thread. Three things can therefore
go wrong, and each is provided for:

1. Code that catches every exception swallows the one that the handler raises.
   ``InterruptedRunError`` is not an ``Exception``, so that only ``except BaseException`` catches
   it, and the handler is run once more after ``NUDGE_S``. What catches exceptions of other people's
   code calls ``raise_if_stopped``.
2. The main thread is inside a long call of compiled code, and the handler does not run at all. The
   C part of Python notes the signal in a pipe nevertheless; a thread reads the pipe and ends the
   process after ``GRACE_S``. It needs the interpreter's lock, which nearly all compiled code gives
   back while it works; what does not (SimpleITK) runs in worker processes if it may take long.
3. Other processes continue. All descendants are killed before the process ends.

Everything that has to survive is written to a temporary file and renamed, so that the end may come
at any moment.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from nnunet_autoreg.children import end_children
from nnunet_autoreg.errors import InterruptedRunError
from nnunet_autoreg.phases import current_phase, ending, visible_bars

NUDGE_S = 2.5
"""The handler raises once more if the command has not begun to end by then."""

GRACE_S = 7.5
"""The process is ended if it has not ended by itself by then."""

WORKER_GRACE_S = 8.5
"""The same for a worker of a training, which the main process would otherwise take for lost."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = "what was done is kept: type the same line again to continue"
START_OVER = "no part of the work is kept: type the same line again to start over"
SECOND_PRESS_S = 0.3
"""A second Ctrl-C that comes later than this ends the process at once; one that comes earlier is
the first one, delivered twice.
"""


class _Stop:
    """The state of this process. ``session`` is the number of the use of ``stoppable``."""

    def __init__(self) -> None:
        self.session = 0
        self.is_active = False
        self.number = 0
        self.num_noting = 0
        self.command = ""
        self.line_if_forced: Callable[[], str] | None = None
        self.line = ""
        self.advice = AGAIN
        self.is_worker = False
        self.report_lock = threading.Lock()
        self.is_reported = False
        self.watchdog: _Watchdog | None = None
        self.deliver: Callable[[str], object] | None = None

    def begin(self, command: str) -> None:
        """Note that a command begins."""
        self.session += 1
        self.is_active, self.number, self.num_noting = True, 0, 0
        self.command, self.line_if_forced, self.is_reported = command, None, False
        self.line, self.is_worker = "", False
        self.advice = AGAIN
        ending.clear()

    def end(self) -> None:
        """Note that the command has ended; the process continues with other work."""
        self.session += 1
        self.is_active, self.number = False, 0
        ending.clear()


_stop = _Stop()


def stop_requested() -> bool:
    """Return whether SIGTERM or Ctrl-C has come."""
    return bool(_stop.number)


def raise_if_stopped() -> None:
    """Raise the interruption of a signal handler again, in case other code caught it.

    Raises:
        InterruptedRunError: SIGTERM or Ctrl-C has come, and it is not just noted (``stops_noted``).
    """
    if _stop.number and not _stop.num_noting:
        raise InterruptedRunError(_line())


def writes_at_the_end() -> None:
    """Have the line after a stop say that this command keeps no part of its work."""
    _stop.advice = START_OVER


def _line() -> str:
    """Return one line: why the command ends, in which phase it was, and what to do."""
    if _stop.line:
        return _stop.line
    phase = current_phase()
    doing = f" while {phase}" if phase is not None else ""
    cause = "interrupted" if _stop.number == signal.SIGINT else "stopped by SIGTERM"
    return f"{cause}{doing}; {_stop.advice}"


@contextmanager
def stoppable(command: str = "", until_exit: bool = False) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the block, as described above.

    Inside another one, and outside the main thread, nothing changes.

    Args:
        command: begins the line that is printed if the process has to be ended by force; "" to end
            it silently.
        until_exit: the process ends soon after a stop, so that the watch continues until then; else
            it ends with the block.

    Raises:
        InterruptedRunError: a signal came.
    """
    if _stop.is_active or threading.current_thread() is not threading.main_thread():
        yield
        return

    if _stop.watchdog is None:
        _stop.watchdog = _Watchdog()
        _stop.watchdog.start()
    _stop.watchdog.read()  # Signals of an earlier use are over.
    _stop.begin(command)

    handlers = {number: signal.signal(number, _on_signal) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(_stop.watchdog.writer, warn_on_full_buffer=False)
    hook = sys.unraisablehook

    def quiet(unraisable: Any) -> None:
        # An interruption that was raised in a destructor is raised once more later.
        if not isinstance(unraisable.exc_value, InterruptedRunError):
            hook(unraisable)

    sys.unraisablehook = quiet
    try:
        yield
    finally:
        if not (until_exit and _stop.number):
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            sys.unraisablehook = hook
            _stop.end()


@contextmanager
def stops_noted(line_if_forced: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    """Note signals inside the block without ending it, so that the state can be saved first.

    Yields a function that returns whether one has come. An interruption that is raised inside ends
    the command with its line, even if another signal or the end by force comes after it.

    Args:
        line_if_forced: returns the line for a process that has to be ended by force, because the
            state was not saved in time.
    """
    with stoppable():
        outer = _stop.line_if_forced
        _stop.num_noting += 1
        _stop.line_if_forced = line_if_forced
        try:
            yield stop_requested
        except InterruptedRunError as error:
            _stop.line = str(error)
            raise
        finally:
            _stop.num_noting -= 1
            _stop.line_if_forced = outer


@contextmanager
def stops_raised() -> Iterator[None]:
    """Let signals end this block immediately, inside of a block where they are only noted.

    It is for work that takes long while there is nothing to save.

    Raises:
        InterruptedRunError: a signal came, inside or before.
    """
    outer, _stop.num_noting = _stop.num_noting, 0
    try:
        raise_if_stopped()
        yield
    finally:
        _stop.num_noting = outer


@contextmanager
def stops_passed_on(send: Callable[[], object]) -> Iterator[None]:
    """Pass the signals on to another process inside, for whose end this one waits.

    ``stop_requested`` says afterwards whether one has come.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        _stop.number = _stop.number or number
        send()

    # The watchdog does not end this process: the other one has its own watchdog.
    was_active, _stop.is_active = _stop.is_active, False
    handlers = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _stop.is_active = was_active


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Run by Python in the main thread, as soon as that thread is back from compiled code."""
    _stop.number = _stop.number or number
    ending.set()
    # With its line settled, the command is on its way to its end already.
    if not _stop.is_reported and not _stop.line:
        raise_if_stopped()


def report_stop(line: str = "", is_forced: bool = False) -> None:
    """Print the one line that ends a command that was stopped, once; "" for the usual one."""
    with _stop.report_lock:
        if _stop.is_reported:
            return
        _stop.is_reported = True
    if not _stop.command:
        return

    # A progress bar has no line break at its end.
    line_break = "\n" if visible_bars() else ""
    last_line(f"{line_break}{_stop.command}: {line or _line()}", is_forced)


def last_line(line: str, is_forced: bool = False) -> None:
    """Print the line that ends this command, or deliver it to the process that launched it."""
    if _stop.deliver is not None:
        _stop.deliver(line)
        return
    with suppress(OSError):
        if is_forced:
            # Not through sys.stderr, whose lock the main thread may hold.
            os.write(2, f"{line}\n".encode(errors="replace"))
        else:
            print(line, file=sys.stderr, flush=True)


def deliver_last_line(deliver: Callable[[str], object]) -> None:
    """Have the line that ends this command delivered instead of printed.

    The process that launched this one and others prints one of their lines.
    """
    _stop.deliver = deliver


def keep_silent() -> None:
    """Leave the line to the main process, because this one is a worker of a training.

    It is also ended later by force, so that the main process does not take it for lost.
    """
    _stop.command, _stop.is_worker = "", True


class _Watchdog(threading.Thread):
    """Ends the process if it does not end by itself after a signal."""

    def __init__(self) -> None:
        super().__init__(name="stop watchdog", daemon=True)
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)

    def run(self) -> None:
        """Wait for signals for as long as the process lives."""
        while True:
            select.select([self.reader], [], [])
            numbers = self.read()
            stops = [number for number in numbers if number in STOP_SIGNALS]
            if stops and _stop.is_active:
                self._give_grace(stops[0])

    def read(self) -> bytes:
        """Return the numbers of the signals that have come and that nobody has read."""
        with suppress(BlockingIOError):
            return os.read(self.reader, 4096)
        return b""

    def _give_grace(self, number: int) -> None:
        """Wait for the end of the command; hurry it, then end it."""
        session, began = _stop.session, time.monotonic()
        is_nudged = False
        grace_s = WORKER_GRACE_S if _stop.is_worker else GRACE_S
        _stop.number = _stop.number or number
        ending.set()

        while _stop.session == session:
            elapsed = time.monotonic() - began
            is_pressed_again = elapsed > SECOND_PRESS_S and signal.SIGINT in self.read()
            if elapsed >= grace_s or is_pressed_again:
                _end_now()

            # Where signals are only noted, or the command is about to end, nothing is raised.
            may_raise = not (_stop.num_noting or _stop.is_reported or _stop.line)
            if elapsed >= NUDGE_S and may_raise and not is_nudged:
                is_nudged = True
                # As a signal, it also interrupts a system call that waits.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            time.sleep(0.05)


def _end_now() -> None:
    """End this process and all below it, with its line."""
    try:
        line = "" if _stop.line_if_forced is None else _stop.line_if_forced()
        report_stop(line, is_forced=True)
        end_children()
    finally:
        os._exit(InterruptedRunError.exit_code)


def _forget_in_child() -> None:
    """Have a forked child not write into its parent's pipe, nor raise its parent's exceptions."""
    if _stop.is_active:
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _stop.end()
    _stop.watchdog = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def refuse_interruption(error: BaseException) -> None:
    """Raise the interruption that is hidden in an exception of other code, if there is one.

    torch's compiler wraps every exception that is raised inside it. An interruption that it has
    wrapped is not a fault of the code that was compiled.

    Raises:
        InterruptedRunError: SIGTERM or Ctrl-C has come, or one of the causes of ``error`` is an
            interruption.
    """
    raise_if_stopped()
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]

    while waiting:
        cause = waiting.pop()
        if cause is None or id(cause) in seen:
            continue
        if isinstance(cause, KeyboardInterrupt):
            raise cause
        seen.add(id(cause))
        waiting += [cause.__cause__, cause.__context__, getattr(cause, "inner_exception", None)]
