"""What a command is doing now.

The line that ends a command names it, and so does a sign of life whenever nothing else was printed
for five seconds.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nnunet_autoreg.wording import duration

log = logging.getLogger(__name__)

QUIET_S = 5.0
"""A sign of life is given after this many seconds without any other output."""

QUIET_BESIDE_BAR_S = 60.0
"""The same if a progress bar has moved since the phase began: the user sees that it lives."""

LOOK_EVERY_S = 0.25
MOST_QUIET_S = 60.0
"""Signs of life come less and less often, down to one in this many seconds."""


@dataclass
class Phase:
    """A part of a command's work.

    Attributes:
        doing: what is done, to be read after "while": "checking scans".
        progress: how far it is, as text; may be changed at any time.
        began: by ``time.monotonic``.
    """

    doing: str
    progress: str = ""
    began: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"{self.doing}, {self.progress}" if self.progress else self.doing


_phases: list[Phase] = []
ending = threading.Event()
"""Set while a command is being stopped: the line that says so is then all that is still printed."""


@contextmanager
def phase(doing: str) -> Iterator[Phase]:
    """Name the work of a block, e.g. ``with phase("reading labels of 40 scans")``.

    Phases may be nested; the innermost counts.
    """
    entered = Phase(doing)
    _phases.append(entered)
    try:
        yield entered
    finally:
        # By identity: two phases may say the same.
        _phases[:] = [other for other in _phases if other is not entered]


def current_phase() -> Phase | None:
    """Return the innermost phase, None outside all phases."""
    return _phases[-1] if _phases else None


def visible_bars() -> list[Any]:
    """Return the progress bars of tqdm that are shown now. Any thread may ask.

    tqdm lists a bar before it sets it up, so that a thread may meet one without ``disable`` or
    ``n``; it meets such a bar also if the set-up was interrupted. Such a bar shows nothing.
    """
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    try:
        bars = list(getattr(tqdm, "_instances", ()))
    except RuntimeError:  # A bar came or went while they were counted.
        return []
    return [bar for bar in bars if not getattr(bar, "disable", True) and hasattr(bar, "n")]


@contextmanager
def signs_of_life(quiet_s: float = QUIET_S) -> Iterator[None]:
    """Log what is going on, and for how long, after ``quiet_s`` without any other output.

    A progress bar that moves counts as output.
    """
    watcher = _Watcher(quiet_s)
    logger = logging.getLogger("nnunet_autoreg")
    logger.addHandler(watcher.handler)
    watcher.start()
    try:
        yield
    finally:
        watcher.over.set()
        logger.removeHandler(watcher.handler)


class _LastOutput(logging.Handler):
    """Notes when the last line was logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.at = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.at = time.monotonic()


class _Watcher(threading.Thread):
    """Looks a few times a second whether there was any output."""

    def __init__(self, quiet_s: float):
        super().__init__(name="signs of life", daemon=True)
        self.quiet_s = quiet_s
        self.handler = _LastOutput()
        self.over = threading.Event()
        self.bars: dict[int, float] = {}
        self.bar_moved_at = -float("inf")

    def run(self) -> None:
        """Give signs of life until it is over."""
        spoke_of: Phase | None = None
        wait_s = self.quiet_s

        while not self.over.wait(LOOK_EVERY_S):
            # A progress bar that has moved since the last look is a sign of life.
            counts = {id(bar): float(bar.n) for bar in visible_bars()}
            moved = [key for key, count in counts.items() if self.bars.get(key, count) != count]
            if moved:
                self.bar_moved_at = time.monotonic()
            self.bars = counts

            phase = current_phase()
            if phase is None or ending.is_set():
                continue

            if phase is not spoke_of:
                spoke_of, wait_s = phase, self.quiet_s
            patience_s = wait_s
            if self.bar_moved_at > phase.began:
                patience_s = max(wait_s, QUIET_BESIDE_BAR_S)

            last_output = max(self.handler.at, self.bar_moved_at)
            if time.monotonic() - last_output >= patience_s:
                log.info("%s (%s so far)", phase, duration(round(time.monotonic() - phase.began)))
                wait_s = min(2 * wait_s, MOST_QUIET_S)
