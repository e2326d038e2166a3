"""What every command shares: how errors end it, where its log goes, and its last line."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from nnunet_autoreg.errors import AutoregError

INTERRUPTED = 130

Main = Callable[[list[str] | None], int]
Command = Callable[..., int]


def command(main: Main) -> Command:
    """Wrap a command's ``main(argv)`` so that every way of ending is an exit code and at most one line on stderr.

    An ``AutoregError`` becomes ``<command>: <message>`` and its exit code; an interruption 130; a closed pipe is silent.
    Anything else is a bug and keeps its traceback. ``argparse`` ends misuse with 2 by itself.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except AutoregError as error:
            return _complain(main, str(error), error.exit_code)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                _silence_stdout()
                return 1
            where = f" ({error.filename})" if error.filename else ""
            return _complain(main, f"{error.strerror or error}{where}; what was written before is kept", 1)
        except KeyboardInterrupt:
            return _complain(main, "interrupted; run the same line again to go on", INTERRUPTED)

    return run


def prepare_torch() -> None:
    """Have OpenMP's waiting threads soon sleep instead of spin, unless the user chose; must come before torch is imported.

    On a CPU that is shared, even with this program's own helpers, spinning threads keep the ones that work from running;
    docs/measured.md has the figures. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) costs an idle machine half as much again.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=FutureWarning)  # torchvision's own, at its import


def print_next(line: str) -> None:
    """Print a command's last line: what to type next."""
    print(f"next: {line}", flush=True)


class _LevelFormatter(logging.Formatter):
    """Plain messages, with the level in front from WARNING up."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def configure_logging(verbose: bool = False) -> None:
    """Send the library's log to stderr: INFO and above, or everything when ``verbose``. May be called again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LevelFormatter("%(message)s"))
    handler.set_name("nnunet_autoreg.cli")
    logger = logging.getLogger("nnunet_autoreg")
    for old in [h for h in logger.handlers if h.get_name() == handler.get_name()]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)


def _complain(main: Main, message: str, code: int) -> int:
    one_line = " ".join(message.splitlines())
    print(f"{_command_name(main)}: {one_line}", file=sys.stderr, flush=True)
    return code


def _command_name(main: Main) -> str:
    """``autoreg_doctor`` for the main function of ``nnunet_autoreg.cli.doctor``, also under ``python -m``."""
    spec = main.__globals__.get("__spec__")
    module = spec.name if spec is not None else main.__module__
    return "autoreg_" + module.rpartition(".")[2]


def _silence_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's own flush at exit does not complain about the closed pipe."""
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())
