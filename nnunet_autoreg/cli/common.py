"""The parts that all commands share: errors, the log, and the last line."""

import argparse
import dataclasses
import difflib
import functools
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nnunet_autoreg import __version__
from nnunet_autoreg.children import end_children
from nnunet_autoreg.cli import starting
from nnunet_autoreg.corpus.private import TERMINAL_ONLY
from nnunet_autoreg.errors import (
    AutoregError,
    InterruptedRunError,
    LostProcessError,
    PlanError,
    did_you_mean,
    printable,
)
from nnunet_autoreg.machine import is_out_of_memory
from nnunet_autoreg.requirements import find_violations, in_one_line
from nnunet_autoreg.stopping import last_line, report_stop, stop_requested, stoppable
from nnunet_autoreg.terminal import (
    NORMAL,
    QUIET,
    VERBOSE,
    TerminalHandler,
    lowest_log_level,
    printable_stdout,
    set_verbosity,
)

Main = Callable[[list[str] | None], int]
Command = Callable[..., int]
SHARED_MEMORY = Path("/dev/shm")

COMMON_OPTIONS = ("--version", "--verbose", "--quiet")
"""Options of every command."""


class _SetVerbosity(argparse.Action):
    """An option that says how much is shown. It is not a value of the command itself."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        set_verbosity(self.const)


class CommandParser(argparse.ArgumentParser):
    """A parser with the options of every command, examples, and a close match for wrong names.

    Args:
        examples: command lines that are shown below the help.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **options: Any):
        if examples:
            lines = [f"  {example}" for example in examples]
            options["epilog"] = "\n".join(["examples:", *lines])
            options["formatter_class"] = _HelpWithExamples
        super().__init__(*args, **options)
        self.examples = tuple(examples)

        self.add_argument("--version", action="version", version=f"nnunet-autoreg {__version__}")
        self._add_verbosity("-v", "--verbose", VERBOSE, "show details of what is done")
        self._add_verbosity("-q", "--quiet", QUIET, "show warnings, errors and results only")

    def _add_verbosity(self, short: str, long: str, level: int, text: str) -> None:
        self.add_argument(
            short,
            long,
            action=_SetVerbosity,
            nargs=0,
            const=level,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help=text,
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the parsed arguments; an unknown option gets a close match."""
        set_verbosity(NORMAL)
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            typed = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(typed, known, n=1)
            advice = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        advice = did_you_mean(str(value), map(str, action.choices))
        raise argparse.ArgumentError(action, f"'{value}' does not exist; {advice}")


class _HelpWithExamples(argparse.HelpFormatter):
    """Fills paragraphs as usual, but leaves the lines of the examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return "\n".join(indent + line for line in text.splitlines())
        return super()._fill_text(text, width, indent)


def options_for(kind: type, args: argparse.Namespace) -> dict[str, Any]:
    """Return the parsed options that are fields of the dataclass ``kind``.

    Parsers name an option after the field, so that ``kind(**options_for(kind, args))`` is the
    request. Lists become tuples, because requests cannot be changed.

    Raises:
        AttributeError: the parser has no option for a field.
    """
    values = {}
    for field in dataclasses.fields(kind):
        value = getattr(args, field.name)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return values


def command(main: Main) -> Command:
    """Wrap a command's ``main(argv)`` so that it ends with an exit code and at most one error line.

    - An ``AutoregError`` becomes ``<command>: <message>`` on stderr and its own exit code.
    - SIGTERM and Ctrl-C become 130 within ten seconds, and no child process is left.
    - A closed pipe ends the command silently.
    - Anything else is a bug and keeps its traceback, unless an installed package violates a
      requirement: then one line names the package and the remedy, and the exit code is 1.

    ``argparse`` itself ends with 2 when it cannot parse the command line.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        # multiprocessing's helper process warns when it cleans up after killed processes. It does
        # so anyway, and reads its warning filters from the environment.
        rule = "ignore:resource_tracker:UserWarning"
        filters = os.environ.get("PYTHONWARNINGS", "")
        if rule not in filters:
            os.environ["PYTHONWARNINGS"] = f"{filters},{rule}" if filters else rule

        # Names of files may not be valid text, and an ASCII terminal has no umlauts. So characters
        # that the terminal's encoding lacks are printed as escapes.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")

        # Called without arguments, the command is the whole process and ends with it.
        with stoppable(_command_name(main), until_exit=argv is None), printable_stdout():
            starting.finish()
            try:
                code = main(argv)
                sys.stdout.flush()
                return code
            except KeyboardInterrupt as error:
                return _stopped(error)
            except Exception as error:
                # After a stop request, an error is only a consequence of it: children were ended
                # by the same signal, for example. A lost process is the exception.
                if stop_requested() and not isinstance(error, LostProcessError):
                    return _stopped(error)
                return _failed(main, error)

    return run


def _stopped(error: BaseException) -> int:
    """Print the line of a command that was stopped, end its children, and return its exit code."""
    message = ""
    if isinstance(error, InterruptedRunError):
        message = " ".join(str(error).split())
    elif not stop_requested():
        message = "interrupted; run the same command again to continue"
    report_stop(message)
    end_children()
    return InterruptedRunError.exit_code


def _failed(main: Main, error: Exception) -> int:
    """Print the error line of a command and return its exit code; raise the error of a bug."""
    if isinstance(error, AutoregError):
        message = str(error)
        # If a network cannot be built, a package of the wrong version may be the reason.
        cause = error.__cause__
        is_own = cause is None or isinstance(cause, AutoregError | OSError)
        if isinstance(error, PlanError) and not is_own:
            violations = find_violations()
            message += f"; {in_one_line(violations)}" if violations else ""
        return _complain(main, message, error.exit_code)

    if is_out_of_memory(error):
        message = "out of memory; files that were written before are kept"
        return _complain(main, f"{message}: close other programs, or give less data", 1)
    if isinstance(error, BrokenPipeError):
        # Flushing the closed pipe at exit would print another error.
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError):
        location = f" ({error.filename})" if error.filename else ""
        is_shared_memory = SHARED_MEMORY.is_dir() and not os.access(SHARED_MEMORY, os.W_OK)
        if not error.filename and is_shared_memory:
            # Python keeps its semaphores there, and the error does not name the file.
            location = (
                f" ({SHARED_MEMORY}, where processes share memory, cannot be written: make it "
                "writable, in Docker by --ipc=host or --shm-size=8g)"
            )
        message = f"{error.strerror or error}{location}; files that were written before are kept"
        return _complain(main, message, 1)

    violations = find_violations()
    if not violations:
        raise error
    # Not necessarily a bug of ours. File and line of the innermost call replace the traceback.
    frames = traceback.extract_tb(error.__traceback__)
    location = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "location unknown"
    problem = f"{type(error).__name__}: {error} ({location})"
    advice = "fix this first; if the error remains, it is then shown in full"
    return _complain(main, f"{problem}; {in_one_line(violations)}; {advice}", 1)


def warn_of_violations() -> None:
    """Log a warning for every installed package that violates a requirement.

    Only the main process does so. It is not an error: most versions that a requirement excludes
    still work for most encoders. If the network cannot be built, the error names the package again.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    for violation in find_violations():
        logging.getLogger("nnunet_autoreg").warning("%s", violation)


def prepare_torch() -> None:
    """Let OpenMP's waiting threads sleep soon instead of spinning, unless the user has chosen.

    It must be called before torch is imported. On a shared CPU, spinning threads keep working
    threads from running, even those of this program's own data loaders. Measured: a training step
    of primus_tiny took 0.69 s by OpenMP's default beside one busy process, and 0.36 to 0.50 s with
    the value below. On an idle machine it took 0.2 s either way, and 0.28 to 0.30 s with
    OMP_WAIT_POLICY=PASSIVE, which lets threads sleep immediately.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # torchvision causes this warning when it is imported.
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=FutureWarning)


def print_next(line: str) -> None:
    """Print a command's last line: the next command to type."""
    print(f"next: {printable(line)}", flush=True)


class _LevelFormatter(logging.Formatter):
    """Format plain messages, with the level in front from WARNING up.

    Args:
        is_terminal: whether a person reads them. Only then are files named, because output that is
            redirected into a file may be sent to others.
    """

    def __init__(self, is_terminal: bool):
        super().__init__("%(message)s")
        self.is_terminal = is_terminal

    def format(self, record: logging.LogRecord) -> str:
        safe = record
        if isinstance(record.args, tuple):
            # Arguments may be names of files, and a terminal obeys control characters in them.
            arguments: list[object] = []
            for argument in record.args:
                is_text = isinstance(argument, str | Path | BaseException)
                arguments.append(printable(str(argument)) if is_text else argument)
            safe = logging.makeLogRecord(record.__dict__)
            safe.args = tuple(arguments)

        text = super().format(safe)
        if self.is_terminal:
            text += printable(getattr(record, TERMINAL_ONLY, ""))
        if record.levelno >= logging.WARNING:
            return f"{record.levelname.lower()}: {text}"
        return text


def configure_logging() -> None:
    """Send the library's log to stderr, as much of it as ``-v`` or ``-q`` wants.

    Files of a run get everything. The function may be called again.
    """
    handler = TerminalHandler(sys.stderr)
    handler.setFormatter(_LevelFormatter(sys.stderr.isatty()))
    handler.set_name("nnunet_autoreg.cli")
    handler.setLevel(lowest_log_level())
    logger = logging.getLogger("nnunet_autoreg")
    for old in list(logger.handlers):
        if old.get_name() == handler.get_name():
            logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


def _complain(main: Main, message: str, code: int) -> int:
    one_line = printable(" ".join(message.splitlines()))
    last_line(f"{_command_name(main)}: {one_line}")
    return code


def _command_name(main: Main) -> str:
    """Return a command's name, e.g. ``autoreg_doctor`` for ``nnunet_autoreg.cli.doctor``.

    Under ``python -m`` the module itself is called ``__main__``, but its spec keeps the name.
    """
    spec = main.__globals__.get("__spec__")
    module = spec.name if spec is not None else main.__module__
    return "autoreg_" + module.rpartition(".")[2]
