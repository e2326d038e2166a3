"""What commands show on the terminal: how much, progress bars, and log lines beside them.

Lines and bars go to stderr; results of a command go to stdout, also with ``-q``.
"""

import io
import logging
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from nnunet_autoreg.errors import printable
from nnunet_autoreg.wording import duration

QUIET, NORMAL, VERBOSE = -1, 0, 1


class _Terminal:
    """How much this process shows; its command sets it."""

    level = NORMAL


_terminal = _Terminal()


def set_verbosity(level: int) -> None:
    """Set how much is shown: QUIET for warnings and errors only, NORMAL, or VERBOSE."""
    _terminal.level = level


def verbosity() -> int:
    """Return how much is shown."""
    return _terminal.level


def lowest_log_level() -> int:
    """Return the level from which log lines are shown."""
    return {QUIET: logging.WARNING, NORMAL: logging.INFO, VERBOSE: logging.DEBUG}[_terminal.level]


class PrintableStream(io.TextIOBase):
    """Passes text on to another stream, with control characters as escapes.

    Commands print names of files and words of other people's tables, and a terminal obeys control
    characters. Line breaks and tabs are our own, so that they stay.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        if not text.isprintable():
            text = "".join(c if c in "\n\t" else printable(c) for c in text)
        return self.stream.write(text)

    def flush(self) -> None:
        """Flush the other stream."""
        self.stream.flush()

    def fileno(self) -> int:
        """Return the file descriptor of the other stream."""
        return self.stream.fileno()

    def isatty(self) -> bool:
        """Return whether the other stream is a terminal."""
        return self.stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return the encoding of the other stream."""
        return self.stream.encoding


@contextmanager
def printable_stdout() -> Iterator[None]:
    """Let nothing that is printed inside hold a control character."""
    usual = sys.stdout
    sys.stdout = PrintableStream(usual)
    try:
        yield
    finally:
        sys.stdout = usual


class ProgressBar(tqdm):  # type: ignore[misc]
    """A progress bar whose time left is written as people write it."""

    disable = True
    """Until ``__init__`` has set it: tqdm lists a bar before, and closes one that was interrupted
    by a signal in between.
    """

    def exclude(self, seconds: float) -> None:
        """Leave out the last ``seconds``, such as those of a validation, of the time left."""
        if not self.disable:
            self.start_t += seconds
            self.last_print_t += seconds

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        """Return the fields of ``bar_format``, with the time left in words."""
        facts = super().format_dict
        num_done, elapsed = self.n - self.initial, facts["elapsed"]
        rate = facts["rate"] or (num_done / elapsed if num_done and elapsed > 0 else None)
        left = ""
        if rate and self.total and self.n < self.total:
            left = f", about {duration((self.total - self.n) / rate)} left"
        return {**facts, "left": left}


def progress_bar(
    total: int,
    description: str,
    unit: str,
    initial: int = 0,
    is_shown: bool = True,
) -> ProgressBar:
    """Return a progress bar on stderr, which shows nothing if that is not a terminal.

    Args:
        unit: unit of what is counted, in the singular.
        initial: how many are done before.
        is_shown: False to show nothing anywhere.
    """
    is_wanted = is_shown and _terminal.level > QUIET
    return ProgressBar(
        total=total,
        initial=initial,
        desc=description,
        mininterval=0.5,
        # None: decided by whether stderr is a terminal.
        disable=None if is_wanted else True,
        bar_format="{desc}: {percentage:3.0f} % |{bar}| {n_fmt} of {total_fmt} "
        + f"{unit}s"
        + "{left}{postfix}",
        dynamic_ncols=True,
    )


@contextmanager
def bars_cleared() -> Iterator[None]:
    """Clear progress bars while something is written, and draw them again below it."""
    with tqdm.external_write_mode(file=sys.stderr):
        yield


class TerminalHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes log lines to stderr, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        with bars_cleared():
            super().emit(record)
