"""What every command shares: how errors end it, where its log goes, and its last line."""

import functools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from nnunet_autoreg.children import end_children
from nnunet_autoreg.errors import (
    AutoregError,
    InterruptedRunError,
    LostProcessError,
    PlanError,
    printable,
)
from nnunet_autoreg.requirements import find_violations, in_one_line
from nnunet_autoreg.stopping import report_stop, stop_requested, stoppable

Main = Callable[[list[str] | None], int]
Command = Callable[..., int]


def command(main: Main) -> Command:
    """Wrap a command's ``main(argv)`` so that every way of ending is an exit code and at most one
    line on stderr.

    An ``AutoregError`` becomes ``<command>: <message>`` and its exit code. SIGTERM and Ctrl-C
        become 130 within
    ten seconds, with no child process left. A closed pipe is silent. Anything else is a bug and
    keeps its traceback, unless an installed package violates what is required of it: then one line
    names the package and what mends it, and the exit code is 1. ``argparse`` ends misuse with 2 by
    itself.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        _quiet_resource_tracker()
        # Without arguments of its own, it is the whole process that runs the command, and that ends
        # with it.
        with stoppable(_command_name(main), until_exit=argv is None):
            try:
                code = main(argv)
                sys.stdout.flush()
                return code
            except KeyboardInterrupt as error:
                return _stopped(error)
            except Exception as error:
                # Where children ended by the same signal, say: not what went wrong then, but why is
                # what counts.
                is_consequence = stop_requested() and not isinstance(error, LostProcessError)
                return _stopped(error) if is_consequence else _failed(main, error)

    return run


def _quiet_resource_tracker() -> None:
    """Have multiprocessing's helper remove semaphores that killed processes leave behind without a
    warning beside the one line.
    """
    ours, theirs = "ignore:resource_tracker:UserWarning", os.environ.get("PYTHONWARNINGS", "")
    if ours not in theirs:
        os.environ["PYTHONWARNINGS"] = f"{theirs},{ours}" if theirs else ours


def _stopped(error: BaseException) -> int:
    """Print the line of a command that was stopped, end its children, and return its exit code."""
    if isinstance(error, InterruptedRunError):
        report_stop(" ".join(str(error).split()))
    else:
        report_stop("" if stop_requested() else "interrupted; run the same line again to go on")
    end_children()
    return InterruptedRunError.exit_code


def _failed(main: Main, error: Exception) -> int:
    """Print the line of a command that failed, and return its exit code; raise what is a bug."""
    if isinstance(error, AutoregError):
        return _complain(main, str(error) + _broken_packages(error), error.exit_code)
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return 1
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return _complain(
            main, f"{error.strerror or error}{where}; what was written before is kept", 1
        )

    violations = find_violations()
    if not violations:
        raise error
    what = f"{type(error).__name__}: {error} ({_place_of(error)})"
    advice = "mend this first; if the error remains, it is then shown in full"
    return _complain(main, f"{what}; {in_one_line(violations)}; {advice}", 1)


def warn_of_violations() -> None:
    """Log one warning per installed package that violates a requirement; with several processes, in
    the main one only.

    It is no error yet: most versions that a requirement excludes still work for most encoders.
        Where the
    network cannot be built after all, the error names the package again.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    for violation in find_violations():
        logging.getLogger("nnunet_autoreg").warning("%s", violation)


def _broken_packages(error: AutoregError) -> str:
    """Return the tail of a message about a network that could not be built: violated requirements
    may be why.
    """
    cause = error.__cause__
    if (
        not isinstance(error, PlanError)
        or cause is None
        or isinstance(cause, AutoregError | OSError)
    ):
        return ""
    violations = find_violations()
    return f"; {in_one_line(violations)}" if violations else ""


def _place_of(error: Exception) -> str:
    """Return file and line of the innermost call, in place of a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "place unknown"


def prepare_torch() -> None:
    """Have OpenMP's waiting threads soon sleep instead of spin, unless the user chose; must come
    before torch is imported.

    On a CPU that is shared, even with this program's own helpers, spinning threads keep the ones
    that work from running; docs/explanation/measured.md has the figures. Sleeping at once
    (OMP_WAIT_POLICY=PASSIVE) costs an idle machine half as much again.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    warnings.filterwarnings(
        "ignore", message=r".*torch\.jit\.", category=FutureWarning
    )  # torchvision's own, at its import


def print_next(line: str) -> None:
    """Print a command's last line: what to type next."""
    print(f"next: {printable(line)}", flush=True)


def _without_controls(record: logging.LogRecord) -> logging.LogRecord:
    """Return a record whose arguments, which may be names of files, hold no character that a
    terminal obeys.
    """
    if not isinstance(record.args, tuple):
        return record
    safe = logging.makeLogRecord(record.__dict__)
    safe.args = tuple(
        printable(str(a)) if isinstance(a, str | Path | BaseException) else a for a in record.args
    )
    return safe


class _LevelFormatter(logging.Formatter):
    """Plain messages, with the level in front from WARNING up."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(_without_controls(record))
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def configure_logging(verbose: bool = False) -> None:
    """Send the library's log to stderr:

    INFO and above, or everything when ``verbose``. May be called again.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LevelFormatter("%(message)s"))
    handler.set_name("nnunet_autoreg.cli")
    logger = logging.getLogger("nnunet_autoreg")
    for old in [h for h in logger.handlers if h.get_name() == handler.get_name()]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)


def _complain(main: Main, message: str, code: int) -> int:
    one_line = printable(" ".join(message.splitlines()))
    print(f"{_command_name(main)}: {one_line}", file=sys.stderr, flush=True)
    return code


def _command_name(main: Main) -> str:
    """``autoreg_doctor`` for the main function of ``nnunet_autoreg.cli.doctor``, also under
    ``python -m``.
    """
    spec = main.__globals__.get("__spec__")
    module = spec.name if spec is not None else main.__module__
    return "autoreg_" + module.rpartition(".")[2]


def _silence_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's own flush at exit does not complain about
    the closed pipe.
    """
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())
